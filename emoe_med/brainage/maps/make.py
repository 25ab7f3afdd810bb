"""From runs and heads to `expert_maps/`: one run, or all runs of an arm with their experts matched."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from emoe_med.brainage.cohort import Cohort, prepare_cohort
from emoe_med.brainage.inference import TrainedModel
from emoe_med.brainage.maps.background import Background
from emoe_med.brainage.maps.cells import CellGrid
from emoe_med.brainage.maps.montage import draw_montage
from emoe_med.brainage.maps.observe import VIEW, Observed, observe
from emoe_med.brainage.maps.parcels import ParcelCounts, Parcels
from emoe_med.brainage.maps.regions import RegionStatistics
from emoe_med.brainage.maps.routes import Routes, joined
from emoe_med.brainage.maps.stability import RunMap, match_experts, reference_run, reliability, stability
from emoe_med.brainage.maps.verdicts import sanity
from emoe_med.brainage.maps.write import group_maps, write_json, write_maps, write_parcels, write_tables
from emoe_med.brainage.prepared import prepared_like
from emoe_med.data.manifest import Manifest
from emoe_med.errors import ConfigError, DataError, EmoeError, Fault
from emoe_med.storage import replace_file
from emoe_med.training.progress import counted

LOG = logging.getLogger("emoe_med")
MIN_PERSONS = 20  # a mean over fewer real persons could show one of them


@dataclass(frozen=True)
class MapOptions:
    """What to make.

    Attributes:
        atlas: File or name; None takes the labels column of the manifest, where every head has labels.
        labels: Table of the names of atlas or labels.
        everyone: All heads of the manifest, those that the run learned from among them.
        contribution: Heads whose contribution is measured cell by cell, over all runs, but two a run at least.
        occlusion: The same of occlusion.
        checked: Heads that are moved and mirrored, over all runs, but one a run at least.
    """

    atlas: str | None = None
    labels: Path | None = None
    everyone: bool = False
    contribution: int = 40
    occlusion: int = 40
    checked: int = 20


def runs_in(folder: Path) -> list[Path]:
    """Return the runs of a folder: itself where it is one, else the trained runs of an arm.

    Raises:
        ConfigError: There is none (MAPS-RUN).
    """
    if (folder / "config.yaml").is_file():
        return [folder]
    runs = sorted(path.parent for path in folder.glob("seed*-fold*/checkpoints"))
    if not runs:
        hint = "name a fold, as runs/emoe_4mm/seed0-fold0, or its arm, as runs/emoe_4mm"
        raise ConfigError(Fault("MAPS-RUN", "no trained run in this folder", str(folder), hint=hint))
    return runs


def make_maps(folder: Path, manifest: Manifest, cache_dir: Path, options: MapOptions, jobs: int = 0) -> Path:
    """Make the maps of a run or an arm from the heads of a manifest, and return their folder.

    Heads that a run did not learn from are taken: its test fold of the manifest that it was trained on, or all
    heads of another one. Raw heads go through the steps of the training scans first, as in `predict`.

    Raises:
        EmoeError: No routed layer, cells above 16 mm, an atlas for unaligned heads, fewer than 20 persons.
    """
    runs = runs_in(folder)
    models = [TrainedModel.load(run) for run in runs]
    scans, unusable = prepared_like(models[0].contract, manifest.scans, cache_dir, jobs)
    if unusable:
        raise DataError(*(replace(fault, manifest=manifest.path.name) for fault in unusable))
    manifest = replace(manifest, scans=tuple(scans))
    cohort = prepare_cohort(manifest, models[0].chain(), cache_dir, jobs, counted("reading scans"))
    heads = [_heads(run, m, cohort, options.everyone) for run, m in zip(runs, models, strict=True)]
    return write_all(folder, runs, models, cohort, heads, options)


def maps_after_training(folder: Path, runs: Sequence[Path], cohort: Cohort, publish: Callable[[Path], object]) -> None:
    """Make the maps of runs that were just trained, as `maps` does; a failure is told and costs nothing.

    Args:
        folder: Run, or arm of the runs.
        runs: Trained on the manifest of ``cohort``.
        cohort: Its scans.
        publish: Takes the folder of the maps, where there is something to map.
    """
    try:
        models = [TrainedModel.load(run) for run in runs]
        layers = models[0].net.routed_layers().values()
        if not any(layer.router.num_experts > 1 for layer in layers):
            return
        heads = [_heads(run, model, cohort, False) for run, model in zip(runs, models, strict=True)]
        publish(write_all(folder, runs, models, cohort, heads, MapOptions()))
    except EmoeError as error:
        LOG.warning("note: no expert maps: %s", error.faults[0].reason)
    except Exception:  # the trained model is worth more than its picture
        LOG.warning("note: no expert maps", exc_info=True)


def write_all(
    folder: Path,
    runs: Sequence[Path],
    models: Sequence[TrainedModel],
    cohort: Cohort,
    heads: Sequence[Sequence[int]],
    options: MapOptions,
) -> Path:
    """Observe the given heads through each run, and write `<folder>/expert_maps`."""
    grid, space = CellGrid.of(models[0].net, models[0].config), models[0].chain().space
    synthetic = bool(models[0].contract["synthetic"])
    _enough(cohort, heads, options, synthetic)
    if none := [run.name for run, some in zip(runs, heads, strict=True) if not some]:
        reason = f"no head here that {', '.join(none)} did not learn from"
        raise DataError(Fault("MAPS-FEW", reason, hint="map those runs alone that have some, or give --everyone"))
    parcels = (
        Parcels.of_atlas(options.atlas, options.labels, grid, space)
        if options.atlas
        else Parcels.of_heads(options.labels, grid, list(cohort.heads.scans))
    )
    counts = ParcelCounts(parcels) if parcels else None
    least = 1 if synthetic else MIN_PERSONS
    background = Background(grid.spacing_mm / grid.oversample, parcels is not None, least)
    seen: list[Observed] = []
    # of a run's only head nothing could be said that is not its run's
    measured = [n and max(n, 2 * len(runs)) for n in (options.contribution, options.occlusion)]
    shares = [_share(n, len(runs)) for n in (*measured, max(options.checked, len(runs)))]
    for number, (run, model, some) in enumerate(zip(runs, models, heads, strict=True)):
        parts = [share[number] for share in shares]
        progress = counted(f"heads of {run.name}")
        seen.append(
            observe(model, cohort, some, grid, background, counts, *parts, number / len(runs), run.name, progress)
        )
    compared = [_run_map(*parts) for parts in zip(runs, seen, heads, strict=True)]
    found = stability(compared, grid.centres_mm)
    routes = joined([_renamed(observed, compared, number) for number, observed in enumerate(seen)])
    routes = routes.of_many(least)
    (layer,) = models[0].net.routed_layers()
    facts: dict[str, Any] = {
        "space": space,
        "subjects": len(np.unique(routes.person)),
        "subjects_contribution": len(np.unique(routes.person[routes.contribution_of])),
        "subjects_occlusion": len(np.unique(routes.person[routes.occlusion_of])),
        "model": models[0].config.name,
        "runs": [run.name for run in runs],
        "weights": [_digest(model) for model in models],
        "held_out": not options.everyone,
        "synthetic": synthetic,
        "view": VIEW,
        "verdict": found["verdict"],
    }
    out = folder / "expert_maps"
    index = write_maps(out, maps := group_maps(routes, least), background, grid, layer, facts)
    checks = sanity(
        routes,
        [observed.routes for observed in seen],
        grid,
        [pair for observed in seen for pair in observed.shifted],
        [share for observed in seen for share in observed.mirrored],
        [r for observed in seen for r in observed.random_router],
    )
    if counts is not None:
        tables = RegionStatistics(routes, counts, grid, least=least)
        names = tables.common()
        volume = background.majority() if counts.parcels.volume is None else counts.parcels.volume
        volume = np.where(np.isin(volume, list(names)), volume, 0)
        write_parcels(out, index, volume, names, counts.parcels.name, background)
        write_tables(out, tables.regions(), tables.parcels())
    write_json(out, stability=found, sanity=checks)
    replace_file(out / "montage.png", draw_montage(maps, background, grid, index))
    write_json(out, maps=index)
    return out


def _heads(run: Path, model: TrainedModel, cohort: Cohort, everyone: bool) -> list[int]:
    """Choose the heads that a run may be looked at with."""
    count = len(cohort.manifest.scans)
    if everyone:
        return list(range(count))
    trained_on = json.loads((run / "environment.json").read_text()).get("manifest")
    if trained_on == cohort.manifest.sha256:
        splits = pd.read_csv(run / "splits.csv")
        return np.flatnonzero(splits["split"] == "test").tolist()
    known = {*model.contract["seen"], *model.contract.get("seen_voxels", ())}
    return [i for i, reading in enumerate(cohort.readings) if known.isdisjoint((reading.content, reading.voxels))]


def _enough(cohort: Cohort, heads: Sequence[Sequence[int]], options: MapOptions, synthetic: bool) -> None:
    """Refuse maps of so few real persons that one of them could be seen in them (MAPS-FEW)."""
    persons = cohort.table()["participant_id"].to_numpy()
    count = len({persons[head] for some in heads for head in some})
    counts = {"heads": count, "--contribution": options.contribution, "--occlusion": options.occlusion}
    lowest = 1 if synthetic else MIN_PERSONS
    few = {name: n for name, n in counts.items() if n < lowest and (n or name == "heads")}
    if few:
        told = ", ".join(f"{name} {n}" for name, n in few.items())
        reason = f"a map of so few persons could show one of them: {told}; {lowest} are needed"
        raise DataError(Fault("MAPS-FEW", reason, hint="name the arm's folder for all folds, or a larger manifest"))


def _digest(model: TrainedModel) -> str:
    """Return the SHA-256 of a run's weights, by which anyone who has them knows them again."""
    assert model.folder is not None
    return hashlib.sha256((model.folder / "model.safetensors").read_bytes()).hexdigest()


def _share(total: int, parts: int) -> list[int]:
    """Deal a number of heads out to runs."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def _run_map(run: Path, observed: Observed, heads: Sequence[int]) -> RunMap:
    seed, _, fold = run.name.removeprefix("seed").partition("-fold")
    routes = observed.routes
    inside = routes.inside()
    persons, number = np.unique(routes.person, return_inverse=True)
    halves = [routes.occupancy(np.flatnonzero(number % 2 == half))[inside] for half in (0, 1)]
    return RunMap(
        run.name,
        int(seed) if seed.isdigit() else 0,
        int(fold) if fold.isdigit() else 0,
        routes.occupancy(),
        routes.routed.sum(0),
        inside,
        reliability(*halves) if len(persons) > 1 else float("nan"),
        np.asarray(heads),
        routes.person,
        routes.expert[:, :, 0],
    )


def _renamed(observed: Observed, compared: list[RunMap], number: int) -> Routes:
    """Call the experts of a run by the names of the reference run's."""
    if len(compared) == 1:
        return observed.routes
    inside = np.all([run.inside for run in compared], axis=0)
    reference = compared[reference_run(compared)]
    match = match_experts(reference.occupancy[inside], compared[number].occupancy[inside])
    name = np.empty(len(match.expert), int)
    name[match.expert] = np.arange(len(match.expert))
    return observed.routes.renamed(name)
