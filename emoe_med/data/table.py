"""Read a CSV or TSV table strictly: text, records with their line numbers, columns by name.

Accepted: UTF-8 with or without byte-order mark, any line ends, blank lines, quoted fields.
Refused with the line: other encodings, semicolons, open quotes, rows that are too short or too long.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import io
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from emoe_med.errors import DataError, Fault

_MAX_BYTES = 200 * 2**20
_CLOSE_NAME = 0.82  # "session" is close to "session_id", "weight_kg" is not close to "weight"


@dataclass
class Refusals:
    """Faults of one table, collected so that all are told at once."""

    table: str  # file name
    faults: list[Fault] = field(default_factory=list)

    def add(
        self, code: str, reason: str, row: int | None = None, hint: str | None = None, file: str | None = None
    ) -> None:
        """Note one refused thing of the table, ``row`` being a line of the file."""
        self.faults.append(Fault(code, reason, file=file, row=row, manifest=self.table, hint=hint))


def read_table(path: Path) -> bytes:
    """Read the bytes of a table in UTF-8.

    Raises:
        DataError: ``MAN-FILE``: not there, not a regular file, above 200 MiB; ``MAN-ENCODING``: not UTF-8.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # asked before open: a FIFO would block
            raise DataError(Fault("MAN-FILE", "not a regular file", file=str(path)))
        if status.st_size > _MAX_BYTES:
            raise DataError(Fault("MAN-FILE", f"larger than {_MAX_BYTES >> 20} MiB", file=str(path)))
        content = path.read_bytes()
    except OSError as error:
        raise DataError(Fault("MAN-FILE", f"cannot be read: {error.strerror}", file=str(path))) from None
    _check_encoding(content, path.name)
    return content


def _check_encoding(content: bytes, name: str) -> None:
    hint = "save the table as UTF-8"
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(Fault("MAN-ENCODING", "encoded as UTF-16", row=1, manifest=name, hint=hint))
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        row = 1 + content.count(b"\n", 0, error.start)
        reason = f"byte 0x{content[error.start]:02x} is not UTF-8; is the table Latin-1?"
        raise DataError(Fault("MAN-ENCODING", reason, row=row, manifest=name, hint=hint)) from None


def records(content: bytes, refusals: Refusals) -> Iterator[tuple[int, list[str]]]:
    """Yield the line number and cells of the header, then of each row that has as many cells.

    Raises:
        DataError: ``MAN-DELIMITER``, columns are separated by semicolons.
    """
    lines = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig", newline="")
    reader = csv.reader(lines, delimiter=_delimiter(content, refusals.table), strict=True)
    width = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            refusals.add("MAN-QUOTE", f"quotes do not match ({error})", line)
            continue
        if not any(cell.strip() for cell in cells):
            continue
        width = width or len(cells)
        if len(cells) == width:
            yield line, cells
        else:
            refusals.add("MAN-RAGGED", f"{len(cells)} fields, the header has {width}", line)


def _delimiter(content: bytes, table: str) -> str:
    header = next((line for line in io.BytesIO(content) if line.strip()), b"")
    if b"\t" in header:
        return "\t"
    if b";" in header and b"," not in header:
        reason, hint = "columns are separated by semicolons", "save the table with commas or tabs"
        raise DataError(Fault("MAN-DELIMITER", reason, row=1, manifest=table, hint=hint))
    return ","


def match_columns(
    header: Sequence[str], known: Mapping[str, str], required: Sequence[str], refusals: Refusals, line: int = 1
) -> dict[str, int]:
    """Map each known column to its place; refuse doubled and missing ones, ignore the others.

    Args:
        header: Names as written; case and outer blanks do not count.
        known: Accepted name to the column that it means.
        required: Columns that must be there.
        refusals: Takes ``MAN-COLUMN`` faults.
        line: Line of the header.
    """
    names = [name.strip().casefold() for name in header]
    columns: dict[str, int] = {}
    for index, name in enumerate(names):
        column = known.get(name)
        if column in columns:
            twice = f"columns {names[columns[column]]!r} and {name!r} both mean {column!r}"
            refusals.add("MAN-COLUMN", twice, line, "keep one of them")
        elif column is not None:
            columns[column] = index
    for column in required:
        if column not in columns:
            spellings = [name for name, meaning in known.items() if meaning == column]
            others = [name for name in names if name not in known and not re.search(r"\d", name)]  # fields by number
            near = [match for name in spellings for match in difflib.get_close_matches(name, others, 1)]
            hint = f"did you mean {near[0]!r}?" if near else f"write it as {' or '.join(map(repr, spellings))}"
            refusals.add("MAN-COLUMN", f"column {column!r} is missing", line, hint)
    return columns


def refuse_misspelt(
    header: Sequence[str], known: Mapping[str, str], columns: Mapping[str, int], refusals: Refusals, line: int = 1
) -> None:
    """Refuse a column whose name is nearly that of an absent one.

    It is no harmless extra: without its ``split`` column a manifest may put a person in two splits.
    """
    absent = [name for name, column in known.items() if column not in columns]
    told = {fault.hint for fault in refusals.faults}
    for name in sorted({name.strip().casefold() for name in header} - {"", *known}):
        near = difflib.get_close_matches(name, absent, 1, cutoff=_CLOSE_NAME)
        if near and f"did you mean {name!r}?" not in told:
            refusals.add("MAN-COLUMN", f"column {name!r} is unknown", line, f"did you mean {near[0]!r}?")
