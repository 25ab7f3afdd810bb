"""The routers of the literature: a linear map to one logit per expert, as in V-MoE and in Switch.

V-MoE:  noise 1, softmax, `importance_load`, capacity 1.05 in training; at inference a capacity below 1 with
`batch_priority` drops the least certain tokens. Riquelme et al. 2021, arXiv 2106.05974.
Switch: top_k 1, noise 0, jitter 0.01, `switch`, capacity 1.25. Fedus et al. 2022, arXiv 2101.03961.
Loss-free: noise 0, `score: sigmoid`, `bias_sign`. Wang et al. 2024, arXiv 2408.15664.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from emoe_med.moe.balance import BALANCES, BalanceName, Noise
from emoe_med.moe.experts.base import Experts
from emoe_med.moe.router import GateScale, Place, Router, Routing, gate_values, select


@dataclass(frozen=True)
class LinearOptions:
    """Options of `LinearRouter`; the defaults are V-MoE without a capacity.

    Attributes:
        score: `softmax` over experts, or `sigmoid` of each expert by itself.
        gate: scale of the combine weight, see `gate_values`; or `share`, p over the sum of the chosen p, for K > 1: the
            K weights sum to 1, so that experts that are copies of a feed-forward start as it (arXiv 2212.05055).
        noise: standard deviation of the Gaussian noise on the logits in training, in units of 1/E.
        jitter: in training the router's input is multiplied by U(1 - jitter, 1 + jitter).
        balance: see `balance.BALANCES`; `importance_load` needs noise.
        balance_strength: step of the bias or weight of the loss; None is the published one.
        z_loss: weight of mean(logsumexp(logits)^2), which keeps logits small (Zoph et al. 2022,
            arXiv 2202.08906, Eq. 5; 1e-3 there).
        capacity: slots of an expert as a multiple of its even share of the call's tokens; None is no limit.
        eval_capacity: the same outside training.
        batch_priority: where slots run out, the surest tokens of the batch get them, not the first ones.
    """

    score: Literal["softmax", "sigmoid"] = "softmax"
    gate: GateScale | Literal["share"] = "prob"
    noise: float = 1.0
    jitter: float = 0.0
    balance: BalanceName = "importance_load"
    balance_strength: float | None = None
    z_loss: float = 0.0
    capacity: float | None = None
    eval_capacity: float | None = None
    batch_priority: bool = False

    def __post_init__(self) -> None:
        if self.balance == "importance_load" and self.noise <= 0:
            raise ValueError("balance: importance_load needs noise above 0")


class LinearRouter(Router):
    """p = softmax(W h + noise); the K largest are chosen and gate with p, not renormalised unless `gate` is `share`."""

    def __init__(self, width: int, num_experts: int, top_k: int, options: LinearOptions) -> None:
        super().__init__(num_experts, top_k)
        if options.gate == "share" and top_k == 1:
            raise ValueError("gate: share needs top_k above 1: a single share is 1 and teaches the router nothing")
        self.options = options
        # a tenth of the usual variance, after Switch: routing starts near uniform
        self.weight = nn.Parameter(torch.randn(width, num_experts) * (0.1 / width) ** 0.5)
        self.balance = BALANCES[options.balance](num_experts, options.balance_strength)

    @property
    def independent(self) -> bool:
        """Tokens compete for slots where there is a capacity."""
        return (self.options.capacity if self.training else self.options.eval_capacity) is None

    def forward(
        self, tokens: Tensor, experts: Experts, context: Tensor | None = None, place: Place | None = None
    ) -> Routing:
        """Route tokens [N, D] in float32 whatever the ambient precision."""
        options = self.options
        with torch.autocast(tokens.device.type, enabled=False):
            tokens = tokens.float()
            if self.training and options.jitter:
                tokens = tokens * torch.empty_like(tokens).uniform_(1 - options.jitter, 1 + options.jitter)
            logits = tokens @ self.weight.float()
            sigma = options.noise / self.num_experts
            noisy = logits + sigma * torch.randn_like(logits) if self.training and sigma else logits
            scores = self._score(noisy)
            index = select(self.balance.preference(scores), self.top_k)
            gate = self._gate(scores, index)
            capacity = options.capacity if self.training else options.eval_capacity
            if capacity is not None:
                slots = math.ceil(capacity * index.numel() / self.num_experts - 1e-9)  # 1.1 x 50 are 55
                priority = scores.detach().gather(-1, index).amax(-1) if options.batch_priority else None
                gate = gate * within_capacity(index, self.num_experts, slots, priority)
            probs = scores if noisy is logits else self._score(logits)
            probs = probs / probs.sum(-1, keepdim=True) if options.score == "sigmoid" else probs
            if self.training:
                self.balance.observe(scores.detach(), index)
            aux_loss = self.balance.loss(probs, index, Noise(logits, noisy, sigma))
            if options.z_loss:
                aux_loss = aux_loss + options.z_loss * logits.logsumexp(-1).square().sum() / max(1, len(logits))
        return Routing(index, gate, probs, aux_loss)

    def _score(self, logits: Tensor) -> Tensor:
        return logits.sigmoid() if self.options.score == "sigmoid" else logits.softmax(-1)

    def _gate(self, scores: Tensor, index: Tensor) -> Tensor:
        if self.options.gate != "share":
            return gate_values(scores, index, self.options.gate)
        chosen = scores.gather(-1, index)
        return chosen / chosen.sum(-1, keepdim=True)

    def after_step(self) -> None:
        """Move the balance bias."""
        self.balance.after_step()


@torch.no_grad()
def within_capacity(expert_index: Tensor, num_experts: int, slots: int, priority: Tensor | None = None) -> Tensor:
    """Tell which slots an expert with room for so many tokens still serves.

    All first choices queue up before any second choice, in the order of the tokens, or of their priority, the
    highest first (Batch Prioritized Routing).

    Args:
        expert_index: [N, K].
        num_experts: E.
        slots: room of each expert.
        priority: [N] or None.

    Returns:
        [N, K] bool.
    """
    count, choices = expert_index.shape
    order = torch.arange(count, device=expert_index.device)
    if priority is not None:
        order = priority.argsort(descending=True, stable=True)
    queue = expert_index[order].T.flatten()
    ahead = (queue.unsqueeze(1) == torch.arange(num_experts, device=queue.device)).cumsum(0)
    served = slots >= ahead.gather(1, queue.unsqueeze(1)).view(choices, count).T
    return torch.empty_like(served).index_copy_(0, order, served)
