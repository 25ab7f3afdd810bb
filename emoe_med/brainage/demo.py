"""The whole path on synthetic heads, for who has no data: cohort, check, two arms, comparison, where to look."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from emoe_med.brainage.check import check_manifest
from emoe_med.brainage.compare import compare_groups
from emoe_med.brainage.train import train
from emoe_med.config import load_run
from emoe_med.data.cohort import write_cohort
from emoe_med.data.manifest import read_manifest
from emoe_med.errors import ConfigError, Fault, PartialError
from emoe_med.training.progress import counted
from emoe_med.training.ui import map_links

PERSONS, SEED = 72, 7
MARKER = ".emoe_med-demo"
ARMS = ("cnn3d_4mm", "emoe_4mm")
SHORTER = ["training.epochs=40"]
# 4.1 to 4.6 years in the runs made when this was written, each with an interval of about 3 to 6 over the 14 test
# persons: wide on purpose, because other processors round differently
EXPECTED_MAE = {"cnn3d_4mm": (2.5, 6.5), "emoe_4mm": (2.5, 6.5)}


def run_demo(out: Path, configs: Path, jobs: int = 0) -> Iterator[str]:
    """Make the cohort, train the plain CNN and EMoE on it, and yield lines that say what was expected and got.

    Args:
        out: Folder for cohort and runs; an earlier demo in it is replaced.
        configs: Folder of the run files.
        jobs: Processes that read scans.

    Raises:
        ConfigError: The folder holds something that is no demo.
        PartialError: The demo ran, and an error is not as expected.
    """
    _make_room(out)
    cohort, runs = out / "cohort", out / "runs"
    yield f"SYNTHETIC heads of {PERSONS} persons, two sites, some scanned twice: {cohort}"
    manifest = write_cohort(cohort, persons=PERSONS, seed=SEED, spacing_mm=4.0)
    check_manifest(manifest, out=out / "check", jobs=jobs, progress=counted("checking scans"))
    yield f"every scan checked: {out / 'check' / 'check.html'}"
    table = read_manifest(manifest)
    surprises = []
    for arm in ARMS:
        config = load_run(configs / f"{arm}.yaml", SHORTER)
        (run,) = train(config, table, runs, [0], runs / "cache", jobs=jobs, synthetic=True)
        verdict, is_expected = _verdict(arm, json.loads((run / "metrics.json").read_text()))
        yield verdict
        surprises += [] if is_expected else [Fault("DEMO-MAE", verdict)]
        yield f"  report: {run / 'report' / 'report.html'}"
        yield from map_links(runs, [run])
    yield from _comparison(runs)
    yield f"look at the runs in MLflow: python -m emoe_med.brainage ui --out {runs}"
    if surprises:
        raise PartialError(*surprises)


def _make_room(out: Path) -> None:
    """Remove an earlier demo; touch nothing that this program did not make."""
    if out.exists() and any(out.iterdir()):
        if not (out / MARKER).is_file():
            raise ConfigError(Fault("DEMO-FOLDER", "holds something else", str(out), hint="name a new folder by --out"))
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).write_text("made by python -m emoe_med.brainage demo, which may replace this folder\n")


def _verdict(arm: str, metrics: dict) -> tuple[str, bool]:
    mae, guess = metrics["test"]["mae"], metrics["test"]["mae_training_median"]
    low, high = EXPECTED_MAE[arm]
    is_expected = low <= mae["value"] <= high
    word = "as expected" if is_expected else "NOT as expected"
    text = (
        f"{arm}: MAE {mae['value']:.2f} y [{mae['low']:.2f}, {mae['high']:.2f}] on {mae['n']} test persons, "
        f"expected {low:.1f} to {high:.1f}: {word}; guessing the median age is off by {guess['value']:.1f}"
    )
    return text, is_expected


def _comparison(runs: Path) -> Iterator[str]:
    result, _ = compare_groups([runs / arm for arm in ARMS])
    difference = result[ARMS[1]]["difference"]
    apart = "apart" if difference["low"] > 0 or difference["high"] < 0 else "not to be told apart"
    interval = f"[{difference['low']:+.2f}, {difference['high']:+.2f}]"
    yield (
        f"{ARMS[1]} minus {ARMS[0]}: {difference['value']:+.2f} y {interval} on the same persons, {apart} "
        "(one seed, synthetic: says nothing about brains)"
    )
