"""FSL's linear transforms: points worked by hand, files of both handednesses, and heads that come to one place."""

import nibabel as nib
import numpy as np
import pytest

from emoe_med.data.brain import ChainOptions
from emoe_med.data.cache import HeadDataset
from emoe_med.data.flirt import given_matrix, read_flirt
from emoe_med.data.grid import box_grid, template
from emoe_med.data.scan import Scan
from emoe_med.errors import VolumeError

SHAPE, SIZES = (10, 12, 14), (2.0, 1.0, 1.5)
SHIFT = np.array([[1.0, 0, 0, 5], [0, 1, 0, -3], [0, 0, 1, 7], [0, 0, 0, 1]])


def save(path, affine, voxels=None, shape=SHAPE):
    voxels = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) if voxels is None else voxels
    image = nib.Nifti1Image(voxels, affine)
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    nib.save(image, path)
    return path


def write(path, matrix):
    """As flirt does: two blanks after each number."""
    path.write_text("".join("".join(f"{value:.8f}  " for value in row) + "\n" for row in matrix))
    return path


@pytest.mark.parametrize(
    ("sign", "x"),
    [
        (-1, 3 * 2 + 5),  # left-handed, as UK Biobank's: FSL counts from the first voxel
        (1, (10 - 1 - 3) * 2 + 5),  # right-handed: from the last
    ],
)
def test_a_point_worked_by_hand(tmp_path, sign, x):
    """Voxel (3, 4, 5), shifted by (5, -3, 7) mm, is voxel (x, 1, 14.5) of MNI152_T1_1mm, at (90 - x, -125, -57.5)."""
    affine = np.diag([sign * 2.0, 1, 1.5, 1])
    affine[:3, 3] = (-9 * sign, -20, 31)
    matrix = given_matrix(write(tmp_path / "a.mat", SHIFT), save(tmp_path / "a.nii.gz", affine))
    np.testing.assert_allclose(matrix @ [90 - x, -125, -57.5, 1], affine @ [3, 4, 5, 1], atol=1e-6)


def test_an_oblique_scan_in_another_axis_order(tmp_path):
    """By the definition, point by point: voxel -> FSL mm -> FSL mm of the template -> its voxel -> RAS."""
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)) + 3 * np.eye(3)[[2, 0, 1]])[0]
    full = np.array([[1.1, 0.02, -0.05, 31], [0.04, 0.95, 0.1, 22], [0.03, -0.12, 1.2, 17], [0, 0, 0, 1]])
    for sign in (1, -1):
        affine = np.eye(4)
        affine[:3, :3] = rotation @ np.diag([np.sign(np.linalg.det(rotation)) * sign * 2.0, 1, 1.5])
        affine[:3, 3] = (40, -30, 20)
        assert np.sign(np.linalg.det(affine[:3, :3])) == sign
        matrix = given_matrix(write(tmp_path / "a.mat", full), save(tmp_path / "a.nii", affine))
        for voxel in ((0, 0, 0), (9, 0, 3), (4, 11, 13)):
            i = voxel[0] if sign < 0 else SHAPE[0] - 1 - voxel[0]
            fsl = np.array([i * SIZES[0], voxel[1] * SIZES[1], voxel[2] * SIZES[2], 1])
            x, y, z, _ = full @ fsl
            np.testing.assert_allclose(matrix @ [90 - x, y - 126, z - 72, 1], affine @ [*voxel, 1], atol=1e-5)


def test_the_header_s_voxel_size_counts_where_the_sform_tells_another(tmp_path):
    affine = np.diag([-2.0, 1, 1.5, 1])
    path = tmp_path / "a.nii"
    image = nib.Nifti1Image(np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE), affine)
    image.set_sform(affine, 1)
    image.set_qform(None, 0)
    image.header["pixdim"][1:4] = (4, 1, 1.5)
    nib.save(image, path)
    matrix = given_matrix(write(tmp_path / "a.mat", np.eye(4)), path)
    np.testing.assert_allclose(matrix @ [90 - 3 * 4, 4 - 126, 7.5 - 72, 1], affine @ [3, 4, 5, 1], atol=1e-6)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1 0 0 0\n0 1 0 0\n0 0 1 0\n",
        "1 0 0\n0 1 0\n0 0 1\n0 0 0\n",
        "1 0 0 0\n0 1 0 0\n0 0 one 0\n0 0 0 1\n",
        "1 0 0 0\n0 1 0 0\n0 0 nan 0\n0 0 0 1\n",
        "1 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 2\n",
        "1 0 0 0\n0 1 0 0\n0 0 0 0\n0 0 0 1\n",
        "1 0 0 0\n0 9 0 0\n0 0 1 0\n0 0 0 1\n",
        "-1 0 0 181\n0 1 0 0\n0 0 1 0\n0 0 0 1\n",  # swaps left and right
        "1 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 1\n" + " " * 5000,
        "1 0 0 0\n0 1 0 0\n0 0 1 ü\n0 0 0 1\n",
    ],
)
def test_what_is_no_transform_of_a_head(tmp_path, text):
    path = tmp_path / "a.mat"
    path.write_text(text or "\n", encoding="utf-8")
    with pytest.raises(VolumeError, match=r"VOL-TRANSFORM .*a\.mat"):
        read_flirt(path)


def template_head(folder, name, sign):
    """The template, enlarged by a tenth and put elsewhere, stored with x to either side; the matrix that undoes it.

    Returns:
        Scan and the matrix template RAS mm -> scan RAS mm that it was made with.
    """
    voxels, affine = template(4.0)
    voxels = np.array(voxels)
    truth = np.diag([1.1, 1.1, 1.1, 1.0])
    truth[:3, 3] = (12, -7, 20)
    moved = truth @ affine
    if sign < 0:
        voxels, moved = voxels[::-1].copy(), moved @ np.array([[-1.0, 0, 0, len(voxels) - 1], *np.eye(4)[1:]])
    save(folder / f"{name}.nii.gz", moved, 1000 * voxels)
    # FSL's millimetres of this grid, by hand: 4.4 mm a voxel, x from the end that lies to the right
    n = len(voxels)
    to_fsl = np.array([[-4.4 if sign > 0 else 4.4, 0, 0, 4.4 * (n - 1) if sign > 0 else 0], *(4.4 * np.eye(4)[1:])])
    to_fsl[3] = (0, 0, 0, 1)
    to_template = np.array([[-1.0, 0, 0, 90], [0, 1, 0, 126], [0, 0, 1, 72], [0, 0, 0, 1]]) @ np.linalg.inv(truth)
    flirt = write(folder / f"{name}.mat", to_template @ moved @ np.linalg.inv(to_fsl))
    image = folder / f"{name}.nii.gz"
    return Scan(2, image, 50.0, participant_id=name, session_id="", mask=image, transform=flirt), truth


def test_heads_of_both_handednesses_come_to_one_place_with_left_on_the_left(tmp_path):
    options = ChainOptions(4.0, "given")
    made = [template_head(tmp_path, name, sign) for name, sign in (("right", 1), ("left", -1))]
    entries = [HeadDataset([scan], options, tmp_path / "cache").entry(0) for scan, _ in made]
    for entry, (_, truth) in zip(entries, made, strict=True):
        np.testing.assert_allclose(entry["matrix"], truth, atol=1e-4)
        assert entry["similarity"] > 0.9
    assert (entries[0]["image"].float() - entries[1]["image"].float()).abs().max() < 0.02
    assert options.space == "MNI152NLin6Asym"
    assert options.digest() != ChainOptions(4.0).digest()


def test_the_given_transform_is_part_of_the_cache_key(tmp_path):
    scan, _ = template_head(tmp_path, "a", -1)
    heads = HeadDataset([scan], ChainOptions(4.0, "given"), tmp_path / "cache")
    before = heads.entry(0)["matrix"].clone()
    matrix = read_flirt(scan.transform)
    matrix[0, 3] += 8
    write(scan.transform, matrix)
    moved = HeadDataset([scan], ChainOptions(4.0, "given"), tmp_path / "cache").entry(0)["matrix"]
    np.testing.assert_allclose((moved - before)[:3, 3], [8 * 1.1, 0, 0], atol=1e-4)  # RAS x falls as FSL's grows


def test_warped_and_unwarped_scans_are_told_apart_in_both_directions(tmp_path):
    scan, _ = template_head(tmp_path, "a", 1)
    warped = Scan(3, scan.image, 50.0, participant_id="b", session_id="", mask=scan.image, warped=True)
    for options, wrong in (
        (ChainOptions(4.0, "affine"), warped),
        (ChainOptions(4.0, "given"), warped),
        (ChainOptions(4.0, "centred"), warped),
        (ChainOptions(4.0, "warped"), scan),
    ):
        with pytest.raises(VolumeError, match="CON-WARPED"):
            HeadDataset([wrong], options, tmp_path / "cache").entry(0)
    bare = Scan(4, scan.image, 50.0, participant_id="c", session_id="", mask=scan.image)
    with pytest.raises(VolumeError, match=r"VOL-TRANSFORM .*no linear transform"):
        HeadDataset([bare], ChainOptions(4.0, "given"), tmp_path / "cache").entry(0)


def test_a_warped_scan_stays_where_it_is(tmp_path):
    voxels, affine = template(4.0)
    image = save(tmp_path / "T1_brain_to_MNI.nii.gz", np.array(affine), 1000 * np.array(voxels))
    scan = Scan(2, image, 50.0, participant_id="a", session_id="", mask=image, warped=True)
    entry = HeadDataset([scan], ChainOptions(4.0, "warped"), tmp_path / "cache").entry(0)
    np.testing.assert_array_equal(entry["matrix"], np.eye(4))
    assert entry["similarity"] > 0.93  # that of the template with itself
    inside = (entry["image"][0] != 0).numpy()
    assert inside.shape == box_grid(4.0)[0]
    assert (inside == (np.array(voxels) > 0)).mean() > 0.999
