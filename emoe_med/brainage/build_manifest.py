"""Build a manifest from a BIDS data set, a UK Biobank bulk folder, or any files and a table of ages.

Ages are joined by participant and session, never by order. Every scan that is found is either a row or is
listed as skipped, with the reason.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from emoe_med.brainage.age_table import AgeTable, read_columns, session_key
from emoe_med.data.files import replace_file
from emoe_med.data.scan import KNOWN, SEXES, YEARS, identity_from_path, parse_age, person_key
from emoe_med.errors import ConfigError, DataError, Fault

BASE_COLUMNS = ("participant_id", "session_id", "image", "age", "sex", "site")
MORE_COLUMNS = ("mask", "family_id", "diagnosis", "qc_score")  # written where any row has a value

_UKB_IMAGES = (("T1_unbiased", True), ("T1", True), ("T1_unbiased_brain", False), ("T1_brain", False))


@dataclass(frozen=True)
class Skipped:
    """A scan that is no row of the manifest, and why."""

    path: str  # relative to the data root
    reason: str

    def __str__(self) -> str:
        return f"{self.path}  {self.reason}"


@dataclass(frozen=True)
class BuiltManifest:
    """Rows whose paths are relative to ``root``, scans left out, and what a person should know."""

    root: Path
    rows: pd.DataFrame
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]


def write_manifest(built: BuiltManifest, path: Path) -> None:
    """Write the rows as CSV, whole or not at all.

    Raises:
        DataError: ``MAN-EMPTY``, there is no row.
        StorageError: The file cannot be written.
    """
    if built.rows.empty:
        reason = f"no scan with an age was found; {len(built.skipped)} were skipped"
        raise DataError(Fault("MAN-EMPTY", reason, file=str(built.root)))
    replace_file(path, built.rows.to_csv(index=False, lineterminator="\n").encode())


class _Builder:
    """Collects rows and skipped scans below one data root."""

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise DataError(Fault("MAN-ROOT", "is not a folder", file=str(root)))
        self.root = root
        self.rows: list[dict[str, str]] = []
        self.skipped: list[Skipped] = []
        self.taken: dict[tuple[str, str], str] = {}  # scan -> its image

    def name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def skip(self, path: Path, reason: str) -> None:
        self.skipped.append(Skipped(self.name(path), reason))

    def add(self, scan: tuple[str, str], image: Path, record: Mapping[str, str], mask: Path | None = None) -> None:
        """Add a scan of (participant, session) with its record in the table, or skip it."""
        if scan in self.taken:
            self.skip(image, f"same participant and session as {self.taken[scan]}")
            return
        age, reason, _ = parse_age(record.get("age", ""))
        if age is None:
            self.skip(image, reason)
            return
        self.taken[scan] = self.name(image)
        row = {column: record.get(column, "") for column in (*BASE_COLUMNS, *MORE_COLUMNS)}
        row |= {"participant_id": scan[0], "session_id": scan[1], "sex": SEXES.get(row["sex"].casefold(), "")}
        row |= {"image": self.name(image), "mask": self.name(mask) if mask else "", "age": f"{age:.10g}"}
        self.rows.append(row)

    def finish(self, *notes: str) -> BuiltManifest:
        table = pd.DataFrame(self.rows, columns=[*BASE_COLUMNS, *MORE_COLUMNS], dtype=str)
        used = [column for column in MORE_COLUMNS if table[column].ne("").any()]
        told = [*notes]
        if len(table) and not table["age"].str.contains(".", regex=False).any():
            told.append("all ages are whole years: rounding alone can cost a mean error of 0.5 years")
        sessions = table.assign(session=table["session_id"].map(session_key)).groupby("participant_id")
        frozen = len(sessions[["session", "age"]].nunique().query("session > 1 and age == 1"))
        if frozen:
            told.append(f"{frozen} participants have several sessions, but one age: give the age at each session")
        return BuiltManifest(self.root, table[[*BASE_COLUMNS, *used]], tuple(self.skipped), tuple(told))


def from_bids(folder: Path, table: Path | None = None) -> BuiltManifest:
    """List the T1w images of a BIDS data set, raw or derivative.

    Of several versions of one scan the one in native space is taken, preprocessed before raw; a
    ``desc-brain_mask`` beside it becomes its mask. Runs and acquisitions are told apart in ``session_id``.

    Args:
        folder: Data set with ``sub-*/[ses-*/]anat``.
        table: Ages by ``participant_id`` and, where it has one, ``session_id``; default ``participants.tsv``,
            for a derivative also that of its raw data set. An age in ``sub-*_sessions.tsv`` comes first.

    Raises:
        DataError: No folder, no table, a column missing, or an age unit other than years.
    """
    builder = _Builder(folder)
    homes = [folder, folder.parent.parent] if folder.parent.name == "derivatives" else [folder]
    tables = [home / "participants.tsv" for home in homes if (home / "participants.tsv").is_file()]
    if not (table or tables):
        raise DataError(Fault("MAN-FILE", "no participants.tsv; give ages by --table", file=str(folder)))
    source = table or tables[0]
    _check_unit(source.with_suffix(".json"))
    ages = AgeTable(source)
    for path in sorted(source.parent.glob("sub-*/sub-*_sessions.tsv")):
        sessions = read_columns(path, KNOWN, ("session_id",))
        ages.add(((line, {**cells, "participant_id": path.parent.name}) for line, cells in sessions), path.name)
    images = [path for depth in ("sub-*", "sub-*/ses-*") for path in folder.glob(f"{depth}/anat/*_T1w.nii*")]
    for image in sorted(images, key=_bids_rank):
        participant, session = identity_from_path(builder.name(image))
        record = ages.find(participant, session) if participant else None
        if participant is None or record is None:
            builder.skip(image, f"participant or session is not in {source.name}")
            continue
        mask = image.with_name(re.sub(r"(_desc-[^_]+)?_T1w(\.nii.*)$", r"_desc-brain_mask\2", image.name))
        builder.add((participant, session), image, record, mask if mask.is_file() else None)
    spaces = sum("_space-" in row["image"] for row in builder.rows)
    warning = f"{spaces} images are in a template space: a nonlinear warp hides age; prefer native images"
    return builder.finish(*([warning] if spaces else []))


def _bids_rank(image: Path) -> tuple[bool, bool, str]:
    return "_space-" in image.name, "_desc-preproc" not in image.name, image.as_posix()


def _check_unit(sidecar: Path) -> None:
    if not sidecar.is_file():
        return
    try:
        age = json.loads(sidecar.read_text(encoding="utf-8")).get("age", {})
        unit = age.get("Units", "years") if isinstance(age, dict) else "years"
    except (ValueError, AttributeError) as error:
        raise DataError(Fault("MAN-FILE", f"cannot be read as JSON: {error}", file=str(sidecar))) from None
    if str(unit).casefold() not in YEARS:
        raise DataError(Fault("MAN-UNIT", f"age is given in {unit!r}, not in years", file=str(sidecar)))


def from_glob(folder: Path, pattern: str, table: Path, mask_pattern: str | None = None) -> BuiltManifest:
    """List the files that match a pattern, with ages from a table.

    A file belongs to the participant whose id stands in its path between separators; the longest one wins, with
    its ``sub-``, and a path with two such ids is skipped. Masks are joined in the same way, by participant and session.

    Args:
        folder: Data root.
        pattern: As ``**/*_T1w.nii.gz``, relative to ``folder``.
        table: ``participant_id``, ``age`` and, where it has one, ``session_id``.
        mask_pattern: Brain masks, relative to ``folder``. These are no images, and an image without exactly
            one of its own is skipped.

    Raises:
        ConfigError: A pattern is empty or absolute.
        DataError: No folder, no table, or a column missing.
    """
    builder = _Builder(folder)
    ages = AgeTable(table)

    def identity(path: Path) -> tuple[tuple[str, ...], str]:
        name = builder.name(path)
        return tuple(_ids_in(name, ages.people)), identity_from_path(name)[1]

    masks = _files(folder, mask_pattern) if mask_pattern else []
    masks_of: dict[tuple[tuple[str, ...], str], list[Path]] = {}
    for mask in masks:
        masks_of.setdefault(identity(mask), []).append(mask)
    for image in sorted(set(_files(folder, pattern)) - set(masks)):
        participants, session = identity(image)
        record = ages.find(participants[0], session) if len(participants) == 1 else None
        own = masks_of.get((participants, session), [])
        if len(participants) > 1:
            builder.skip(image, f"path names several participants of {table.name}")
        elif record is None:
            builder.skip(image, f"path names no participant, or no session, of {table.name}")
        elif mask_pattern and len(own) != 1:
            builder.skip(image, f"{len(own) or 'no'} masks name this participant and session")
        else:
            builder.add((participants[0], session), image, record, own[0] if own else None)
    return builder.finish()


def _files(folder: Path, pattern: str) -> list[Path]:
    try:
        return [path for path in folder.glob(pattern) if path.is_file()]
    except (NotImplementedError, ValueError):
        reason = f"{pattern!r} is no pattern of files below a folder"
        raise ConfigError(Fault("CLI-PATTERN", reason, hint="such as '**/*_T1w.nii.gz'")) from None


def _ids_in(path: str, people: set[str]) -> list[str]:
    """Return the longest ids of the table that stand in a path as whole words."""
    words = [match.span() for match in re.finditer(r"[^/_.\- ]+", path)]
    spans = [path[start:end] for i, (start, _) in enumerate(words) for _, end in words[i:]]
    found = {person_key(text): text for text in sorted(spans, key=len) if person_key(text) in people}
    longest = max((len(text) for text in found.values()), default=0)
    return [text for text in found.values() if len(text) == longest]


def from_ukb(bulk: Path, table: Path, warped: bool = False) -> BuiltManifest:
    """List the T1 scans of a UK Biobank bulk folder (field 20252, imaging instances 2 and 3).

    The image is the native one with its brain mask (the bias-corrected one first), else the brain alone.
    Age is counted from birth (fields 34 and 52) to the visit (53) where the table has these, else it is
    field 21003, which is rounded down.

    Args:
        bulk: Folder of ``<eid>_20252_<2|3>_0`` folders, or of folders of these.
        table: Fields 21003, 31 and 54 in any of the spellings ``21003-2.0``, ``p21003_i2``, ``f.21003.2.0``.
        warped: Take ``T1_brain_to_MNI`` instead, although a nonlinear warp takes signs of age away.

    Raises:
        DataError: No folder, no table, a field missing, or an eid told twice.
    """
    builder = _Builder(bulk)
    records = _ukb_records(table)
    found = [path for depth in ("*", "*/*") for path in bulk.glob(f"{depth}_20252_*")]
    for folder in sorted(found):
        match = re.fullmatch(r"(\d+)_20252_([23])_0", folder.name)
        if match is None or not folder.is_dir():
            zipped = folder.suffix == ".zip"
            builder.skip(folder, "still zipped: unzip it" if zipped else "not a scan of instance 2 or 3")
            continue
        eid, instance = match.groups()
        image, mask, reason = _ukb_image(folder / "T1", warped)
        if image is None:
            builder.skip(folder, reason)
        elif eid not in records:
            builder.skip(folder, f"eid is not in {table.name}")
        else:
            builder.add((eid, instance), image, _ukb_record(records[eid], instance), mask)
    return builder.finish()


def _ukb_records(table: Path) -> dict[str, dict[str, str]]:
    records: dict[str, dict[str, str]] = {}
    for line, cells in read_columns(table, _ukb_columns(), ("eid", "age_2")):
        if cells["eid"] in records:
            raise DataError(Fault("MAN-TWICE", "this eid has a row already", row=line, manifest=table.name))
        records[cells["eid"]] = cells
    return records


def _ukb_columns() -> dict[str, str]:
    """Map each spelling of a field to its column, such as ``age_2`` for field 21003 at instance 2."""
    known = {"eid": "eid", "f.eid": "eid"}
    for field, column in {"31": "sex", "34": "birth_year", "52": "birth_month"}.items():
        known |= dict.fromkeys((f"{field}-0.0", f"p{field}", f"f.{field}.0.0"), column)
    for field, column in {"21003": "age", "54": "site", "53": "date"}.items():
        for i in "23":
            known |= dict.fromkeys((f"{field}-{i}.0", f"p{field}_i{i}", f"f.{field}.{i}.0"), f"{column}_{i}")
    return known | {f"participant.{name}": column for name, column in known.items()}


def _ukb_image(t1: Path, warped: bool) -> tuple[Path | None, Path | None, str]:
    """Return image and mask, or the reason why there is none."""
    if warped:
        image = t1 / "T1_brain_to_MNI.nii.gz"
        return (image, None, "") if image.is_file() else (None, None, "no T1/T1_brain_to_MNI.nii.gz")
    mask = t1 / "T1_brain_mask.nii.gz"
    for name, needed in _UKB_IMAGES:
        image = t1 / f"{name}.nii.gz"
        if image.is_file() and (not needed or mask.is_file()):
            return image, mask if needed else None, ""
    unusable = (t1 / "unusable").exists()
    return None, None, "marked unusable by UK Biobank" if unusable else "no T1 with a brain mask, and no T1_brain"


def _ukb_record(record: Mapping[str, str], instance: str) -> dict[str, str]:
    sex = {"0": "F", "1": "M"}.get(record.get("sex", ""), record.get("sex", ""))
    age = record.get(f"age_{instance}", "")
    with suppress(KeyError, ValueError):  # field 21003 remains
        visit = datetime.date.fromisoformat(record[f"date_{instance}"])
        birth = datetime.date(int(record["birth_year"]), int(record["birth_month"]), 15)  # the day is not told
        age = f"{(visit - birth).days / 365.25:.2f}"
    return {"age": age, "sex": sex, "site": record.get(f"site_{instance}", "")}
