import os
from pathlib import Path

import numpy as np
import pytest
from affines import random_affine

from emoe_med.data.grid import box_grid, resample, template
from emoe_med.data.register import align_affine
from emoe_med.errors import VolumeError


def _correlation(voxels: np.ndarray, spacing_mm: float = 4.0) -> float:
    return float(np.corrcoef(voxels.ravel(), template(spacing_mm)[0].ravel())[0, 1])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_alignment_recovers_a_known_affine(seed):
    """The template, put on a 2 mm grid of its own through a random affine, dimmed and given noise."""
    voxels, affine = template(1.0)
    truth = random_affine(seed, 15, 0.12, 0.06, 25)
    native = np.diag([2.0, 2, 2, 1])
    native[:3, 3] = [-120, -130, -125]
    shape = (120, 130, 125)
    head = resample(voxels, affine, np.linalg.inv(truth), native, shape)
    mask = head > 0.1
    head = 900 * head + np.random.default_rng(seed).normal(0, 30, shape).astype(np.float32)
    found = align_affine(head, native, mask)
    brain = np.argwhere(template(4.0)[0] > 0.1) @ template(4.0)[1][:3, :3].T + template(4.0)[1][:3, 3]
    brain = np.c_[brain, np.ones(len(brain))]
    error = np.linalg.norm((brain @ (found.matrix - truth).T)[:, :3], axis=1)
    assert error.mean() < 0.5
    assert error.max() < 1.5
    assert 0.9 < found.similarity <= 1


def test_alignment_repeats_bit_for_bit_and_ignores_intensity_scale():
    voxels, affine = template(4.0)
    first, second = (align_affine(voxels, affine, voxels > 0.1) for _ in range(2))
    assert (first.matrix == second.matrix).all()
    assert first.similarity == second.similarity
    bright = align_affine(voxels * 4096, affine, voxels > 0.1)
    np.testing.assert_allclose(bright.matrix, first.matrix, atol=1e-3)


def test_alignment_refuses_a_useless_mask():
    voxels, affine = template(8.0)
    empty, flat = np.zeros(voxels.shape, bool), np.zeros(voxels.shape, bool)
    flat[:, :, 10] = True
    for image, mask, reason in [
        (voxels, empty, "empty"),
        (voxels, flat, "single slice"),
        (voxels, flat[1:], "shape"),
        (np.zeros_like(voxels), voxels > 0, "no signal"),
        (np.full_like(voxels, np.nan), voxels > 0, "no signal"),
    ]:
        with pytest.raises(VolumeError, match=reason):
            align_affine(image, affine, mask)


def test_real_heads_end_closer_to_the_template_than_by_centring():
    root = os.environ.get("EMOE_MED_TEST_DATA")
    if not root or not (Path(root) / "ixi").is_dir():
        pytest.skip("EMOE_MED_TEST_DATA/ixi is absent")
    import nibabel

    shape, grid = box_grid(4.0)
    for name in sorted(path.name for path in (Path(root) / "ixi" / "t1").glob("*.nii.gz"))[:3]:
        image = nibabel.as_closest_canonical(nibabel.load(Path(root) / "ixi" / "t1" / name))
        label_file = Path(root) / "ixi" / "dlmuse" / name.replace("_T1w", "_dlmuse")
        mask = np.asarray(nibabel.as_closest_canonical(nibabel.load(label_file)).dataobj) > 0
        head = np.where(mask, image.get_fdata(dtype=np.float32), 0)
        found = align_affine(head, image.affine, mask)
        centring = np.eye(4)
        template_centre = np.argwhere(template(4.0)[0] > 0.1).mean(axis=0) @ grid[:3, :3] + grid[:3, 3]
        centring[:3, 3] = image.affine[:3] @ [*np.argwhere(mask).mean(axis=0), 1] - template_centre
        before, after = (
            _correlation(resample(head, image.affine, matrix, grid, shape)) for matrix in (centring, found.matrix)
        )
        assert after > before + 0.02
        assert after > 0.92
        assert found.similarity > 0.65
