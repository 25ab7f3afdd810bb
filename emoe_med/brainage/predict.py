"""Apply a trained run to scans: one row out for every scan in, with a status and a reason."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import typer

from emoe_med.brainage.bias import AgeBias
from emoe_med.brainage.conformal import Interval
from emoe_med.brainage.evaluate import saved_bias, saved_interval, with_correction
from emoe_med.brainage.inference import TrainedModel, predict_scans
from emoe_med.brainage.prepared import prepared_like
from emoe_med.data.cache import HeadDataset
from emoe_med.data.contract import contract_digest
from emoe_med.data.manifest import Scan, inspect_manifest
from emoe_med.data.scan import identity_from_path, is_warped
from emoe_med.data.tree import mask_beside, scans_in
from emoe_med.errors import EXIT_PARTIAL, DataError, Fault
from emoe_med.storage import replace_file
from emoe_med.training.cli import say
from emoe_med.training.progress import counted

LOG = logging.getLogger("emoe_med")

COLUMNS = [
    *("row", "participant_id", "session_id", "image", "status", "reason", "predicted_age", "lower", "upper", "level"),
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

    The scans go through the chain of the training run. Where its scans were preprocessed, raw ones are so first, by the
    same steps; what `preprocess` wrote is used as it is. A folder is recognised as `scans_in` does; the brain mask of
    a file is looked for beside it (`mask_beside`).

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
    given, faults, identities = _scans(source, data_root)
    chain = model.chain()
    if chain.mask == "head":
        LOG.warning("note: this model was trained on whole heads, centred but not aligned; masks are not used")
    for part in model.lacking():
        LOG.warning("note: %s", part)
    scans, unusable = prepared_like(model.contract, given, cache_dir)
    heads = HeadDataset(scans, chain, cache_dir)
    found = predict_scans(model, heads, range(len(scans)), progress=counted("predicting"))
    found = with_correction(found, predictor.bias)
    if interval := predictor.interval:
        found = found.assign(**interval.ends(found), level=interval.level)
    refused = [*faults, *unusable]
    found = pd.concat([found, _refused(refused)]) if refused else found
    found = found.merge(_asked(given, faults, identities), on="row").sort_values("row", kind="stable")
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


Identities = Mapping[int, tuple[str, str]]  # participant and session by row


def _scans(source: Path, data_root: Path | None) -> tuple[list[Scan], list[Fault], Identities]:
    """Return the scans of a file, folder or manifest, the faults of those that its table already refuses, and whose."""
    if source.is_dir():
        return scans_in(source), [], {}
    if source.suffix.lower() not in (".csv", ".tsv"):
        return [_scan_of(source)], [], {}
    manifest, faults = inspect_manifest(source, data_root, require_age=False)
    if not manifest.scans:
        raise DataError(*faults or [Fault("PRED-NONE", "no scan in this manifest", str(source))])
    if any(fault.row is None or fault.code == "MAN-COLUMN" for fault in faults):  # of no row, but of the table
        raise DataError(*faults)
    wrong = {fault.row for fault in faults}
    return [scan for scan in manifest.scans if scan.row not in wrong], list(faults), manifest.identities


def _refused(faults: list[Fault]) -> pd.DataFrame:
    """Return a row for every scan that cannot be used, with all that is wrong with it."""
    reasons = pd.Series([fault.in_table for fault in faults], [fault.row for fault in faults])
    told = reasons.groupby(level=0).agg("; ".join)
    return pd.DataFrame({"row": told.index, "reason": told.to_numpy(), "status": "refused"})


def _asked(given: list[Scan], faults: list[Fault], identities: Identities) -> pd.DataFrame:
    """Return whose every row is, as far as the table tells."""
    rows: list[dict[str, Any]] = [
        {"row": s.row, "participant_id": s.participant_id, "session_id": s.session_id, "image": str(s.image)}
        for s in given
    ]
    for fault in faults:
        participant, session = identities.get(fault.row or 0, ("", ""))
        rows.append({"row": fault.row, "participant_id": participant, "session_id": session, "image": fault.file})
    return pd.DataFrame(rows).drop_duplicates("row")


def _scan_of(file: Path) -> Scan:
    participant, session = identity_from_path(file.as_posix())
    name = participant or file.name.split(".")[0]
    return Scan(
        row=1,
        image=file,
        age=None,
        participant_id=name,
        session_id=session,
        mask=mask_beside(file),
        warped=is_warped(file.name),
    )
