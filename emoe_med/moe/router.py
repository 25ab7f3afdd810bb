"""What a router is: tokens in, a `Routing` out, state moved only in `after_step`.

Axis letters of the whole package: B batch, T tokens per sample, N = tokens in the call, D width,
E experts, K experts per token, R rank of the basis, b hidden width of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from emoe_med.moe.experts.base import Experts

GateScale = Literal["prob", "one", "prob_times_E"]


@dataclass(frozen=True)
class Routing:
    """Where every token goes, and with what weight.

    Attributes:
        expert_index: [N, K] int64 in [0, E).
        gate: [N, K] float32, combine weight >= 0; exactly 0 means that this slot was dropped: it is not
            computed and gets no gradient.
        probs: [N, E] float32, the distribution before selection; rows sum to 1.
        aux_loss: [] ready to be added to the task loss.
    """

    expert_index: Tensor
    gate: Tensor
    probs: Tensor
    aux_loss: Tensor

    def load(self) -> Tensor:
        """Count the slots that each expert serves, [E] int64; by comparison, which no GPU has to wait for."""
        experts = torch.arange(self.probs.shape[1], device=self.gate.device)
        served = (self.expert_index.unsqueeze(-1) == experts) & (self.gate > 0).unsqueeze(-1)
        return served.sum(dim=(0, 1))


@dataclass(frozen=True)
class Place:
    """Where the N tokens of a call come from.

    Attributes:
        sample: [N] int64 in [0, samples): the image or volume of each token.
        position: [N] int64: its place in the sample's grid, the same for all samples.
        samples: B.
    """

    sample: Tensor
    position: Tensor
    samples: int

    @classmethod
    def alone(cls, tokens: Tensor) -> Place:
        """Take tokens [N, D] for one sample, in order."""
        position = torch.arange(tokens.shape[0], device=tokens.device)
        return cls(torch.zeros_like(position), position, 1)


class Router(nn.Module):
    """Base of all routers: maps tokens [N, D] to a `Routing`.

    `forward` is pure: it changes no parameter and no persistent buffer. In training mode it may add
    detached sums to non-persistent accumulators, which `after_step` consumes once per optimiser step.

    Attributes:
        needs_context: the caller must hand in the tokens' surroundings.
        needs_basis: the experts must have a `basis()`.
        needs_place: the caller should tell sample and position of the tokens.
    """

    needs_context = False
    needs_basis = False
    needs_place = False

    def __init__(self, num_experts: int, top_k: int) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k {top_k} must lie in [1, number of experts {num_experts}]")
        self.num_experts = num_experts
        self.top_k = top_k

    @property
    def independent(self) -> bool:
        """Whether a token's experts follow from itself and its place, whatever other tokens are in the call."""
        return not self.needs_context

    def forward(
        self, tokens: Tensor, experts: Experts, context: Tensor | None = None, place: Place | None = None
    ) -> Routing:
        """Route tokens.

        Args:
            tokens: [N, D].
            experts: for routers that score a token against the experts themselves.
            context: [N, D], the tokens' surroundings, for routers that compare the two.
            place: sample and position of each token, for routers that choose within a sample or by position;
                without it the tokens are taken for one sample in order.
        """
        raise NotImplementedError

    def after_step(self) -> None:
        """Move the router's state once, after an optimiser step."""

    def health(self) -> dict[str, float]:
        """Return figures that tell whether the router is what its name says; none by default."""
        return {}


def select(scores: Tensor, top_k: int) -> Tensor:
    """Choose the top_k experts of every token, [N, K] int64, best first; no gradient.

    Args:
        scores: [N, E], what to rank by: probabilities, or these plus a selection-only bias.
        top_k: K.
    """
    if top_k == 1:  # argmax is several times cheaper than topk
        return scores.detach().argmax(dim=-1, keepdim=True)
    return scores.detach().topk(top_k, dim=-1).indices


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


class StepSums(nn.Module):
    """Sums over the forward passes of one optimiser step, each rank its own until they are taken.

    They are no buffers: DDP puts rank 0's buffers in place of all others' before each forward pass.
    """

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.sums = [torch.zeros(shape) for shape in shapes]

    def _apply(self, fn: Any, recurse: bool = True) -> StepSums:
        self.sums = [fn(total).float() for total in self.sums]  # to another device, never to a lower precision
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def add(self, *values: Tensor | int) -> None:
        """Add one value to each sum; a GPU need not wait for a number, as it would for a tensor made of one."""
        for total, value in zip(self.sums, values, strict=True):
            total += value

    def so_far(self) -> list[Tensor]:
        """Return the sums over all ranks, and go on."""
        totals = [total.clone() for total in self.sums]
        sum_over_ranks(*totals)
        return totals

    def take(self) -> list[Tensor]:
        """Return the sums over all ranks, and start anew."""
        totals = self.so_far()
        self.clear()
        return totals

    def clear(self) -> None:
        """Start anew: after a step that is left out."""
        for total in self.sums:
            total.zero_()


def sum_over_ranks(*sums: Tensor) -> None:
    """Add up accumulators over all ranks, in place; nothing to do in a single process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for tensor in sums:
            torch.distributed.all_reduce(tensor)
