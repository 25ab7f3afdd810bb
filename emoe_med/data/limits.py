"""What a usable volume is, whatever file it came from: size, geometry, intensity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from emoe_med.data.files import refuse

_MAX_SHEAR = 0.1  # cosine between two voxel axes
_MAX_ORIGIN_MM = 1e4  # no scanner is longer
_FORM_TOLERANCE_MM = 1.0
_FORM_TOLERANCE_DEG = 1.0
_HEAD_SHARE = (0.05, 0.95)


@dataclass(frozen=True)
class VolumeLimits:
    """Largest size and range of voxel spacing that a volume may have."""

    max_voxels: int = 512**3
    min_spacing_mm: float = 0.2
    max_spacing_mm: float = 10.0


DEFAULT_LIMITS = VolumeLimits()


def check_size(sizes: Sequence[int], limits: VolumeLimits) -> tuple[int, int, int]:
    """Return the shape [X, Y, Z] of one volume, of three or more axes.

    Raises:
        VolumeError: VOL-DIM (not 3-D, several volumes) or VOL-SIZE.
    """
    text = " x ".join(map(str, sizes))
    if len(sizes) < 3 or min(sizes) < 1 or min(sizes[:3]) < 2:
        refuse("VOL-DIM", f"size {text} is not a 3-D volume")
    if math.prod(sizes[3:]) > 1:
        refuse("VOL-DIM", f"size {text} holds several volumes", "keep one of them")
    if math.prod(sizes) > limits.max_voxels:
        refuse("VOL-SIZE", f"size {text} is above the limit of {limits.max_voxels} voxels")
    return sizes[0], sizes[1], sizes[2]


def check_affine(name: str, affine: np.ndarray, limits: VolumeLimits) -> None:
    """Refuse an affine that cannot belong to a scan in millimetres.

    Args:
        name: What the affine is called in its file.
        affine: Shape [4, 4], voxel index to mm.
        limits: Range of spacing.

    Raises:
        VolumeError: VOL-AFFINE (not finite, singular, far away) or VOL-SPACING (spacing, shear).
    """
    if not np.isfinite(affine).all():
        refuse("VOL-AFFINE", f"{name} is not finite")
    with np.errstate(all="ignore"):
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        axes = affine[:3, :3] / spacing
        volume = abs(np.linalg.det(axes))
    if not volume > 1e-6:  # NaN where a column is zero
        refuse("VOL-AFFINE", f"{name} is zero or singular")
    origin_mm = abs(affine[:3, 3]).max()
    if origin_mm > _MAX_ORIGIN_MM:
        refuse("VOL-AFFINE", f"{name} puts the first voxel {origin_mm:g} mm from the origin")
    if spacing.min() < limits.min_spacing_mm or spacing.max() > limits.max_spacing_mm:
        text = " x ".join(f"{size:g}" for size in spacing)
        hint = f"{limits.min_spacing_mm:g} to {limits.max_spacing_mm:g} mm are accepted: is the unit right?"
        refuse("VOL-SPACING", f"{name} has voxels of {text} mm", hint)
    shear = abs(axes.T @ axes - np.eye(3)).max()
    if shear > _MAX_SHEAR:
        refuse("VOL-SPACING", f"{name} is sheared: two voxel axes have cosine {shear:.2f}")


def affines_differ(first: np.ndarray, second: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Tell whether two affines put a corner of the box over 1 mm apart, or turn an axis by over 1 degree."""
    corners = np.array(list(product(*((0, size - 1) for size in shape), (1,))))
    distance_mm = np.linalg.norm(corners @ (first - second).T, axis=1).max()
    axes = [affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0) for affine in (first, second)]
    cosine = (axes[0] * axes[1]).sum(axis=0).min()
    return bool(distance_mm > _FORM_TOLERANCE_MM or cosine < math.cos(math.radians(_FORM_TOLERANCE_DEG)))


def _finite_range(voxels: np.ndarray) -> tuple[float, float]:
    low, high = float(voxels.min()), float(voxels.max())  # NaN and Inf survive both
    if not math.isfinite(low + high):
        count = voxels.size - np.count_nonzero(np.isfinite(voxels))
        refuse("VOL-NONFINITE", f"{count} of {voxels.size} voxels are NaN, infinite or beyond float32")
    return low, high


def judge_map(voxels: np.ndarray) -> tuple[str, ...]:
    """Return no notes: a map or labels need not look like a head, and may be constant.

    Raises:
        VolumeError: VOL-NONFINITE.
    """
    _finite_range(voxels)
    return ()


def judge_intensity(voxels: np.ndarray) -> tuple[str, ...]:
    """Return notes on the voxels of shape [X, Y, Z]: a head that fills almost nothing or all of the box.

    Raises:
        VolumeError: VOL-NONFINITE or VOL-CONST.
    """
    low, high = _finite_range(voxels)
    if low == high:
        refuse("VOL-CONST", f"all voxels are {low:g}")
    share = np.count_nonzero(voxels > low + 0.1 * (high - low)) / voxels.size
    if _HEAD_SHARE[0] <= share <= _HEAD_SHARE[1]:
        return ()
    return (f"{share:.1%} of the voxels lie above a tenth of the intensity range",)
