"""What a NIfTI-1 or NIfTI-2 header says of its voxels, judged before memory is taken for them.

The refusal codes (``VOL-...``) are told in docs/reliability.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import nibabel as nib
import numpy as np
from nibabel.nifti1 import data_type_codes
from nibabel.spatialimages import HeaderDataError

from emoe_med.data.files import KIND_HINTS, ByteStream, kind_of, refuse
from emoe_med.data.limits import VolumeLimits, affines_differ, check_affine, check_size

NIFTI_HEADER_BYTES = 348
_NIFTI = {  # header size, the header's first field: class, place of the magic, single file, pair
    348: (nib.Nifti1Header, slice(344, 348), b"n+1\0", b"ni1\0"),
    540: (nib.Nifti2Header, slice(4, 12), b"n+2\0\r\n\x1a\n", b"ni2\0\r\n\x1a\n"),
}
_REAL_TYPES = frozenset({2, 4, 8, 16, 64, 256, 512, 768, 1024, 1280})  # NIfTI codes of 8 to 64 bit numbers
_MAX_EXTENSION_BYTES = 16 << 20  # header extensions are skipped, never parsed
_MAX_SLOPE = 1e6


@dataclass(frozen=True)
class Layout:
    """Where the voxels of a file lie and what they mean, whatever its format."""

    shape: tuple[int, int, int]
    dtype: np.dtype  # as stored, with byte order
    offset: int  # of the first voxel, in inflated bytes
    slope: float
    intercept: float
    affine: np.ndarray  # [4, 4], voxel index of the file -> RAS mm
    sizes_mm: tuple[float, ...]  # of a voxel by the header alone, which FSL goes by
    notes: tuple[str, ...]
    tail_bytes: int = 0  # that may follow the last voxel


def nifti_layout(head: bytes, stream: ByteStream, limits: VolumeLimits) -> Layout:
    """Read on behind the first bytes of a header and say where the voxels lie; a VolumeError says why not."""
    header = _nifti_header(head, stream)
    shape, notes = _shape(header, limits)
    offset = float(header["vox_offset"])
    if not (offset >= header.sizeof_hdr + 4 and offset.is_integer()):  # 4 bytes say if extensions follow
        refuse("VOL-FORMAT", f"voxel offset {offset:g} does not lie behind the header")
    if offset > _MAX_EXTENSION_BYTES:
        refuse("VOL-SIZE", f"header extension of {offset:g} bytes")
    slope, intercept = _scaling(header)
    return Layout(
        shape=shape,
        dtype=_dtype(header),
        offset=int(offset),
        slope=slope,
        intercept=intercept,
        affine=_affine(header, shape, limits),
        sizes_mm=tuple(abs(float(size)) for size in header["pixdim"][1:4]),
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
    kind = kind_of(head)
    refuse("VOL-FORMAT", f"is not NIfTI: it holds {kind}", KIND_HINTS.get(kind))


def _shape(header: nib.Nifti1Header, limits: VolumeLimits) -> tuple[tuple[int, int, int], tuple[str, ...]]:
    num_axes, *sizes = (int(size) for size in header["dim"])
    if not 1 <= num_axes <= 7:
        refuse("VOL-DIM", f"header tells of {num_axes} axes")
    sizes = sizes[:num_axes]
    shape = check_size(sizes, limits)
    return shape, (f"{num_axes}-D file of one volume, read as 3-D",) if num_axes > 3 else ()


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
