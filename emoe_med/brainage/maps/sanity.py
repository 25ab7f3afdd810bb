"""Checks that tell a map of anatomy from a map of something else, each a figure with a sentence about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from emoe_med.brainage.maps.cells import CellGrid, routed_part
from emoe_med.brainage.maps.nulls import rotations
from emoe_med.brainage.maps.place import by_place, share_of_same
from emoe_med.brainage.maps.routes import COVERED, Routes, route, route_tokens
from emoe_med.brainage.maps.stability import match_experts
from emoe_med.brainage.net import BrainAgeNet
from emoe_med.config import BrainAgeConfig, ModelConfig
from emoe_med.data.augment import shift
from emoe_med.errors import DataError, Fault

STEPS = [tuple(sign * int(axis == a) for a in range(3)) for axis in range(3) for sign in (-1, 1)]
MAX_HEADS = 2000  # whose routing the interval of one figure is drawn from
DEAD = 0.01  # share of the tokens


def follows_shift(net: BrainAgeNet, image: Tensor, grid: CellGrid, expert: np.ndarray) -> tuple[float, float]:
    """Move one head by one cell each way; return the share of tokens whose expert went along, and that stayed.

    Args:
        net: Network.
        image: Head [1, 1, X, Y, Z].
        grid: Its cells.
        expert: [C, K] of the head where it is.
    """
    before = expert[:, 0].reshape(grid.shape)
    moved, stayed = [], []
    for step in STEPS:
        voxels = tuple(grid.edge * s for s in step)
        after = route(net, shift(image[0], voxels)[None])[0][:, 0].reshape(grid.shape)
        source = [slice(max(0, -s), n - max(0, s)) for s, n in zip(step, grid.shape, strict=True)]
        target = [slice(max(0, s), n - max(0, -s)) for s, n in zip(step, grid.shape, strict=True)]
        moved.append(_same(before[tuple(source)], after[tuple(target)]))
        stayed.append(_same(before, after))
    return float(np.mean(moved)), float(np.mean(stayed))


def follows_mirror(net: BrainAgeNet, image: Tensor, grid: CellGrid, expert: np.ndarray) -> float:
    """Mirror one head left to right; return the share of tokens whose expert changed sides with the anatomy."""
    after = route(net, image.flip(2))[0][:, 0]
    return _same(expert[grid.mirror, 0], after)


def _same(a: np.ndarray, b: np.ndarray) -> float:
    both = (a >= 0) & (b >= 0)
    return float((a[both] == b[both]).mean()) if both.any() else float("nan")


def random_router_r(
    net: BrainAgeNet, config: BrainAgeConfig, tokens: Sequence[tuple[Tensor, Tensor]], seeds: int = 3
) -> list[float]:
    """Put fresh, untrained routers into the network; return how well their maps match its own, matched r of each.

    Args:
        net: Network; its router is put back.
        config: How to build a router.
        tokens: Of heads, from `routes.tokens_of`.
        seeds: Routers to try.
    """
    layer, model = routed_part(net)[1], config.model
    assert isinstance(model, ModelConfig)
    assert model.moe is not None
    trained = layer.router
    own = _routes(net, tokens)
    found = []
    try:
        for seed in range(seeds):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                fresh = model.moe.build(model.channels[model.moe.after_block - 1]).router
            layer.router = fresh.eval().to(tokens[0][0].device)
            other = _routes(net, tokens)
            inside = (own.coverage() >= COVERED) & (other.coverage() >= COVERED)
            match = match_experts(own.occupancy()[inside], other.occupancy()[inside])
            found.append(float(match.r.mean()))
    finally:
        layer.router = trained
    return found


def _routes(net: BrainAgeNet, tokens: Sequence[tuple[Tensor, Tensor]]) -> Routes:
    routed = [route_tokens(net, *some) for some in tokens]
    return Routes.of(*(np.stack(part) for part in zip(*routed, strict=True)), routed_part(net)[1].router.num_experts)


def position_share(routes: Routes, seed: int = 0) -> dict[str, Any]:
    """Return the share of the variance of the first choices that the cell alone explains, and that of a random router.

    1: every head is served by one and the same pattern, whatever its anatomy; about 1 / N: place plays no part.
    `guessed` is the share of cells whose expert is the most frequent one there in other persons, of the same heads.
    """
    heads = np.random.default_rng(seed).permutation(len(routes))[:MAX_HEADS]
    first = routes.expert[heads, :, 0]
    served = (first[..., None] == np.arange(routes.num_experts)).astype(np.float32)  # [N, C, E]
    routed = served.sum(-1)
    draws = np.random.default_rng(seed).multinomial(len(heads), np.full(len(heads), 1 / len(heads)), size=200)
    drawn = [_explained(np.tensordot(d, served, 1), d @ routed) for d in draws]
    value = _explained(served.sum(0), routed.sum(0))
    count = served.sum((0, 1), dtype=np.float64)
    number, load = routed.sum(0).astype(int), count / count.sum()
    rng = np.random.default_rng(seed + 1)
    chance = [_explained(rng.multinomial(number, load).astype(float), number) for _ in range(200)]
    guessed = share_of_same(by_place(first, routes.person[heads], routes.num_experts), first)
    return {
        "value": value,
        **_interval(value, drawn),
        "chance_high": float(np.quantile(chance, 0.975)),
        "guessed": float(np.nanmean(guessed)) if np.isfinite(guessed).any() else float("nan"),
    }


def _explained(count: np.ndarray, number: np.ndarray) -> float:
    """Between-cell over total sum of squares of one-hot routing: counts [C, E] of a number [C] of heads."""
    load = count.sum(0) / max(count.sum(), 1)
    mean = count / np.maximum(number, 1)[:, None]
    between = (number[:, None] * (mean - load) ** 2).sum()
    return float(between / max(number.sum() * (1 - (load**2).sum()), 1e-12))


def occlusion_agreement(routes: Routes, grid: CellGrid, seed: int = 0) -> dict[str, Any]:
    """Return Spearman's rho over cells of the contribution and occlusion maps, its interval over heads, its null."""
    inside = routes.inside()
    measures = list(routes.influence().values())
    rng = np.random.default_rng(seed)
    own, other = (found.deviation()[inside] for found in measures)
    draws = [rng.multinomial(len(found), np.full(len(found), 1 / len(found)), size=200) for found in measures]
    drawn = [
        _rho(a[inside], b[inside])
        for a, b in zip(*(found.deviation(draw) for found, draw in zip(measures, draws, strict=True)), strict=True)
    ]
    centres = grid.centres_mm[inside]
    turned = rotations(centres, np.ones(len(centres), bool), 1000, rng)
    null = [_rho(own, other[index]) for index in turned]
    value = _rho(own, other)
    return {"value": value, **_interval(value, drawn), "null_high": float(np.quantile(null, 0.975))}


def _interval(value: float, drawn: Sequence[float]) -> dict[str, float]:
    """95 % of the draws, moved to the value: a head drawn twice makes a map look steadier, or noisier, than it is."""
    low, high = np.clip(np.quantile(drawn, [0.025, 0.975]) - np.mean(drawn) + value, -1, 1)
    return {"low": float(low), "high": float(high)}


def _rho(a: np.ndarray, b: np.ndarray) -> float:
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(stats.spearmanr(a, b).statistic)


def over_heads(values: Sequence[float]) -> dict[str, Any]:
    """Mean of one figure a head with its 95 % t interval; no interval from fewer than 5."""
    known = np.asarray(values, float)
    known = known[np.isfinite(known)]
    if not len(known):
        raise DataError(Fault("MAPS-EMPTY", "no token of any head was routed"))
    mean = float(known.mean())
    if len(known) < 5:
        return {"value": mean, "low": None, "high": None}
    half = float(stats.t.ppf(0.975, len(known) - 1) * known.std(ddof=1) / len(known) ** 0.5)
    return {"value": mean, "low": mean - half, "high": mean + half}
