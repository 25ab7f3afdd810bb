"""Linear transforms to MNI space as FSL writes them: 4 x 4 numbers in a text file, in FSL's own coordinates.

FSL counts millimetres from the first voxel of a file along its axes, x the other way round where the file is
right-handed (determinant of its affine above 0). So a matrix says nothing without the two grids that it was made for:
that of the scan, in the axis order of its file, and that of FSL's MNI152_T1_1mm.

Source: https://fsl.fmrib.ox.ac.uk/fsl/docs/#/registration/flirt/faq
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from emoe_med.data.files import refuse
from emoe_med.data.nifti import Layout
from emoe_med.data.opening import opened
from emoe_med.data.volume import read_layout
from emoe_med.errors import Fault, VolumeError

SPACE = "MNI152NLin6Asym"
_MAX_BYTES = 4096
_SCALES = (0.4, 2.5)  # how much a head may be stretched along an axis
# MNI152_T1_1mm: 182 x 218 x 182 voxels of 1 mm, left-handed, so that FSL's millimetres are its voxel indices
_TEMPLATE_TO_RAS = np.array([[-1.0, 0, 0, 90], [0, 1, 0, -126], [0, 0, 1, -72], [0, 0, 0, 1]])


def given_matrix(transform: Path, image: Path) -> np.ndarray:
    """Return what resampling needs of a given linear transform: MNI RAS mm -> scan RAS mm, [4, 4].

    Args:
        transform: FLIRT's matrix from the scan to MNI152_T1_1mm, such as UK Biobank's ``T1_to_MNI_linear.mat``.
        image: The scan, or any volume on its grid in the same axis order.

    Raises:
        VolumeError: VOL-TRANSFORM, no such matrix; or as `read_layout` of the image.
    """
    to_template = read_flirt(transform)
    layout = read_layout(image)
    return layout.affine @ np.linalg.inv(to_template @ _to_fsl(layout)) @ np.linalg.inv(_TEMPLATE_TO_RAS)


def read_flirt(path: Path) -> np.ndarray:
    """Read a matrix [4, 4] from one grid's FSL millimetres to another's.

    Raises:
        VolumeError: VOL-TRANSFORM where it is no affine of a head; VOL-MISSING and the like.
    """
    with opened(path) as (file, _):
        content = file.read(_MAX_BYTES + 1)
    try:
        matrix = np.array([line.split() for line in content.decode("ascii").strip().splitlines()], float)
    except ValueError:
        matrix = np.empty(0)
    if len(content) > _MAX_BYTES or matrix.shape != (4, 4) or not np.isfinite(matrix).all():
        reason = "is not a linear transform of 4 lines of 4 numbers, as FSL's flirt writes it"
        raise VolumeError(Fault("VOL-TRANSFORM", reason, str(path)))
    scales = np.linalg.svd(matrix[:3, :3], compute_uv=False)
    mirrors = np.linalg.det(matrix[:3, :3]) <= 0  # FSL's millimetres have one handedness: no flirt swaps left and right
    low, high = _SCALES
    if mirrors or not np.array_equal(matrix[3], [0, 0, 0, 1]) or not low < scales.min() <= scales.max() < high:
        raise VolumeError(Fault("VOL-TRANSFORM", "is no linear transform of a head", str(path)))
    return matrix


def _to_fsl(layout: Layout) -> np.ndarray:
    """Return voxel index of the file -> FSL's millimetres [4, 4]."""
    if min(layout.sizes_mm) <= 0:
        refuse("VOL-TRANSFORM", "header gives no voxel size, so a given transform has no meaning")
    to_fsl = np.diag([*layout.sizes_mm, 1.0])
    if np.linalg.det(layout.affine[:3, :3]) > 0:
        to_fsl[0, 0] = -layout.sizes_mm[0]
        to_fsl[0, 3] = layout.sizes_mm[0] * (layout.shape[0] - 1)
    return to_fsl
