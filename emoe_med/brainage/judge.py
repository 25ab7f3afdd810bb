"""Hold the scans of a manifest against the contract of a run, without predicting anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from emoe_med.brainage.check import Check
from emoe_med.brainage.inference import SEEN, TrainedModel
from emoe_med.brainage.prepared import prepared_like
from emoe_med.data.cache import HeadDataset
from emoe_med.data.contract import told
from emoe_med.data.fingerprint import MEASURES
from emoe_med.data.readings import Reading
from emoe_med.errors import DataError, Fault
from emoe_med.training.progress import counted

SHOWN = ("volume_ml", "scale", "similarity", "overlap")


@dataclass(frozen=True)
class Judgement:
    """What a run says of one scan: status `ok`, `check` or `refused`, why, and a few figures."""

    row: int
    status: str
    reason: str
    figures: str


def judge_by(run_dir: Path, cache_dir: Path, jobs: int = 0) -> Callable[[Check], Check]:
    """Return what holds the scans of a check against the contract of a run: broken steps, images it has seen.

    Raises:
        CheckpointError: The run has no usable checkpoint.
        DataError: Its checkpoint holds no contract (CON-NONE).
    """
    model = TrainedModel.load(run_dir)
    if model.spread is None:
        hint = "train it again, or predict without"
        raise DataError(Fault("CON-NONE", "this run keeps no spread of its training scans", str(run_dir), hint=hint))

    def judge(check: Check) -> Check:
        faulty = {fault.row for fault in check.faults}
        scans = [scan for scan in (check.manifest.scans if check.manifest else ()) if scan.row not in faulty]
        usable, unusable = prepared_like(model.contract, scans, cache_dir, jobs)
        heads = HeadDataset(usable, model.chain(), cache_dir)
        readings = heads.build(jobs, counted("against the contract"))
        found = {
            scan.row: _judgement(model, heads, i, reading)
            for i, (scan, reading) in enumerate(zip(usable, readings, strict=True))
        }
        found |= {fault.row: _unusable(fault.row, fault) for fault in unusable if fault.row is not None}
        return _judged(check, {str(row): judgement for row, judgement in found.items()})

    return judge


def _judged(check: Check, found: dict[str, Judgement]) -> Check:
    """Write judgements into a check; what the contract refuses is a fault."""
    faults, table = list(check.faults), check.table.copy()
    for index, row in table["row"].items():
        if (judgement := found.get(row)) is None or judgement.status == "ok":
            continue
        table.loc[index, "status"] = judgement.status
        table.loc[index, "reason"] = "; ".join(filter(None, (judgement.reason, table.loc[index, "reason"])))
        if judgement.status == "refused":
            table.loc[index, "code"] = "CON-BROKEN"
            manifest = check.manifest.path.name if check.manifest else None
            faults.append(Fault("CON-BROKEN", judgement.reason, row=judgement.row, manifest=manifest))
    figures = {row: judgement.figures for row, judgement in found.items()}
    ordered = tuple(sorted(faults, key=lambda fault: fault.row or 0))
    return replace(check, table=table, faults=ordered, figures=figures)


def _unusable(row: int, fault: Fault) -> Judgement:
    return Judgement(row, "refused", fault.in_table, "")


def _judgement(model: TrainedModel, heads: HeadDataset, index: int, reading: Reading) -> Judgement:
    """Judge one scan as `predict` does, apart from what takes its network: features and predicted age."""
    scan, sidecar = heads.scans[index], heads.sidecars[index]
    if reading.fault is not None:
        return _unusable(scan.row, reading.fault)
    assert model.spread is not None
    breaches = model.spread.breaches(reading.fingerprint)
    reasons = [told(breaches)] if breaches else []
    reasons += model.other_preprocessing(heads.stated(index), sidecar.figures if sidecar else {})
    reasons += model.other_ages({"age": scan.age})
    if not model.seen.isdisjoint((reading.content, reading.voxels)):
        reasons.append(SEEN)
    status = "refused" if any(breach.refuses for breach in breaches) else "check" if reasons else "ok"
    measured = dict(zip(MEASURES, reading.fingerprint, strict=True))
    figures = ", ".join(f"{name.removesuffix('_ml')} {measured[name]:.4g}" for name in SHOWN)
    worst = f"; the worst measure is {breaches[0].distance:.1f} times too far" if breaches else ""
    return Judgement(scan.row, status, "; ".join(reasons), figures + worst)
