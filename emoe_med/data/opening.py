"""Open the bytes of a scan: a file, or a member of a zip archive that is read in place.

``1000001_20252_2_0.zip/T1/T1.nii.gz`` names a member where ``1000001_20252_2_0.zip`` is a file. A member is found by
its exact name and streamed; nothing is unpacked to disk, so that no name in an archive leads anywhere.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from emoe_med.data.files import MAX_INFLATION, refuse
from emoe_med.errors import Fault, VolumeError

ARCHIVE = ".zip"
_MAX_MEMBER_BYTES = 2 << 30  # twice a volume of the largest size and type
_MAX_LIST_BYTES = 4 << 20  # of the names in an archive; that of a bulk folder has some 10 KiB
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # Python inflates the others without a bound on memory
_DAMAGED = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, ValueError, OverflowError)


def split_member(path: Path) -> tuple[Path, str]:
    """Return the file to open, and the name of the member in it; empty for a plain file."""
    if f"{ARCHIVE}/" in str(path).lower():
        for parent in path.parents:
            if parent.suffix.lower() == ARCHIVE and parent.is_file():
                return parent, path.relative_to(parent).as_posix()
    return path, ""


@contextmanager
def opened(path: Path) -> Generator[tuple[io.BufferedReader | zipfile.ZipExtFile, int]]:
    """Open a regular, filled file or member; yields it and its size in bytes. Every refusal in the block names it.

    Raises:
        VolumeError: VOL-MISSING, VOL-KIND, VOL-EMPTY; of a member also VOL-FORMAT (no archive, encrypted, named twice,
            packed by another method than deflate), VOL-SIZE, VOL-CRC; or what the block refused.
    """
    try:
        archive, member = split_member(path)
        with _file(archive) as file:
            if not member:
                yield file, os.fstat(file.fileno()).st_size
                return
            with _listed(file) as listed, _streamed(listed, member) as content:
                yield content
    except VolumeError as error:
        raise VolumeError(*(replace(fault, file=str(path)) for fault in error.faults)) from error.__cause__
    except OSError as error:
        reason = f"cannot be read ({error.strerror or error})"
        raise VolumeError(Fault("VOL-MISSING", reason, file=str(path))) from error


def member_names(archive: Path) -> set[str]:
    """Return the names in a zip archive.

    Raises:
        VolumeError: No archive, damaged, or one that lists too many names.
    """
    with _file(archive) as file, _listed(file) as listed:
        return set(listed.namelist())


class _Bounded(io.BufferedReader):
    """A file that is read in pieces; only the list of an archive's members is one piece, whatever its size."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _MAX_LIST_BYTES:
            refuse("VOL-SIZE", f"archive has a list of members of {size} bytes")
        return super().read(size)


@contextmanager
def _file(path: Path) -> Generator[_Bounded]:
    try:
        status = path.stat()
    except FileNotFoundError:
        refuse("VOL-MISSING", "is not there")
    except ValueError as error:
        refuse("VOL-MISSING", f"cannot be a file name ({error})")
    if not stat.S_ISREG(status.st_mode):  # asked before open: a FIFO would block, a device might act
        refuse("VOL-KIND", f"is a {_kind(status.st_mode)}, not a file")
    if status.st_size == 0:
        refuse("VOL-EMPTY", "holds no bytes")
    with _Bounded(io.FileIO(path)) as file:
        yield file


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "folder", stat.S_IFSOCK: "socket", stat.S_IFIFO: "FIFO"}
    return kinds.get(stat.S_IFMT(mode), "device")


@contextmanager
def _listed(file: _Bounded) -> Generator[zipfile.ZipFile]:
    try:
        archive = zipfile.ZipFile(file)
    except _DAMAGED as error:
        refuse("VOL-FORMAT", f"is not a whole zip archive ({error})", "copy the archive again")
    with archive:
        yield archive


@contextmanager
def _streamed(archive: zipfile.ZipFile, member: str) -> Generator[tuple[Any, int]]:
    info = _find(archive, member)
    try:
        content = archive.open(info)
    except _DAMAGED as error:
        refuse("VOL-FORMAT", f"archive cannot be read here ({error})", "copy the archive again")
    most = info.compress_size * (MAX_INFLATION if info.compress_type == zipfile.ZIP_DEFLATED else 1)
    with content:
        try:
            yield content, min(info.file_size, most)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            refuse("VOL-CRC", f"archive is damaged here ({error})", "copy the archive again")


def _find(archive: zipfile.ZipFile, member: str) -> zipfile.ZipInfo:
    """Return the one member of a name that can be read safely."""
    found = [info for info in archive.infolist() if info.filename == member]
    if not found:
        refuse("VOL-MISSING", "is not in the archive")
    if len(found) > 1:
        refuse("VOL-FORMAT", f"archive holds {len(found)} members of this name")
    info = found[0]
    if stat.S_ISLNK(info.external_attr >> 16):
        refuse("VOL-KIND", "is a link in an archive, not a file")
    if info.flag_bits & 1:
        refuse("VOL-FORMAT", "is encrypted")
    if info.compress_type not in _METHODS:
        refuse("VOL-FORMAT", "is packed by another method than deflate", "pack the archive again")
    if info.file_size == 0:
        refuse("VOL-EMPTY", "holds no bytes")
    if info.file_size > _MAX_MEMBER_BYTES:
        refuse("VOL-SIZE", f"member of {info.file_size} bytes, {_MAX_MEMBER_BYTES >> 30} GiB are read")
    return info
