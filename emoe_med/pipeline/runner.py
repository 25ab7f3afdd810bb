"""Run a pipeline: what is done is skipped, what was interrupted goes on, what fails stops nothing else."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from emoe_med.errors import EXIT_DONE, EXIT_PARTIAL, DataError, Fault, PartialError
from emoe_med.pipeline.plan import KEY_LENGTH, Arm, Job, Places, commands
from emoe_med.pipeline.pool import OnEnd
from emoe_med.pipeline.schema import Pipeline
from emoe_med.pipeline.sources import check_sources
from emoe_med.pipeline.state import state
from emoe_med.pipeline.work import Work, fill_cache, run_verbs
from emoe_med.training.arm import PARENT_WAIT_S, enter
from emoe_med.training.run_folder import probe, wait_until_free
from emoe_med.training.tracking import Tracker

LOG = logging.getLogger("emoe_med")


class Executor(Protocol):
    """What does the work: this machine, or a cluster.

    Attributes:
        processes: That one piece of work may start when it runs alone.
    """

    processes: int

    def run(self, works: Sequence[Work], on_end: OnEnd) -> None:
        """Do all of it, and call `on_end` for each as it ends."""
        ...


def tracked_pipeline(pipeline: Pipeline, jobs: Sequence[Job], out: Path) -> Tracker:
    """Return the record of a pipeline, parent of its arms; in the experiment of its first run, so that MLflow nests."""
    return Tracker(
        out / pipeline.name,
        out=out,
        experiment=jobs[0].arm.task,
        run_name=pipeline.name,
        uri=None if pipeline.tracking.mlflow else "none",
        allow_remote=pipeline.tracking.allow_remote,
    )


def run_pipeline(
    pipeline: Pipeline,
    jobs: Sequence[Job],
    out: Path,
    places: Places,
    executor: Executor,
    finish: Callable[[Tracker], None],
) -> None:
    """Run what is not done, then `finish`: the table and what else is made of the runs.

    Args:
        pipeline: As read.
        jobs: Its runs, as planned.
        out: Folder of all runs, their cache and the tracking store.
        places: Where the data lie.
        executor: Does the work.
        finish: Called at the end with the entered tracker of the pipeline, also where runs failed.

    Raises:
        DataError: Data are missing, or others than those of finished runs, or cannot be used; nothing was run.
        PartialError: Runs failed; each is named.
        Interrupted: SIGTERM or SIGINT; start it again to go on.
    """
    places.check(jobs)
    check_sources(jobs, out, places)
    probe(out)
    folder = out / pipeline.name
    left = [job for job in jobs if state(job, out) != "done"]
    with tracked_pipeline(pipeline, jobs, out) as tracker:
        if tracker.uri.startswith("sqlite:") or tracker.uri == "none":
            # one store for all runs, whatever their own folder, or none
            os.environ["MLFLOW_TRACKING_URI"] = tracker.uri
        _nest(left, out, folder, tracker.uri)
        LOG.info("%s: %d runs, %d to do", pipeline.name, len(jobs), len(left))
        for job in left:
            if state(job, out) == "running":
                LOG.info(
                    "%s runs elsewhere and is waited for; %s names where", job.label, out / job.folder / "run.lock"
                )
        _fill_caches(left, out, places, executor, folder)
        failed = _run(left, out, places, executor, folder, tracker)
        finish(tracker)
    if failed:
        raise PartialError(*failed)


def _nest(jobs: Sequence[Job], out: Path, folder: Path, uri: str) -> None:
    """Make the record of each arm before its runs start, so that the pipeline is its parent and the store is there."""
    for arm in {job.arm.key: job.arm for job in jobs}.values():
        wait_until_free(out / arm.folder)  # another pipeline, or a run of it that starts or ends
        tracking = arm.config.tracking
        tracker = Tracker(
            out / arm.folder,
            out=out,
            experiment=arm.task,
            run_name=arm.name,
            parent=folder,
            uri=uri if tracking.mlflow else "none",
            allow_remote=tracking.allow_remote,
        )
        enter(tracker, PARENT_WAIT_S)  # who waited for the same folder may have it first
        tracker.__exit__(None, None, None)


def _fill_caches(jobs: Sequence[Job], out: Path, places: Places, executor: Executor, folder: Path) -> None:
    """Read the scans once for every chain that the runs need.

    Raises:
        DataError: Scans cannot be used.
    """
    arms = {_chain(job.arm): job.arm for job in jobs if job.arm.task == "brainage"}
    works = [
        Work(
            name,
            folder / "local" / f"{name}.log",
            partial(fill_cache, arm.path, arm.assignments, *places.scans(), out / "cache", executor.processes),
        )
        for name, arm in arms.items()
    ]
    faults: list[Fault] = []
    for work in works:  # each uses all processes by itself
        LOG.info("reading the scans once for all runs")
        executor.run([work], partial(_note_failure, faults))
    if faults:
        raise DataError(*faults)


def _chain(arm: Arm) -> str:
    """Name the volumes that an arm needs, the same for all arms that share them."""
    data = arm.config.data
    told = repr((data.spacing_mm / data.oversample, data.align, data.mask))
    return f"cache-{hashlib.sha256(told.encode()).hexdigest()[:KEY_LENGTH]}"


def _note_failure(faults: list[Fault], work: Work, code: int, seconds: float) -> None:
    if code != EXIT_DONE:
        faults.append(
            Fault(
                "PIPE-SCANS", f"the scans could not be read (exit code {code}): {_last_line(work.log)}", str(work.log)
            )
        )


def _run(
    jobs: Sequence[Job], out: Path, places: Places, executor: Executor, folder: Path, tracker: Tracker
) -> list[Fault]:
    """Run what is left; returns a fault for each run that failed."""
    works = [
        Work(
            job.label,
            folder / "local" / f"{job.arm.name}-{job.run}.log",
            partial(run_verbs, commands(job, out, places), out / job.folder),
        )
        for job in jobs
    ]
    failed: list[Fault] = []
    ended = 0

    def on_end(work: Work, code: int, seconds: float) -> None:
        nonlocal ended
        ended += 1
        tracker.note("run", label=work.label, exit_code=code, seconds=round(seconds, 1))
        tracker.flush()
        how = "done" if code in (EXIT_DONE, EXIT_PARTIAL) else f"FAILED, exit code {code}"
        LOG.info("%d of %d  %s  %s, %.0f s", ended, len(works), work.label, how, seconds)
        if code not in (EXIT_DONE, EXIT_PARTIAL):
            reason = f"{work.label} ended with exit code {code}: {_last_line(work.log)}"
            failed.append(Fault("PIPE-RUN", reason, str(work.log)))

    executor.run(works, on_end)
    return failed


def _last_line(log: Path) -> str:
    """Return the last line of a log that says what went wrong."""
    lines = (
        [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.is_file() else []
    )
    told = [line for line in lines if line.startswith("error ")]
    return (told or lines or ["it left no log"])[-1]
