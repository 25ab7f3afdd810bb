"""What a router is: tokens in, a `Routing` out, state moved only in `after_step`.

Axis letters of the whole package: B batch, T tokens per sample, N = tokens in the call, D width,
E experts, K experts per token, R rank of the basis, b hidden width of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

GateScale = Literal["prob", "one", "prob_times_E"]


@dataclass(frozen=True)
class Routing:
    """Where every token goes, and with what weight.

    Attributes:
        expert_index: [N, K] int64 in [0, E).
        gate: [N, K] float32, combine weight >= 0; exactly 0 means that this slot was dropped.
        probs: [N, E] float32, the distribution before selection; rows sum to 1.
        aux_loss: [] ready to be added to the task loss.
    """

    expert_index: Tensor
    gate: Tensor
    probs: Tensor
    aux_loss: Tensor


class Router(nn.Module):
    """Base of all routers: maps tokens [N, D] to a `Routing`.

    `forward` is pure: it changes no parameter and no persistent buffer. In training mode it may add
    detached sums to non-persistent accumulators, which `after_step` consumes once per optimiser step.
    """

    def __init__(self, num_experts: int, top_k: int) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k {top_k} must lie in [1, number of experts {num_experts}]")
        self.num_experts = num_experts
        self.top_k = top_k

    def forward(self, tokens: Tensor, experts: nn.Module, context: Tensor | None = None) -> Routing:
        """Route tokens [N, D]; `context` [N, D] serves routers that compare a token with its surroundings."""
        raise NotImplementedError

    def after_step(self) -> None:
        """Move the router's state once, after an optimiser step."""

    def health(self) -> dict[str, float]:
        """Return figures that tell whether the router is what its name says; none by default."""
        return {}


def select(probs: Tensor, top_k: int, bias: Tensor | None = None) -> Tensor:
    """Choose the top_k experts of every token by probability plus a selection-only bias.

    Args:
        probs: [N, E].
        top_k: K.
        bias: [E], added for the selection alone (Wang et al. 2024, arXiv 2408.15664).

    Returns:
        [N, K] int64, best first.
    """
    preference = probs.detach() if bias is None else probs.detach() + bias
    if top_k == 1:  # argmax is several times cheaper than topk
        return preference.argmax(dim=-1, keepdim=True)
    return preference.topk(top_k, dim=-1).indices


def gate_values(probs: Tensor, expert_index: Tensor, scale: GateScale) -> Tensor:
    """Give the combine weight [N, K] of the selected experts.

    `prob` is p (the published code); `prob_times_E` starts at unit scale when p is uniform; `one` is 1 in the
    forward pass with the gradient of p (straight through). Without p the router would get no gradient.
    """
    chosen = probs.gather(-1, expert_index)
    if scale == "prob":
        return chosen
    if scale == "prob_times_E":
        return chosen * probs.shape[-1]
    return 1 + chosen - chosen.detach()


def sum_over_ranks(*sums: Tensor) -> None:
    """Add up accumulators over all ranks, in place; nothing to do in a single process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for tensor in sums:
            torch.distributed.all_reduce(tensor)
