"""The model's box around the MNI brain, the template in it, and area-aware resampling onto a grid.

Every grid of the package covers one box of 160 x 192 x 160 mm around the MNI brain, symmetric about the
mid-sagittal plane so that a left-right flip of the voxels flips the head. The grids are nested:
averaging k^3 fine voxels gives the coarse grid exactly.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

BOX_MM = (160.0, 192.0, 160.0)  # X, Y, Z extent of the model box
BOX_CORNER_MM = (-80.0, -113.5, -75.5)  # RAS; x is symmetric, y and z are voxel faces of the template

_CHUNK_POINTS = 2_000_000


def box_grid(spacing_mm: float) -> tuple[tuple[int, ...], np.ndarray]:
    """Return shape and affine [4, 4] of the model box at a spacing that divides 160 and 192 mm.

    Raises:
        ValueError: The spacing does not divide the box.
    """
    shape = tuple(round(extent / spacing_mm) for extent in BOX_MM)
    if spacing_mm <= 0 or any(abs(n * spacing_mm - e) > 1e-6 for n, e in zip(shape, BOX_MM, strict=True)):
        raise ValueError(f"spacing {spacing_mm} mm does not divide the box of {BOX_MM} mm")
    affine = np.diag([spacing_mm, spacing_mm, spacing_mm, 1.0])
    affine[:3, 3] = np.asarray(BOX_CORNER_MM) + spacing_mm / 2
    return shape, affine


@lru_cache(maxsize=4)
def template(spacing_mm: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the brain-only MNI152 2009a symmetric T1 in the model box, area-averaged from 1 mm.

    Returns:
        Voxels [X, Y, Z] in [0, 1] and affine [4, 4]; shared and read-only.

    Raises:
        ValueError: The spacing does not divide the box.

    Source: Fonov et al. 2011, as nilearn ships it (``load_mni152_template``).
    """
    from nilearn.datasets import load_mni152_template  # seconds to import

    shape, affine = box_grid(spacing_mm)
    image = load_mni152_template(resolution=1)
    voxels = resample(np.asarray(image.dataobj, np.float32), image.affine, np.eye(4), affine, shape)
    voxels.flags.writeable = affine.flags.writeable = False
    return voxels, affine


def resample(
    voxels: np.ndarray,
    affine: np.ndarray,
    matrix: np.ndarray,
    grid_affine: np.ndarray,
    shape: tuple[int, ...],
    order: int = 1,
) -> np.ndarray:
    """Sample a volume on a grid that an affine map carries into its space.

    Each target voxel is the mean of k trilinear samples per axis, k being its size in source voxels: a coarse
    target does not alias, and a nested one is the exact area average. Outside the source is 0.

    Args:
        voxels: Source [X, Y, Z].
        affine: Source voxel -> source RAS mm [4, 4].
        matrix: Target RAS mm -> source RAS mm [4, 4].
        grid_affine: Target voxel -> target RAS mm [4, 4].
        shape: Target X, Y, Z.
        order: 1 for intensities, 0 for labels (nearest, kept dtype, no averaging).

    Returns:
        Volume of ``shape``, float32 for order 1.
    """
    target_to_source = np.linalg.inv(affine) @ matrix @ grid_affine
    if order == 0:
        return _nearest(voxels, target_to_source, shape)
    sizes = np.linalg.norm(target_to_source[:3, :3], axis=0)
    splits = np.maximum(1, np.ceil(sizes - 0.25)).astype(int)  # a quarter voxel more is scale, not aliasing
    source = torch.tensor(voxels, dtype=torch.float32)[None, None]  # a copy: the input may be read-only
    fine = np.diag([*(1 / splits), 1.0])
    fine[:3, 3] = (1 / splits - 1) / 2
    fine_to_source = torch.from_numpy(target_to_source @ fine)
    points_per_slab = int(np.prod(shape[1:]) * np.prod(splits))
    slab = max(1, _CHUNK_POINTS // points_per_slab)
    parts = []
    for start in range(0, shape[0], slab):
        rows = min(slab, shape[0] - start) * int(splits[0])
        size = (rows, shape[1] * int(splits[1]), shape[2] * int(splits[2]))
        grid = sampling_grid(fine_to_source, size, source.shape[2:], first=start * int(splits[0]))
        sampled = F.grid_sample(source, grid[None].float(), align_corners=True)
        parts.append(F.avg_pool3d(sampled, tuple(int(k) for k in splits))[0, 0])
    return torch.cat(parts).numpy()


def sampling_grid(
    index_map: torch.Tensor, shape: tuple[int, ...], source_shape: tuple[int, ...], first: int = 0
) -> torch.Tensor:
    """Return ``grid_sample`` coordinates [X, Y, Z, 3] of a target-index to source-index map [4, 4].

    Built as three broadcast sums in float64: affine_grid would need a matrix in its own normalised axes.
    """
    size = torch.tensor(source_shape, dtype=torch.float64)
    scaled = index_map[:3] * (2 / (size - 1).clamp_min(1))[:, None]
    scaled = scaled.flip(0).T  # rows x, y, z, 1 of the target; columns Z, Y, X of the source
    axes = [torch.arange(n, dtype=torch.float64) for n in shape]
    axes[0] = axes[0] + first
    x, y, z = (axis[:, None] * row for axis, row in zip(axes, scaled[:3], strict=True))
    return x[:, None, None] + y[None, :, None] + (z + scaled[3] - 1)[None, None]


def _nearest(voxels: np.ndarray, target_to_source: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    out = np.zeros(shape, voxels.dtype)
    x, y, z = (np.arange(n)[:, None] * target_to_source[:3, a] for a, n in enumerate(shape))
    plane = y[:, None] + z[None] + target_to_source[:3, 3]
    for i, row in enumerate(x):
        index = np.floor(plane + row + 0.5).astype(int)
        inside = ((index >= 0) & (index < voxels.shape)).all(axis=-1)
        out[i][inside] = voxels[tuple(index[inside].T)]
    return out
