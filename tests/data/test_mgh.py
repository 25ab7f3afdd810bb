"""FreeSurfer volumes are read as strictly as NIfTI: equal to nibabel's reading, or refused by name."""

import gzip
import warnings

import nibabel as nib
import numpy as np
import pytest

from emoe_med.data.volume import read_volume
from emoe_med.errors import VolumeError

AFFINE = np.array([[-1.0, 0, 0, 12], [0, 0, 1.5, -9], [0, -2.0, 0, 7], [0, 0, 0, 1]])  # LIA
VOXELS = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)


def save(path, voxels=VOXELS, affine=AFFINE):
    nib.save(nib.MGHImage(voxels, affine), path)
    return path


def nibabels(path):
    content = path.read_bytes()
    content = gzip.decompress(content) if path.suffix == ".mgz" else content
    return nib.as_closest_canonical(nib.MGHImage.from_bytes(content))


def code(path, content=None) -> str:
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(VolumeError) as caught:
        read_volume(path)
    (fault,) = caught.value.faults
    assert fault.file == str(path)
    return fault.code


@pytest.mark.parametrize("name", ["a.mgz", "a.mgh"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32])
def test_every_stored_type_is_read_as_nibabel_reads_it(tmp_path, name, dtype):
    path = save(tmp_path / name, VOXELS.astype(dtype))
    volume, truth = read_volume(path), nibabels(path)
    np.testing.assert_array_equal(volume.voxels, np.asarray(truth.dataobj))
    np.testing.assert_allclose(volume.affine, truth.affine, atol=1e-5)
    assert nib.aff2axcodes(volume.affine) == tuple("RAS")


def test_real_heads_equal_nibabels_reading(real_data):
    path = real_data / "scans" / "aomic_piop2" / "sub-0001_T1.mgz"
    volume, truth = read_volume(path), nibabels(path)
    np.testing.assert_array_equal(volume.voxels, np.asarray(truth.dataobj))
    np.testing.assert_allclose(volume.affine, truth.affine, atol=1e-4)


def test_flipped_bits_never_change_a_volume(tmp_path):
    path = save(tmp_path / "a.mgz", np.random.default_rng(0).integers(0, 4000, (9, 8, 7)).astype(np.int16))
    sound, truth = path.read_bytes(), read_volume(path)
    rng = np.random.default_rng(1)
    for _ in range(200):
        content = bytearray(sound)
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        path.write_bytes(content)
        try:
            volume = read_volume(path)
        except VolumeError:
            continue
        np.testing.assert_array_equal(volume.voxels, truth.voxels)


def changed(content: bytes, offset: int, new: bytes) -> bytes:
    return content[:offset] + new + content[offset + len(new) :]


@pytest.mark.parametrize(
    ("offset", "value", "expected"),
    [
        (4, (0).to_bytes(4, "big"), "VOL-DIM"),
        (4, (30000).to_bytes(4, "big") * 3, "VOL-SIZE"),
        (16, (2).to_bytes(4, "big"), "VOL-DIM"),  # two volumes
        (20, (9).to_bytes(4, "big"), "VOL-DTYPE"),
        (28, (0).to_bytes(2, "big"), "VOL-AFFINE"),  # directions unknown
        (30, np.array([0.001] * 3, ">f4").tobytes(), "VOL-SPACING"),  # metres
        (42, np.full(9, np.nan, ">f4").tobytes(), "VOL-AFFINE"),
        (42, np.zeros(9, ">f4").tobytes(), "VOL-AFFINE"),
        (284, np.full(120, 7, ">i2").tobytes(), "VOL-CONST"),
    ],
)
def test_header_faults(tmp_path, offset, value, expected):
    sound = save(tmp_path / "a.mgh").read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert code(tmp_path / "b.mgh", changed(sound, offset, value)) == expected
        assert code(tmp_path / "b.mgz", gzip.compress(changed(sound, offset, value))) == expected


def test_what_follows_the_voxels_is_skipped_up_to_a_limit(tmp_path):
    sound = save(tmp_path / "a.mgh").read_bytes()
    (tmp_path / "b.mgh").write_bytes(sound + bytes(100_000))
    np.testing.assert_array_equal(read_volume(tmp_path / "b.mgh").voxels, read_volume(tmp_path / "a.mgh").voxels)
    assert code(tmp_path / "c.mgz", gzip.compress(sound + bytes(20 << 20))) == "VOL-SIZE"
    assert code(tmp_path / "d.mgh", sound[:300]) == "VOL-TRUNC"
    assert code(tmp_path / "d.mgh", sound[:100]) == "VOL-TRUNC"
    assert code(tmp_path / "e.mgz", gzip.compress(sound)[:-5]) == "VOL-TRUNC"
