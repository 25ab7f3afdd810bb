"""From a pipeline file to runs: every configuration read and checked, every run given its folder and commands.

OUT/<pipeline>/                      table, report, journal, logs (local/)
OUT/<key>/<arm>/seed0-fold0          a run, as its own verb writes it

The key is a digest of the arm's complete configuration, so that a changed file starts new runs, and pipelines
that hold the same arm share its runs.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from emoe_med.config import dump_run, load_run, read_run
from emoe_med.errors import ConfigError, DataError, EmoeError, Fault
from emoe_med.pipeline.schema import FewShot, HeatMap, Pipeline, RunEntry
from emoe_med.vision.run import load_vision

ROOT = Path(__file__).parent.parent.parent
TASKS = {"brainage": load_run, "vision": load_vision}
KEY_LENGTH = 12


@dataclass(frozen=True)
class Arm:
    """One configuration, of which seeds and folds are the runs."""

    name: str
    task: str
    config: Any
    path: Path
    assignments: tuple[str, ...]

    @cached_property
    def key(self) -> str:
        """Digest of the complete configuration, the training seed aside."""
        seedless = self.config.training.model_copy(update={"seed": 0})
        text = dump_run(self.config.model_copy(update={"training": seedless}))
        return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]

    @property
    def folder(self) -> Path:
        """Folder of its runs, below the folder of all runs."""
        return Path(self.key, self.name)


@dataclass(frozen=True)
class Job:
    """One run and the steps after it."""

    arm: Arm
    seed: int
    fold: int | None
    steps: tuple[FewShot | HeatMap, ...]

    @property
    def run(self) -> str:
        """Name of the run folder."""
        return f"seed{self.seed}" if self.fold is None else f"seed{self.seed}-fold{self.fold}"

    @property
    def label(self) -> str:
        """Name of the run among all of the pipeline."""
        return f"{self.arm.name}/{self.run}"

    @property
    def folder(self) -> Path:
        """Run folder, below the folder of all runs."""
        return self.arm.folder / self.run


def read_pipeline(path: Path) -> Pipeline:
    """Read a pipeline file.

    Raises:
        ConfigError: All faults of the file at once.
    """
    return read_run(Pipeline, path)


def plan(pipeline: Pipeline, path: Path, only: Sequence[str] = ()) -> list[Job]:
    """Return the runs of a pipeline: all arms of the first seed and fold first, so that a table grows evenly.

    Args:
        pipeline: As read.
        path: File that it was read from; run files are looked for beside it, then in the repository.
        only: Patterns as `emoe*` or `*/seed0-*`; runs of which none fits arm or label are left out.

    Raises:
        ConfigError: A run file is missing or faulty, names are doubled, a row or control is no arm, a column is made by
            no step, nothing left.
    """
    arms: dict[str, Arm] = {}
    jobs: list[tuple[int, Job]] = []
    faults: list[Fault] = []
    for entry in pipeline.runs:
        try:
            arm = _arm(pipeline, path, entry)
            if arm.name in arms:
                hint = "give one of them another name by set: [name=...]"
                raise ConfigError(Fault("PIPE-NAMES", f"two arms are called {arm.name}", str(path), hint=hint))
            arms[arm.name] = arm
            jobs += [(seeds, job) for seeds, job in _jobs(pipeline, entry, arm, path)]
        except EmoeError as error:
            faults += error.faults
    if faults:
        raise ConfigError(*faults)
    _check_probes(pipeline, path)
    if unknown := sorted(pipeline.table.arms() - arms.keys()):
        raise ConfigError(Fault("PIPE-ARM", f"table: no run is called {', '.join(unknown)}", str(path)))
    order = sorted(jobs, key=lambda pair: (pair[0], pair[1].fold or 0))  # stable: arms as they stand in the file
    chosen = [job for _, job in order if not only or _fits(job, only)]
    if not chosen:
        raise ConfigError(Fault("PIPE-ONLY", f"--only {', '.join(only)}: no run is left", str(path)))
    return chosen


def _check_probes(pipeline: Pipeline, path: Path) -> None:
    """Refuse a column of few-shot probes that no step makes."""
    made = {f"{step.dataset}/{n}" for step in pipeline.steps if isinstance(step, FewShot) for n in step.shots}
    for column in pipeline.table.columns:
        family, *rest = column.metric.split("/")
        if family == "fewshot" and "/".join(rest[:2]) not in made:
            hint = f"steps: [{{verb: fewshot, dataset: {rest[0]}, shots: [{rest[1]}]}}]"
            raise ConfigError(Fault("PIPE-STEP", f"no step makes {column.metric}", str(path), hint=hint))


def _fits(job: Job, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns for name in (job.arm.name, job.label))


def _arm(pipeline: Pipeline, path: Path, entry: RunEntry) -> Arm:
    beside = path.parent / entry.config
    found = beside if beside.is_file() else ROOT / entry.config
    task = found.parent.name
    if task not in TASKS:
        raise ConfigError(
            Fault("PIPE-TASK", f"{entry.config}: a run file lies in a folder {' or '.join(TASKS)}", str(path))
        )
    assignments = (*pipeline.set, *entry.set)
    config = TASKS[task](found, list(assignments))
    return Arm(config.name, task, config, found, assignments)


def _jobs(pipeline: Pipeline, entry: RunEntry, arm: Arm, path: Path) -> list[tuple[int, Job]]:
    if len(set(entry.seeds)) < len(entry.seeds):
        raise ConfigError(Fault("PIPE-SEEDS", f"{arm.name}: a seed stands twice", str(path)))
    if arm.task == "vision":
        if entry.folds != "all":
            raise ConfigError(Fault("PIPE-FOLDS", f"{arm.name}: images have no folds", str(path)))
        parts = (getattr(arm.config.model, name, None) for name in ("moe", "single_gated"))
        routed = any(part is not None and part.num_experts > 1 for part in parts)
        steps = tuple(step for step in pipeline.steps if isinstance(step, FewShot) or routed)
        return [(at, Job(arm, seed, None, steps)) for at, seed in enumerate(entry.seeds)]
    count = arm.config.data.folds
    folds = range(count) if entry.folds == "all" else entry.folds
    if not folds or max(folds) >= count or len(set(folds)) < len(folds):
        raise ConfigError(Fault("PIPE-FOLDS", f"{arm.name}: folds are 0 to {count - 1}, each once", str(path)))
    return [(at, Job(arm, seed, fold, ())) for at, seed in enumerate(entry.seeds) for fold in folds]


@dataclass(frozen=True)
class Places:
    """Where the data of a pipeline lie.

    Attributes:
        pipeline: As read.
        data_root: Folder below which data sets lie; None: EMOE_MED_DATA_ROOT, or else the current folder.
        manifest: Manifest of the scans, if not the one that the pipeline names. Its paths start where `brainage train`
            has them without `--data-root`: in EMOE_MED_DATA_ROOT, or else beside it.
    """

    pipeline: Pipeline
    data_root: Path | None = None
    manifest: Path | None = None

    @property
    def _root(self) -> Path:
        return self.data_root or Path(os.environ.get("EMOE_MED_DATA_ROOT", "."))

    def scans(self) -> tuple[Path, Path | None]:
        """Return the manifest and the root of its paths; None: the verb settles it.

        Raises:
            DataError: There is none.
        """
        if self.manifest is not None:
            return _found(self.manifest, "manifest of the scans"), None
        named = self.pipeline.data.brainage
        if named is None:
            hint = "give --manifest FILE"
            raise DataError(Fault("PIPE-DATA", "this pipeline needs a manifest of scans", hint=hint))
        path = _found(self._root / named, "manifest of the scans")
        return path, path.parent

    def images(self, dataset: str) -> Path | None:
        """Return where a data set lies; None for the one that ships with a library.

        Raises:
            DataError: It is not there.
        """
        if dataset == "digits":
            return None
        path = self._root / (getattr(self.pipeline.data, dataset) or dataset)
        return _found(path, f"data set {dataset}")

    def check(self, jobs: Sequence[Job]) -> None:
        """See that all data of these runs, and weights to start from, are there.

        Raises:
            DataError: All that is missing.
        """
        starts = {getattr(job.arm.config.model, "weights", None) for job in jobs} - {None}
        faults = {
            name: Fault(
                "PIPE-WEIGHTS", "no such weights to start from", name, hint=f"vision import-weights ... -o {name}"
            )
            for name in sorted(map(str, starts))
            if not Path(name).is_file()
        }
        asked = {dataset for job in jobs for dataset in _datasets(job)}
        for name in sorted(asked):
            try:
                self.scans() if name == "brainage" else self.images(name)
            except DataError as error:
                faults[name] = error.faults[0]
        if faults:
            raise DataError(*faults.values())


def _found(path: Path, what: str) -> Path:
    if not path.exists():
        hint = "give --data-root, the folder of the data sets, or set EMOE_MED_DATA_ROOT"
        raise DataError(Fault("PIPE-DATA", f"{what} is not here", str(path), hint=hint))
    return path


def _datasets(job: Job) -> set[str]:
    if job.arm.task == "brainage":
        return {"brainage"}
    return {job.arm.config.data.dataset, *(step.dataset for step in job.steps if isinstance(step, FewShot))}


Command = tuple[str, ...]  # the module, then its arguments


def commands(job: Job, out: Path, places: Places) -> list[Command]:
    """Return what a person would type for a run and its steps, after `python -m`; every command resumes."""
    arm, config = job.arm, job.arm.config
    assignments = [part for text in arm.assignments for part in ("--set", text)]
    common = ["--config", str(arm.path), *assignments, "--out", str(out / arm.key), "--resume"]
    if arm.task == "brainage":
        manifest, root = places.scans()
        where = ["--manifest", str(manifest), *_option("--data-root", root), "--cache", str(out / "cache")]
        chosen = ["--set", f"training.seed={job.seed}", "--fold", str(job.fold)]
        return [("emoe_med.brainage", "train", *where, *common, *chosen)]
    root = places.images(config.data.dataset)
    found = [("emoe_med.vision", "train", *_option("--data-root", root), *common, "--seeds", str(job.seed))]
    run = ["--run", str(out / job.folder)]
    for step in job.steps:
        if isinstance(step, HeatMap):
            found.append(("emoe_med.vision", "heatmap", *run, *_option("--data-root", root)))
        else:
            numbers = ["--shots", ",".join(map(str, step.shots)), "--draws", str(step.draws)]
            where = ["--dataset", step.dataset, *_option("--data-root", places.images(step.dataset))]
            found.append(("emoe_med.vision", "fewshot", *run, *where, *numbers))
    return found


def _option(name: str, value: Path | None) -> list[str]:
    return [] if value is None else [name, str(value)]


def steps_left(job: Job, out: Path) -> list[FewShot | HeatMap]:
    """Return the steps of a run whose results are not there, or of fewer draws."""
    return [step for step in job.steps if not _step_done(step, out / job.folder)]


def probes(run_dir: Path, dataset: str) -> dict[str, Any]:
    """Return what the few-shot probes of a run on a data set left; nothing where they are damaged."""
    try:
        return dict(json.loads((run_dir / "fewshot" / f"{dataset}.json").read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return {}


def _step_done(step: FewShot | HeatMap, run_dir: Path) -> bool:
    if isinstance(step, HeatMap):
        return (run_dir / "expert_maps" / "expert_class.json").is_file()
    report = probes(run_dir, step.dataset)
    draws = [found["n"] for shot in step.shots for by in report.get(str(shot), {}).values() for found in by.values()]
    return set(map(str, step.shots)) <= report.keys() and min(draws, default=0) >= step.draws
