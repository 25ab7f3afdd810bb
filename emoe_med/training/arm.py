"""The runs of one configuration: where they lie, which are done, and how they are recorded, for any task.

runs/<name>/           the arm, parent run in MLflow
runs/<name>/seed0-...  its runs: one configuration, seeds aside
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Generator, Hashable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from emoe_med.config import Section, TrackingConfig, TrainingConfig, dump_run, read_run
from emoe_med.errors import CheckpointError, ConfigError, DataError, Fault
from emoe_med.training.journal import read_journal
from emoe_med.training.ranks import ALONE, Machine
from emoe_med.training.tracking import Tracker

PARENT_WAIT_S = 60  # runs of one arm that start together take turns at their parent's folder


class RunConfig(Protocol):
    """What every run file has, whatever the task."""

    @property
    def name(self) -> str:
        """Name of the arm."""
        ...

    @property
    def training(self) -> TrainingConfig:
        """The optimisation."""
        ...

    @property
    def tracking(self) -> TrackingConfig:
        """Where metrics go besides the run folder."""
        ...

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        """Return the values as a nested mapping."""
        ...


def check_folders(run_dirs: Sequence[Path], resume: bool) -> None:
    """Refuse run folders that hold a run, unless it is to be resumed."""
    used = [d for d in run_dirs if any((d / name).exists() for name in ("checkpoints", "phases", "metrics.json"))]
    if used and not resume:
        hint = "give --resume to go on, or another --out or --set name="
        raise ConfigError(*(Fault("RUN-EXISTS", "this run folder is in use", str(d), hint=hint) for d in used))


def is_done(run_dir: Path) -> bool:
    """Whether a run came to its end: it was scored, and its record says that everything was written.

    A later session, as one that records maps, does not undo that where it is stopped; nor does it end a run for it.
    """
    events = (event for _, event in read_journal(run_dir / "journal.jsonl") if event["kind"] == "status")
    return (run_dir / "metrics.json").is_file() and any(event["status"] == "FINISHED" for event in events)


def check_arm(config: Any, group: Path) -> None:
    """Refuse to mix configurations under one name: the runs of an arm differ in fold and training seed alone."""
    for path in sorted(group.glob("seed*/config.yaml")):
        other = read_run(type(config), path)
        seeds_aside = {"training": other.training.model_copy(update={"seed": config.training.seed})}
        if other.model_copy(update=seeds_aside) != config:
            reason = f"{config.name} has runs of another configuration here"
            raise ConfigError(Fault("RUN-OTHER", reason, str(path), hint="give --out or --set name= another value"))


def config_digest(config: Section) -> str:
    """Return the SHA-256 of the complete configuration."""
    return hashlib.sha256(dump_run(config).encode()).hexdigest()


def check_same(run_dir: Path, digests: Mapping[str, str]) -> None:
    """Refuse a run folder of another configuration or other data before anything in it is touched.

    What the version that began the run did not record is not compared.
    """
    path = run_dir / "environment.json"
    before = json.loads(path.read_text()) if path.is_file() else digests
    faults = [
        Fault("CKPT-OTHER", f"{name} was {before[name]} in this run and is {now} now", str(run_dir))
        for name, now in digests.items()
        if before.get(name, now) != now
    ]
    if faults:
        raise CheckpointError(*faults)


def check_alike(runs: Iterable[tuple[Hashable, Path]]) -> None:
    """Refuse to compare runs, given with their fold, that saw other data or, within a fold, other splits.

    What the version that made a run did not record is not compared.

    Raises:
        DataError: CMP-OTHER, each run that differs from those before it.
    """
    faults: list[Fault] = []
    known: dict[Hashable, object] = {}
    for fold, run_dir in runs:
        environment = json.loads((run_dir / "environment.json").read_text())
        facts = {name: environment.get(name) for name in ("manifest", "chain", "contents")}
        facts["splits"] = hashlib.sha256((run_dir / "splits.csv").read_bytes()).hexdigest()
        for name, value in facts.items():
            scope = (name, fold) if name == "splits" else name
            if value is not None and known.setdefault(scope, value) != value:
                faults.append(Fault("CMP-OTHER", f"another {name} than the other runs", str(run_dir)))
    if faults:
        raise DataError(*faults)


@contextmanager
def tracked(
    run_dir: Path,
    out: Path,
    config: RunConfig,
    experiment: str,
    run_name: str,
    parent: Path | None = None,
    machine: Machine = ALONE,
) -> Generator[Tracker]:
    """Own a run folder and its record; the parent's folder is waited for, as runs of an arm may start together.

    All ranks of `machine` enter and leave together, and rank 0 owns.
    """
    tracker = Tracker(
        run_dir,
        out=out,
        experiment=experiment,
        run_name=run_name,
        parent=parent,
        uri=None if config.tracking.mlflow else "none",
        allow_remote=config.tracking.allow_remote,
        words=words(config),
    )
    with machine.together():
        enter(tracker, wait_s=PARENT_WAIT_S if parent is None else 0)
    try:
        yield tracker
    except BaseException as error:
        tracker.__exit__(type(error), error, error.__traceback__)
        raise
    with machine.together():
        tracker.__exit__(None, None, None)


def enter(tracker: Tracker, wait_s: float) -> None:
    """Enter a tracker; while another process has its folder, wait so long.

    Raises:
        ConfigError: RUN-LOCKED, it has it still.
    """
    deadline = time.monotonic() + wait_s
    while True:
        try:
            tracker.__enter__()
            return
        except ConfigError as error:
            if error.faults[0].code != "RUN-LOCKED" or time.monotonic() >= deadline:
                raise
            time.sleep(0.2)


def headline(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of metrics.json that a table of runs shows, under their tracking names."""
    found = {}
    for split in ("test", "val"):
        for name, estimate in metrics.get(split, {}).items():
            if estimate["value"] is not None:
                found[f"{split}/{name}"] = estimate["value"]
    return found


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a nested mapping to `a.b: value`."""
    found = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def words(config: RunConfig) -> set[str]:
    """Texts of a configuration that may be tracked: its choices, and the name of the arm."""
    return {value for value in flat(config.model_dump(mode="json")).values() if isinstance(value, str)}
