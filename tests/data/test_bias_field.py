"""N4 takes a drawn bias field out of a drawn brain, and leaves a flat one as it is."""

import numpy as np
import pytest

from emoe_med.errors import VolumeError

pytest.importorskip("SimpleITK", reason="the extra is not installed")
from emoe_med.data.bias_field import flatten

SHAPE, SPACING = (70, 80, 64), 2.5


def brain(rng):
    """Two tissues in layers, noise, and a smooth field that is twice as bright on the left."""
    axes = [(np.arange(n) - (n - 1) / 2) * SPACING for n in SHAPE]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    radius = np.sqrt((x / 65) ** 2 + (y / 80) ** 2 + (z / 60) ** 2)
    mask = radius < 1
    tissue = np.where(np.sin(14 * radius) > 0, 700.0, 450.0)
    field = np.exp(-x / 65 * 0.35)
    return np.where(mask, tissue + rng.normal(0, 10, SHAPE), 30.0).astype(np.float32), field, mask, tissue


def spread(voxels, tissue, mask):
    """Mean coefficient of variation within the tissues."""
    return np.mean([voxels[mask & (tissue == t)].std() / voxels[mask & (tissue == t)].mean() for t in (450.0, 700.0)])


def test_a_planted_field_is_taken_out_and_the_scale_stays():
    flat, field, mask, tissue = brain(np.random.default_rng(0))
    affine = np.diag([SPACING] * 3 + [1.0])
    made_flat = flatten(flat * field, affine, mask)
    assert spread(flat * field, tissue, mask) > 0.13
    assert spread(made_flat, tissue, mask) < 0.05
    kept = np.exp(np.log(made_flat[mask]).mean() - np.log((flat * field)[mask]).mean())
    assert kept == pytest.approx(1, abs=1e-4)
    # where the head stands in the scanner plays no part, nor does its unit
    turned = np.array([[0, -SPACING, 0, 70], [SPACING, 0, 0, -90], [0, 0, SPACING, 5], [0, 0, 0, 1.0]])
    np.testing.assert_allclose(flatten(3 * flat * field, turned, mask), 3 * made_flat, rtol=1e-3)


def test_a_mask_without_signal_is_refused():
    with pytest.raises(VolumeError, match="VOL-BIAS"):
        flatten(np.zeros((9, 9, 9), np.float32), np.eye(4), np.ones((9, 9, 9), bool))
