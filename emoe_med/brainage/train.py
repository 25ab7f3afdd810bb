"""Train brain-age runs: one run folder a fold, under one parent run in MLflow."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import torch

from emoe_med.brainage.cohort import Cohort, chain_options, prepare_cohort
from emoe_med.brainage.compare import compare_groups
from emoe_med.brainage.evaluate import evaluate_run, write_reports
from emoe_med.brainage.map_record import publish_maps, record_maps
from emoe_med.brainage.maps.make import maps_after_training
from emoe_med.brainage.task import BrainAgeTask
from emoe_med.brainage.viewer import write_viewer
from emoe_med.config import BrainAgeConfig, dump_run
from emoe_med.data.brain import ChainOptions
from emoe_med.data.contract import Spread
from emoe_med.data.manifest import Manifest
from emoe_med.data.sidecar import strip_statement
from emoe_med.data.splits import split_warnings
from emoe_med.storage import replace_file
from emoe_med.training.arm import (
    check_arm,
    check_folders,
    check_same,
    config_digest,
    flat,
    headline,
    is_done,
    tracked,
)
from emoe_med.training.progress import counted
from emoe_med.training.ranks import Machine, joined
from emoe_med.training.single_gated import fit_run

LOG = logging.getLogger("emoe_med")


def train(
    config: BrainAgeConfig,
    manifest: Manifest,
    out: Path,
    folds: list[int],
    cache_dir: Path,
    resume: bool = False,
    jobs: int = 0,
    synthetic: bool = False,
) -> list[Path]:
    """Train and evaluate the given folds of one configuration; returns their run folders.

    Args:
        config: The run.
        manifest: Scans with ages.
        out: Folder of all runs and of the default tracking store.
        folds: Folds to test on, each a run of its own.
        cache_dir: Cache of volumes, shared by all runs that use it.
        resume: Skip finished folds and go on with unfinished ones.
        jobs: Processes that fill the cache.
        synthetic: Label every output as synthetic.

    Raises:
        EmoeError: With the exit code of what went wrong; see docs/reliability.md.
    """
    group = out / config.name
    run_dirs = [group / f"seed{config.training.seed}-fold{fold}" for fold in folds]
    with joined() as machine:
        with machine.together():
            check_folders(run_dirs, resume)
            check_arm(config, group)
            chain = _settle_chain(config, manifest)
        cohort = prepare_cohort(manifest, chain, cache_dir, jobs, counted("reading scans"), machine)
        with machine.together():
            cohort.steps()  # one for all, before anything is learned
            digests = {fold: _digests(config, cohort, fold) for fold in folds}
            for fold, run_dir in zip(folds, run_dirs, strict=True):
                check_same(run_dir, digests[fold])
        with tracked(group, out, config, "brainage", "group", machine=machine):
            pass  # the parent exists from now on; its children name it
        for fold, run_dir in zip(folds, run_dirs, strict=True):
            if not machine.gather(is_done(run_dir))[0]:
                _train_fold(config, cohort, out, run_dir, fold, digests[fold], resume, synthetic, machine)
        with machine.together():
            if machine.first:
                _summarise(config, out, group)
                if config.evaluation.maps and len(run_dirs) > 1:
                    done = [run for run in sorted(group.glob("seed*-fold*")) if is_done(run)]
                    maps_after_training(group, done, cohort, publish_maps)
    return run_dirs


def _settle_chain(config: BrainAgeConfig, manifest: Manifest) -> ChainOptions:
    chain = chain_options(config, manifest)
    if chain.mask == "head":
        LOG.warning("note: the whole head is used, centred but not aligned; masks or labels would make it a brain")
    if config.data.spacing_mm < 2 and not torch.cuda.is_available():
        LOG.warning("note: this is a preset for a GPU and there is none; configs/brainage/*_4mm.yaml suit a CPU")
    return chain


def _summarise(config: BrainAgeConfig, out: Path, group: Path) -> None:
    """Give the parent run the error pooled over all folds and seeds that are done."""
    result, table = compare_groups([group])
    found = result[group.name]
    replace_file(group / "summary.json", (json.dumps(found, indent=1) + "\n").encode())
    replace_file(group / "summary.md", (table + "\n").encode())
    with tracked(group, out, config, "brainage", "group") as tracker:
        values = {"test/mae": found["mae"]["value"], "test/mae_ensemble": found["mae_ensemble"]["value"]}
        tracker.results(values)
        for name in ("summary.json", "summary.md"):
            tracker.log_artifact(group / name, "tables")


def _digests(config: BrainAgeConfig, cohort: Cohort, fold: int) -> dict[str, str]:
    """What must be equal for a run to be gone on with, or to stand as it is."""
    return {
        "config": config_digest(config),
        "manifest": cohort.manifest.sha256,
        "chain": cohort.heads.options.digest(),
        "fold": str(fold),
    }


def _train_fold(
    config: BrainAgeConfig,
    cohort: Cohort,
    out: Path,
    run_dir: Path,
    fold: int,
    digests: dict[str, str],
    resume: bool,
    synthetic: bool,
    machine: Machine,
) -> None:
    splits, scans = cohort.split(config, fold), cohort.manifest.scans
    for warning in split_warnings(scans, splits):
        LOG.warning("note: %s", warning)
    where = {name: np.flatnonzero(splits["split"] == name).tolist() for name in ("train", "val")}
    meta = {
        "chain": cohort.heads.options.contract(),
        "manifest": cohort.manifest.sha256,
        "strip": strip_statement(
            [scans[index] for index in where["train"]],
            [cohort.heads.stated(index) for index in where["train"]],
            cohort.heads.options.mask,
        )
        | {"prepared": cohort.steps()},
        "fingerprint": Spread.of(np.array([cohort.readings[index].fingerprint for index in where["train"]])).to_json(),
        "similarity": _similarity(cohort, where["train"]),
        "seen": sorted(cohort.readings[index].content for index in where["train"] + where["val"]),
        "seen_voxels": sorted(cohort.readings[index].voxels for index in where["train"] + where["val"]),
        "persons": cohort.describe(where["train"]),
        "synthetic": synthetic,
    }
    task = BrainAgeTask(config, cohort.heads, where["train"], where["val"], digests, meta)
    name = f"{config.name}-seed{config.training.seed}-fold{fold}"
    with tracked(run_dir, out, config, "brainage", name, parent=run_dir.parent, machine=machine) as tracker:
        with machine.together():
            if machine.first:
                replace_file(run_dir / "config.yaml", dump_run(config).encode())
                replace_file(run_dir / "splits.csv", splits.to_csv(index=False).encode())
                tracker.params(flat(config.model_dump(mode="json")))
                tracker.tags({"arm": config.name, "fold": fold, "seed": config.training.seed, "synthetic": synthetic})
        gated = getattr(config.model, "single_gated", None)
        fit_run(task, config.training, gated, run_dir, tracker, resume)
        with machine.together():
            if machine.first:
                metrics = evaluate_run(run_dir, cohort, splits)
                tracker.results(headline(metrics))
                page, figures = write_reports(run_dir)
                tracker.log_artifact(page, "report")
                tracker.log_artifact(figures, "metrics")

                def publish(maps: Path) -> None:
                    write_viewer(maps)
                    record_maps(tracker, maps)

                if config.evaluation.maps:
                    maps_after_training(run_dir, [run_dir], cohort, publish)
                LOG.info("fold %d: test MAE %.2f years", fold, metrics["test"]["mae"]["value"])


def _similarity(cohort: Cohort, indices: list[int]) -> dict[str, float | None]:
    """Lowest and median similarity of the training scans with the template; None where none was aligned."""
    values = [cohort.readings[index].similarity for index in indices]
    if not np.isfinite(values).all():
        return {"low": None, "median": None}
    return {"low": float(np.min(values)), "median": float(np.median(values))}
