"""Read ages from tables of many kinds and find them by participant and session, never by order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from emoe_med.data.scan import KNOWN, is_missing, person_key
from emoe_med.data.table import Refusals, match_columns, read_table, records
from emoe_med.errors import DataError, Fault


class AgeTable:
    """Rows of a table by participant and, where it tells, by session.

    Args:
        table: CSV or TSV.
        ages_elsewhere: It may lack ages, because further tables tell them.

    Raises:
        DataError: As `read_columns`; ``MAN-TWICE``, one scan has two rows.
    """

    def __init__(self, table: Path, ages_elsewhere: bool = False) -> None:
        self.by_scan: dict[tuple[str, str], Mapping[str, str]] = {}
        self.people: set[str] = set()
        required = ("participant_id",) if ages_elsewhere else ("participant_id", "age")
        self.add(read_columns(table, KNOWN, required), table.name)

    def add(self, rows: Iterable[tuple[int, Mapping[str, str]]], source: str) -> None:
        """Add lines and their cells, of sessions for example, none of which may be known yet."""
        faults = []
        for line, cells in rows:
            scan = (person_key(cells["participant_id"]), session_key(cells.get("session_id", "")))
            if scan in self.by_scan:
                reason = "this participant and session has a row already"
                faults.append(Fault("MAN-TWICE", reason, row=line, manifest=source))
            self.by_scan[scan] = cells
            self.people.add(scan[0])
        if faults:
            raise DataError(*faults)

    def find(self, participant: str, session: str) -> dict[str, str] | None:
        """Return what the table tells of a scan: of the session first, else of the participant."""
        person = person_key(participant)
        found = [self.by_scan.get((person, part), {}) for part in dict.fromkeys(("", session_key(session)))]
        return {column: text for cells in found for column, text in cells.items() if text} or None


def read_columns(path: Path, known: Mapping[str, str], required: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """Read the known columns of a CSV or TSV: line and cells of each row, empty where a value is missing.

    Args:
        path: Table in UTF-8.
        known: Accepted name to the column that it means; other columns are left out.
        required: Columns that must be there.

    Raises:
        DataError: All faults of the table: ``MAN-FILE``, ``MAN-ENCODING``, ``MAN-DELIMITER``,
            ``MAN-COLUMN``, ``MAN-RAGGED``, ``MAN-QUOTE``, ``MAN-EMPTY``.
    """
    refusals = Refusals(path.name)
    table = records(read_table(path), refusals)
    line, header = next(table, (1, []))
    if header:
        columns = match_columns(header, known, required, refusals, line)
    else:
        columns = {}
        refusals.add("MAN-EMPTY", "the table is empty")
    rows = []
    for line, cells in table:
        texts = {column: cells[index].strip() for column, index in columns.items()}
        rows.append((line, {column: "" if is_missing(text) else text for column, text in texts.items()}))
    if refusals.faults:
        raise DataError(*refusals.faults)
    return rows


def session_key(session: str) -> str:
    """Return the label that ``2``, ``ses-2`` and ``ses-2_run-1`` share; none of ``run-1``, a run without a session."""
    first = session.casefold().split("_")[0]
    return "" if first.startswith(("acq-", "rec-", "run-")) else first.removeprefix("ses-")
