"""Whether runs agree on who handles what: experts matched across seeds and folds, against maps that mean nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from emoe_med.brainage.maps.nulls import rotations
from emoe_med.brainage.maps.place import beyond_place, by_place

THRESHOLD = 0.5
UNSTABLE = "unstable, do not interpret"
MIN_SEEDS = 3  # folds of one seed start alike: two seeds are one independent pair, however many folds
DRAWS = 200  # of each baseline; five times as many of the interval over seeds and folds


@dataclass
class RunMap:
    """One run's group map.

    Attributes:
        name: `seed0-fold1`.
        seed, fold: Of the run.
        occupancy: [C, E].
        routed: [C], heads in which each cell was routed.
        inside: [C] bool, cells of the group's brain.
        reliability: Correlation with the map of as many other heads that the same run would give, see `reliability`.
        head: [N], which heads of the cohort the run looked at.
        person: [N], equal for all heads of a person.
        expert: [N, C], first choice of each cell; -1 where it was not routed.
    """

    name: str
    seed: int
    fold: int
    occupancy: np.ndarray
    routed: np.ndarray
    inside: np.ndarray
    reliability: float = float("nan")
    head: np.ndarray = field(default_factory=lambda: np.zeros(0, int))
    person: np.ndarray = field(default_factory=lambda: np.zeros(0, int))
    expert: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int16))

    @cached_property
    def place(self) -> np.ndarray:
        """What a router that knows the place alone would choose, [N, C]."""
        return by_place(self.expert, self.person, self.occupancy.shape[1])


def reliability(half: np.ndarray, other: np.ndarray) -> float:
    """Return how well a run's map agrees with itself, from the maps [C, E] of two halves of its heads.

    The mean correlation of the experts, stepped up to all heads (Spearman and Brown 1910): what number of heads alone
    lets two runs agree at most.
    """
    r = float(np.diag(_correlation(half, other)).mean())
    return 2 * r / (1 + r) if r > 0 else 0.0


@dataclass(frozen=True)
class Match:
    """The experts of one map found in another.

    Attributes:
        expert: [E], expert of the other map for each of the first.
        r: [E] Pearson correlation over cells of each pair; 0 where a map is constant.
        dice: Mean overlap of the cells in which each pair is on top.
    """

    expert: np.ndarray
    r: np.ndarray
    dice: float


def match_experts(a: np.ndarray, b: np.ndarray) -> Match:
    """Pair the experts of two maps [C, E] one to one so that the sum of correlations is largest.

    Source: Kuhn 1955 (the Hungarian method), as scipy's `linear_sum_assignment`.
    """
    r = _correlation(a, b)
    rows, expert = linear_sum_assignment(-r)
    top_a, top_b = a.argmax(1), b[:, expert].argmax(1)
    return Match(expert, r[rows, expert], _dice(top_a, top_b, a.shape[1]))


def _correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    units = []
    for values in (a, b):
        centred = values - values.mean(0)
        norm = np.linalg.norm(centred, axis=0)
        units.append(np.where(norm > 1e-9, centred / np.maximum(norm, 1e-9), 0))
    return units[0].T @ units[1]


def _dice(a: np.ndarray, b: np.ndarray, num_experts: int) -> float:
    """Mean over the experts that are on top somewhere of 2 |A and B| / (|A| + |B|)."""
    sizes = np.bincount(a, minlength=num_experts) + np.bincount(b, minlength=num_experts)
    both = np.bincount(a[a == b], minlength=num_experts)
    return float((2 * both[sizes > 0] / sizes[sizes > 0]).mean())


def stability(runs: Sequence[RunMap], centres_mm: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Compare all pairs of runs; the verdict stands on runs of different seeds, whose experts start unrelated.

    Args:
        runs: Maps of one arm.
        centres_mm: [C, 3].
        seed: Of the baselines.

    Returns:
        The content of stability.json.
    """
    names = [run.name for run in runs]
    if len({run.seed for run in runs}) < 2:
        return {
            "verdict": "not tested: needs runs of another seed",
            "stable": None,
            "reason": "Experts are numbered by chance. Only runs of several seeds tell whether the same regions "
            "find an expert of their own each time.",
            "threshold": THRESHOLD,
            "runs": names,
            "matched_r": None,
            "dice": None,
            "pairs": [],
        }
    inside = np.all([run.inside for run in runs], axis=0)
    pairs = list(combinations(range(len(runs)), 2))
    maps = [run.occupancy[inside] for run in runs]
    matches = {(a, b): match_experts(maps[a], maps[b]) for a, b in pairs}
    judged = [(a, b) for a, b in pairs if runs[a].seed != runs[b].seed]
    rng = np.random.default_rng(seed)
    found = {name: _over_runs(matches, judged, name, runs, rng) for name in ("matched_r", "dice")}
    baselines = {
        "turned_patches": _baseline(_turned(maps, centres_mm, inside, rng), judged)
        | {"text": "patches of the same size and shape laid over the brain at random"},
        "random_router": _baseline(_random(runs, maps, inside, rng), judged)
        | {"text": "tokens dealt out at random, with the same load"},
    }
    place = _beyond_place(runs, matches, judged)
    kinds: dict[str, list[Match]] = {}
    for a, b in pairs:
        kinds.setdefault(_kind(runs[a], runs[b]), []).append(matches[a, b])
    return {
        **_verdict(found["matched_r"], baselines, place, len({run.seed for run in runs})),
        "threshold": THRESHOLD,
        "reliability": _mean_of([run.reliability for run in runs]),
        "runs": names,
        **found,
        "by_kind": {
            kind: {"pairs": len(some), **{name: float(np.mean([_score(m, name) for m in some])) for name in found}}
            for kind, some in kinds.items()
        },
        **baselines,
        "position_only": place,
        "pairs": [
            {
                "a": names[a],
                "b": names[b],
                **{name: _score(match, name) for name in found},
                "match": match.expert.tolist(),
                "r": match.r.tolist(),
            }
            for (a, b), match in matches.items()
        ],
    }


def _mean_of(values: list[float]) -> float | None:
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else None


def _beyond_place(
    runs: Sequence[RunMap], matches: Mapping[tuple[int, int], Match], judged: list[tuple[int, int]]
) -> dict[str, Any] | None:
    """Compare runs in the heads that both looked at; None where no two runs of different seeds share a head."""
    pairs = []
    for a, b in judged:
        one, other = runs[a], runs[b]
        heads, first, second = np.intersect1d(one.head, other.head, return_indices=True)
        if len(heads):
            name = np.append(np.argsort(matches[a, b].expert), -1)  # by the first run's names; -1 stays -1
            experts = one.expert[first], name[other.expert[second]]
            pairs.append((*experts, one.place[first], name[other.place[second]], one.person[first]))
    if not pairs:
        return None
    text = "in one and the same head, with either run's router replaced by one that knows the place alone"
    return beyond_place(pairs) | {"text": text}


def _kind(a: RunMap, b: RunMap) -> str:
    seed = "same seed" if a.seed == b.seed else "other seed"
    return f"{seed}, {'same fold' if a.fold == b.fold else 'other fold'}"


def _score(match: Match, name: str) -> float:
    return match.dice if name == "dice" else float(match.r.mean())


def _over_runs(
    matches: Mapping[tuple[int, int], Match], judged: list[tuple[int, int]], name: str, runs: Sequence[RunMap], rng: Any
) -> dict[str, Any]:
    """Mean over pairs, and its interval over seeds and folds: runs that share one move together.

    Both are drawn with replacement, and a run counts as often as its seed times as often as its fold (Owen and Eckles
    2012). Of two seeds only draws of both have pairs, so that the interval is over folds alone.
    """
    score = np.array([_score(matches[pair], name) for pair in judged])
    a, b = np.array(judged).T
    drawn = []
    for _ in range(5 * DRAWS):
        count = _redrawn([run.seed for run in runs], rng) * _redrawn([run.fold for run in runs], rng)
        weight = count[a] * count[b]
        if weight.any():
            drawn.append(weight @ score / weight.sum())
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {"value": float(score.mean()), "low": float(low), "high": float(high), "n": len(runs)}


def _redrawn(groups: Sequence[int], rng: Any) -> np.ndarray:
    """Draw as many groups as there are, with replacement; return how often that of each run was drawn, [R]."""
    names, index = np.unique(groups, return_inverse=True)
    return rng.multinomial(len(names), np.full(len(names), 1 / len(names)))[index]


def _turned(maps: list[np.ndarray], centres_mm: np.ndarray, inside: np.ndarray, rng: Any) -> Any:
    centres = centres_mm[inside]
    index = [rotations(centres, np.ones(len(centres), bool), DRAWS, rng) for _ in maps]
    return ([m[turn[draw]] for m, turn in zip(maps, index, strict=True)] for draw in range(DRAWS))


def _random(runs: Sequence[RunMap], maps: list[np.ndarray], inside: np.ndarray, rng: Any) -> Any:
    loads = [np.average(m, axis=0, weights=run.routed[inside]) for m, run in zip(maps, runs, strict=True)]
    heads = [np.maximum(run.routed[inside], 1) for run in runs]
    for _ in range(DRAWS):
        yield [rng.multinomial(n, load / load.sum()) / n[:, None] for n, load in zip(heads, loads, strict=True)]


def _baseline(draws: Any, judged: list[tuple[int, int]]) -> dict[str, Any]:
    """Mean over the pairs of each draw, with the interval over draws."""
    scores = {"matched_r": [], "dice": []}
    for maps in draws:
        some = [match_experts(maps[a], maps[b]) for a, b in judged]
        for name, values in scores.items():
            values.append(np.mean([_score(match, name) for match in some]))
    return {
        name: dict(
            zip(("value", "low", "high"), map(float, (np.mean(v), *np.quantile(v, [0.025, 0.975]))), strict=True)
        )
        for name, v in scores.items()
    }


def _verdict(
    matched: Mapping[str, Any], baselines: Mapping[str, Any], place: Mapping[str, Any] | None, seeds: int
) -> dict[str, Any]:
    """Stable: at least the threshold, its interval above both baselines, more than places give, on three seeds."""
    value, low = matched["value"], matched["low"]
    patches, chance = (baselines[name]["matched_r"] for name in ("turned_patches", "random_router"))
    figures = f"matched r {value:.2f} [{low:.2f}, {matched['high']:.2f}] across seeds"
    if value < THRESHOLD:
        reason = f"{figures} is below {THRESHOLD}: another training run gives other experts to the same regions."
    elif low <= max(patches["high"], chance["high"]):
        reason = (
            f"{figures} is not above what patches at random places reach ({patches['value']:.2f}, up to "
            f"{patches['high']:.2f}) or a random router ({chance['value']:.2f}, up to {chance['high']:.2f})."
        )
    elif place and place["difference"]["low"] <= 0:
        same, alone = place["same_expert"]["value"], place["by_place"]["value"]
        reason = (
            f"{figures}, but in one and the same head runs agree on the expert of {same:.0%} of cells, and a router "
            f"that knows the place alone does so in {alone:.0%}: the maps show places, not what is there."
        )
    elif seeds < MIN_SEEDS:
        reason = f"{figures}, but {seeds} seeds tell nothing of others: it needs {MIN_SEEDS} or more."
        return {"verdict": "not tested: needs more seeds", "stable": None, "reason": reason}
    else:
        reason = (
            f"{figures}: other training runs find the same regions, beyond patches at random places "
            f"({patches['value']:.2f}, up to {patches['high']:.2f}) and a random router (up to {chance['high']:.2f})."
        )
        return {"verdict": "stable", "stable": True, "reason": reason}
    return {"verdict": UNSTABLE, "stable": False, "reason": reason}


def reference_run(runs: Sequence[RunMap]) -> int:
    """Return the run whose experts are found best in all others: the one that names them."""
    inside = np.all([run.inside for run in runs], axis=0)
    maps = [run.occupancy[inside] for run in runs]
    score = [sum(float(match_experts(a, b).r.mean()) for b in maps) for a in maps]
    return int(np.argmax(score))
