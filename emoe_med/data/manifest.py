"""Read a manifest: one row per scan, every fault of the table found in one look.

Columns: ``image`` and ``age`` (decimal years) are required; the rest is told in data_manifests/README.md.
Nothing is repaired or guessed: what is not understood is refused with its row and a ``MAN-...`` code.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from emoe_med.data.paths import find_data_root
from emoe_med.data.scan import KNOWN, OUTCOME, RowReader, Scan, person_key
from emoe_med.data.table import Refusals, match_columns, read_table, records, refuse_misspelt
from emoe_med.errors import DataError, Fault

__all__ = ["Manifest", "Scan", "inspect_manifest", "person_key", "read_manifest"]

_UKB_HINT = (
    "build the real manifest with: python -m emoe_med.brainage manifest ukb --bulk DIR --table FIELDS.csv"
    " -o FILE; then "
)
_ROOT_HINT = "name the folder of the images by --data-root DIR or EMOE_MED_DATA_ROOT"


@dataclass(frozen=True)
class Manifest:
    """A table of scans, known by the SHA-256 of its bytes.

    Attributes:
        notes: What a person should know.
        identities: Participant and session of every row that could be told apart, of refused ones too.
    """

    path: Path
    sha256: str
    scans: tuple[Scan, ...]
    notes: tuple[str, ...] = ()
    identities: Mapping[int, tuple[str, str]] = field(default_factory=dict)


def read_manifest(
    path: Path, data_root: Path | None = None, require_age: bool = True, check_files: bool = True
) -> Manifest:
    """Read a manifest, or refuse it with all faults of the table at once.

    Args:
        path: CSV or TSV in UTF-8.
        data_root: Folder of relative paths; default ``EMOE_MED_DATA_ROOT``, else the manifest's folder.
        require_age: Refuse rows without age, and cohorts of one person or one age.
        check_files: Look whether each image, mask and label file is there and inside the data root.

    Raises:
        DataError: One fault per refused thing, in order of rows. A wrong data root is one fault, not one
            per image.
    """
    manifest, faults = inspect_manifest(path, data_root, require_age, check_files)
    if faults:
        raise DataError(*faults)
    return manifest


def inspect_manifest(
    path: Path, data_root: Path | None = None, require_age: bool = True, check_files: bool = True
) -> tuple[Manifest, tuple[Fault, ...]]:
    """Read a manifest as `read_manifest` does, and return its faults beside the scans that can be opened.

    Raises:
        DataError: The file is no table at all: not there, too large, not UTF-8, semicolons.
    """
    path = Path(path)
    content = read_table(path)
    root = find_data_root(path, data_root)
    has_root = root.folder.is_dir()
    reader = RowReader(root, Refusals(path.name), require_age, look=check_files and has_root)
    with _without_search_for_cycles():
        scans = _read_rows(content, reader)
    if check_files and not (has_root and (reader.num_found or not reader.lost)):
        _blame_root(reader, has_root, scans)
        scans = []
    _judge_cohort(scans, reader)
    faults = tuple(sorted(reader.refusals.faults, key=lambda fault: fault.row or 0))
    digest = hashlib.sha256(content).hexdigest()
    return Manifest(path, digest, tuple(scans), tuple(_notes(scans, reader)), reader.identities), faults


@contextmanager
def _without_search_for_cycles() -> Generator[None]:
    """Rest Python's search for cyclic garbage: rows make none, and it took a third of the time of a million of them."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _read_rows(content: bytes, reader: RowReader) -> list[Scan]:
    table = records(content, reader.refusals)
    line, header = next(table, (1, []))
    if not header:
        reader.refusals.add("MAN-EMPTY", "the table is empty")
        return []
    required = ("image", "age") if reader.require_age else ("image",)
    columns = match_columns(header, KNOWN | OUTCOME, required, reader.refusals, line)
    refuse_misspelt(header, KNOWN, columns, reader.refusals, line)
    scans = []
    num_rows = 0
    for line, cells in table:
        num_rows += 1
        scan = reader.read(line, {name: cells[index] for name, index in columns.items()})
        if scan is not None:
            scans.append(scan)
    if not num_rows and not reader.refusals.faults:
        reader.refusals.add("MAN-EMPTY", "no rows below the header")
    return scans


def _blame_root(reader: RowReader, has_root: bool, scans: list[Scan]) -> None:
    """Say once that the data root is wrong, rather than once for every image."""
    faults = reader.refusals.faults
    faults[:] = [fault for fault in faults if fault.code != "VOL-MISSING"]
    if has_root:
        what = f"holds none of the {len(reader.lost)} images"
    else:
        what = "does not exist" if not reader.root.folder.exists() else "is not a folder"
    images = reader.lost or [str(scan.image) for scan in scans]
    hint = (_UKB_HINT if any("_20252_" in image for image in images) else "") + _ROOT_HINT
    reason = f"this data root ({reader.root.source}) {what}"
    reader.refusals.add("MAN-ROOT", reason, hint=hint, file=str(reader.root.folder))


def _judge_cohort(scans: list[Scan], reader: RowReader) -> None:
    refusals = reader.refusals
    if any(scan.split for scan in scans) and not any(fault.code == "MAN-SPLIT" for fault in refusals.faults):
        for scan in scans:
            if scan.split is None:
                refusals.add("MAN-SPLIT", "split is missing, but other rows have one", scan.row)
    if reader.require_age and not refusals.faults:
        if len({person_key(scan.participant_id) for scan in scans}) == 1:
            refusals.add("MAN-COHORT", "all rows are of one participant")
        elif len({scan.age for scan in scans}) == 1:
            refusals.add("MAN-COHORT", "all ages are equal")


def _notes(scans: list[Scan], reader: RowReader) -> list[str]:
    notes = []
    if reader.num_derived:
        notes.append(f"participant_id of {reader.num_derived} rows was read from the path")
    if reader.num_nameless:
        notes.append(f"{reader.num_nameless} rows name no participant: each file counts as its own person")
    ages = [scan.age for scan in scans if scan.age is not None]
    if ages and all(age == int(age) for age in ages):
        notes.append("all ages are whole years: rounding alone can cost a mean error of 0.5 years")
    return notes
