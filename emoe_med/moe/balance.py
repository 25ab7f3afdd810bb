"""Balance without a conflicting loss: a selection bias that no gradient reaches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from emoe_med.moe.router import sum_over_ranks


class BiasBalance(nn.Module):
    """Nudge the selection towards experts that got fewer tokens than the mean.

    After each step bias += u * clip(1 - load / mean load, -1, 1), with u = rate * (averaged top1-top2 margin
    of p). Gates never see the bias. Two things differ from the published rule: its constant u = 1e-3 is made for
    sigmoid scores, while eigen-energies differ by 1e-3 to 1e-2 between experts, so that the step has to follow
    their margin; and its sign of the error never settles, so that the load swings for ever, while the error
    itself fades as the load evens out.

    Buffers: `bias` [E], `margin` [].
    Source: Wang et al. 2024, arXiv 2408.15664.
    """

    bias: Tensor
    margin: Tensor
    step: Tensor
    _load: Tensor
    _margin_sum: Tensor
    _count: Tensor

    def __init__(self, num_experts: int, rate: float = 0.05, decay: float = 0.99) -> None:
        super().__init__()
        self.rate = rate
        self.decay = decay
        self.register_buffer("bias", torch.zeros(num_experts))
        self.register_buffer("margin", torch.zeros(()))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("_load", torch.zeros(num_experts), persistent=False)
        self.register_buffer("_margin_sum", torch.zeros(()), persistent=False)
        self.register_buffer("_count", torch.zeros(()), persistent=False)

    @torch.no_grad()
    def observe(self, probs: Tensor, expert_index: Tensor) -> None:
        """Count the tokens of each expert and the margin between the two best; probs [N, E], index [N, K]."""
        self._load += torch.bincount(expert_index.flatten(), minlength=probs.shape[1])
        top = probs.topk(min(2, probs.shape[1]), dim=-1).values
        self._margin_sum += (top[:, 0] - top[:, -1]).sum()
        self._count += probs.shape[0]

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the bias once by what was observed on all ranks since the last step."""
        sum_over_ranks(self._load, self._margin_sum, self._count)
        if self._count > 0:
            self.step += 1
            weight = max(1 - self.decay, 1 / int(self.step))
            self.margin.lerp_(self._margin_sum / self._count, weight)
            error = 1 - self._load / self._load.mean()
            self.bias += self.rate * self.margin * error.clamp(-1, 1)
            self.bias -= self.bias.mean()
        for accumulator in (self._load, self._margin_sum, self._count):
            accumulator.zero_()
