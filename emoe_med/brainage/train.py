"""Train brain-age runs: one run folder a fold, under one parent run in MLflow."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emoe_med.brainage.cohort import Cohort, chain_options, prepare_cohort
from emoe_med.brainage.compare import compare_groups
from emoe_med.brainage.evaluate import evaluate_run, write_reports
from emoe_med.brainage.task import BrainAgeTask
from emoe_med.config import BrainAgeConfig, dump_run, load_run
from emoe_med.data.contract import Spread
from emoe_med.data.manifest import Manifest
from emoe_med.data.sidecar import strip_statement
from emoe_med.data.splits import split_warnings
from emoe_med.errors import CheckpointError, ConfigError, Fault
from emoe_med.training.journal import read_journal
from emoe_med.training.loop import fit
from emoe_med.training.progress import counted
from emoe_med.training.run_folder import replace_file
from emoe_med.training.tracking import Tracker

LOG = logging.getLogger("emoe_med")
PARENT_WAIT_S = 60  # runs of one arm that start together take turns at their parent's folder


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
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(Fault("RUN-RANKS", "this verb runs in one process; several ranks are not supported yet"))
    group = out / config.name
    run_dirs = [group / f"seed{config.training.seed}-fold{fold}" for fold in folds]
    _check_folders(run_dirs, resume)
    _check_arm(config, group)
    chain = chain_options(config, manifest)
    if chain.mask == "head":
        LOG.warning("note: the whole head is used, centred but not aligned; masks or labels would make it a brain")
    if config.data.spacing_mm < 2 and not torch.cuda.is_available():
        LOG.warning("note: this is a preset for a GPU and there is none; configs/brainage/*_4mm.yaml suit a CPU")
    cohort = prepare_cohort(manifest, chain, cache_dir, jobs, counted("reading scans"))
    digests = {fold: _digests(config, cohort, fold) for fold in folds}
    for fold, run_dir in zip(folds, run_dirs, strict=True):
        _check_same(run_dir, digests[fold])
    with _tracker(group, out, config, "group"):
        pass  # the parent exists from now on; its children name it
    for fold, run_dir in zip(folds, run_dirs, strict=True):
        if not _is_done(run_dir):
            _train_fold(config, cohort, out, run_dir, fold, digests[fold], resume, synthetic)
    _summarise(config, out, group)
    return run_dirs


def _summarise(config: BrainAgeConfig, out: Path, group: Path) -> None:
    """Give the parent run the error pooled over all folds and seeds that are done."""
    result, table = compare_groups([group])
    found = result[group.name]
    replace_file(group / "summary.json", (json.dumps(found, indent=1) + "\n").encode())
    replace_file(group / "summary.md", (table + "\n").encode())
    with _tracker(group, out, config, "group") as tracker:
        values = {"test/mae": found["mae"]["value"], "test/mae_ensemble": found["mae_ensemble"]["value"]}
        tracker.metrics(len(found["mae_by_run"]), values)
        for name in ("summary.json", "summary.md"):
            tracker.log_artifact(group / name, "tables")


def _check_folders(run_dirs: list[Path], resume: bool) -> None:
    used = [
        run_dir for run_dir in run_dirs if (run_dir / "checkpoints").exists() or (run_dir / "metrics.json").exists()
    ]
    if used and not resume:
        hint = "give --resume to go on, or another --out or --set name="
        raise ConfigError(*(Fault("RUN-EXISTS", "this run folder is in use", str(d), hint=hint) for d in used))


def _is_done(run_dir: Path) -> bool:
    """Whether a run came to its end: its record says so after report and figures were written."""
    events = (event for _, event in read_journal(run_dir / "journal.jsonl") if event["kind"] == "status")
    return [event["status"] for event in events][-1:] == ["FINISHED"]


def _check_arm(config: BrainAgeConfig, group: Path) -> None:
    """Refuse to mix configurations under one name: the runs of an arm differ in fold and training seed alone."""
    for path in sorted(group.glob("seed*-fold*/config.yaml")):
        other = load_run(path)
        seeds_aside = {"training": other.training.model_copy(update={"seed": config.training.seed})}
        if other.model_copy(update=seeds_aside) != config:
            reason = f"{config.name} has runs of another configuration here"
            raise ConfigError(Fault("RUN-OTHER", reason, str(path), hint="give --out or --set name= another value"))


def _digests(config: BrainAgeConfig, cohort: Cohort, fold: int) -> dict[str, str]:
    """What must be equal for a run to be gone on with, or to stand as it is."""
    return {
        "config": hashlib.sha256(dump_run(config).encode()).hexdigest(),
        "manifest": cohort.manifest.sha256,
        "chain": cohort.heads.options.digest(),
        "fold": str(fold),
    }


def _check_same(run_dir: Path, digests: dict[str, str]) -> None:
    """Refuse a run folder of another configuration, manifest or chain before anything in it is touched."""
    path = run_dir / "environment.json"
    before = json.loads(path.read_text()) if path.is_file() else digests
    faults = [
        Fault("CKPT-OTHER", f"{name} was {before.get(name)} in this run and is {now} now", str(run_dir))
        for name, now in digests.items()
        if before.get(name) != now
    ]
    if faults:
        raise CheckpointError(*faults)


@contextmanager
def _tracker(run_dir: Path, out: Path, config: BrainAgeConfig, run_name: str, parent: Path | None = None):
    tracker = Tracker(
        run_dir,
        out=out,
        experiment="brainage",
        run_name=run_name,
        parent=parent,
        uri=None if config.tracking.mlflow else "none",
        allow_remote=config.tracking.allow_remote,
        words=_words(config),
    )
    deadline = time.monotonic() + PARENT_WAIT_S
    while True:
        try:
            tracker.__enter__()
            break
        except ConfigError as error:
            if parent is not None or error.faults[0].code != "RUN-LOCKED" or time.monotonic() > deadline:
                raise
            time.sleep(0.2)
    try:
        yield tracker
    except BaseException as error:
        tracker.__exit__(type(error), error, error.__traceback__)
        raise
    tracker.__exit__(None, None, None)


def _train_fold(
    config: BrainAgeConfig,
    cohort: Cohort,
    out: Path,
    run_dir: Path,
    fold: int,
    digests: dict[str, str],
    resume: bool,
    synthetic: bool,
) -> None:
    splits, scans = cohort.split(config, fold), cohort.manifest.scans
    for warning in split_warnings(scans, splits):
        LOG.warning("note: %s", warning)
    where = {name: np.flatnonzero(splits["split"] == name).tolist() for name in ("train", "val")}
    meta = {
        "chain": cohort.heads.options.contract(),
        "manifest": cohort.manifest.sha256,
        "strip": strip_statement([scans[index] for index in where["train"]], cohort.heads.options.mask),
        "fingerprint": Spread.of(np.array([cohort.readings[index].fingerprint for index in where["train"]])).to_json(),
        "similarity": _similarity(cohort, where["train"]),
        "seen": sorted(cohort.readings[index].content for index in where["train"] + where["val"]),
        "seen_voxels": sorted(cohort.readings[index].voxels for index in where["train"] + where["val"]),
        "synthetic": synthetic,
    }
    task = BrainAgeTask(config, cohort.heads, where["train"], where["val"], digests, meta)
    name = f"{config.name}-seed{config.training.seed}-fold{fold}"
    with _tracker(run_dir, out, config, name, parent=run_dir.parent) as tracker:
        replace_file(run_dir / "config.yaml", dump_run(config).encode())
        replace_file(run_dir / "splits.csv", splits.to_csv(index=False).encode())
        tracker.params(_flat(config.model_dump(mode="json")))
        tracker.tags({"arm": config.name, "fold": fold, "seed": config.training.seed, "synthetic": synthetic})
        result = fit(task, config.training, run_dir, tracker, resume)
        metrics = evaluate_run(run_dir, cohort, splits)
        tracker.metrics(result.step, headline(metrics))
        page, figures = write_reports(run_dir)
        tracker.log_artifact(page, "report")
        tracker.log_artifact(figures, "metrics")
        LOG.info("fold %d: test MAE %.2f years", fold, metrics["test"]["mae"]["value"])


def _similarity(cohort: Cohort, indices: list[int]) -> dict[str, float | None]:
    """Lowest and median similarity of the training scans with the template; None where none was aligned."""
    values = [cohort.readings[index].similarity for index in indices]
    if not np.isfinite(values).all():
        return {"low": None, "median": None}
    return {"low": float(np.min(values)), "median": float(np.median(values))}


def headline(metrics: dict[str, Any]) -> dict[str, float]:
    """Return the figures of metrics.json that a table of runs shows, under their tracking names."""
    found = {}
    for split in ("test", "val"):
        for name, estimate in metrics.get(split, {}).items():
            if estimate["value"] is not None:
                found[f"{split}/{name}"] = estimate["value"]
    return found


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _words(config: BrainAgeConfig) -> set[str]:
    """Texts of a configuration that may be tracked: its choices, and the name of the arm."""
    return {value for value in _flat(config.model_dump(mode="json")).values() if isinstance(value, str)}
