"""What one scan looks like in numbers: size, place, intensity and sharpness, measured as it is read.

No figure depends on the intensity scale, and none names a person. A contract (`contract.py`) holds how these
figures spread over the training scans; a scan that was made otherwise stands out in at least one of them.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import ndimage

from emoe_med.data.grid import resample, template

FINGERPRINT_VERSION = 1
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
_COARSE_MM = 4.0  # grid of what is measured around the mask
_SHELL_VOXELS = 3  # 12 mm: scalp and skull
_DARK = 0.2  # of the mean inside the mask: air, or nothing

MEASURES: dict[str, str] = {  # in this order in a cache entry; what a reader is told
    "spacing_mm": "coarsest voxel edge, mm",
    "volume_ml": "volume of the mask, ml",
    "size_x_mm": "extent of the mask from left to right, mm",
    "size_y_mm": "extent of the mask from back to front, mm",
    "size_z_mm": "extent of the mask from bottom to top, mm",
    "cut_cm2": "area of the mask in its outermost slices, cm2",
    "pieces": "share of the mask outside its largest piece",
    "cv": "standard deviation over mean, inside the mask",
    **{f"p{p:02d}": f"percentile {p} over the mean, inside the mask" for p in PERCENTILES},
    "negative": "share of voxels below 0 inside the mask",
    "dark": "share of background inside the mask",
    "mode": "share of the most frequent value inside the mask",
    "anisotropy": "fine detail along the sharpest over that along the bluntest voxel axis, inside the mask",
    "shell": "mean signal within 12 mm outside the mask, over the mean inside",
    "scale": "linear size against the template",
    "stretch": "largest over smallest scale along an axis",
    "tilt_deg": "rotation against the template, degrees",
    "similarity": "local correlation with the template",
    "overlap": "Dice of the mask with the template's brain",
    "rim": "mean of the outermost voxels of the mask, over the mean inside",
    "rim_spread": "difference of that between the six sides",
    "rough_x": "mean square step from left to right over the variance",
    "rough_y": "mean square step from back to front over the variance",
    "rough_z": "mean square step from bottom to top over the variance",
}


def fingerprint(
    voxels: np.ndarray,
    affine: np.ndarray,
    mask: np.ndarray,
    matrix: np.ndarray,
    similarity: float,
    normal: np.ndarray,
    spacing_mm: float,
) -> np.ndarray:
    """Measure one scan.

    Args:
        voxels: [X, Y, Z] as read, RAS.
        affine: [4, 4] voxel to RAS mm.
        mask: [X, Y, Z] true inside.
        matrix: [4, 4] template RAS mm to subject RAS mm.
        similarity: With the template, NaN where nothing was aligned.
        normal: The volume in the model's box at ``spacing_mm``, 0 outside the mask.
        spacing_mm: Voxel edge of the box.

    Returns:
        Float64 array of the length and order of `MEASURES`, in the units told there; NaN where a figure does
        not exist.
    """
    (box,) = ndimage.find_objects(mask.astype(np.uint8))  # the air around it costs time
    found = {
        **_shape(affine, mask[box]),
        **_intensity(voxels[mask]),
        "anisotropy": _anisotropy(voxels[box], mask[box]),
        "shell": _shell(voxels, affine, mask),
        **_placed(matrix, similarity),
        **_boxed(normal, spacing_mm),
    }
    return np.array([found[name] for name in MEASURES], np.float64)


def _shape(affine: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    edges = np.linalg.norm(affine[:3, :3], axis=0)
    voxel = float(np.prod(edges))
    sizes, faces = [], []
    for axis, edge in enumerate(edges):
        area = mask.sum(axis=tuple({0, 1, 2} - {axis})) * voxel / edge  # of each slice, mm2
        inside = np.flatnonzero(area)
        sizes.append((inside[-1] - inside[0] + 1) * edge)
        faces += [area[inside[0]], area[inside[-1]]]
    pieces, count = ndimage.label(mask)
    largest = np.bincount(pieces.ravel())[1:].max() if count else 0
    return {
        "spacing_mm": float(edges.max()),
        "volume_ml": mask.sum() * voxel / 1000,
        **dict(zip(("size_x_mm", "size_y_mm", "size_z_mm"), sizes, strict=True)),
        "cut_cm2": max(faces) / 100,
        "pieces": 1 - largest / mask.sum(),
    }


def _intensity(inside: np.ndarray) -> dict[str, float]:
    mean = float(inside.mean(dtype=np.float64))
    values = np.percentile(inside, PERCENTILES) / mean
    _, counts = np.unique(inside, return_counts=True)
    return {
        "cv": float(inside.std(dtype=np.float64)) / mean,
        **{f"p{p:02d}": float(value) for p, value in zip(PERCENTILES, values, strict=True)},
        "negative": float((inside < 0).mean()),
        "dark": float((inside < _DARK * mean).mean()),
        "mode": counts.max() / inside.size,
    }


def _anisotropy(voxels: np.ndarray, mask: np.ndarray) -> float:
    """Ratio of fine detail between axes; it shows slices that were repeated or interpolated, whatever the header says.

    Fine detail is the mean square second difference over the mean square first one, among voxels inside the mask.
    """
    detail = []
    for axis in range(3):
        first, second = np.diff(voxels, axis=axis), np.diff(voxels, n=2, axis=axis)
        pairs = _pairs(mask, axis)
        triples = _pairs(pairs, axis)
        means = [
            np.square(step[both], dtype=np.float64).mean()
            for step, both in ((first, pairs), (second, triples))
            if both.any()
        ]
        detail.append(means[1] / max(means[0], 1e-12) if len(means) == 2 else math.nan)
    return float(np.max(detail) / np.maximum(np.min(detail), 1e-12))


def _pairs(mask: np.ndarray, axis: int) -> np.ndarray:
    """Tell where a voxel and the next along an axis are both inside: one shorter along that axis."""
    count = mask.shape[axis]
    return mask.take(range(count - 1), axis) & mask.take(range(1, count), axis)


def _shell(voxels: np.ndarray, affine: np.ndarray, mask: np.ndarray) -> float:
    """Mean signal close outside the mask over the mean inside, on a coarse grid; 0 outside the volume."""
    steps = np.maximum(1.0, _COARSE_MM / np.linalg.norm(affine[:3, :3], axis=0))
    pad = np.ceil(_SHELL_VOXELS * steps)
    shape = tuple(int(n) for n in np.ceil((np.asarray(mask.shape) + 2 * pad) / steps))
    grid = np.diag([*steps, 1.0])
    grid[:3, 3] = (steps - 1) / 2 - pad
    coarse = resample(voxels, affine, np.eye(4), affine @ grid, shape)
    inside = resample(mask.astype(np.float32), affine, np.eye(4), affine @ grid, shape)
    near = ndimage.binary_dilation(inside > 0, iterations=_SHELL_VOXELS) & (inside == 0)
    return float(coarse[near].mean() / voxels[mask].mean(dtype=np.float64)) if near.any() else math.nan


def _placed(matrix: np.ndarray, similarity: float) -> dict[str, float]:
    left, sizes, right = np.linalg.svd(matrix[:3, :3])
    turn = np.clip((np.trace(left @ right) - 1) / 2, -1, 1)
    return {
        "scale": float(np.prod(sizes) ** (1 / 3)),
        "stretch": float(sizes.max() / sizes.min()),
        "tilt_deg": float(np.degrees(np.arccos(turn))),
        "similarity": similarity,
    }


def _boxed(normal: np.ndarray, spacing_mm: float) -> dict[str, float]:
    """Measure the volume that the network sees."""
    inside = normal != 0
    brain = template(spacing_mm)[0] > 0.1
    values = normal[inside]
    variance = max(float(values.var(dtype=np.float64)), 1e-12) if values.size else math.nan
    rim = inside & ~ndimage.binary_erosion(inside, iterations=max(1, round(2 / spacing_mm)))
    sides = []
    for axis, size in enumerate(normal.shape):
        third = (np.indices(normal.shape, sparse=True)[axis] + 0.5) / size
        sides += [rim & (third < 1 / 3), rim & (third > 2 / 3)]
    means = [normal[side].mean() for side in sides if side.any()]
    rough = {}
    for axis, name in enumerate(("rough_x", "rough_y", "rough_z")):
        step, both = np.diff(normal, axis=axis), _pairs(inside, axis)
        rough[name] = float(np.square(step[both]).mean() / variance) if both.any() else math.nan
    return {
        "overlap": 2 * (inside & brain).sum() / (inside.sum() + brain.sum()),
        "rim": float(normal[rim].mean()) if rim.any() else math.nan,
        "rim_spread": float(np.ptp(means)) if means else math.nan,
        **rough,
    }
