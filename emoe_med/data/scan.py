"""Read one row of a manifest into a scan, refusing what it cannot mean.

Each method of the reader takes one column; a row is understood in full, or it tells all its faults.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emoe_med.data.paths import DataRoot, Located, locate, printable
from emoe_med.data.table import Refusals
from emoe_med.errors import DataError

COLUMNS = (
    *("image", "age", "participant_id", "session_id", "sex", "site", "mask", "labels", "family_id", "split"),
    *("weight", "qc_score", "diagnosis", "sha256", "age_unit", "transform", "warped"),
)
ALIASES = {"path": "image", "age_years": "age", "subject_id": "participant_id", "eid": "participant_id"}
OUTCOME = {"status": "status", "reason": "reason"}  # of `preprocess`
KNOWN = {name: name for name in COLUMNS} | ALIASES
SEXES = {"f": "F", "female": "F", "m": "M", "male": "M", "o": "O", "other": "O"}
YES_OR_NO = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}
SPLITS = {"train": "train", "val": "val", "test": "test"}
MAX_AGE_YEARS = 120
YEARS = ("years", "year", "yrs", "y")

_MISSING = {"", "n/a", "na", "nan", "null", "none"}
_MAX_WEIGHT = 20  # a column of body weights in kg would pass for sample weights
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_SHOWN = re.compile(r"[+-]?\d{1,3}([.,]\d{1,2})?|[a-z/]{1,3}", re.ASCII | re.IGNORECASE)
_SUBJECT = re.compile(r"(?:^|[/_])(sub-[^/_.]+)(?=[/_.]|$)")
_SESSION = re.compile(r"(?:^|[/_])((?:ses|acq|rec|run)-[^/_.]+)(?=[/_.]|$)")
# UK Biobank's name, and fMRIPrep's for a template's space; `preprocess`, which is affine, writes to the excepted one
_WARPED = re.compile(r"(^|/)T1_brain_to_MNI\.nii|_space-MNI(?!152NLin2009aSym_)[^/]*_T1w\.nii")
_UKB = re.compile(r"(?:^|/)(\d{7})(?:_20252_(\d)_\d)?(?=[/_.]|$)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Scan:
    """One row of a manifest."""

    row: int  # line in the file, the header being line 1
    image: Path
    age: float | None  # years
    participant_id: str
    session_id: str  # empty where the manifest knows of none
    sex: str | None = None  # F, M or O
    site: str | None = None
    mask: Path | None = None
    labels: Path | None = None
    family_id: str | None = None
    split: str | None = None  # train, val or test
    weight: float = 1.0
    qc_score: float | None = None
    diagnosis: str | None = None
    sha256: str | None = None  # of the image's bytes
    transform: Path | None = None  # FSL's linear matrix to MNI152_T1_1mm
    warped: bool = False  # nonlinearly, to a template


def person_key(participant_id: str) -> str:
    """Return what all spellings of one participant share: composed accents, one case, no ``sub-``."""
    return unicodedata.normalize("NFC", participant_id).casefold().removeprefix("sub-")


def identity_from_path(path: str) -> tuple[str | None, str]:
    """Derive participant and session from BIDS entities or from the folder names of UK Biobank.

    Returns:
        ``("sub-01", "ses-2_run-1")`` in BIDS, ``("1000001", "2")`` for ``1000001_20252_2_0``. The participant
        is None where the path names none, or two; the session is then empty.
    """
    if subjects := set(_SUBJECT.findall(path)):
        session = "_".join(dict.fromkeys(_SESSION.findall(path)))
    else:
        found = set(_UKB.findall(path))
        subjects = {eid for eid, _ in found}
        session = max((instance for _, instance in found), default="")
    return (subjects.pop(), session) if len(subjects) == 1 else (None, "")


def is_warped(path: str) -> bool:
    """Tell whether a path names a nonlinearly warped image, as UK Biobank and fMRIPrep call theirs."""
    return _WARPED.search(path) is not None


def parse_age(text: str) -> tuple[float | None, str, str]:
    """Read decimal years; None comes with the reason and with what to write instead. No unit is guessed."""
    text = text.strip()
    age = _parse_number(text)
    hint = "write decimal years, such as 67.4"
    if age is not None and 0 <= age <= MAX_AGE_YEARS:
        return age, "", ""
    if is_missing(text):
        return None, "age is missing", hint
    if age is None:
        return None, f"age {_shown(text)}is not a number", hint
    if MAX_AGE_YEARS < age <= 12 * MAX_AGE_YEARS:
        hint = f"if it is in months, write {age / 12:.1f} years"
    return None, f"age {_shown(text)}is outside 0 to {MAX_AGE_YEARS} years", hint


def is_missing(text: str) -> bool:
    """Tell whether a cell says that there is no value."""
    return not text or (len(text) < 5 and text.casefold() in _MISSING)


@dataclass
class RowReader:
    """Reads row after row, remembering what must not come twice.

    Attributes:
        look: Look for the files; otherwise paths are judged by their text alone.
        lost: Images that are not there.
        seen: Identity of a scan or a file, and the first row that has it.
        identities: Participant and session of every row, of refused ones too.
    """

    root: DataRoot
    refusals: Refusals
    require_age: bool
    look: bool
    lost: list[str] = field(default_factory=list)
    seen: dict[Hashable, int] = field(default_factory=dict)
    identities: dict[int, tuple[str, str]] = field(default_factory=dict)
    num_found: int = 0
    num_derived: int = 0
    num_nameless: int = 0
    line: int = 0
    cells: Mapping[str, str] = field(default_factory=dict)

    def read(self, line: int, cells: Mapping[str, str]) -> Scan | None:
        """Read the cells of one line, by column; None where there is no image to open."""
        self.line, self.cells = line, cells
        image, is_new = self._image()
        participant, session = self.identities[line] = self._identity()
        scan = Scan(
            row=self.line,
            image=image or Path(),
            age=self._age(),
            participant_id=participant,
            session_id=session,
            sex=self._choice("sex", "MAN-SEX", SEXES, "write F or M, or leave it empty"),
            site=self._text("site"),
            mask=self._file("mask"),
            labels=self._file("labels"),
            family_id=self._text("family_id"),
            split=self._choice("split", "MAN-SPLIT", SPLITS, "write train, val or test"),
            weight=self._weight(),
            qc_score=self._number("qc_score", "MAN-QC"),
            diagnosis=self._text("diagnosis"),
            sha256=self._digest(),
            transform=self._file("transform"),
            warped=self._warped(),
        )
        if is_new and participant:
            key = ("scan", person_key(participant), session.casefold().removeprefix("ses-"))
            self._is_first(key, "MAN-TWICE", "same participant and session", "tell sessions apart by session_id")
        return scan if image else None

    def _refuse(self, code: str, reason: str, hint: str | None = None, file: str | None = None) -> None:
        self.refusals.add(code, reason, self.line, hint, file or printable(self.cells.get("image", "")) or None)

    def _is_first(self, key: Hashable, code: str, what: str, hint: str | None = None) -> bool:
        first = self.seen.setdefault(key, self.line)
        if first != self.line:
            self._refuse(code, f"{what} as row {first}", hint)
        return first == self.line

    def _text(self, column: str) -> str | None:
        text = self.cells.get(column)
        if text is None or is_missing(text := text.strip()):
            return None
        return text if text.isascii() else unicodedata.normalize("NFC", text)

    def _number(self, column: str, code: str) -> float | None:
        text = self._text(column)
        if text is None:
            return None
        value = _parse_number(text)
        if value is None:
            self._refuse(code, f"{column} {_shown(text)}is not a number")
        return value

    def _choice(self, column: str, code: str, words: Mapping[str, Any], hint: str) -> Any:
        text = self._text(column)
        if text is None:
            return None
        if text.casefold() not in words:
            self._refuse(code, f"{column} {_shown(text)}is not known", hint)
        return words.get(text.casefold())

    def _age(self) -> float | None:
        """Return the age in years; a unit is never guessed."""
        if "age" not in self.cells:
            return None
        if "age_unit" in self.cells and (self._text("age_unit") or "").casefold() not in YEARS:
            self._refuse("MAN-UNIT", "age_unit is not years", "convert ages to decimal years")
            return None
        if self._text("age") is None and not self.require_age:
            return None
        age, reason, hint = parse_age(self.cells["age"])
        if age is None:
            self._refuse("MAN-AGE", reason, hint)
        return age

    def _weight(self) -> float:
        value = self._number("weight", "MAN-WEIGHT")
        if value is not None and not 0 < value <= _MAX_WEIGHT:
            reason = f"weight {_shown(f'{value:g}')}is outside 0 to {_MAX_WEIGHT}"
            self._refuse("MAN-WEIGHT", reason, "weight is the share in the loss, not body weight")
        return 1.0 if value is None else value

    def _warped(self) -> bool:
        """Return what the column says; where it says nothing, what the name of the image tells."""
        told = self._choice("warped", "MAN-WARPED", YES_OR_NO, "write yes or no")
        return is_warped(self.cells.get("image", "")) if told is None else told

    def _digest(self) -> str | None:
        text = (self._text("sha256") or "").lower()
        if text and not re.fullmatch(r"[0-9a-f]{64}", text):
            self._refuse("MAN-SHA256", "sha256 is not 64 hex digits")
            return None
        return text or None

    def _identity(self) -> tuple[str, str]:
        """Return participant and session: as given, else as the path tells them."""
        participant, session = self._text("participant_id"), self._text("session_id")
        path = self.cells.get("image", "").strip()
        from_path, path_session = identity_from_path(path)
        if participant is None and from_path is not None:
            self.num_derived += 1
            participant = from_path
        elif participant is None and "participant_id" in self.cells:
            self._refuse("MAN-ID", "participant_id is missing, and the path names no sub-... and no eid folder")
        elif participant is None:
            self.num_nameless += 1
            participant = path
        return participant or "", path_session if session is None else session

    def _image(self) -> tuple[Path | None, bool]:
        """Return the image, if it can be opened, and whether no row above names the same file."""
        if "image" in self.cells and self._text("image") is None:
            if self._text("status") == "failed":
                self._refuse("MAN-FAILED", f"preprocessing failed: {printable(self.cells.get('reason', ''))}")
            else:
                self._refuse("MAN-PATH", "image is missing")
        found = self._locate("image")
        if found is None:
            return None, True
        name = str(found.path).casefold()
        name = name if name.isascii() else unicodedata.normalize("NFC", name)
        is_new = self._is_first(name, "MAN-IMAGE", "same image")
        if is_new and found.inode:
            is_new = self._is_first(found.inode, "MAN-IMAGE", "another name of the same file")
        return found.path, is_new

    def _file(self, column: str) -> Path | None:
        found = self._locate(column)
        return found.path if found else None

    def _locate(self, column: str) -> Located | None:
        """Find the file that a column names, after refusing what leads outside the data root."""
        text = self.cells.get(column, "").strip(" ")
        if is_missing(text):
            return None
        try:
            found = locate(text, self.root, self.look)
        except DataError as error:
            (fault,) = error.faults
            reason = fault.reason if column == "image" else f"{column}: {fault.reason}"
            self._refuse(fault.code, reason, fault.hint, fault.file)
            if column == "image" and fault.code == "VOL-MISSING":
                self.lost.append(text)
            return None
        self.num_found += column == "image"
        return found


def _parse_number(text: str) -> float | None:
    return float(text) if _NUMBER.fullmatch(text) and math.isfinite(float(text)) else None


def _shown(text: str) -> str:
    """Quote a short number or word; longer text may be a name that slipped in from another column."""
    return f"{text!r} " if _SHOWN.fullmatch(text) else ""
