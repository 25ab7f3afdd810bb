"""Keeping experts evenly loaded: a bias that no gradient reaches, or a loss that the literature adds.

`BALANCES` is the choice; `none` is the paper read literally.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from emoe_med.moe.router import StepSums

BalanceName = Literal["none", "bias", "bias_sign", "switch", "importance_load"]


class Noise(NamedTuple):
    """Router noise: logits [N, E] without it, `noisy` [N, E] that were ranked, its standard deviation sigma."""

    logits: Tensor
    noisy: Tensor
    sigma: float


class Balance(nn.Module):
    """No balancing: select by score, add no loss. Base of the others.

    Args:
        num_experts: E.
        strength: size of the bias step, or weight of the loss; None takes the published one.
    """

    DEFAULT_STRENGTH = 0.0

    def __init__(self, num_experts: int, strength: float | None = None) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.strength = self.DEFAULT_STRENGTH if strength is None else strength

    def preference(self, scores: Tensor) -> Tensor:
        """Return what experts are selected by, [N, E]; gates never see it."""
        return scores.detach()

    def loss(self, probs: Tensor, expert_index: Tensor, noise: Noise | None = None) -> Tensor:
        """Return the weighted loss [] of probabilities [N, E] without noise and a selection [N, K]."""
        return probs.new_zeros(())

    def observe(self, scores: Tensor, expert_index: Tensor) -> None:
        """Take note of a batch: detached scores [N, E] and the selection [N, K]."""

    def after_step(self) -> None:
        """Move the state once by what was observed on all ranks since the last step."""


class SignBias(Balance):
    """Loss-free balancing as published: bias += u * sign(mean load - load), u = 1e-3.

    Its constant step is made for sigmoid scores in [0, 1].

    Buffers: `bias` [E].
    Source: Wang et al. 2024, arXiv 2408.15664, Algorithm 1.
    """

    DEFAULT_STRENGTH = 1e-3

    bias: Tensor

    def __init__(self, num_experts: int, strength: float | None = None) -> None:
        super().__init__(num_experts, strength)
        self.register_buffer("bias", torch.zeros(num_experts))
        self.load = StepSums((num_experts,))

    def preference(self, scores: Tensor) -> Tensor:
        """Return scores + bias."""
        return scores.detach() + self.bias

    @torch.no_grad()
    def observe(self, scores: Tensor, expert_index: Tensor) -> None:
        """Count the tokens of each expert."""
        experts = torch.arange(self.num_experts, device=expert_index.device)
        self.load.add((expert_index.unsqueeze(-1) == experts).sum(dim=(0, 1)))

    @torch.no_grad()
    def after_step(self) -> None:
        """Raise the bias of underloaded experts by u, lower that of overloaded ones."""
        (load,) = self.load.take()
        self.bias += self.strength * (load.mean() - load).sign()


class MarginBias(SignBias):
    """Loss-free balancing for scores of any scale (our default).

    After each step bias += u * clip(1 - load / mean load, -1, 1), with u = strength * (averaged top1-top2
    margin of the scores). Two things differ from the published rule: a constant u cannot serve eigen-energies,
    which differ by 1e-3 to 1e-2 between experts, so that the step follows their margin; and the sign of the
    error never settles, so that the load swings for ever, while the error itself fades as the load evens out.

    Buffers: `bias` [E], `margin` [], `step` [].
    """

    DEFAULT_STRENGTH = 0.05
    DECAY = 0.99  # of the averaged margin

    margin: Tensor
    step: Tensor

    def __init__(self, num_experts: int, strength: float | None = None) -> None:
        super().__init__(num_experts, strength)
        self.register_buffer("margin", torch.zeros(()))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.margins = StepSums((), ())  # their sum and number

    @torch.no_grad()
    def observe(self, scores: Tensor, expert_index: Tensor) -> None:
        """Count the tokens of each expert and add up the margin between the two best scores."""
        super().observe(scores, expert_index)
        top = scores.topk(min(2, self.num_experts), dim=-1).values
        self.margins.add((top[:, 0] - top[:, -1]).sum(), len(scores))

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the bias by the clipped load error; nothing observed moves nothing."""
        (load,) = self.load.take()
        total, count = self.margins.take()
        seen = (count > 0).float()  # kept on the device: a GPU need not wait for the answer
        self.step += seen.to(self.step.dtype)
        weight = torch.clamp_min(1 / self.step.clamp_min(1), 1 - self.DECAY) * seen
        self.margin += weight * (total / count.clamp_min(1) - self.margin)
        error = 1 - load / load.mean().clamp_min(1e-12)
        self.bias += seen * self.strength * self.margin * error.clamp(-1, 1)
        self.bias -= self.bias.mean()


class SwitchLoss(Balance):
    """a * E * sum_i f_i P_i: f_i the share of first choices, P_i the mean probability; a = 1e-2.

    The shares are those of all ranks and of the step so far: balancing each small part of a batch by itself
    hurts specialisation (Qiu et al. 2025, arXiv 2501.11873).

    Source: Fedus et al. 2022, arXiv 2101.03961, Eqs. 4-6.
    """

    DEFAULT_STRENGTH = 1e-2

    def __init__(self, num_experts: int, strength: float | None = None) -> None:
        super().__init__(num_experts, strength)
        self.first = StepSums((num_experts,))

    def loss(self, probs: Tensor, expert_index: Tensor, noise: Noise | None = None) -> Tensor:
        """Return the weighted loss []; `strength` where the load is even."""
        experts = torch.arange(self.num_experts, device=probs.device)
        first = (expert_index[:, :1] == experts).sum(0).float()
        if self.training:
            self.first.add(first)
            (first,) = self.first.so_far()
        share = first / first.sum().clamp_min(1)
        mean = probs.sum(0) / max(1, probs.shape[0])
        return self.strength * self.num_experts * (share * mean).sum()

    def after_step(self) -> None:
        """Start counting anew."""
        self.first.take()


class ImportanceLoadLoss(Balance):
    """a * (CV(importance)^2 + CV(load)^2) / 2, a = 1e-2.

    importance_i = sum_t p_i(t); load_i = sum_t P(expert i stays among the K best of token t when its noise is
    drawn anew) = sum_t 1 - Phi((threshold_t - logit_i(t)) / sigma), with the K-th best noisy logit as threshold.

    Source: Shazeer et al. 2017, arXiv 1701.06538; Riquelme et al. 2021, arXiv 2106.05974, appendix A.
    """

    DEFAULT_STRENGTH = 1e-2

    def loss(self, probs: Tensor, expert_index: Tensor, noise: Noise | None = None) -> Tensor:
        """Return the weighted loss []; 0 where importance and load are even."""
        if noise is None or noise.sigma <= 0:
            raise ValueError("importance_load needs a router with noise")
        threshold = noise.noisy.gather(-1, expert_index[:, -1:])
        chance = torch.special.ndtr((noise.logits - threshold) / noise.sigma)
        return self.strength / 2 * (_squared_cv(probs.sum(0)) + _squared_cv(chance.sum(0)))


def _squared_cv(amount: Tensor) -> Tensor:
    return amount.var(correction=0) / amount.mean().square().clamp_min(1e-12)


BALANCES: dict[str, type[Balance]] = {
    "none": Balance,
    "bias": MarginBias,
    "bias_sign": SignBias,
    "switch": SwitchLoss,
    "importance_load": ImportanceLoadLoss,
}
