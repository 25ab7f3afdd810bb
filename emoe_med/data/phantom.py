"""A drawn head with known anatomy: ellipsoids and a folded cortex, in millimetres of the MNI template.

With age the ventricles grow, the cortex thins, and one left-sided region of white matter loses intensity:
the planted region, which a map of a trained model should find. It is no model of real ageing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

LABELS = (  # by index; of a pair, the left one comes first
    "background",
    *("left_cortex", "right_cortex", "left_white_matter", "right_white_matter"),
    *("left_ventricle", "right_ventricle", "left_deep_grey", "right_deep_grey"),
    *("left_cerebellum", "right_cerebellum", "brainstem", "planted_region"),
)
PLANTED_CENTRE_MM = (-36.0, -42.0, 26.0)  # MNI, RAS: left parietal white matter
PLANTED_RADII_MM = (13.0, 17.0, 12.0)
YOUNGEST, OLDEST = 20.0, 85.0  # years

_SCALP, _SKULL, _CSF, _GREY, _DEEP_GREY, _WHITE = 0.85, 0.12, 0.28, 0.72, 0.8, 1.0  # T1-weighted; air is 0
_FOLD_MM = 24.0  # wavelength of the gyri


@dataclass(frozen=True)
class Head:
    """What is in one scan, voxels [X, Y, Z]: intensity (white matter 1), index in ``LABELS``, brain mask."""

    image: np.ndarray
    labels: np.ndarray
    brain: np.ndarray


def draw_head(
    template_mm: np.ndarray, tissue_age: np.ndarray, folding: np.ndarray, *, planted: bool, edge_mm: float
) -> Head:
    """Draw a head without noise.

    Args:
        template_mm: [3, X, Y, Z] template RAS mm of each voxel.
        tissue_age: [3] years of ventricles, cortex and planted region.
        folding: [3] phase of the gyri, radians.
        planted: Whether the planted region fades with age; without, it is white matter under a label.
        edge_mm: Width over which one tissue turns into the next: the voxel size, for partial volume.

    Returns:
        Intensity, labels and brain mask on the grid of ``template_mm``.
    """
    ageing = (np.asarray(tissue_age) - YOUNGEST) / (OLDEST - YOUNGEST)
    image = np.zeros(template_mm.shape[1:], np.float32)
    labels = np.zeros(image.shape, np.uint8)
    is_right = template_mm[0] > 0
    cerebellum = _ellipsoid(template_mm, (0, -68, -38), (53, 36, 30))
    cerebrum = _cerebrum(template_mm, cerebellum)
    gyri = _gyri(template_mm, folding)
    for depth_mm, intensity, label in (
        *_skull(template_mm),
        *_cortex(template_mm, cerebrum, gyri, ageing[1]),
        *_cerebellum(template_mm, cerebellum, gyri),
        *_core(template_mm, ageing[0], ageing[2] if planted else 0.0),
    ):
        image += np.clip(depth_mm / edge_mm + 0.5, 0, 1) * (np.float32(intensity) - image)
        inside = depth_mm > 0
        labels[inside] = LABELS.index(label)
        if label.startswith("left_"):
            labels[inside & is_right] += 1
    return Head(image, labels, (cerebrum > 0) | (cerebellum > 0) | (labels > 0))


_Tissues = Iterator[tuple[np.ndarray, float, str]]  # depth below the surface in mm, intensity, label


def _skull(template_mm: np.ndarray) -> _Tissues:
    inner = _ellipsoid(template_mm, (0, -18, 5), (76, 93, 80))
    yield _ellipsoid(template_mm, (0, -45, -100), (55, 60, 70)), _SCALP, "background"  # neck
    yield _ellipsoid(template_mm, (0, 45, -55), (55, 45, 60)), _SCALP, "background"  # face
    yield inner + 15, _SCALP, "background"
    yield inner + 9, _SKULL, "background"
    yield inner, _CSF, "background"


def _cerebrum(template_mm: np.ndarray, cerebellum: np.ndarray) -> np.ndarray:
    """Depth below the smooth surface of the hemispheres with temporal lobes, apart from the cerebellum."""
    x, y, z = template_mm
    leaning = np.stack([x, y + 0.2 * (z - 15), z])  # the vertex lies behind the centre
    hemispheres = _ellipsoid(leaning, (0, -19, 15), (72, 88, 66))
    lobes = _ellipsoid(_mirrored(template_mm), (44, -12, -22), (27, 42, 28))
    return np.minimum(np.maximum(hemispheres, lobes), -cerebellum - 2)


def _cortex(template_mm: np.ndarray, cerebrum: np.ndarray, gyri: np.ndarray, ageing: float) -> _Tissues:
    yield cerebrum - (4 + 2 * ageing) * gyri, _GREY, "left_cortex"
    yield cerebrum - (5 - ageing) - 13 * gyri, _WHITE, "left_white_matter"
    corpus_callosum = _ellipsoid(template_mm, (0, -15, 10), (40, 45, 22))
    fissure = np.minimum(1.5 - np.abs(template_mm[0]), np.minimum(-corpus_callosum, cerebrum + 3))
    yield fissure, _CSF, "background"


def _cerebellum(template_mm: np.ndarray, cerebellum: np.ndarray, gyri: np.ndarray) -> _Tissues:
    yield cerebellum - 1.5 * gyri, _GREY, "left_cerebellum"
    yield np.minimum(cerebellum - 13, np.abs(template_mm[0]) - 5), _WHITE, "left_cerebellum"
    yield _ellipsoid(template_mm, (0, -28, -42), (13, 14, 34)), _WHITE, "brainstem"


def _core(template_mm: np.ndarray, ventricle_ageing: float, fading: float) -> _Tissues:
    mirrored = _mirrored(template_mm)
    yield _ellipsoid(mirrored, (15, -12, 4), (10, 20, 9)), _DEEP_GREY, "left_deep_grey"
    radii = (0.8 + 0.4 * ventricle_ageing) * np.array((8, 30, 10))
    yield _ellipsoid(mirrored, (11, -16, 17), radii), _CSF, "left_ventricle"
    region = _ellipsoid(template_mm, PLANTED_CENTRE_MM, PLANTED_RADII_MM)
    yield region, _WHITE - 0.45 * fading, "planted_region"


def _mirrored(template_mm: np.ndarray) -> np.ndarray:
    return np.concatenate([np.abs(template_mm[:1]), template_mm[1:]])


def _gyri(template_mm: np.ndarray, folding: np.ndarray) -> np.ndarray:
    """Depth of the sulci, about 0 to 1: a gyroid."""
    a, b, c = 2 * np.pi / _FOLD_MM * template_mm + np.asarray(folding, np.float32).reshape(3, 1, 1, 1)
    return 0.5 + (np.sin(a) * np.cos(b) + np.sin(b) * np.cos(c) + np.sin(c) * np.cos(a)) / 3


def _ellipsoid(
    template_mm: np.ndarray, centre_mm: tuple[float, ...], radii_mm: tuple[float, ...] | np.ndarray
) -> np.ndarray:
    """Depth below the surface in mm, negative outside; exact at the surface to first order."""
    radii = np.asarray(radii_mm, np.float32).reshape(3, 1, 1, 1)
    square = ((template_mm - np.asarray(centre_mm, np.float32).reshape(3, 1, 1, 1)) / radii) ** 2
    distance = np.sqrt(square.sum(0))
    gradient = np.sqrt(np.tensordot(radii.ravel() ** -2, square, 1))
    return distance * (1 - distance) / np.maximum(gradient, 1e-6)
