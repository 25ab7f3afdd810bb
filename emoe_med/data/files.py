"""Files as bytes: told apart, and read to their verified end."""

from __future__ import annotations

import re
import zlib
from io import BufferedReader
from typing import NoReturn
from zipfile import ZipExtFile

import numpy as np

from emoe_med.errors import Fault, VolumeError

GZIP_MAGIC = b"\x1f\x8b"
_KINDS = (  # offset, magic, what it is: met under the name of a volume
    (344, b"n+1\0", "NIfTI-1"),
    (4, b"n+2\0", "NIfTI-2"),
    (128, b"DICM", "DICOM"),
    (0, b"\0\0\0\1", "FreeSurfer MGH"),
    (0, b"NRRD", "NRRD"),
    (0, b"\x89HDF", "HDF5 or MINC-2"),
    (0, b"CDF", "NetCDF or MINC-1"),
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"BZh", "a bzip2 stream"),
    (0, b"\xfd7zXZ\0", "an xz stream"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd stream"),
    (0, b"\x89PNG", "a PNG picture"),
    (0, b"\xff\xd8\xff", "a JPEG picture"),
)
DICOM_HINT = "make one file of a folder of DICOM files: dcm2niix -z y -b y -o OUT FOLDER"
KIND_HINTS = {"DICOM": DICOM_HINT}
_CHUNK_BYTES = 1 << 18
MAX_INFLATION = 1032  # deflate codes at most 258 bytes in 2 bits
_MAX_TAIL_BYTES = 64 << 10  # read beyond the expected end before giving up


def refuse(code: str, reason: str, hint: str | None = None) -> NoReturn:
    """Raise the refusal of a file; `opening.opened` adds its name."""
    raise VolumeError(Fault(code, reason, hint=hint))


def kind_of(head: bytes) -> str:
    """Say what a file is whose first bytes are ``head``."""
    for offset, magic, kind in _KINDS:
        if head[offset : offset + len(magic)] == magic:
            return kind
    return "unknown data" if re.search(rb"[\x00-\x08\x0e-\x1f]", head) else "text"


def check_name(name: str, head: bytes, packed: bool) -> None:
    """Refuse a file whose name tells otherwise of its compression than its first inflated bytes.

    Raises:
        VolumeError: VOL-FORMAT, VOL-EMPTY (nothing in the gzip stream) or VOL-SIZE (gzip in gzip).
    """
    if not head:
        refuse("VOL-EMPTY", "holds no bytes once inflated")
    if packed and head.startswith(GZIP_MAGIC):
        refuse("VOL-SIZE", "is gzip inside gzip", "decompress it once")
    name, kind = name.lower(), kind_of(head)
    ending = name[name.rfind(".") :]
    if ending in (".gz", ".mgz") and not packed:
        reason = f"is named {ending}, but is not gzip: it holds {kind}"
        refuse("VOL-FORMAT", reason, KIND_HINTS.get(kind))
    if ending in (".nii", ".mgh") and packed:
        refuse("VOL-FORMAT", f"is named {ending}, but is gzip: it holds {kind}")
    if (kind == "FreeSurfer MGH") != name.endswith((".mgh", ".mgz")) and "." in name:
        refuse("VOL-FORMAT", f"is named {ending}, but holds {kind}")


class ByteStream:
    """The content of a plain or gzip file of ``size`` bytes, in order, told apart by its first bytes.

    Attributes:
        packed: True for gzip.
        position: Count of bytes read so far.
        capacity: The most bytes that a file of this size can hold.
    """

    def __init__(self, file: BufferedReader | ZipExtFile, size: int) -> None:
        self._file = file
        self.packed = file.peek(len(GZIP_MAGIC)).startswith(GZIP_MAGIC)
        self.capacity = size * (MAX_INFLATION if self.packed else 1)
        self.position = 0
        self._waiting = b""  # packed bytes that were read, but not yet inflated
        self._member = zlib.decompressobj(wbits=31)  # zlib verifies checksum and length as a member ends

    def take(self, size: int) -> bytes:
        """Return the next ``size`` bytes, fewer only at the end."""
        pieces = []
        while size > 0 and (piece := self._next(size)):
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces)

    def fill(self, size: int) -> np.ndarray:
        """Return the next ``size`` bytes as a uint8 array of shape [size]."""
        content = np.empty(size, np.uint8)
        filled = 0
        while filled < size:
            piece = self._next(size - filled)
            if not piece:
                refuse("VOL-TRUNC", f"ends after {filled} of {size} bytes", "copy the file again")
            content[filled : filled + len(piece)] = np.frombuffer(piece, np.uint8)
            filled += len(piece)
        return content

    def finish(self, allowed: int = 0) -> None:
        """Read on to the end, which has the checksum verified; at most ``allowed`` bytes may follow."""
        tail, limit = 0, max(allowed, _MAX_TAIL_BYTES)
        while piece := self._next(_MAX_TAIL_BYTES):
            tail += len(piece)
            if tail > limit:
                refuse("VOL-SIZE", f"more than {limit} bytes follow the last voxel")
        if tail > allowed:
            refuse("VOL-TRAIL", f"{tail} bytes follow the last voxel")

    def _next(self, size: int) -> bytes:
        """Return 1 to ``size`` bytes, or none at the verified end."""
        size = min(size, _CHUNK_BYTES)
        piece = self._inflate(size) if self.packed else self._file.read(size)
        self.position += len(piece)
        return piece

    def _inflate(self, size: int) -> bytes:
        while not self._member.eof or self._next_member():
            packed = self._waiting or self._file.read(_CHUNK_BYTES)
            try:
                piece = self._member.decompress(packed, size)
            except zlib.error as error:
                detail = str(error).rpartition(": ")[2]
                refuse("VOL-CRC", f"gzip stream is damaged ({detail})", "copy the file again")
            self._waiting = self._member.unconsumed_tail
            if piece:
                return piece
            if not packed and not self._member.eof:
                refuse("VOL-TRUNC", "gzip stream ends early", "copy the file again")
        return b""

    def _next_member(self) -> bool:
        """Begin the next gzip member, as parallel and block compressors write them."""
        rest = self._member.unused_data
        if len(rest) < len(GZIP_MAGIC):
            rest += self._file.read(_CHUNK_BYTES)
        if not rest:
            return False
        if not rest.startswith(GZIP_MAGIC):
            refuse("VOL-TRAIL", "bytes follow the end of the gzip stream", "copy the file again")
        self._waiting, self._member = rest, zlib.decompressobj(wbits=31)
        return True
