"""Apply a trained run to scans: one row out for every scan in, with a status and a reason."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import typer

from emoe_med.brainage.bias import AgeBias
from emoe_med.brainage.conformal import Interval
from emoe_med.brainage.evaluate import saved_bias, saved_interval, with_correction
from emoe_med.brainage.inference import TrainedModel, predict_scans
from emoe_med.data.cache import HeadDataset
from emoe_med.data.contract import contract_digest
from emoe_med.data.manifest import Scan, inspect_manifest
from emoe_med.data.scan import identity_from_path
from emoe_med.errors import EXIT_PARTIAL, DataError, Fault
from emoe_med.training.cli import say
from emoe_med.training.progress import counted
from emoe_med.training.run_folder import replace_file

LOG = logging.getLogger("emoe_med")

COLUMNS = [
    *("participant_id", "session_id", "image", "status", "reason", "predicted_age", "lower", "upper", "level"),
    *("age", "brain_pad", "predicted_age_corrected", "corrected_in_range", "similarity"),
    *("ood_score", "ood_percentile", "in_training", "model", "chain", "contract"),
]


@dataclass(frozen=True)
class Predictor:
    """A trained model, and what its last evaluation says of its predictions."""

    model: TrainedModel
    bias: AgeBias | None
    interval: Interval | None

    @classmethod
    def of_run(cls, run_dir: Path) -> Predictor:
        """Take them from a run folder.

        Raises:
            CheckpointError: The run has no usable checkpoint.
        """
        return cls(TrainedModel.load(run_dir), saved_bias(run_dir), saved_interval(run_dir))


def predict(
    predictor: Predictor, source: Path, output: Path, cache_dir: Path, data_root: Path | None = None
) -> pd.DataFrame:
    """Predict the age of every scan of a file, folder or manifest and write a CSV.

    The scans go through the chain of the training run. For a file or folder the brain mask is looked for beside
    each head: `*_desc-brain_mask`, `<head>_mask`, `<head>_brain_mask` or `T1_brain_mask`.

    Status is `ok`; `check` where a person should look: the scan differs from the training scans in a step that the
    reason names, looks unlike them to the network, or has an age outside theirs; `refused` where no age is given.
    lower and upper hold the age of a person like the validation persons with the probability `level`. Interval
    and corrected age are those of the run's last evaluation; the latter is empty where it needs an age that is
    unknown. Ages are in years; the file names persons, because it is for the one who asked.

    Raises:
        DataError: There is no scan at all.
        StorageError: The output cannot be written.
    """
    model = predictor.model
    scans, refused = _scans(source, data_root)
    chain = model.chain()
    if chain.mask == "head":
        LOG.warning("note: this model was trained on whole heads, centred but not aligned; masks are not used")
    for part in model.lacking():
        LOG.warning("note: %s", part)
    heads = HeadDataset(scans, chain, cache_dir)
    found = predict_scans(model, heads, range(len(scans)), progress=counted("predicting"))
    found = with_correction(found, predictor.bias)
    if interval := predictor.interval:
        found = found.assign(**interval.ends(found), level=interval.level)
    found["participant_id"] = [scan.participant_id for scan in scans]
    found["session_id"] = [scan.session_id for scan in scans]
    found["image"] = [str(scan.image) for scan in scans]
    found = pd.concat([found, refused]).sort_values("row", kind="stable")
    found["model"] = f"{model.config.name}-seed{model.config.training.seed}"
    found["chain"] = model.contract["chain"]["digest"]
    found["contract"] = contract_digest(model.contract)
    table = found.reindex(columns=COLUMNS).infer_objects()  # else numbers beside missing ones keep every digit
    output.parent.mkdir(parents=True, exist_ok=True)
    replace_file(output, table.to_csv(index=False, float_format="%.3f").encode())
    return table


def finish(table: pd.DataFrame, output: Path) -> None:
    """Print how many rows went how; where some were refused the verb ends with exit code 8."""
    counts = table["status"].value_counts()
    say(f"{output}: " + ", ".join(f"{count} {status}" for status, count in counts.items()))
    if counts.get("refused", 0):
        raise typer.Exit(EXIT_PARTIAL)


def _scans(source: Path, data_root: Path | None) -> tuple[list[Scan], pd.DataFrame]:
    """Return the scans of a file, folder or manifest, and rows for those that its table already refuses."""
    none = pd.DataFrame(columns=["row", *COLUMNS])
    if source.is_dir():
        files = sorted(f for f in [*source.rglob("*.nii"), *source.rglob("*.nii.gz")] if not _DERIVED.search(f.name))
        if not files:
            raise DataError(Fault("PRED-NONE", "no .nii or .nii.gz head in this folder", str(source)))
        return [_scan_of(file, row) for row, file in enumerate(files, start=1)], none
    if source.suffix.lower() not in (".csv", ".tsv"):
        return [_scan_of(source, 1)], none
    manifest, faults = inspect_manifest(source, data_root, require_age=False)
    if not manifest.scans:
        raise DataError(*faults or [Fault("PRED-NONE", "no scan in this manifest", str(source))])
    by_row: dict[int, list[Fault]] = {}
    for fault in faults:
        if fault.row is None:
            raise DataError(*faults)
        by_row.setdefault(fault.row, []).append(fault)
    rows = [
        {
            "row": row,
            "image": told[0].file,
            "status": "refused",
            "reason": "; ".join(f"{f.code} {f.reason}" for f in told),
        }
        for row, told in by_row.items()
    ]
    scans = [scan for scan in manifest.scans if scan.row not in by_row]
    return scans, pd.DataFrame(rows, columns=none.columns) if rows else none


_DERIVED = re.compile(r"(mask|dseg|probseg|label|seg)s?\.nii", re.IGNORECASE)  # no heads


def _scan_of(file: Path, row: int) -> Scan:
    participant, session = identity_from_path(file.as_posix())
    name = participant or file.name.split(".")[0]
    return Scan(row=row, image=file, age=None, participant_id=name, session_id=session, mask=_mask_beside(file))


def _mask_beside(file: Path) -> Path | None:
    """Return the brain mask that lies beside a head under one of the usual names."""
    stem = file.name.removesuffix(".gz").removesuffix(".nii")
    bids = re.sub(r"(_desc-[^_]+)?_T1w$", "", stem)
    for name in (f"{bids}_desc-brain_mask", f"{stem}_mask", f"{stem}_brain_mask", "T1_brain_mask"):
        for ending in (".nii.gz", ".nii"):
            if (file.parent / (name + ending)).is_file():
                return file.parent / (name + ending)
    return None
