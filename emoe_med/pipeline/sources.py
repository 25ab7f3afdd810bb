"""What runs are made from besides their configuration: scans, images, weights. A finished run stands for its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from emoe_med.errors import DataError, Fault
from emoe_med.pipeline.plan import Job, Places, probes
from emoe_med.pipeline.schema import FewShot
from emoe_med.training.arm import is_done


def check_sources(jobs: Sequence[Job], out: Path, places: Places) -> None:
    """Refuse to let runs and probes stand that were made from other data or weights than those that are given now.

    Raises:
        DataError: PIPE-OTHER, each such run or file of probes.
    """
    digest = cache(_digest)  # many runs of one file; for this start alone
    faults = []
    for job in jobs:
        folder = out / job.folder
        if is_done(folder):
            before = json.loads((folder / "environment.json").read_text())
            sources = {name: source for name, source in _sources(job, places).items() if name in before}
            others = [name for name, source in sources.items() if before[name] != digest(*source)]
            reason = f"{job.label} was made from other {' and '.join(others)}"
            faults += [Fault("PIPE-OTHER", reason, str(folder), hint="give another --out")] if others else []
        for dataset in sorted({step.dataset for step in job.steps if isinstance(step, FewShot)}):
            probed = probes(folder, dataset).get("contents")
            if probed is not None and probed != digest(dataset, places.images(dataset)):
                path, reason = (
                    folder / "fewshot" / f"{dataset}.json",
                    f"{job.label} was probed on other images of {dataset}",
                )
                faults.append(Fault("PIPE-OTHER", reason, str(path), hint="delete it, or give another --out"))
    if faults:
        raise DataError(*faults)


def _sources(job: Job, places: Places) -> dict[str, tuple[str | Path, Path | None]]:
    """The sources of a run by their name in `environment.json`: a file, or a data set with its root."""
    config = job.arm.config
    if job.arm.task == "brainage":
        return {"manifest": (places.scans()[0], None)}
    weights = {} if config.model.weights is None else {"weights": (Path(config.model.weights), None)}
    return {"contents": (config.data.dataset, places.images(config.data.dataset)), **weights}


def _digest(source: str | Path, root: Path | None) -> str:
    if isinstance(source, Path):
        with source.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    from emoe_med.data.images import list_images

    return list_images(source, root).contents()
