"""Flatten the bias field of a head: N4 on a thinned copy of the brain, applied at full resolution."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

from emoe_med.data.files import refuse

SPACING_MM = 6.0  # of the copy: a field is smooth, and N4 costs by the voxel
MARGIN_MM = 8.0  # around the brain; the control points of the field span what is left
ITERATIONS = (50, 50, 50)  # at most, at 1, 2 and 4 patches of control points along each axis


def flatten(voxels: np.ndarray, affine: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Divide a head by its smooth intensity field, estimated inside the brain.

    The copy takes every k-th voxel: means over blocks would blur the tissue peaks that N4 sharpens. Within the box
    of the brain four patches an axis suffice; more would follow tissue (docs/preprocessing.md).

    Args:
        voxels: Head [X, Y, Z], any scale.
        affine: Voxel -> RAS mm [4, 4].
        mask: Brain [X, Y, Z], true inside.

    Returns:
        Flat head [X, Y, Z] float32. The geometric mean of the field inside the brain is 1; outside the box around
        the brain the head is as it was.

    Raises:
        VolumeError: VOL-BIAS, no positive voxels inside the mask, or N4 gave up.

    Source: Tustison et al. 2010 (N4), as SimpleITK has it.
    """
    sitk = import_module("SimpleITK")  # an extra
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)  # equal sums on every machine; scans run side by side
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    inside = mask & (voxels > 0)  # N4 takes logarithms
    if not inside.any():
        refuse("VOL-BIAS", "no positive voxels inside the brain mask")
    box = _box(inside, spacing)
    image = _image(voxels[box].astype(np.float32), spacing)
    thinning = np.maximum(1, np.rint(SPACING_MM / spacing)).astype(int).tolist()
    n4 = sitk.N4BiasFieldCorrectionImageFilter()
    n4.SetMaximumNumberOfIterations(ITERATIONS)
    try:
        n4.Execute(sitk.Shrink(image, thinning), sitk.Shrink(_image(inside[box].astype(np.uint8), spacing), thinning))
        log_field = sitk.GetArrayFromImage(n4.GetLogBiasFieldAsImage(image)).T
    except RuntimeError as error:
        refuse("VOL-BIAS", f"N4 gave up: {str(error).splitlines()[-1].strip()}")
    flat = voxels.astype(np.float32)
    flat[box] *= np.exp(log_field[inside[box]].mean() - log_field)
    return flat


def _box(mask: np.ndarray, spacing: np.ndarray) -> tuple[slice, ...]:
    """Return the slices of the mask's bounding box with its margin."""
    margin = np.ceil(MARGIN_MM / spacing).astype(int)
    index = np.nonzero(mask)
    return tuple(slice(max(0, int(i.min() - m)), int(i.max() + m + 1)) for i, m in zip(index, margin, strict=True))


def _image(voxels: np.ndarray, spacing: np.ndarray) -> Any:
    """Make an ITK image of voxels [X, Y, Z] in a frame of its own: only distances matter to a field."""
    sitk = import_module("SimpleITK")
    image = sitk.GetImageFromArray(np.ascontiguousarray(voxels.T))
    image.SetSpacing(spacing.tolist())
    return image
