"""How evenly, how surely and how strongly a layer routes: statistics over a whole evaluation set."""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from emoe_med.moe.layer import MoELayer
from emoe_med.moe.router import Routing, sum_over_ranks


def load_statistics(counts: Tensor) -> dict[str, float]:
    """Describe the token counts [E] of the experts.

    Returns:
        cv (population std over mean, 0 balanced, sqrt(E-1) collapsed), entropy (0 to 1, of ln E), effective
        experts exp(H), max_over_mean, max_vio (the same less 1: MaxVio of arXiv 2408.15664), min_over_mean,
        gini, and dead: experts below a tenth of their share.
    """
    num_experts = counts.numel()
    share = _shares(counts)
    entropy = float(torch.special.entr(share).sum())
    gaps = (share[:, None] - share[None, :]).abs().sum()
    cv, max_vio = _imbalance(counts).tolist()
    return {
        "cv": cv,
        "entropy": entropy / math.log(num_experts) if num_experts > 1 else 1.0,
        "effective_experts": math.exp(entropy),
        "max_over_mean": float(share.max() * num_experts),
        "max_vio": max_vio,
        "min_over_mean": float(share.min() * num_experts),
        "gini": float(gaps / (2 * num_experts)),
        "dead": float((share < 0.1 / num_experts).sum()),
    }


def changed_share(before: Routing, after: Routing) -> float:
    """Return the share of tokens whose set of experts differs between two routings of the same N tokens.

    Order of slots and size of gates do not count; a dropped slot is no expert. For the stability of routing,
    route one sample of tokens at two checkpoints.

    Raises:
        ValueError: The routings are not of the same number of tokens and experts, or of no token.
    """
    sets = [_experts_of(routing) for routing in (before, after)]
    if sets[0].shape != sets[1].shape or not len(sets[0]):
        raise ValueError(f"cannot compare routings of shapes {tuple(sets[0].shape)} and {tuple(sets[1].shape)}")
    return float((sets[0] != sets[1]).any(dim=-1).double().mean())


class RoutingStats:
    """Sum up the routing of many batches; memory does not grow with their number.

    `update` with each batch, then `reduce` once where there are several ranks, then `summary`. A batch is one
    routing: the tokens that one call of the layer saw on one rank.

    Args:
        num_experts: E.
        device: Where the sums are kept. On a GPU `update` never waits for it; on the CPU it waits for one
            transfer. The backend of the ranks must be able to reduce there: NCCL asks for the GPU.
    """

    def __init__(self, num_experts: int, device: torch.device | str = "cpu") -> None:
        self.num_experts = num_experts
        # sums over tokens per expert: slots, gate, probability
        self.per_expert = torch.zeros(3, num_experts, dtype=torch.float64, device=device)
        # tokens, slots, dropped slots, tokens without expert, sums of margin and entropy; then batches with any load
        # and over these the sums of CV and MaxVio
        self.sums = torch.zeros(9, dtype=torch.float64, device=device)
        # the largest CV and MaxVio of a batch
        self.worst = torch.zeros(2, dtype=torch.float64, device=device)

    @property
    def counts(self) -> Tensor:
        """Slots that each expert served, [E] float64."""
        return self.per_expert[0]

    @torch.no_grad()
    def update(self, routing: Routing) -> None:
        """Add one batch."""
        gate, probs = routing.gate.double(), routing.probs.double()
        counts = routing.load().double()
        mass = torch.zeros_like(counts).scatter_add(0, routing.expert_index.flatten(), gate.flatten())
        top = probs.topk(min(2, self.num_experts), dim=-1).values
        dropped = gate == 0
        found = [
            *(counts.new_full((), size) for size in (len(gate), gate.numel())),
            *(dropped.sum(), dropped.all(dim=-1).sum()),
            *((top[:, 0] - top[:, -1]).sum(), torch.special.entr(probs).sum()),
            *(counts.any(), *_imbalance(counts)),
        ]
        packed = torch.cat([counts, mass, probs.sum(0), torch.stack([value.double() for value in found])])
        per_expert, sums = packed.to(self.sums.device).split([3 * self.num_experts, len(found)])
        self.per_expert += per_expert.view(3, -1)
        self.sums += sums
        self.worst = torch.maximum(self.worst, sums[-2:])

    def reduce(self) -> None:
        """Join the ranks' statistics, once: each rank then has those of all batches."""
        sum_over_ranks(self.per_expert, self.sums)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.worst, dist.ReduceOp.MAX)

    def summary(self) -> dict[str, float]:
        """Return all statistics as plain numbers.

        Returns:
            Those of `load_statistics` over all tokens. Of a batch: `cv_batch` and `max_vio_batch`, means over
            batches, and with `_max` their largest. Tokens: their number; `dropped` slots and `dropped_tokens`,
            shares (the latter have no expert at all; under Expert Choice, 1 less it is the coverage). Per token:
            mean `gate` of a served slot, top1-top2 `margin` and `token_entropy` (nats) of the probabilities. Per
            expert: `load/E03`, share of served slots; `importance/E03`, mean gate of a token, and its
            `importance_cv`: where routing is soft they tell what load cannot; `prob/E03`, mean probability.
        """
        tokens, slots, dropped, without, margin, entropy, batches, cv, max_vio = self.sums.tolist()
        counts, mass, probs = self.per_expert.cpu()
        worst_cv, worst_vio = self.worst.tolist()
        columns = {"load": _shares(counts), "importance": mass / max(tokens, 1), "prob": probs / max(tokens, 1)}
        return {
            **load_statistics(counts),
            "cv_batch": cv / max(batches, 1),
            "cv_batch_max": worst_cv,
            "max_vio_batch": max_vio / max(batches, 1),
            "max_vio_batch_max": worst_vio,
            "importance_cv": float(_imbalance(mass)[0]),
            "tokens": tokens,
            "dropped": dropped / max(slots, 1),
            "dropped_tokens": without / max(tokens, 1),
            "gate": float(mass.sum()) / max(slots - dropped, 1),
            "margin": margin / max(tokens, 1),
            "token_entropy": entropy / max(tokens, 1),
            **{f"{name}/E{e:02d}": float(v) for name, column in columns.items() for e, v in enumerate(column)},
        }


@contextmanager
def collected_routing(layer: MoELayer, stats: RoutingStats):
    """Add the routing of every forward pass of the layer to the statistics."""
    handle = layer.register_forward_hook(lambda module, args, result: stats.update(result[1]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def branch_norms(layer: MoELayer):
    """Collect ||branch|| / ||stream|| per token, averaged over tokens, of every forward pass."""
    shares: list[float] = []

    def measure(module: nn.Module, args: Any, kwargs: Any, result: tuple[Tensor, Routing]) -> None:
        before, mask = args[0], args[1] if len(args) > 1 else None
        branch = result[0] - before
        share = branch.norm(dim=-1) / before.norm(dim=-1).clamp_min(1e-12)
        shares.append(float((share if mask is None else share[mask]).mean()))

    handle = layer.register_forward_hook(measure, with_kwargs=True)
    try:
        yield shares
    finally:
        handle.remove()


def _shares(amounts: Tensor) -> Tensor:
    """Divide [E] by its sum, in float64; zeros stay zeros."""
    return amounts.double() / amounts.double().sum().clamp_min(1e-30)


def _imbalance(amounts: Tensor) -> Tensor:
    """Return CV and MaxVio of amounts [E], in units of their mean."""
    share = _shares(amounts)
    return torch.stack([share.std(correction=0), share.max() - share.mean()]) * share.numel()


def _experts_of(routing: Routing) -> Tensor:
    """Return [N, E] bool, True where the token has a slot at the expert that was not dropped."""
    gate = routing.gate.detach()
    return torch.zeros_like(routing.probs).scatter_add(-1, routing.expert_index, gate.to(routing.probs.dtype)) > 0
