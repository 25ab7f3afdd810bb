"""Random affine maps."""

import numpy as np


def random_affine(seed: int, degrees: float, scale: float, shear: float, shift_mm: float) -> np.ndarray:
    """A random affine of at most these sizes."""
    rng = np.random.default_rng(seed)
    matrix = np.eye(4)
    for plane, angle in zip([(0, 1), (0, 2), (1, 2)], np.deg2rad(rng.uniform(-degrees, degrees, 3)), strict=True):
        turn = np.eye(4)
        turn[np.ix_(plane, plane)] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        matrix = matrix @ turn
    stretch = np.diag([*rng.uniform(1 - scale, 1 + scale, 3), 1.0])
    stretch[[0, 0, 1], [1, 2, 2]] = rng.uniform(-shear, shear, 3)
    matrix = matrix @ stretch
    matrix[:3, 3] = rng.uniform(-shift_mm, shift_mm, 3)
    return matrix
