"""The reader's choices, the writer's promises, digests, MONAI. Faults: tests/faults/test_volumes.py."""

import errno
import gzip
import hashlib
import os

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor, PersistentDataset
from monai.transforms import LoadImaged

from emoe_med.data.volume import (
    StrictReader,
    Volume,
    VolumeLimits,
    file_digest,
    read_volume,
    voxel_digest,
    write_volume,
)
from emoe_med.errors import EXIT_STORAGE, StorageError, VolumeError

AFFINE = np.array([[2.0, 0, 0, -9], [0, 1.5, 0, -12], [0, 0, 1, 4], [0, 0, 0, 1]])
VOXELS = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
LOAD = LoadImaged(keys=["image"], reader=StrictReader(), image_only=True, ensure_channel_first=True)


def save(path, voxels=VOXELS, sform=AFFINE, qform=AFFINE, extension=None):
    """Write with nibabel; a form of None has code 0."""
    image = nib.Nifti1Image(voxels, None)
    image.set_sform(sform, 0 if sform is None else 1)
    image.set_qform(qform, 0 if qform is None else 1)
    if extension:
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", extension))
    nib.save(image, path)
    return path


def noise(shape):
    return np.random.default_rng(0).integers(0, 2**15, shape).astype(np.int16)


def refused(path, *limits) -> str:
    with pytest.raises(VolumeError) as caught:
        read_volume(path, *limits)
    (fault,) = caught.value.faults
    assert fault.file == str(path)
    return fault.code


# Reading


def test_voxels_and_affine_of_a_file_in_ras(tmp_path):
    volume = read_volume(save(tmp_path / "a.nii.gz"))
    np.testing.assert_array_equal(volume.voxels, VOXELS)
    np.testing.assert_array_equal(volume.affine, AFFINE)
    assert volume.voxels.dtype == np.float32
    assert volume.voxels.flags.c_contiguous
    assert volume.notes == ()


def test_a_radiological_file_is_mirrored_by_hand(tmp_path):
    # first voxel at x = +9, stepping left: RAS begins at the last one, 3 steps of 2 mm to the left of it
    lps = AFFINE.copy()
    lps[0] = [-2, 0, 0, 9]
    volume = read_volume(save(tmp_path / "a.nii", sform=lps, qform=lps))
    np.testing.assert_array_equal(volume.voxels, VOXELS[::-1])
    np.testing.assert_array_equal(volume.affine[0], [2, 0, 0, 3])


def test_sform_goes_before_qform_and_qform_serves_alone(tmp_path):
    shifted = AFFINE.copy()
    shifted[0, 3] += 0.5  # within the millimetre that they may differ by
    both = read_volume(save(tmp_path / "a.nii", sform=shifted))
    alone = read_volume(save(tmp_path / "b.nii", sform=None))
    np.testing.assert_allclose(both.affine, shifted)
    np.testing.assert_allclose(alone.affine, AFFINE, atol=1e-6)


def test_a_qfac_of_zero_means_one(tmp_path):
    path = save(tmp_path / "a.nii", sform=None)
    content = bytearray(path.read_bytes())
    content[76:80] = bytes(4)  # pixdim[0]
    path.write_bytes(content)
    np.testing.assert_allclose(read_volume(path).affine, AFFINE, atol=1e-6)


def test_one_volume_in_four_axes_is_squeezed_and_noted(tmp_path):
    volume = read_volume(save(tmp_path / "a.nii.gz", VOXELS[..., None]))
    assert volume.voxels.shape == (4, 5, 6)
    assert volume.notes == ("4-D file of one volume, read as 3-D",)
    assert refused(save(tmp_path / "b.nii.gz", np.stack([VOXELS, VOXELS], axis=-1))) == "VOL-DIM"


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_an_extension_is_skipped(tmp_path, name):
    volume = read_volume(save(tmp_path / name, extension=b"secret " * 5000))
    np.testing.assert_array_equal(volume.voxels, VOXELS)


@pytest.mark.parametrize("chunk_bytes", [2, 3, 7, 1 << 18])
def test_gzip_in_many_members_as_parallel_compressors_write_it(tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr("emoe_med.data.files._CHUNK_BYTES", chunk_bytes)  # a member may end anywhere in a chunk
    content = save(tmp_path / "a.nii").read_bytes()
    pieces = [gzip.compress(content[start : start + 50]) for start in range(0, len(content), 50)]
    path = tmp_path / "b.nii.gz"
    path.write_bytes(b"".join(pieces) + gzip.compress(b""))  # the empty last member ends a BGZF file
    np.testing.assert_array_equal(read_volume(path).voxels, VOXELS)
    path.write_bytes(b"".join(pieces[:-1]))
    assert refused(path) == "VOL-TRUNC"


def test_a_member_larger_than_the_chunks_it_is_read_in(tmp_path):
    voxels = np.random.default_rng(0).integers(0, 2**15, (90, 80, 70)).astype(np.int16)  # 1 MB that hardly packs
    np.testing.assert_array_equal(read_volume(save(tmp_path / "a.nii.gz", voxels)).voxels, voxels)


@pytest.mark.parametrize(("side", "noted"), [(3, True), (12, False), (20, True)])
def test_a_head_that_fills_almost_nothing_or_all_is_noted(tmp_path, side, noted):
    voxels = np.zeros((20, 20, 20), np.int16)
    voxels[:side, :side, :side] = 100  # 0.3 %, 22 % and 100 % of the box
    voxels[0, 0, 0] = 0
    assert bool(read_volume(save(tmp_path / "a.nii", voxels)).notes) == noted


def test_limits_can_be_set(tmp_path):
    path = save(tmp_path / "a.nii")
    assert refused(path, VolumeLimits(max_voxels=119)) == "VOL-SIZE"
    assert refused(path, VolumeLimits(max_spacing_mm=1.9)) == "VOL-SPACING"
    assert read_volume(path, VolumeLimits(max_voxels=120, max_spacing_mm=2, min_spacing_mm=1))


def test_a_read_error_names_the_file(tmp_path, monkeypatch):
    path = save(tmp_path / "a.nii")

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("emoe_med.data.files.ByteStream.fill", fail)
    assert refused(path) == "VOL-MISSING"


def test_one_brain_in_all_48_orientations_of_real_files(real_data):
    paths = sorted((real_data / "scans" / "orientation_48").glob("*.nii.gz"))
    assert len(paths) == 48
    truth = read_volume(real_data / "scans" / "orientation_48" / "RAS.nii.gz")
    for path in paths:
        volume = read_volume(path)
        np.testing.assert_array_equal(volume.voxels, truth.voxels)
        np.testing.assert_allclose(volume.affine, truth.affine, atol=1e-4)
        assert voxel_digest(volume) == voxel_digest(truth)


def test_real_scans_equal_nibabel_and_leave_no_note(real_data):
    paths = [
        *sorted((real_data / "ixi" / "t1").glob("*.nii.gz"))[:5],
        *(real_data / "scans").glob("ixi_guys/*.gz"),
    ]
    assert len(paths) == 6
    for path in paths:
        volume, reference = read_volume(path), nib.as_closest_canonical(nib.load(path))
        np.testing.assert_array_equal(volume.voxels, reference.get_fdata(dtype=np.float32))
        np.testing.assert_allclose(volume.affine, reference.affine, atol=1e-5)
        assert volume.notes == ()


# Writing


@pytest.mark.parametrize("dtype", ["u1", "i2", "i4", "i8", "f4", "f8"])
def test_written_types_are_kept(tmp_path, dtype):
    path = tmp_path / "a.nii.gz"
    write_volume(path, VOXELS.astype(dtype), AFFINE)
    assert nib.load(path).get_data_dtype() == np.dtype(dtype)
    np.testing.assert_array_equal(read_volume(path).voxels, VOXELS)


def test_the_stored_type_can_be_chosen_where_the_values_fit(tmp_path):
    path = tmp_path / "a.nii.gz"
    write_volume(path, VOXELS.astype(np.float64), AFFINE, dtype=np.uint8)
    assert nib.load(path).get_data_dtype() == np.uint8
    for voxels in (VOXELS + 0.5, VOXELS - 1, VOXELS + 200, np.full((2, 2, 2), np.nan)):
        with pytest.raises(ValueError, match=r"a\.nii\.gz: values do not fit uint8"):
            write_volume(path, voxels, AFFINE, dtype=np.uint8)
    write_volume(path, VOXELS > 3, AFFINE)
    assert nib.load(path).get_data_dtype() == np.uint8


@pytest.mark.parametrize("form_code", [1, 2, 4])
def test_the_header_holds_geometry_alone(tmp_path, form_code):
    path = tmp_path / "a.nii"
    write_volume(path, VOXELS, AFFINE, form_code=form_code)
    header = nib.load(path).header
    for get_form in (header.get_sform, header.get_qform):
        affine, code = get_form(coded=True)
        np.testing.assert_allclose(affine, AFFINE, atol=1e-6)
        assert code == form_code
    assert header.get_xyzt_units()[0] == "mm"
    assert len(header.extensions) == 0
    content = path.read_bytes()
    assert len(content) == 352 + VOXELS.nbytes
    text_fields = content[4:39] + content[148:252] + content[328:344]  # data_type to session_error; text; intent
    assert not any(text_fields.replace(b"r", b""))  # 'regular' is the letter r by the standard


def test_a_sheared_affine_has_no_qform_and_is_read_again(tmp_path):
    sheared = AFFINE.copy()
    sheared[0, 1] = 0.1
    write_volume(tmp_path / "a.nii", VOXELS, sheared)
    assert int(nib.load(tmp_path / "a.nii").header["qform_code"]) == 0
    np.testing.assert_allclose(read_volume(tmp_path / "a.nii").affine, sheared, atol=1e-6)


def test_equal_content_gives_equal_bytes(tmp_path):
    write_volume(tmp_path / "one.nii.gz", VOXELS, AFFINE)
    write_volume(tmp_path / "two.nii.gz", np.asfortranarray(VOXELS), AFFINE)
    content = (tmp_path / "one.nii.gz").read_bytes()
    assert content == (tmp_path / "two.nii.gz").read_bytes()
    assert content[3:8] == bytes(5)  # no name, no time


@pytest.mark.parametrize(("name", "shape"), [("a.mgz", (4, 5, 6)), ("a", (4, 5, 6)), ("a.nii", (4, 5, 6, 1))])
def test_what_cannot_be_written(tmp_path, name, shape):
    with pytest.raises(ValueError, match=name):
        write_volume(tmp_path / name, np.zeros(shape), AFFINE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["os.fsync", "pathlib.Path.replace"])
def test_a_failed_write_leaves_the_old_file_and_no_stump(tmp_path, monkeypatch, call):
    path = tmp_path / ("n" * 248 + ".nii.gz")  # 255 bytes, the longest name
    write_volume(path, VOXELS, AFFINE)
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(call, full)
        with pytest.raises(StorageError, match="No space left") as caught:
            write_volume(path, VOXELS + 1, AFFINE)
    assert caught.value.exit_code == EXIT_STORAGE
    assert caught.value.faults[0].file == str(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_gone_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError, match=r"gone/a\.nii"):
        write_volume(tmp_path / "gone" / "a.nii", VOXELS, AFFINE)


# Digests


def test_file_digest_is_sha256_of_the_bytes(tmp_path):
    path = tmp_path / "any"
    path.write_bytes(b"abc")
    assert file_digest(path) == hashlib.sha256(b"abc").hexdigest()
    with pytest.raises(VolumeError, match=r"VOL-MISSING.*gone"):
        file_digest(tmp_path / "gone")


def test_voxel_digest_finds_one_image_under_two_names(tmp_path):
    lps = np.diag([-1.0, -1, 1, 1]) @ AFFINE
    copies = [
        save(tmp_path / "plain.nii"),
        save(tmp_path / "packed.nii.gz"),
        save(tmp_path / "noted.nii.gz", extension=b"another"),
        save(tmp_path / "float.nii", VOXELS.astype(np.float32)),
        save(tmp_path / "turned.nii", VOXELS[::-1, ::-1], sform=None, qform=lps),
    ]
    assert len({voxel_digest(read_volume(path)) for path in copies}) == 1
    assert len({file_digest(path) for path in copies}) == 5


def test_voxel_digest_tells_shapes_and_values_apart():
    def digest(voxels):
        return voxel_digest(Volume(voxels.astype(np.float32), AFFINE, ()))

    changed = VOXELS.copy()
    changed[3, 4, 5] += 1
    assert len({digest(VOXELS), digest(changed), digest(VOXELS.reshape(5, 4, 6))}) == 3


# In MONAI


def test_the_reader_gives_a_metatensor_in_ras(tmp_path):
    lps = np.diag([-1.0, -1, 1, 1]) @ AFFINE
    path = save(tmp_path / "a.nii.gz", sform=lps, qform=lps)
    image = LOAD({"image": str(path)})["image"]
    volume = read_volume(path)
    assert isinstance(image, MetaTensor)
    assert image.shape == (1, 4, 5, 6)
    assert image.dtype == torch.float32
    np.testing.assert_array_equal(image[0].numpy(), volume.voxels)
    np.testing.assert_array_equal(image.affine.numpy(), volume.affine)
    np.testing.assert_allclose(image.pixdim, [2, 1.5, 1])
    assert image.meta["space"] == "RAS"


def test_a_damaged_file_is_not_handed_to_monais_own_readers(tmp_path):
    voxels = noise((12, 13, 14))
    path = save(tmp_path / "a.nii.gz", voxels)
    path.write_bytes(path.read_bytes()[:-8])  # without its checksum, which nibabel does not miss
    np.testing.assert_array_equal(nib.load(path).get_fdata(), voxels)
    with pytest.raises(VolumeError, match="VOL-TRUNC"):
        LOAD({"image": path})


def test_several_files_are_not_stacked(tmp_path):
    path = str(save(tmp_path / "a.nii.gz"))
    with pytest.raises(ValueError, match="2 were given"):
        LOAD({"image": [path, path]})


def test_limits_reach_the_reader(tmp_path):
    load = LoadImaged(keys=["image"], reader=StrictReader(VolumeLimits(max_voxels=10)), image_only=True)
    with pytest.raises(VolumeError, match="VOL-SIZE"):
        load({"image": save(tmp_path / "a.nii.gz")})


def test_scans_are_collated_and_cached_without_pickle(tmp_path):
    items = [{"image": str(save(tmp_path / f"{i}.nii.gz", VOXELS + i))} for i in range(2)]
    for _ in range(2):  # the second time from the cache
        cached = PersistentDataset(items, LOAD, tmp_path / "cache", track_meta=True, weights_only=True)
        np.testing.assert_array_equal(cached[1]["image"].affine.numpy(), AFFINE)
    batch = next(iter(DataLoader(Dataset(items, LOAD), batch_size=2)))["image"]
    assert batch.shape == (2, 1, 4, 5, 6)
    np.testing.assert_array_equal(batch[1, 0].numpy(), VOXELS + 1)
