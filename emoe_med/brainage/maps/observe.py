"""Look at heads through one trained network, one after the other, and keep what maps are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from emoe_med.brainage.cohort import Cohort
from emoe_med.brainage.inference import TrainedModel
from emoe_med.brainage.maps.background import Background
from emoe_med.brainage.maps.cells import CellGrid
from emoe_med.brainage.maps.influence import contributions, occlusions
from emoe_med.brainage.maps.parcels import ParcelCounts
from emoe_med.brainage.maps.routes import Routes, route_tokens, tokens_of
from emoe_med.brainage.maps.sanity import follows_mirror, follows_shift, random_router_r
from emoe_med.data.augment import to_model_grid

REROUTED = 20  # heads of each run that untrained routers are shown
VIEW = "one pass of each head as it is (no mirror image, no grid phases), float32"


@dataclass
class Observed:
    """What one run saw.

    Attributes:
        routes: Of its heads.
        shifted, mirrored, random_router: See `verdicts.sanity`.
    """

    routes: Routes
    shifted: list[tuple[float, float]] = field(default_factory=list)
    mirrored: list[float] = field(default_factory=list)
    random_router: list[float] = field(default_factory=list)


def observe(
    model: TrainedModel,
    cohort: Cohort,
    heads: Sequence[int],
    grid: CellGrid,
    background: Background,
    counts: ParcelCounts | None,
    contribution: int,
    occlusion: int,
    checked: int,
    phase: float = 0.0,
    run: str = "",
    progress: Callable[[Sequence[int]], Iterator[int]] = iter,
) -> Observed:
    """Route heads, measure influence at the cells of some of them, and check the map's sanity on some.

    Args:
        model: Trained network.
        cohort: Scans in the model's space.
        heads: Which of them.
        grid: Cells of the network.
        background: Takes the heads.
        counts: Takes their parcels; None for no parcels.
        contribution: Heads, evenly spread over ``heads``, whose contribution is measured cell by cell.
        occlusion: The same of occlusion.
        checked: Heads to move and to mirror.
        phase: Runs of other phases, 0 to 1, measure other heads of the same.
        run: Name of the run.
        progress: Wraps the heads, e.g. for a progress bar.
    """
    net, device = model.net, next(model.net.parameters()).device
    numbers = {"c": contribution, "o": occlusion, "s": checked, "r": REROUTED}
    wanted = {name: set(_spread(len(heads), number, phase)) for name, number in numbers.items()}
    rows: dict[str, list[Any]] = {name: [] for name in ("expert", "gate", "brain", "c", "o")}
    found, kept = Observed(Routes.of(np.zeros((0, 1, 1), int), np.zeros((0, 1, 1)), 1)), []
    persons = cohort.table()["participant_id"].to_numpy()
    for place, head in enumerate(progress(heads)):
        entry = cohort.heads.entry(head)
        image = to_model_grid(entry["image"][None].float(), model.config.data.oversample).to(device)
        image = image.to(memory_format=torch.channels_last_3d)
        tokens = tokens_of(net, image)
        expert, gate = route_tokens(net, *tokens)
        voxels = entry["image"][0].float().numpy()
        inside = voxels != 0
        rows["expert"].append(expert)
        rows["gate"].append(gate)
        rows["brain"].append((grid.count(inside) / (grid.edge * grid.oversample) ** 3).astype(np.float32))
        labels = None
        if counts is not None:
            labels = counts.add(head, cohort.heads.scans[head], entry["matrix"].numpy(), inside)
        background.add(persons[head], voxels, labels)
        if place in wanted["c"]:
            rows["c"].append(contributions(net, image))
        if place in wanted["o"]:
            rows["o"].append(occlusions(net, image, grid))
        if place in wanted["s"]:
            found.shifted.append(follows_shift(net, image, grid, expert))
            found.mirrored.append(follows_mirror(net, image, grid, expert))
        if place in wanted["r"]:
            kept.append(tokens)
    if kept:
        found.random_router = random_router_r(net, model.config, kept)
    found.routes = _routes(rows, cohort, heads, persons, wanted, net.routed_layers(), run)
    return found


def _spread(count: int, wanted: int, phase: float) -> list[int]:
    """Choose ``wanted`` of ``count`` places, evenly; another phase in 0 to 1 chooses others."""
    wanted = min(wanted, count)
    return np.floor((np.arange(wanted) + phase) * count / max(wanted, 1)).astype(int).tolist()


def _routes(
    rows: dict[str, list[Any]],
    cohort: Cohort,
    heads: Sequence[int],
    persons: np.ndarray,
    wanted: dict[str, set[int]],
    layers: Any,
    run: str,
) -> Routes:
    (layer,) = layers.values()
    ages = [cohort.heads.scans[head].age for head in heads]
    known = {
        "brain": np.stack(rows["brain"]),
        "age": np.array([np.nan if age is None else age for age in ages]),
        "person": persons[list(heads)],
        "run": np.full(len(heads), run),
    }
    for name, key in (("contribution", "c"), ("occlusion", "o")):
        if rows[key]:
            known |= {name: np.stack(rows[key]), f"{name}_of": np.array(sorted(wanted[key]))}
    return Routes.of(np.stack(rows["expert"]), np.stack(rows["gate"]), layer.router.num_experts, **known)
