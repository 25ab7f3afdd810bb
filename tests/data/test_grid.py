import numpy as np
import pytest
from affines import random_affine
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe_med.data.grid import BOX_MM, box_grid, resample, template

CUBE = (20, 24, 18)


def _world(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]


def _ramp(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return (_world(affine, shape) @ [0.3, -0.2, 0.5] + 7).astype(np.float32)


@pytest.mark.parametrize(("spacing", "shape"), [(1, (160, 192, 160)), (2, (80, 96, 80)), (4, (40, 48, 40))])
def test_box_covers_the_same_millimetres_at_every_spacing(spacing, shape):
    found, affine = box_grid(spacing)
    assert found == shape
    corners = affine @ np.array([[-0.5, -0.5, -0.5, 1], [*(np.array(shape) - 0.5), 1]]).T
    assert corners[:3].T.tolist() == [[-80, -113.5, -75.5], [80, 78.5, 84.5]]


@pytest.mark.parametrize("spacing", [3.0, 7.0, 0.0, -2.0])
def test_a_spacing_that_does_not_divide_the_box_is_refused(spacing):
    with pytest.raises((ValueError, ZeroDivisionError)):
        box_grid(spacing)


def test_template_is_nested_symmetric_and_holds_the_whole_brain():
    fine, coarse = template(1.0)[0], template(4.0)[0]
    blocks = fine.reshape(40, 4, 48, 4, 40, 4).mean(axis=(1, 3, 5))
    np.testing.assert_allclose(blocks, coarse, atol=1e-6)
    np.testing.assert_allclose(fine, fine[::-1], atol=0.02)  # stored as 8 bits
    assert fine.min() == 0
    assert fine.max() == pytest.approx(1.0, abs=0.03)  # between voxels
    faces = [fine[[0, -1]], fine[:, [0, -1]], fine[:, :, [0, -1]]]
    assert max(face.max() for face in faces) == 0
    assert (fine > 0).sum() / 1e6 == pytest.approx(1.887, abs=0.05)  # litres, as in nilearn


def test_template_sits_at_its_world_coordinates():
    from nilearn.datasets import load_mni152_template

    image = load_mni152_template(resolution=1)
    world = _world(image.affine, image.shape)
    data = np.asarray(image.dataobj, np.float64)
    centre = (world * data[..., None]).sum(axis=(0, 1, 2)) / data.sum()
    voxels, affine = template(2.0)
    ours = (_world(affine, voxels.shape) * voxels[..., None]).sum(axis=(0, 1, 2)) / voxels.sum()
    np.testing.assert_allclose(ours, centre, atol=1e-3)


def test_template_is_shared_and_read_only():
    voxels, affine = template(8.0)
    assert template(8.0)[0] is voxels
    with pytest.raises(ValueError, match="read-only"):
        voxels[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        affine[0] = 1


def test_resampling_onto_its_own_grid_changes_nothing():
    affine = np.array([[0, -1.5, 0, 3], [2, 0, 0, -9], [0, 0, 1.0, 4], [0, 0, 0, 1]])
    voxels = np.random.default_rng(0).normal(size=CUBE).astype(np.float32)
    np.testing.assert_allclose(resample(voxels, affine, np.eye(4), affine, CUBE), voxels, atol=2e-5)
    labels = np.random.default_rng(0).integers(0, 200, CUBE).astype(np.uint8)
    same = resample(labels, affine, np.eye(4), affine, CUBE, order=0)
    assert same.dtype == np.uint8
    assert (same == labels).all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), spacing=st.sampled_from([0.7, 1.0, 2.5, 4.0]))
def test_a_ramp_of_world_coordinates_stays_exact(seed, spacing):
    source = random_affine(seed, 180, 0.2, 0.1, 20)
    matrix = random_affine(seed + 1, 10, 0.1, 0.05, 2)
    grid = np.diag([spacing] * 3 + [1.0])
    shape = (5, 4, 3)
    centre = (source @ [9.5, 11.5, 8.5, 1])[:3]  # put the middle of the target on the middle of the source
    grid[:3, 3] = np.linalg.inv(matrix)[:3] @ [*centre, 1] - grid[:3, :3] @ [2.0, 1.5, 1.0]
    got = resample(_ramp(source, CUBE), source, matrix, grid, shape)
    index = _world(np.linalg.inv(source) @ matrix @ grid, shape)
    reach = np.abs(np.linalg.inv(source) @ matrix @ grid)[:3, :3].sum(axis=1) / 2
    inside = ((index - reach >= 0) & (index + reach <= np.array(CUBE) - 1)).all(axis=-1)
    want = _ramp(matrix @ grid, shape)
    assert inside.any()
    np.testing.assert_allclose(got[inside], want[inside], atol=1e-3)


def test_a_nested_coarse_grid_is_the_exact_area_average_and_does_not_alias():
    noise = np.random.default_rng(1).normal(size=(40, 48, 40)).astype(np.float32)
    fine, coarse = np.diag([1.0, 1, 1, 1]), np.diag([4.0, 4, 4, 1])
    coarse[:3, 3] = 1.5
    got = resample(noise, fine, np.eye(4), coarse, (10, 12, 10))
    np.testing.assert_allclose(got, noise.reshape(10, 4, 12, 4, 10, 4).mean(axis=(1, 3, 5)), atol=1e-5)
    assert got.std() == pytest.approx(1 / 8, rel=0.1)  # 64 voxels averaged


def test_slabs_join_without_a_seam(monkeypatch):
    voxels = np.random.default_rng(2).normal(size=CUBE).astype(np.float32)
    grid, matrix = np.diag([2.0, 2, 2, 1]), random_affine(3, 10, 0.1, 0.1, 1)
    whole = resample(voxels, np.eye(4), matrix, grid, (9, 10, 8))
    monkeypatch.setattr("emoe_med.data.grid._CHUNK_POINTS", 1)
    np.testing.assert_allclose(resample(voxels, np.eye(4), matrix, grid, (9, 10, 8)), whole, atol=1e-6)


def test_outside_the_source_is_zero():
    far = np.eye(4)
    far[0, 3] = 500
    assert not resample(np.ones(CUBE, np.float32), np.eye(4), far, np.eye(4), CUBE).any()
    assert not resample(np.ones(CUBE, np.uint8), np.eye(4), far, np.eye(4), CUBE, order=0).any()


def test_labels_are_the_nearest_voxel():
    labels = np.arange(5, dtype=np.int16).reshape(5, 1, 1)
    shift = np.eye(4)
    shift[0, 3] = 0.4
    assert resample(labels, np.eye(4), shift, np.eye(4), (5, 1, 1), order=0).ravel().tolist() == [
        0,
        1,
        2,
        3,
        4,
    ]
    shift[0, 3] = 0.6
    assert resample(labels, np.eye(4), shift, np.eye(4), (5, 1, 1), order=0).ravel().tolist() == [
        1,
        2,
        3,
        4,
        0,
    ]


def test_a_planted_blob_keeps_its_world_coordinate():
    source, matrix = random_affine(5, 30, 0.1, 0.05, 5), random_affine(6, 8, 0.1, 0.05, 3)
    point = source[:3] @ [10, 12, 9, 1]
    blob = np.exp(-((_world(source, CUBE) - point) ** 2).sum(axis=-1) / 8).astype(np.float32)
    shape, grid = (60, 60, 60), np.diag([1.0, 1, 1, 1])
    landing = np.linalg.inv(matrix)[:3] @ [*point, 1]
    grid[:3, 3] = np.round(landing) - 30
    got = resample(blob, source, matrix, grid, shape)
    found = (_world(grid, shape) * got[..., None]).sum(axis=(0, 1, 2)) / got.sum()
    np.testing.assert_allclose(found, landing, atol=0.05)


def test_box_is_the_published_input_of_sfcn():
    assert BOX_MM == (160, 192, 160)
