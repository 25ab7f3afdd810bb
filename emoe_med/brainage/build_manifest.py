"""What every way to build a manifest shares: rows, scans left out, notes, and the file.

Ages are joined by participant and session, never by order. Every scan that is found is either a row or is
listed as skipped, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from emoe_med.brainage.age_table import session_key
from emoe_med.data.scan import SEXES, parse_age
from emoe_med.errors import DataError, Fault
from emoe_med.storage import replace_file

BASE_COLUMNS = ("participant_id", "session_id", "image", "age", "sex", "site")
# written where any row has a value
MORE_COLUMNS = ("mask", "transform", "warped", "family_id", "diagnosis", "qc_score")


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


class Builder:
    """Collects rows and skipped scans below one data root."""

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise DataError(Fault("MAN-ROOT", "is not a folder", file=str(root)))
        self.root = root
        self.rows: list[dict[str, str]] = []
        self.skipped: list[Skipped] = []
        self.taken: dict[tuple[str, str], str] = {}  # scan -> its image

    def name(self, path: Path) -> str:
        """Return a path as the manifest has it."""
        return path.relative_to(self.root).as_posix()

    def skip(self, path: Path, reason: str) -> None:
        """Leave a scan out, and say why."""
        self.skipped.append(Skipped(self.name(path), reason))

    def add(
        self, scan: tuple[str, str], image: Path, record: Mapping[str, str], mask: Path | None = None, **more: str
    ) -> None:
        """Add a scan of (participant, session) with its record in the table and further columns, or skip it."""
        if scan in self.taken:
            self.skip(image, f"same participant and session as {self.taken[scan]}")
            return
        age, reason, _ = parse_age(record.get("age", ""))
        if age is None:
            self.skip(image, reason)
            return
        self.taken[scan] = self.name(image)
        row = {column: record.get(column, "") for column in (*BASE_COLUMNS, *MORE_COLUMNS)} | more
        row |= {"participant_id": scan[0], "session_id": scan[1], "sex": SEXES.get(row["sex"].casefold(), "")}
        row |= {"image": self.name(image), "mask": self.name(mask) if mask else "", "age": f"{age:.10g}"}
        self.rows.append(row)

    def finish(self, *notes: str) -> BuiltManifest:
        """Return the manifest, with what a person should know of its ages beside the notes given."""
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
