"""Where the images of a manifest lie: the data root, and paths that must stay inside it.

A manifest may come from anywhere, so its paths are judged by their text first and by ``lstat`` and
``stat`` after; nothing is opened here.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from emoe_med.data.files import DICOM_HINT
from emoe_med.data.opening import split_member
from emoe_med.errors import DataError, Fault

ROOT_VARIABLE = "EMOE_MED_DATA_ROOT"

# One pass tells nearly all honest paths apart; only the suspects meet the rules below.
_SUSPECT = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\\~$%:]|\.\.")
_RULES = (
    (re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]"), "control character in the path"),
    (re.compile(r"^[a-z][a-z0-9+.-]*:[\\/]|^(file|data):", re.I), "a URL or drive; only files are read"),
    (re.compile(r"^\\\\"), "a network share; only files under the data root are read"),
    (re.compile(r"(^|[\\/])\.\.([\\/]|$)"), "'..' is not allowed in a path"),
    (re.compile(r"^~|(^|[\\/])(\$\{?\w|%\w+%)"), "'~' and variables are not expanded"),
    (re.compile(r"%(00|2e|2f|5c)", re.I), "percent-encoded path"),
)


@dataclass(frozen=True)
class DataRoot:
    """Folder that relative image paths start from, and who chose it."""

    folder: Path
    source: str
    real: str  # without symbolic links


@dataclass(frozen=True)
class Located:
    """A file inside the data root, or a member of a zip archive there."""

    path: Path
    inode: tuple[int, int, str] | None  # equal for two names of one file; None where nobody looked


def find_data_root(manifest: Path, data_root: Path | None) -> DataRoot:
    """Choose the data root: the argument, else ``EMOE_MED_DATA_ROOT``, else the manifest's folder."""
    if data_root is not None:
        folder, source = Path(data_root), "given as --data-root"
    elif os.environ.get(ROOT_VARIABLE):
        folder, source = Path(os.environ[ROOT_VARIABLE]), f"from {ROOT_VARIABLE}"
    else:
        folder = manifest.parent
        source = f"assumed: the manifest's folder, as neither --data-root nor {ROOT_VARIABLE} is set"
    return DataRoot(folder, source, os.path.realpath(folder))


def printable(text: str) -> str:
    """Escape what would move the cursor or break the line of a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def check_path(text: str, root: DataRoot) -> None:
    """Refuse a path by its text alone, touching no file system.

    Raises:
        DataError: ``MAN-PATH``: control character, URL, share, ``..``, variable, absolute outside the root.
    """
    if _SUSPECT.search(text):
        for pattern, reason in _RULES:
            if pattern.search(text):
                raise _refusal("MAN-PATH", reason, text)
    if text.startswith("/") and not any(
        _is_inside(os.path.normpath(text), base) for base in (os.path.abspath(root.folder), root.real)
    ):
        hint = "let --data-root name a folder that all images lie in"
        raise _refusal("MAN-PATH", "absolute path outside the data root", text, hint)


def locate(text: str, root: DataRoot, look: bool = True) -> Located:
    """Find the file that a manifest names; links may lead anywhere inside the root.

    With ``look=False`` the path is judged by its text alone. Of a member of a zip archive the archive is looked for;
    whether it holds the member is told when it is read.

    An accented name is looked for as written, then composed (NFC), then decomposed (NFD), because
    tables and file systems disagree about it.

    Raises:
        DataError: ``MAN-PATH`` as in :func:`check_path`, for a link that leaves the root and for a loop
            of links; ``VOL-MISSING``, ``VOL-KIND`` (not a regular file) or ``VOL-EMPTY``.
    """
    check_path(text, root)
    if not look:
        return Located(root.folder / text, None)
    spellings = [text] if text.isascii() else _spellings(text)
    for spelling in spellings:
        path = root.folder / spelling
        file, member = split_member(path)
        try:
            real = os.path.realpath(file, strict=True)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR) and spelling != spellings[-1]:
                continue
            raise _unreachable(error, text) from None
        if not _is_inside(real, root.real):
            raise _refusal("MAN-PATH", "a symbolic link leads outside the data root", text)
        return Located(path, (*_regular_file(real, text), member))
    raise AssertionError("unreachable: the last spelling returns or raises")


def _spellings(text: str) -> list[str]:
    return list(dict.fromkeys([text, *(unicodedata.normalize(form, text) for form in ("NFC", "NFD"))]))


def _regular_file(real: str, text: str) -> tuple[int, int]:
    try:
        status = os.stat(real)
    except OSError as error:
        raise _unreachable(error, text) from None
    if not stat.S_ISREG(status.st_mode):
        hint = DICOM_HINT if stat.S_ISDIR(status.st_mode) else None
        raise _refusal("VOL-KIND", "not a regular file", text, hint)
    if status.st_size == 0:
        raise _refusal("VOL-EMPTY", "file is empty", text)
    return status.st_dev, status.st_ino


def _unreachable(error: OSError, text: str) -> DataError:
    if error.errno == errno.ELOOP:
        return _refusal("MAN-PATH", "a loop of symbolic links", text)
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return _refusal("VOL-MISSING", "file does not exist", text)
    return _refusal("VOL-MISSING", f"file cannot be reached: {error.strerror}", text)


def _is_inside(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip("/") + "/")


def _refusal(code: str, reason: str, text: str, hint: str | None = None) -> DataError:
    return DataError(Fault(code, reason, file=printable(text), hint=hint))
