"""Build a manifest from UK Biobank's T1 bulk items, unzipped or still zipped, and a table of fields."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

from emoe_med.brainage.age_table import read_columns
from emoe_med.brainage.build_manifest import Builder, BuiltManifest
from emoe_med.data.opening import ARCHIVE, member_names
from emoe_med.errors import DataError, Fault, VolumeError

_MASK = "T1/T1_brain_mask.nii.gz"
_TRANSFORM = "T1/transforms/T1_to_MNI_linear.mat"
_WARPED = "T1/T1_brain_to_MNI.nii.gz"
_IMAGES = {"T1/T1_unbiased_brain": True, "T1/T1_unbiased": False, "T1/T1_brain": True, "T1/T1": False}  # brain alone?


def from_ukb(bulk: Path, table: Path, warped: bool = False) -> BuiltManifest:
    """List the T1 scans of UK Biobank bulk items (field 20252, imaging instances 2 and 3).

    The image is the unbiased brain, else the unbiased head with its brain mask, else the same of the T1 as it was; it
    comes with the linear transform to MNI space where there is one. Of a zip archive the members are named in place.
    Age is counted from birth (fields 34 and 52) to the visit (53) where the table has these, else it is
    field 21003, which is rounded down.

    Args:
        bulk: Folder of ``<eid>_20252_<2|3>_0`` folders or zip archives, or of folders of these.
        table: Fields 21003, 31 and 54 in any of the spellings ``21003-2.0``, ``p21003_i2``, ``f.21003.2.0``.
        warped: Take ``T1_brain_to_MNI`` instead, although a nonlinear warp takes signs of age away.

    Raises:
        DataError: No folder, no table, a field missing, or an eid told twice.
    """
    builder = Builder(bulk)
    records = _records(table)
    undated = 0
    for item in sorted(path for depth in ("*", "*/*") for path in bulk.glob(f"{depth}_20252_*")):
        match = re.fullmatch(rf"(\d+)_20252_([23])_0(?:{re.escape(ARCHIVE)})?", item.name)
        if match is None:
            builder.skip(item, "not a scan of instance 2 or 3")
            continue
        eid, instance = match.groups()
        try:
            holds = _holds(item)
        except VolumeError as error:
            builder.skip(item, error.faults[0].reason)
            continue
        image, mask, reason = _choose(holds, warped)
        if image is None:
            builder.skip(item, reason)
        elif eid not in records:
            builder.skip(item, f"eid is not in {table.name}")
        else:
            linear = builder.name(item / _TRANSFORM) if not warped and holds(_TRANSFORM) else ""
            record = _record(records[eid], instance)
            exact = _exact_age(records[eid], instance)
            undated += exact is None and record["age"] != ""
            record["age"] = exact or record["age"]
            more = {"transform": linear, "warped": "yes" if warped else ""}
            builder.add((eid, instance), item / image, record, item / (mask or image), **more)
    dated = any("date_2" in record for record in records.values())
    lacking = f"{undated} scans lack a date that can be read (fields 34, 52, 53): age is field 21003, rounded down"
    return builder.finish(*_notes(builder, warped), *([lacking] if dated and undated else []))


def _holds(item: Path) -> Callable[[str], bool]:
    """Return what tells whether a folder or archive holds a file.

    Raises:
        VolumeError: No folder, and no archive that can be read.
    """
    if item.is_dir():
        return lambda name: (item / name).exists()
    names = member_names(item)  # not every archive lists the folders of its files
    return (names | {f"{parent}" for name in names for parent in PurePosixPath(name).parents}).__contains__


def _choose(holds: Callable[[str], bool], warped: bool) -> tuple[str | None, str | None, str]:
    """Return image and mask, None for the image itself, or the reason why there is none."""
    if warped:
        return (_WARPED, None, "") if holds(_WARPED) else (None, None, f"no {_WARPED}")
    mask = _MASK if holds(_MASK) else None
    for stem, brain_alone in _IMAGES.items():
        if holds(f"{stem}.nii.gz") and (mask or brain_alone):
            return f"{stem}.nii.gz", mask, ""
    if not holds("T1"):
        return None, None, "no folder T1 in it"
    unusable = holds("T1/unusable")
    return None, None, "marked unusable by UK Biobank" if unusable else "no T1 with a brain mask, and no T1_brain"


def _notes(builder: Builder, warped: bool) -> list[str]:
    if warped:
        return ["images are warped nonlinearly, which takes signs of age away: a model of these takes no others"]
    given = sum(bool(row["transform"]) for row in builder.rows)
    if 0 < given < len(builder.rows):
        return [f"{len(builder.rows) - given} scans lack {_TRANSFORM}: then all heads are aligned anew"]
    return []


def _records(table: Path) -> dict[str, dict[str, str]]:
    records: dict[str, dict[str, str]] = {}
    for line, cells in read_columns(table, _columns(), ("eid", "age_2")):
        if cells["eid"] in records:
            raise DataError(Fault("MAN-TWICE", "this eid has a row already", row=line, manifest=table.name))
        records[cells["eid"]] = cells
    return records


def _columns() -> dict[str, str]:
    """Map each spelling of a field to its column, such as ``age_2`` for field 21003 at instance 2."""
    known = {"eid": "eid", "f.eid": "eid"}
    for field, column in {"31": "sex", "34": "birth_year", "52": "birth_month"}.items():
        known |= dict.fromkeys((f"{field}-0.0", f"p{field}", f"f.{field}.0.0"), column)
    for field, column in {"21003": "age", "54": "site", "53": "date"}.items():
        for i in "23":
            known |= dict.fromkeys((f"{field}-{i}.0", f"p{field}_i{i}", f"f.{field}.{i}.0"), f"{column}_{i}")
    return known | {f"participant.{name}": column for name, column in known.items()}


def _record(record: Mapping[str, str], instance: str) -> dict[str, str]:
    sex = {"0": "F", "1": "M"}.get(record.get("sex", ""), record.get("sex", ""))
    return {"age": record.get(f"age_{instance}", ""), "sex": sex, "site": record.get(f"site_{instance}", "")}


def _exact_age(record: Mapping[str, str], instance: str) -> str | None:
    """Count the years from birth to visit; None where a date is missing or cannot be read."""
    try:
        visit = datetime.date.fromisoformat(record[f"date_{instance}"])
        birth = datetime.date(int(record["birth_year"]), int(record["birth_month"]), 15)  # the day is not told
    except (KeyError, ValueError):
        return None
    return f"{(visit - birth).days / 365.25:.2f}"
