"""The sanity figures as a page shows them: value, interval, threshold, passed or not, and a sentence in plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from emoe_med.brainage.maps.cells import CellGrid
from emoe_med.brainage.maps.routes import Routes
from emoe_med.brainage.maps.sanity import DEAD, occlusion_agreement, over_heads, position_share
from emoe_med.moe import load_statistics

MIN_OCCLUDED = 3  # heads, for a map of occlusion to be compared with


def sanity(
    routes: Routes,
    runs: Sequence[Routes],
    grid: CellGrid,
    shifted: Sequence[tuple[float, float]],
    mirrored: Sequence[float],
    random_router: Sequence[float],
) -> dict[str, Any]:
    """Judge a map; returns the content of sanity.json.

    Args:
        routes: All heads, by the names of the experts that all runs share.
        runs: The same by run: runs that disagree would hide what place explains in each.
        grid: Their cells.
        shifted: Of some heads, the shares of tokens whose expert went along with the head, and that stayed.
        mirrored: Of some heads, the share whose expert changed sides with the anatomy.
        random_router: Matched r of maps of untrained routers with the map of their run.
    """
    checks = [
        _shift(shifted),
        _mirror(mirrored, routes.load()),
        _position([position_share(run) for run in runs]),
        _random_router(random_router),
        _outside(routes),
        _alive([run.load() for run in runs]),
    ]
    if min(map(len, routes.influence().values()), default=0) >= MIN_OCCLUDED:
        checks.append(_occlusion(occlusion_agreement(routes, grid)))
    return {"checks": checks}


def _check(
    name: str, title: str, found: Mapping[str, Any], threshold: str, passed: bool | None, text: str, **details: Any
) -> dict[str, Any]:
    figures = {key: found[key] for key in ("value", "low", "high")}
    return {
        "name": name,
        "title": title,
        **figures,
        "threshold": threshold,
        "passed": None if passed is None else bool(passed),
        "text": text,
        "details": details,
    }


def _shift(shares: Sequence[tuple[float, float]]) -> dict[str, Any]:
    moved, stayed = (over_heads(column) for column in zip(*shares, strict=True))
    return _check(
        "shift",
        "The map moves with the head",
        moved,
        ">= 0.9, and more than stays in place",
        moved["value"] >= 0.9 and moved["value"] > stayed["value"],
        f"When a head is moved by one cell, {moved['value']:.0%} of the tokens take their expert along; "
        f"{stayed['value']:.0%} have at a place the expert that was there before, which is what a map of mere places "
        "would give. A convolutional net without coordinates passes by construction: a failure tells of a fault, a "
        "pass tells nothing of meaning.",
        stayed_in_place=stayed,
        heads=len(shares),
    )


def _mirror(shares: Sequence[float], load: np.ndarray) -> dict[str, Any]:
    found, chance = over_heads(shares), float((load**2).sum())
    return _check(
        "mirror",
        "The map changes sides with a mirrored head",
        found,
        "told, not judged",
        None,
        f"In a mirrored head {found['value']:.0%} of the tokens keep their expert on the other side; {chance:.0%} "
        "would by chance. A map that treats left and right alike gives 100 %.",
        chance=chance,
    )


def _position(shares: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    found = {name: float(np.mean([share[name] for share in shares])) for name in ("value", "low", "high")}
    value, chance = found["value"], max(share["chance_high"] for share in shares)
    guessed = float(np.mean([share["guessed"] for share in shares]))
    return _check(
        "position_only",
        "Place explains the routing in part",
        found,
        f"above a random router ({chance:.2f}) and below 0.95",
        found["low"] > chance and value < 0.95,
        f"Within a run the place in the brain explains {value:.0%} of the routing; the rest depends on what a head "
        f"shows there. A random router reaches {chance:.0%}; at 100 % all heads would have one map, whatever "
        f"their anatomy. A router that knew the place alone would choose the same expert for {guessed:.0%} of the "
        "cells.",
        random_router_high=chance,
        guessed_by_place=None if np.isnan(guessed) else guessed,
    )


def _random_router(values: Sequence[float]) -> dict[str, Any]:
    found = {"value": float(np.mean(values)), "low": float(np.min(values)), "high": float(np.max(values))}
    return _check(
        "random_router",
        "An untrained router loses the pattern",
        found,
        "< 0.5",
        found["value"] < 0.5,
        f"With fresh, untrained routers on the same features of the same heads the maps match at r = "
        f"{found['value']:.2f} ({found['low']:.2f} to {found['high']:.2f}): the closer to 1, the less of the pattern "
        "was learned by the router.",
        routers=len(values),
    )


def _outside(routes: Routes) -> dict[str, Any]:
    routed = routes.routed
    share = [float((1 - b[r]).mean()) for b, r in zip(routes.brain, routed, strict=True) if r.any()]
    found = over_heads(share)
    return _check(
        "outside_brain",
        "Cells hold brain",
        found,
        "<= 0.5",
        found["value"] <= 0.5,
        f"{found['value']:.0%} of the volume of the routed cells lies outside the brain, because cells at its edge are "
        "cubes; maps and tables count the part inside alone.",
    )


def _alive(loads: Sequence[np.ndarray]) -> dict[str, Any]:
    """Judge the worst run: what one lets lie, another serves under the same name, and their mean hides it."""
    dead, top = max(int((load < DEAD).sum()) for load in loads), max(float(load.max()) for load in loads)
    mean, where = np.mean(loads, axis=0), "" if len(loads) == 1 else "In the worst run "
    return _check(
        "experts_alive",
        "Every expert works",
        {"value": dead, "low": None, "high": None},
        "no expert below 1 % of the tokens, none above 50 %",
        dead == 0 and top <= 0.5,
        f"{where}{dead} of {len(mean)} experts serve less than 1 % of the tokens; the busiest serves {top:.1%} "
        f"({1 / len(mean):.1%} would be even).",
        load={f"E{e:02d}": float(share) for e, share in enumerate(mean)},
        load_cv=max(load_statistics(torch.from_numpy(load))["cv"] for load in loads),
        largest_share=top,
    )


def _occlusion(found: Mapping[str, float]) -> dict[str, Any]:
    value, chance = found["value"], found["null_high"]
    return _check(
        "occlusion",
        "Hiding the input hurts where experts matter",
        found,
        f"above {chance:.2f}, the 97.5 % point for maps turned at random",
        value > chance,
        f"Rank correlation over cells of two maps made in different ways: how the age changes when an expert's "
        f"output is replaced, and when the head is painted grey there: {value:.2f}.",
        turned_high=chance,
    )
