"""Train vision runs: one run folder a seed, under one parent run in MLflow."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from emoe_med.config import dump_run
from emoe_med.data.image_layouts import Listing
from emoe_med.data.images import DATASETS, ImageDataset, list_images, split
from emoe_med.errors import CheckpointError, ConfigError, Fault
from emoe_med.models.normalisation import flaw
from emoe_med.models.weights import ViTWeights, read_weights
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
from emoe_med.training.ranks import Machine, joined
from emoe_med.training.single_gated import fit_run
from emoe_med.training.tracking import Tracker
from emoe_med.vision.config import VisionConfig
from emoe_med.vision.evaluate import TrainedClassifier, evaluate_run
from emoe_med.vision.heatmap import FOLDER, PAGE, write_heatmap
from emoe_med.vision.task import VisionTask

LOG = logging.getLogger("emoe_med")


def train(
    config: VisionConfig, root: Path | None, out: Path, seeds: list[int] | None = None, resume: bool = False
) -> list[Path]:
    """Train and evaluate one configuration with the given seeds; returns the run folders.

    Args:
        config: The run.
        root: Folder or archive of the images; not needed for a data set that ships with a library.
        out: Folder of all runs and of the default tracking store.
        seeds: Training seeds, each a run of its own; the one of the configuration if not given.
        resume: Skip finished seeds and go on with unfinished ones.

    Raises:
        EmoeError: With the exit code of what went wrong; see docs/reliability.md.
    """
    runs = [_with_seed(config, seed) for seed in seeds or [config.training.seed]]
    group = out / config.name
    run_dirs = [group / f"seed{run.training.seed}" for run in runs]
    with joined() as machine:
        with machine.together():
            check_folders(run_dirs, resume)
            check_arm(config, group)
            listing = list_images(config.data.dataset, root)
            options = config.data
            parts = split(
                listing.train.labels, options.val_share, options.train_images, options.split_seed, listing.held
            )
            start = None if config.model.weights is None else read_weights(Path(config.model.weights))
            if start is None and config.model.freeze:
                hint = "give --set model.weights=FILE, written by import-weights"
                raise ConfigError(Fault("CFG-FREEZE", "model.freeze without weights holds random ones", hint=hint))
            sources = {"contents": listing.contents()}
            sources |= {} if start is None else {"weights": start.sha256}
            meta = _meta(config, listing.classes, start)
            for run, run_dir in zip(runs, run_dirs, strict=True):
                check_same(run_dir, {"config": config_digest(run), **sources})
        with tracked(group, out, config, "vision", "group", machine=machine):
            pass  # the parent exists from now on; its children name it
        for run, run_dir in zip(runs, run_dirs, strict=True):
            if not machine.gather(is_done(run_dir))[0]:
                task = _task(run, listing, parts, start, sources, meta)
                _train_seed(task, listing, parts, out, run_dir, resume, machine)
        with machine.together():
            if machine.first:
                _summarise(config, out, group)
    return run_dirs


def _with_seed(config: VisionConfig, seed: int) -> VisionConfig:
    return config.model_copy(update={"training": config.training.model_copy(update={"seed": seed})})


def _meta(config: VisionConfig, classes: Sequence[str], start: ViTWeights | None) -> dict[str, Any]:
    """Return what images must be like for the network, as checkpoints keep it.

    Raises:
        ConfigError, CheckpointError: The constants to normalise by are for another number of channels.
    """
    known = DATASETS[config.data.dataset]
    constants = {
        name: getattr(config.data, name) or getattr(known if start is None else start, name) for name in ("mean", "std")
    }
    if reason := flaw(constants["mean"], constants["std"], known.channels):
        if config.data.mean is not None:
            raise ConfigError(Fault("CFG-NORM", f"data.mean and data.std: {reason} of {config.data.dataset}"))
        reason = f"{reason} of {config.data.dataset}"
        raise CheckpointError(Fault("WGT-NORM", reason, config.model.weights))
    return {"classes": list(classes), "channels": known.channels, **constants}


def _task(
    config: VisionConfig,
    listing: Listing,
    parts: tuple[np.ndarray, np.ndarray],
    start: ViTWeights | None,
    sources: Mapping[str, str],
    meta: dict[str, Any],
) -> VisionTask:
    data = ImageDataset(listing.train, config.data.resize, meta["channels"])
    digests = {"config": config_digest(config), **sources}  # must be equal for a run to be gone on with
    return VisionTask(config, data, parts[0].tolist(), parts[1].tolist(), digests, meta, start)


def _train_seed(
    task: VisionTask,
    listing: Listing,
    parts: tuple[np.ndarray, np.ndarray],
    out: Path,
    run_dir: Path,
    resume: bool,
    machine: Machine,
) -> None:
    config, data = task.config, task.data
    test = ImageDataset(listing.test, data.size, data.channels)
    name = f"{config.name}-seed{config.training.seed}"
    with tracked(run_dir, out, config, "vision", name, parent=run_dir.parent, machine=machine) as tracker:
        with machine.together():
            if machine.first:
                replace_file(run_dir / "config.yaml", dump_run(config).encode())
                replace_file(run_dir / "splits.csv", _splits(len(data), *parts).to_csv(index=False).encode())
                tracker.params(flat(config.model_dump(mode="json")))
                tracker.tags({"arm": config.name, "seed": config.training.seed, "dataset": config.data.dataset})
        gated = getattr(config.model, "single_gated", None)
        fit_run(task, config.training, gated, run_dir, tracker, resume)
        with machine.together():
            if machine.first:
                metrics = evaluate_run(run_dir, data, test, parts[1])
                tracker.results(headline(metrics))
                tracker.log_artifact(run_dir / "metrics.json", "metrics")
                _record_heatmap(tracker, run_dir, listing)
                LOG.info("seed %d: test top-1 %.2f %%", config.training.seed, metrics["test"]["top1"]["value"])


def _record_heatmap(tracker: Tracker, run_dir: Path, listing: Listing) -> None:
    """Show which expert serves which class, where there are experts."""
    model = TrainedClassifier.load(run_dir)
    if model.routes:
        write_heatmap(run_dir, model, listing)
        for name in (PAGE, "expert_class.csv", "mean.png"):
            tracker.log_artifact(run_dir / FOLDER / name, FOLDER)
        tracker.flush()
        if link := tracker.deep_link(f"{FOLDER}/{PAGE}"):
            LOG.info("experts and classes, while `ui` runs: %s", link)


def _splits(count: int, train: np.ndarray, val: np.ndarray) -> pd.DataFrame:
    """Say of every training image which part it is in; those left out have none."""
    part = np.full(count, "", dtype=object)
    part[train], part[val] = "train", "val"
    return pd.DataFrame({"row": np.arange(count), "split": part})


def _summarise(config: VisionConfig, out: Path, group: Path) -> None:
    """Give the parent run the mean over the seeds that are done."""
    runs = {path.parent.name: json.loads(path.read_text()) for path in sorted(group.glob("seed*/metrics.json"))}
    by_run = {name: headline(metrics) for name, metrics in runs.items()}
    means = {key: float(np.mean([found[key] for found in by_run.values()])) for key in next(iter(by_run.values()))}
    content = json.dumps({"mean": means, "by_run": by_run}, indent=1)
    replace_file(group / "summary.json", (content + "\n").encode())
    with tracked(group, out, config, "vision", "group") as tracker:
        tracker.results(means)
        tracker.log_artifact(group / "summary.json", "tables")
