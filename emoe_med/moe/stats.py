"""How evenly, how surely and how strongly a layer routes: statistics over a whole evaluation set."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from emoe_med.moe.router import Routing, sum_over_ranks


def load_statistics(counts: Tensor) -> dict[str, float]:
    """Describe the token counts [E] of the experts.

    Returns:
        cv (population std over mean, 0 balanced, sqrt(E-1) collapsed), entropy (0 to 1, of ln E), effective
        experts exp(H), max_over_mean, min_over_mean, gini, and dead: experts below a tenth of their share.
    """
    num_experts = counts.numel()
    share = counts.double() / counts.sum().clamp_min(1)
    entropy = float(-(share * share.clamp_min(1e-30).log()).sum())
    gaps = (share[:, None] - share[None, :]).abs().sum()
    return {
        "cv": float(share.std(correction=0) * num_experts),
        "entropy": entropy / math.log(num_experts) if num_experts > 1 else 1.0,
        "effective_experts": math.exp(entropy),
        "max_over_mean": float(share.max() * num_experts),
        "min_over_mean": float(share.min() * num_experts),
        "gini": float(gaps / (2 * num_experts)),
        "dead": float((share < 0.1 / num_experts).sum()),
    }


class RoutingStats:
    """Sum up the routing of many batches; memory does not grow with their number.

    After `update` of each batch and `reduce` over ranks, `summary` gives load statistics, share and mean
    probability per expert, mean gate, top1-top2 margin, entropy per token, and dropped slots.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self.counts = torch.zeros(num_experts, dtype=torch.float64)
        self.probs = torch.zeros(num_experts, dtype=torch.float64)
        # tokens, slots, dropped slots, sums of gate, margin and entropy
        self.sums = torch.zeros(6, dtype=torch.float64)

    @torch.no_grad()
    def update(self, routing: Routing) -> None:
        """Add one batch."""
        probs, gate = routing.probs.double().cpu(), routing.gate.double().cpu()
        index = routing.expert_index.cpu()
        self.counts += torch.bincount(index[gate > 0], minlength=self.num_experts)
        self.probs += probs.sum(0)
        top = probs.topk(min(2, self.num_experts), dim=-1).values
        entropy = -(probs * probs.clamp_min(1e-30).log()).sum()
        sums = [probs.shape[0], gate.numel(), (gate == 0).sum(), gate.sum(), (top[:, 0] - top[:, -1]).sum()]
        self.sums += torch.tensor([*map(float, sums), float(entropy)], dtype=torch.float64)

    def reduce(self) -> None:
        """Add up the ranks' sums."""
        sum_over_ranks(self.counts, self.probs, self.sums)

    def summary(self) -> dict[str, float]:
        """Return all statistics as plain numbers; keys `load/E03`, `cv`, `margin`, ..."""
        tokens, slots, dropped, gate, margin, entropy = self.sums.tolist()
        shares = self.counts / self.counts.sum().clamp_min(1)
        return {
            **load_statistics(self.counts),
            "tokens": tokens,
            "dropped": dropped / max(slots, 1),
            "gate": gate / max(slots - dropped, 1),
            "margin": margin / max(tokens, 1),
            "token_entropy": entropy / max(tokens, 1),
            **{f"load/E{e:02d}": float(share) for e, share in enumerate(shares)},
        }
