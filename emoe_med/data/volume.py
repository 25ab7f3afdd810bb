"""Read and write 3-D volumes strictly: whole, finite, oriented to RAS, or refused by name.

A file is read to its last byte, so that a cut or altered gzip stream is seen: nibabel stops at the last voxel
and never reaches the checksum. Every size is judged from the header before memory is taken for it.
The refusal codes (``VOL-...``) are told in docs/reliability.md.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.data import ImageReader
from monai.utils import MetaKeys, SpaceKeys
from nibabel.nifti1 import data_type_codes
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation
from nibabel.spatialimages import HeaderDataError

from emoe_med.data.files import ByteStream, check_name, kind_of, opened, refuse, replace_file
from emoe_med.data.limits import DEFAULT_LIMITS, VolumeLimits, affines_differ, check_affine, judge_intensity

_NIFTI = {  # header size, the header's first field: class, place of the magic, single file, pair
    348: (nib.Nifti1Header, slice(344, 348), b"n+1\0", b"ni1\0"),
    540: (nib.Nifti2Header, slice(4, 12), b"n+2\0\r\n\x1a\n", b"ni2\0\r\n\x1a\n"),
}
_REAL_TYPES = frozenset({2, 4, 8, 16, 64, 256, 512, 768, 1024, 1280})  # NIfTI codes of 8 to 64 bit numbers
_MAX_EXTENSION_BYTES = 16 << 20  # header extensions are skipped, never parsed
_MAX_SLOPE = 1e6


@dataclass(frozen=True)
class Volume:
    """One scan in RAS orientation."""

    voxels: np.ndarray  # [X, Y, Z] float32, after slope and intercept
    affine: np.ndarray  # [4, 4] float64, voxel index -> RAS mm
    notes: tuple[str, ...]  # accepted, but a person should know


def read_volume(path: Path, limits: VolumeLimits = DEFAULT_LIMITS) -> Volume:
    """Read one volume, whole and checked, in RAS orientation.

    Args:
        path: NIfTI-1 or NIfTI-2 file, plain or gzip, of either byte order.
        limits: Largest size and spacing range in mm.

    Returns:
        Voxels of shape [X, Y, Z], float32 in scanner units after slope and intercept; affine of shape [4, 4],
        voxel index to RAS mm: the sform where its code is set, else the qform.

    Raises:
        VolumeError: Not there, damaged, too large, not 3-D, non-finite, constant, or without a usable affine.
            Carries one fault with code, reason and path.
    """
    with opened(path) as file:
        layout, voxels = _read_voxels(ByteStream(file), path.name, limits)
        notes = (*layout.notes, *judge_intensity(voxels))
    axes = io_orientation(layout.affine)
    return Volume(
        voxels=np.ascontiguousarray(apply_orientation(voxels, axes)),
        affine=layout.affine @ inv_ornt_aff(axes, voxels.shape),
        notes=notes,
    )


def write_volume(
    path: Path,
    voxels: np.ndarray,
    affine: np.ndarray,
    *,
    dtype: np.typing.DTypeLike | None = None,
    form_code: int = 2,
) -> None:
    """Write one NIfTI-1 file whose header holds geometry alone and whose bytes depend on the content alone.

    Text fields stay blank and no extension is written, so nothing of a source header travels along. The file
    is written aside in its folder and renamed: it is whole, or it is not there.

    Args:
        path: Ends in ``.nii.gz`` or ``.nii``; an existing file is replaced.
        voxels: Shape [X, Y, Z].
        affine: Shape [4, 4], voxel index to RAS mm.
        dtype: Stored type, default that of ``voxels`` (uint8 for bool); no scaling is applied.
        form_code: NIfTI code of sform and qform: 1 scanner, 2 aligned, 4 MNI. A sheared affine has no
            quaternion, so its qform code is 0.

    Raises:
        ValueError: The name ends otherwise, the array is not 3-D, or its values do not fit ``dtype``.
        StorageError: The disk is full, read-only or gone.
    """
    if not path.name.endswith((".nii", ".nii.gz")) or voxels.ndim != 3:
        raise ValueError(f"{path.name}: a 3-D volume is written as .nii.gz or .nii, not {voxels.ndim}-D")
    with np.errstate(invalid="ignore"):  # a value that does not fit is refused below
        stored = voxels.astype(dtype or (np.uint8 if voxels.dtype == bool else voxels.dtype))
    if stored.dtype.kind in "iu" and not np.array_equal(stored, voxels):
        raise ValueError(f"{path.name}: values do not fit {stored.dtype}")
    image = nib.Nifti1Image(stored, affine, dtype=stored.dtype)
    image.set_sform(affine, form_code)
    image.set_qform(affine, form_code)
    if affines_differ(image.get_sform(), image.get_qform(), stored.shape):
        image.set_qform(None, 0)
    image.header.set_xyzt_units("mm")
    content = image.to_bytes()
    packed = path.name.endswith(".gz")
    replace_file(path, gzip.compress(content, compresslevel=6, mtime=0) if packed else content)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hex digits.

    Raises:
        VolumeError: The file is not there, not a regular file, empty, or cannot be read.
    """
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def voxel_digest(volume: Volume) -> str:
    """Return the SHA-256 of shape and voxels, to find one image under two names."""
    digest = hashlib.sha256(repr(volume.voxels.shape).encode())
    digest.update(np.ascontiguousarray(volume.voxels, dtype="<f4").tobytes())
    return digest.hexdigest()


class StrictReader(ImageReader):
    """Reads volumes for MONAI: ``LoadImaged(keys, reader=StrictReader(), ensure_channel_first=True)``."""

    def __init__(self, limits: VolumeLimits = DEFAULT_LIMITS) -> None:
        super().__init__()
        self.limits = limits

    def verify_suffix(self, filename: Sequence[os.PathLike | str] | os.PathLike | str) -> bool:
        """Return True: the content decides, not the name."""
        return True

    def read(self, data: Sequence[os.PathLike | str] | os.PathLike | str, **kwargs: Any) -> list[Path]:
        """Return the paths; `get_data` reads.

        NOTE: ``LoadImage`` answers an error raised here by trying MONAI's own readers, which accept damaged
        files. An error raised in `get_data` reaches the caller.
        """
        return [Path(path) for path in ([data] if isinstance(data, str | os.PathLike) else data)]

    def get_data(self, img: list[Path]) -> tuple[np.ndarray, dict[str, Any]]:
        """Return voxels of shape [X, Y, Z] in RAS and what MONAI needs to know of them.

        Raises:
            VolumeError: As `read_volume`.
            ValueError: Several files were given.
        """
        if len(img) != 1:
            raise ValueError(f"one file per image is read, {len(img)} were given")
        volume = read_volume(img[0], self.limits)
        return volume.voxels, {
            MetaKeys.AFFINE.value: volume.affine,
            MetaKeys.SPACE.value: SpaceKeys.RAS.value,
            MetaKeys.ORIGINAL_CHANNEL_DIM.value: float("nan"),  # MONAI's way to say that there is none
        }


@dataclass(frozen=True)
class _Layout:
    """Where the voxels of a file lie and what they mean, whatever its format."""

    shape: tuple[int, int, int]
    dtype: np.dtype  # as stored, with byte order
    offset: int  # of the first voxel, in inflated bytes
    slope: float
    intercept: float
    affine: np.ndarray  # [4, 4], voxel index of the file -> RAS mm
    notes: tuple[str, ...]


def _read_voxels(stream: ByteStream, name: str, limits: VolumeLimits) -> tuple[_Layout, np.ndarray]:
    """Read a stream to its end; voxels of shape [I, J, K], float32, in the axis order of the file."""
    head = stream.take(min(_NIFTI))
    check_name(name, head, stream.packed)
    # A further format is one more function from its header to a _Layout, chosen here by magic.
    layout = _nifti_layout(head, stream, limits)
    num_bytes = math.prod(layout.shape) * layout.dtype.itemsize
    if layout.offset + num_bytes > stream.capacity:
        refuse("VOL-TRUNC", f"is too short for {num_bytes} bytes of voxels", "copy the file again")
    stream.fill(layout.offset - stream.position)
    stored = stream.fill(num_bytes).view(layout.dtype).reshape(layout.shape, order="F")
    stream.finish()
    with np.errstate(over="ignore", invalid="ignore"):  # what float32 cannot hold becomes Inf and is refused
        if (layout.slope, layout.intercept) == (1.0, 0.0):
            return layout, stored.astype(np.float32)
        voxels = np.empty(layout.shape, np.float32, order="F")
        for k in range(layout.shape[2]):  # slice by slice: the float64 copy stays small
            voxels[..., k] = stored[..., k] * np.float64(layout.slope) + layout.intercept
    return layout, voxels


def _nifti_layout(head: bytes, stream: ByteStream, limits: VolumeLimits) -> _Layout:
    header = _nifti_header(head, stream)
    shape, notes = _shape(header, limits)
    offset = float(header["vox_offset"])
    if not (offset >= header.sizeof_hdr + 4 and offset.is_integer()):  # 4 bytes say if extensions follow
        refuse("VOL-FORMAT", f"voxel offset {offset:g} does not lie behind the header")
    if offset > _MAX_EXTENSION_BYTES:
        refuse("VOL-SIZE", f"header extension of {offset:g} bytes")
    slope, intercept = _scaling(header)
    return _Layout(
        shape=shape,
        dtype=_dtype(header),
        offset=int(offset),
        slope=slope,
        intercept=intercept,
        affine=_affine(header, shape, limits),
        notes=notes,
    )


def _nifti_header(head: bytes, stream: ByteStream) -> nib.Nifti1Header:
    """Return the unchecked header; nibabel's NIfTI-2 header is a kind of its NIfTI-1 header."""
    for order, endian in (("little", "<"), ("big", ">")):
        size = int.from_bytes(head[:4], order)
        if size not in _NIFTI:
            continue
        header_class, place, single, pair = _NIFTI[size]
        head += stream.take(size - len(head))
        if len(head) < size:
            refuse("VOL-TRUNC", f"ends within the header, after {len(head)} bytes", "copy the file again")
        if head[place] == pair:
            refuse("VOL-FORMAT", "is one half of a .hdr/.img pair", "convert it to one .nii.gz file")
        if head[place] != single:
            refuse("VOL-FORMAT", f"is Analyze 7.5 or a damaged NIfTI header (magic {head[place]!r})")
        return header_class(head, endian, check=False)
    refuse("VOL-FORMAT", f"is not NIfTI: it holds {kind_of(head)}")


def _shape(header: nib.Nifti1Header, limits: VolumeLimits) -> tuple[tuple[int, int, int], tuple[str, ...]]:
    num_axes, *sizes = (int(size) for size in header["dim"])
    if not 1 <= num_axes <= 7:
        refuse("VOL-DIM", f"header tells of {num_axes} axes")
    sizes = sizes[:num_axes]
    text = " x ".join(map(str, sizes))
    if num_axes < 3 or min(sizes) < 1 or min(sizes[:3]) < 2:
        refuse("VOL-DIM", f"size {text} is not a 3-D volume")
    if math.prod(sizes[3:]) > 1:
        refuse("VOL-DIM", f"size {text} holds several volumes", "keep one of them")
    if math.prod(sizes) > limits.max_voxels:
        refuse("VOL-SIZE", f"size {text} is above the limit of {limits.max_voxels} voxels")
    notes = (f"{num_axes}-D file of one volume, read as 3-D",) if num_axes > 3 else ()
    return (sizes[0], sizes[1], sizes[2]), notes


def _dtype(header: nib.Nifti1Header) -> np.dtype:
    code, bits = int(header["datatype"]), int(header["bitpix"])
    if code not in _REAL_TYPES:
        name = data_type_codes.label[code] if code in data_type_codes else "unknown"
        refuse("VOL-DTYPE", f"data type {code} ({name}) is not one real number per voxel")
    dtype = header.get_data_dtype()
    if bits != 8 * dtype.itemsize:
        refuse("VOL-DTYPE", f"header tells of {bits} bits per voxel, {dtype.name} has {8 * dtype.itemsize}")
    return dtype


def _scaling(header: nib.Nifti1Header) -> tuple[float, float]:
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or math.isnan(slope):  # NIfTI: no scaling, and the intercept has no meaning
        return 1.0, 0.0
    if not 0 < slope <= _MAX_SLOPE:
        refuse("VOL-SCALE", f"slope {slope:g} is outside 0 to {_MAX_SLOPE:g}")
    if not math.isfinite(intercept):
        refuse("VOL-SCALE", f"intercept is {intercept:g}")
    return slope, intercept


def _affine(header: nib.Nifti1Header, shape: tuple[int, int, int], limits: VolumeLimits) -> np.ndarray:
    """Return the sform where its code is set, else the qform; both must agree where both are set."""
    unit = int(header["xyzt_units"]) & 7
    if unit not in (0, 2):
        names = {1: "metres", 3: "microns"}
        refuse("VOL-SPACING", f"header unit is {names.get(unit, unit)}", "millimetres are wanted")
    if header["pixdim"][0] == 0:
        header["pixdim"][0] = 1  # NIfTI: a qfac of 0 means 1
    try:
        with np.errstate(all="ignore"):
            forms = {"sform": header.get_sform(coded=True), "qform": header.get_qform(coded=True)}
    except (HeaderDataError, ValueError) as error:
        refuse("VOL-AFFINE", f"qform cannot be used ({error})")
    usable = {name: affine for name, (affine, code) in forms.items() if code > 0}
    for name, affine in usable.items():
        check_affine(name, affine, limits)
    if not usable:
        refuse("VOL-AFFINE", "neither sform nor qform is set, so left and right are unknown")
    if len(usable) == 2 and np.prod([np.linalg.det(affine[:3, :3]) for affine in usable.values()]) < 0:
        reason = "sform and qform are of opposite handedness: one of them swaps left and right"
        refuse("VOL-AFFINE", reason, "keep the right one")
    if len(usable) == 2 and affines_differ(*usable.values(), shape):
        refuse("VOL-AFFINE", "sform and qform disagree by more than 1 mm or 1 degree", "keep the right one")
    return next(iter(usable.values()))
