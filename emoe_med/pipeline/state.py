"""How far each run of a pipeline is, as its folder tells."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from emoe_med.pipeline.plan import Job, steps_left
from emoe_med.training.arm import is_done
from emoe_med.training.journal import read_journal
from emoe_med.training.run_folder import is_claimed

State = Literal["done", "running", "interrupted", "failed", "steps left", "waiting"]


def state(job: Job, out: Path) -> State:
    """Return how far a run is; a run whose process was killed is `interrupted`."""
    folder = out / job.folder
    if is_done(folder):
        return "steps left" if steps_left(job, out) else "done"
    if is_claimed(folder):
        return "running"
    kinds = [event["status"] for _, event in read_journal(folder / "journal.jsonl") if event["kind"] == "status"]
    if not kinds:
        return "waiting"
    return "failed" if kinds[-1] == "FAILED" else "interrupted"


def seconds_spent(job: Job, out: Path) -> float:
    """Return the time from each start of a run to the last line of that session, summed."""
    total, start, last = 0, None, None
    for _, event in read_journal(out / job.folder / "journal.jsonl"):
        if event["kind"] == "status" and event["status"] == "RUNNING":
            if start is not None and last is not None:
                total += last - start
            start = event["time"]
        last = event["time"]
    if start is not None and last is not None:
        total += last - start
    return total / 1000


def counted_states(jobs: Sequence[Job], out: Path) -> str:
    """Return how many runs are in each state, as text."""
    counts = Counter(state(job, out) for job in jobs)
    return ", ".join(f"{count} {name}" for name, count in counts.items())
