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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.data import ImageReader
from monai.utils import MetaKeys, SpaceKeys
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

from emoe_med.data.files import ByteStream, check_name, refuse
from emoe_med.data.limits import DEFAULT_LIMITS, VolumeLimits, affines_differ, judge_intensity, judge_map
from emoe_med.data.mgh import MGH_HEADER_BYTES, MGH_MAGIC, mgh_layout
from emoe_med.data.nifti import NIFTI_HEADER_BYTES, Layout, nifti_layout
from emoe_med.data.opening import opened
from emoe_med.storage import replace_file


@dataclass(frozen=True)
class Volume:
    """One scan in RAS orientation."""

    voxels: np.ndarray  # [X, Y, Z] float32, after slope and intercept
    affine: np.ndarray  # [4, 4] float64, voxel index -> RAS mm
    notes: tuple[str, ...]  # accepted, but a person should know


def read_volume(path: Path, limits: VolumeLimits = DEFAULT_LIMITS) -> Volume:
    """Read one volume, whole and checked, in RAS orientation.

    Args:
        path: NIfTI-1 or NIfTI-2 file of either byte order, or FreeSurfer's MGH; plain or gzip; or such a member of a
            zip archive (`opening`).
        limits: Largest size and spacing range in mm.

    Returns:
        Voxels of shape [X, Y, Z], float32 in scanner units after slope and intercept; affine of shape [4, 4],
        voxel index to RAS mm: the sform where its code is set, else the qform.

    Raises:
        VolumeError: Not there, damaged, too large, not 3-D, non-finite, constant, or without a usable affine.
            Carries one fault with code, reason and path.
    """
    return _read(path, limits, judge_intensity)


def read_map(path: Path, limits: VolumeLimits = DEFAULT_LIMITS) -> Volume:
    """Read a map or labels as strictly as a head, which they need not look like: they may be constant."""
    return _read(path, limits, judge_map)


def _read(path: Path, limits: VolumeLimits, judge: Callable[[np.ndarray], tuple[str, ...]]) -> Volume:
    with opened(path) as (file, size):
        layout, voxels = _read_voxels(ByteStream(file, size), path.name, limits)
        notes = (*layout.notes, *judge(voxels))
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
    with opened(path) as (file, _):
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


def read_layout(path: Path, limits: VolumeLimits = DEFAULT_LIMITS) -> Layout:
    """Read the header alone: shape, affine and voxel size in the axis order of the file.

    Raises:
        VolumeError: As `read_volume`, as far as a header shows it.
    """
    with opened(path) as (file, size):
        return _layout(ByteStream(file, size), path.name, limits)


def _layout(stream: ByteStream, name: str, limits: VolumeLimits) -> Layout:
    head = stream.take(MGH_HEADER_BYTES)
    is_mgh = head.startswith(MGH_MAGIC)
    if not is_mgh:
        head += stream.take(NIFTI_HEADER_BYTES - MGH_HEADER_BYTES)
    check_name(name, head, stream.packed)
    # a further format is one more function from its header to a Layout, chosen here by magic
    return mgh_layout(head, limits) if is_mgh else nifti_layout(head, stream, limits)


def _read_voxels(stream: ByteStream, name: str, limits: VolumeLimits) -> tuple[Layout, np.ndarray]:
    """Read a stream to its end; voxels of shape [I, J, K], float32, in the axis order of the file."""
    layout = _layout(stream, name, limits)
    num_bytes = math.prod(layout.shape) * layout.dtype.itemsize
    if layout.offset + num_bytes > stream.capacity:
        refuse("VOL-TRUNC", f"is too short for {num_bytes} bytes of voxels", "copy the file again")
    stream.fill(layout.offset - stream.position)
    stored = stream.fill(num_bytes).view(layout.dtype).reshape(layout.shape, order="F")
    stream.finish(layout.tail_bytes)
    with np.errstate(over="ignore", invalid="ignore"):  # what float32 cannot hold becomes Inf and is refused
        if (layout.slope, layout.intercept) == (1.0, 0.0):
            return layout, stored.astype(np.float32)
        voxels = np.empty(layout.shape, np.float32, order="F")
        for k in range(layout.shape[2]):  # slice by slice: the float64 copy stays small
            voxels[..., k] = stored[..., k] * np.float64(layout.slope) + layout.intercept
    return layout, voxels
