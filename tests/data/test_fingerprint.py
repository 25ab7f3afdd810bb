"""What is measured of a scan, on ellipsoids whose figures are known."""

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy.spatial.transform import Rotation

from emoe_med.data.brain import BrainToBoxd, ChainOptions
from emoe_med.data.fingerprint import MEASURES, _anisotropy, _placed, fingerprint

RADII = np.array([60.0, 75, 55])
CHAIN = BrainToBoxd(ChainOptions(4, "centred"))


def head(spacing=(2.0, 2.0, 2.0)):
    """An ellipsoid of mean 100 in a shell of 50: voxels, affine, mask."""
    spacing = np.asarray(spacing)
    shape = np.ceil(200 / spacing).astype(int)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -spacing * (shape - 1) / 2
    x, y, z = np.meshgrid(*(affine[i, 3] + spacing[i] * np.arange(n) for i, n in enumerate(shape)), indexing="ij")
    r = np.sqrt((x / RADII[0]) ** 2 + (y / RADII[1]) ** 2 + (z / RADII[2]) ** 2)
    mask = r < 1
    waves = 100 + 20 * np.sin(x / 7) * np.sin(y / 7) * np.sin(z / 7)
    return np.where(mask, waves, np.where(r < 1.3, 50, 0)), affine, mask


def measured(voxels, affine, mask) -> dict[str, float]:
    image = MetaTensor(
        torch.from_numpy(np.ascontiguousarray(voxels, np.float32))[None], affine=torch.from_numpy(affine)
    )
    inside = MetaTensor(torch.from_numpy(mask.astype(np.float32))[None], affine=torch.from_numpy(affine))
    return dict(zip(MEASURES, CHAIN({"image": image, "mask": inside})["fingerprint"].tolist(), strict=True))


@pytest.fixture(scope="module")
def plain():
    return measured(*head())


def test_size_and_volume_in_mm(plain):
    assert plain["volume_ml"] == pytest.approx(4 / 3 * np.pi * RADII.prod() / 1000, rel=0.01)
    for name, radius in zip(("size_x_mm", "size_y_mm", "size_z_mm"), RADII, strict=True):
        assert plain[name] == pytest.approx(2 * radius, abs=4)
    assert plain["spacing_mm"] == 2
    assert plain["pieces"] == 0


def test_voxel_size_does_not_matter_much(plain):
    other = measured(*head((1.5, 2.5, 2.0)))
    for name in ("volume_ml", "size_x_mm", "size_y_mm", "cv", "p05", "p95", "overlap", "rim"):
        assert other[name] == pytest.approx(plain[name], rel=0.06, abs=0.05), name
    assert other["spacing_mm"] == 2.5


def test_the_intensity_scale_does_not_matter_at_all(plain):
    voxels, affine, mask = head()
    other = measured(64 * voxels, affine, mask)
    assert other == pytest.approx(plain, rel=1e-4, abs=1e-5, nan_ok=True)


def test_intensity_against_numpy(plain):
    voxels, _, mask = head()
    inside = np.float32(voxels[mask]) / voxels[mask].mean()
    assert plain["cv"] == pytest.approx(inside.std(), rel=1e-4)
    assert plain["p95"] == pytest.approx(np.quantile(inside, 0.95), rel=1e-4)
    assert plain["shell"] == pytest.approx(0.5, abs=0.06)
    assert (plain["negative"], plain["dark"]) == (0, 0)


def test_a_cut_shows_in_the_outermost_slice(plain):
    voxels, affine, mask = head()
    top = np.flatnonzero(mask.any((0, 1)))[-1] - 10
    cut = measured(voxels[:, :, :top], affine, mask[:, :, :top])
    assert cut["cut_cm2"] == pytest.approx(mask[:, :, top - 1].sum() * 4 / 100)
    assert cut["cut_cm2"] > 4 * plain["cut_cm2"]


def test_repeated_slices_show_though_the_header_tells_nothing(plain):
    voxels, affine, mask = head()
    thick, inside = (np.repeat(volume[:, :, 1:99:3], 3, axis=2) for volume in (voxels, mask))
    assert measured(thick, affine, inside)["anisotropy"] > 1.5 * plain["anisotropy"]


def test_fine_detail_by_hand():
    """Steps of 1, -1, 1 along x have second differences of 2: 4 over 1. What rises evenly along y and z has none."""
    x, y, z = np.indices((6, 6, 6))
    assert _anisotropy((x % 2 + y + z).astype(float), np.ones((6, 6, 6), bool)) > 1e9
    alike = (x % 2 + y % 2 + z % 2).astype(float)
    assert _anisotropy(alike, np.ones((6, 6, 6), bool)) == pytest.approx(1)
    assert np.isnan(_anisotropy(alike[:2], np.ones((2, 6, 6), bool)))


def test_a_scrap_beside_the_mask(plain):
    voxels, affine, mask = head()
    mask[2:7, 2:7, 2:7] = True
    assert measured(voxels, affine, mask)["pieces"] == pytest.approx(125 / mask.sum())


def test_place_against_the_template_from_a_known_matrix():
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("x", 20, degrees=True).as_matrix() @ np.diag([0.8, 0.9, 1.0])
    found = _placed(matrix, 0.7)
    assert found["scale"] == pytest.approx(0.72 ** (1 / 3))
    assert found["stretch"] == pytest.approx(1.25)
    assert found["tilt_deg"] == pytest.approx(20)


def test_nothing_inside_is_not_a_number():
    voxels, affine, mask = head((8.0, 8.0, 8.0))
    empty = fingerprint(voxels, affine, mask, np.eye(4), float("nan"), np.zeros((40, 48, 40), np.float32), 4.0)
    found = dict(zip(MEASURES, empty, strict=True))
    assert np.isnan(found["rim"])
    assert np.isnan(found["rough_x"])
    assert found["overlap"] == 0
