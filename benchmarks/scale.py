"""Time the data path at the size of a biobank: what grows with the cohort, and what does not.

    python benchmarks/scale.py [--volumes 100 1000] [--rows 10000 100000] [--registered 16] [--epochs 6]

Heads are SYNTHETIC (drawn, 4 mm, all different). Each cohort runs in a process of its own: `check`, filling the cache,
starting again with a warm one, epochs of training that read every volume from the cache, memory after each
pass. Prints JSON lines: CPU seconds of one thread, and wall seconds, which on a shared machine mean little.
docs/scale.md has the arithmetic.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch

from emoe_med.brainage.check import check_manifest
from emoe_med.brainage.task import BrainAgeTask
from emoe_med.config import load_run
from emoe_med.data import memory
from emoe_med.data.brain import ChainOptions
from emoe_med.data.cache import HeadDataset
from emoe_med.data.cohort import write_cohort
from emoe_med.data.fingerprint import MEASURES
from emoe_med.data.manifest import read_manifest
from emoe_med.data.readings import KnownReadings, Reading
from emoe_med.training.loop import fit
from emoe_med.training.tracking import Tracker

CONFIG = Path(__file__).parents[1] / "configs" / "brainage" / "emoe_4mm.yaml"
PASSES = 5


def timed(work: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Return CPU and wall seconds, and what the work gave."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = work()
    return {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}, result


def resident_mib() -> float:
    return psutil.Process().memory_info().rss / 2**20


def tell(**figures: Any) -> None:
    """Print a line of figures as soon as they are there."""
    print(json.dumps(figures), flush=True)


def measure_cohort(volumes: int, registered: int, epochs: int) -> None:
    """Take a synthetic cohort through the whole path."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = write_cohort(folder / "heads", volumes, seed=0, repeat_share=0, spacing_mm=4.0)
        tell(volumes=volumes, resident_mib=resident_mib())
        tell(check=timed(lambda: check_manifest(table))[0], resident_mib=resident_mib())
        scans = read_manifest(table).scans
        options = ChainOptions(4.0, "centred")  # registration is timed apart
        cache = folder / "cache"
        filled, _ = timed(lambda: HeadDataset(scans, options, cache).build())
        tell(fill=filled, resident_mib=resident_mib())
        start, heads = timed(lambda: HeadDataset(scans, options, cache))
        tell(warm_start=start, warm_readings=timed(heads.build)[0])
        sizes = [entry.stat().st_size for entry in heads.folder.glob("*.pt")]
        tell(entry_kib=sum(sizes) / len(sizes) / 1024, entries=len(sizes))
        for _ in range(PASSES):
            tell(read=read_all(heads))
        tell(epochs=train(heads, folder / "run", epochs))
        aligned, _ = timed(lambda: HeadDataset(scans[:registered], ChainOptions(4.0), folder / "aligned").build())
        tell(registered=registered, **aligned)


def read_all(heads: HeadDataset) -> dict[str, float]:
    """Read every volume from the cache once, its digest checked."""
    spent, _ = timed(lambda: [heads[index]["row"] for index in range(len(heads))])
    return {**spent, "resident_mib": resident_mib()}


def train(heads: HeadDataset, folder: Path, epochs: int) -> list[dict[str, float]]:
    """Train by the 4 mm run file, every volume read from disk each time."""
    memory.LIMIT_BYTES = 0  # a large cohort does not fit
    config = load_run(CONFIG, ["data.oversample=1", f"training.epochs={epochs}", "augment.shift_voxels=1"])
    indices = list(range(len(heads)))
    held_out = max(8, len(indices) // 10)
    task = Watched(config, heads, indices[held_out:], indices[:held_out], {})
    with Tracker(folder, uri="none") as tracker:
        fit(task, config.training, folder, tracker)
    return task.epochs


class Watched(BrainAgeTask):
    """Notes time and memory at the end of each epoch."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.epochs: list[dict[str, float]] = []
        self._since = (time.process_time(), time.perf_counter())

    def end_of_epoch(self, model: Any) -> dict[str, float]:
        cpu, wall = self._since
        self._since = (time.process_time(), time.perf_counter())
        spent = {"cpu_s": self._since[0] - cpu, "wall_s": self._since[1] - wall}
        rate = {"trained_per_cpu_s": len(self.train_data) / spent["cpu_s"]}
        self.epochs.append({**spent, **rate, "resident_mib": resident_mib()})
        return super().end_of_epoch(model)


def measure_rows(rows: int) -> None:
    """Read a manifest of many rows, and start on a cache that holds them all; nothing but names is on disk."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        heads = folder / "heads"
        heads.mkdir()
        names = [f"sub-{row:07d}" for row in range(rows)]
        for person in names:
            for kind in ("T1w", "mask"):
                (heads / f"{person}_{kind}.nii.gz").write_bytes(person.encode())
        image, mask = ([f"{person}_{kind}.nii.gz" for person in names] for kind in ("T1w", "mask"))
        ages = [40 + row % 4001 / 100 for row in range(rows)]
        pd.DataFrame({"participant_id": names, "image": image, "mask": mask, "age": ages}).to_csv(
            heads / "manifest.csv", index=False
        )
        before = resident_mib()
        read, manifest = timed(lambda: read_manifest(heads / "manifest.csv"))
        tell(rows=rows, manifest=read, mib=resident_mib() - before)
        options = ChainOptions(4.0, "centred")
        pretend(HeadDataset(manifest.scans, options, folder / "cache"))
        before = resident_mib()
        start, warm = timed(lambda: HeadDataset(manifest.scans, options, folder / "cache"))
        readings, found = timed(warm.build)
        assert len(found) == rows
        tell(rows=rows, warm_start=start, warm_readings=readings, mib=resident_mib() - before)


def pretend(heads: HeadDataset) -> None:
    """Fill the memory of a cache as if every scan had been read: entries without content, which a start never opens."""
    for item in heads.data:
        for path in item.values():
            heads.digests.of(Path(path))
    keys = [heads.hash_func(item).decode() for item in heads.data]
    for key in keys:
        (heads.folder / f"{key}.pt").touch()
    figures = tuple(1 / (number + 3) for number in range(len(MEASURES)))
    KnownReadings(heads.folder).add((key, Reading(None, key, key, 2 / 3, figures)) for key in keys)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--volumes", type=int, nargs="*", default=[100, 1000])
    parser.add_argument("--rows", type=int, nargs="*", default=[10_000, 100_000])
    parser.add_argument("--registered", type=int, default=16, help="volumes that are registered, to time it")
    parser.add_argument("--epochs", type=int, default=6, help="of training; many show whether memory stays flat")
    parser.add_argument("--one", choices=["volumes", "rows"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one == "volumes":
        measure_cohort(options.volumes[0], options.registered, options.epochs)
    elif options.one == "rows":
        measure_rows(options.rows[0])
    else:
        for kind in ("rows", "volumes"):
            for count in getattr(options, kind):
                command = [sys.executable, __file__, "--one", kind, f"--{kind}", str(count)]
                command += ["--registered", str(options.registered), "--epochs", str(options.epochs)]
                subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
