"""Fault tests of volumes: A1 to A10 of the list in docs/reliability.md, and the files that are no files."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import warnings
import zlib
from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make_volumes import (
    HEADER_FAULTS,
    bad_voxels,
    bombs,
    flip_bit,
    long_stream,
    nifti,
    oblique_affine,
    packed,
    phantom,
)

from emoe_med.data.limits import DEFAULT_LIMITS
from emoe_med.data.volume import Volume, file_digest, read_volume, write_volume
from emoe_med.errors import EXIT_DATA, Fault, VolumeError

CODES = "MISSING KIND EMPTY FORMAT TRUNC CRC TRAIL SIZE DIM DTYPE NONFINITE SCALE AFFINE SPACING CONST"


def outcome(path: Path, content: bytes | None = None) -> Volume | Fault:
    """What becomes of a file: a sound volume, or one fault that names it."""
    if content is not None:
        path.write_bytes(content)
    try:
        volume = read_volume(path)
    except VolumeError as refusal:
        return named(path, refusal)
    spacing = np.linalg.norm(volume.affine[:3, :3], axis=0)
    assert volume.voxels.dtype == np.float32
    assert np.isfinite(volume.voxels).all()
    assert np.isfinite(volume.affine).all()
    assert spacing.min() >= DEFAULT_LIMITS.min_spacing_mm
    assert spacing.max() <= DEFAULT_LIMITS.max_spacing_mm
    assert nib.aff2axcodes(volume.affine) == ("R", "A", "S")
    return volume


def named(path: Path, error: VolumeError) -> Fault:
    (fault,) = error.faults
    assert fault.file == str(path)
    assert str(path) in str(error)
    assert "\n" not in str(error)
    assert fault.code.removeprefix("VOL-") in CODES.split()
    assert error.exit_code == EXIT_DATA
    return fault


def code_of(path: Path, content: bytes | None = None) -> str | None:
    result = outcome(path, content)
    return result.code if isinstance(result, Fault) else None


@pytest.fixture(scope="module")
def sound() -> bytes:
    return packed(nifti(phantom((24, 24, 24))))


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "scan.nii.gz"


def same(first: Volume, second: Volume) -> bool:
    return np.array_equal(first.voxels, second.voxels) and np.array_equal(first.affine, second.affine)


def nibabel_voxels(path: Path) -> np.ndarray | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return np.asarray(nib.as_closest_canonical(nib.load(path)).dataobj)
        except Exception:  # whatever it raises, it is not a wrong volume
            return None


# A1


def test_flipped_bits_never_change_a_volume(sound, path):
    path.write_bytes(sound)
    truth = read_volume(path)
    accepted, nibabel_wrong = 0, 0
    for bit in np.random.default_rng(1).choice(8 * len(sound), 1000, replace=False):
        result = outcome(path, flip_bit(sound, int(bit)))
        if isinstance(result, Volume):
            assert same(result, truth)
            accepted += 1
        loaded = nibabel_voxels(path)
        nibabel_wrong += loaded is not None and not np.array_equal(loaded, truth.voxels)
    print(f"accepted unchanged: {accepted}; nibabel.load loads {nibabel_wrong} of 1000 with other voxels")
    assert accepted < 10
    assert nibabel_wrong > 500


def test_every_flipped_bit_of_the_gzip_frame_is_harmless_or_refused(sound, path):
    path.write_bytes(sound)
    truth = read_volume(path)
    harmless = set()
    for bit in [*range(80), *range(8 * len(sound) - 64, 8 * len(sound))]:
        result = outcome(path, flip_bit(sound, bit))
        if isinstance(result, Volume):
            assert same(result, truth)
            harmless.add(bit // 8)
    # FTEXT in the flags (byte 3), time stamp (4 to 7), compression level (8), system (9)
    assert harmless == {3, 4, 5, 6, 7, 8, 9}


# A2, A3


def test_every_truncation_is_refused(sound, path):
    rng = np.random.default_rng(2)
    for size in [*rng.integers(1, len(sound) - 16, 300), *(len(sound) - np.arange(1, 17))]:
        assert code_of(path, sound[:size]) in {"VOL-TRUNC", "VOL-FORMAT"}, size  # FORMAT: not even the magic


def test_every_truncation_of_a_plain_file_is_refused(tmp_path):
    content = nifti(phantom((4, 5, 6)))
    for size in range(1, len(content)):
        assert code_of(tmp_path / "scan.nii", content[:size]) in {"VOL-TRUNC", "VOL-FORMAT"}, size


def test_zeroed_blocks_are_refused(sound, path):
    for start in np.random.default_rng(3).integers(0, len(sound) - 512, 300):
        assert code_of(path, sound[:start] + bytes(512) + sound[start + 512 :]) is not None, start


@pytest.mark.parametrize("tail", [b"\0", bytes(512), b"\x1f", b"\x1f\x8b", b"\x1f\x8b\x08\0\0\0"])
def test_chosen_tails_are_refused(sound, path, tail):
    assert code_of(path, sound + tail) in {"VOL-TRAIL", "VOL-TRUNC", "VOL-CRC"}


def test_random_tails_are_refused(sound, path):
    rng = np.random.default_rng(4)
    for _ in range(20):
        assert code_of(path, sound + rng.bytes(64)) == "VOL-TRAIL"


@pytest.mark.parametrize(("size", "code"), [(1, "VOL-TRAIL"), (65536, "VOL-TRAIL"), (65537, "VOL-SIZE")])
@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
def test_bytes_behind_the_last_voxel_are_refused(tmp_path, name, size, code):
    content = nifti(phantom()) + bytes(size)
    assert code_of(tmp_path / name, packed(content) if name.endswith("gz") else content) == code


# A4


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("fault", HEADER_FAULTS)
def test_header_faults(tmp_path, fault, version):
    fields, code = HEADER_FAULTS[fault]
    content = nifti(phantom(), version=version, **fields)
    assert code_of(tmp_path / "scan.nii", content) == code
    assert code_of(tmp_path / "scan.nii.gz", packed(content)) == code


@pytest.mark.parametrize("place", ["scan.nii", "scan.nii.gz"])
@pytest.mark.parametrize("fault", bad_voxels())
def test_voxel_faults(tmp_path, place, fault):
    voxels, code = bad_voxels()[fault]
    content = nifti(voxels)
    assert code_of(tmp_path / place, packed(content) if place.endswith("gz") else content) == code


@pytest.mark.parametrize(
    ("version", "old", "new", "word"),
    [
        (1, b"n+1\0", b"ni1\0", "pair"),
        (2, b"n+2\0\r\n\x1a\n", b"ni2\0\r\n\x1a\n", "pair"),
        (1, b"n+1\0", bytes(4), "Analyze"),
        (1, b"n+1\0", b"n+1\1", "magic"),
        (2, b"n+2\0\r\n\x1a\n", b"n+2\0\n\n\x1a\n", "magic"),  # as a transfer in text mode makes it
        (1, b"\x5c\1\0\0", b"\x5c\1\0\1", "not NIfTI"),
    ],
)
def test_header_magic(tmp_path, version, old, new, word):
    content = nifti(phantom(), version=version)
    assert content.count(old) >= 1
    for name, pack in (("scan.nii", bytes), ("scan.nii.gz", packed)):
        fault = outcome(tmp_path / name, pack(content.replace(old, new, 1)))
        assert isinstance(fault, Fault)
        assert fault.code == "VOL-FORMAT"
        assert word in fault.reason


# A5


def test_changed_header_bytes_never_crash(path):
    content = nifti(phantom((12, 13, 14)))
    path.write_bytes(packed(content))
    truth, digest = read_volume(path), file_digest(path)
    rng = np.random.default_rng(5)
    accepted_changed = 0
    for _ in range(1000):
        changed = bytearray(content)
        changed[rng.integers(0, 352)] ^= int(rng.integers(1, 256))
        result = outcome(path, packed(bytes(changed)))
        if isinstance(result, Volume):
            moved_mm = np.abs(result.affine - truth.affine).max()
            accepted_changed += moved_mm > 1e-3 or not np.array_equal(result.voxels, truth.voxels)
        assert file_digest(path) != digest
    print(f"plausible but changed: {accepted_changed} of 1000, seen by the digest of the manifest alone")
    assert accepted_changed < 60


# A6

_CHILD = """
import json, pathlib, resource, sys, time
from emoe_med.data.volume import read_volume
from emoe_med.errors import VolumeError
good, *bad = map(pathlib.Path, sys.argv[1:])
read_volume(good)
pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 50_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in bad:
    start = time.perf_counter()
    try:
        read_volume(path)
        code = None
    except (VolumeError, MemoryError) as error:
        code = error.faults[0].code if isinstance(error, VolumeError) else "memory"
    print(json.dumps([path.name, code, time.perf_counter() - start]))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the size of a process is read from /proc")
def test_bombs_are_refused_in_half_a_second_and_50_mb(sound, path, tmp_path):
    path.write_bytes(sound)
    expected = {}
    for name, (content, code) in bombs().items():
        (tmp_path / name).write_bytes(content)
        expected[name] = code
    command = [sys.executable, "-c", _CHILD, str(path), *(str(tmp_path / name) for name in expected)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True, timeout=200)
    results = [json.loads(line) for line in answer.stdout.splitlines()]
    assert {name: code for name, code, _ in results} == expected
    assert max(seconds for *_, seconds in results) < 0.5


def test_the_long_stream_of_the_bombs_inflates():
    inflated = zlib.decompressobj(wbits=31).decompress(long_stream(b"head", 3 << 20)[:-8])
    assert inflated == b"head" + bytes(3 << 20)


# A7


@pytest.mark.parametrize("forms", ["sform", "qform", "both"])
def test_all_48_orientations_give_one_volume(tmp_path, forms):
    truth, affine = phantom((10, 11, 12)), oblique_affine((10, 11, 12))
    landmarks = np.array([[2, 3, 4, 1], [8, 3, 5, 1], [4, 9, 10, 1]])
    codes = {"sform": {"qform_code": 0}, "qform": {"sform_code": 0}, "both": {}}[forms]
    count = 0
    for order, signs in product(permutations(range(3)), product((1, -1), repeat=3)):
        step = np.zeros((4, 4))  # voxel of the turned file -> voxel of the truth
        step[3, 3] = 1
        turned = truth.transpose(order)[tuple(slice(None, None, sign) for sign in signs)]
        for i, (axis, sign) in enumerate(zip(order, signs, strict=True)):
            step[axis, i] = sign
            step[axis, 3] = 0 if sign > 0 else truth.shape[axis] - 1
        volume = outcome(tmp_path / "scan.nii", nifti(turned, affine @ step, **codes))
        assert isinstance(volume, Volume)
        np.testing.assert_array_equal(volume.voxels, truth)
        np.testing.assert_allclose(volume.affine @ landmarks.T, affine @ landmarks.T, atol=1e-3)
        count += 1
    assert count == 48


# A8


@pytest.mark.parametrize("endian", ["<", ">"])
@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
def test_stored_types_and_scaling(tmp_path, dtype, endian):
    stored = phantom((8, 9, 10), dtype=dtype)
    for slope, intercept in product((0.0, float("nan"), 0.5, 2.0, 1.0), (0.0, -1024.0, 3.5)):
        content = nifti(stored, np.eye(4), endian=endian, scl_slope=slope, scl_inter=intercept)
        volume = outcome(tmp_path / "scan.nii", content)
        rule = stored.astype("f8")  # NIfTI: slope 0 means that both are not used
        if slope > 0:
            rule = rule * slope + intercept
        assert isinstance(volume, Volume)
        np.testing.assert_allclose(volume.voxels, rule, rtol=1e-6, atol=0)
        if not np.isnan(slope):
            (tmp_path / "n.nii").write_bytes(content)
            np.testing.assert_allclose(volume.voxels, nib.load(tmp_path / "n.nii").get_fdata(), rtol=1e-6)


# A9

_FUZZ = settings(
    max_examples=700,
    deadline=1000,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
_SMALL = nifti(phantom((6, 7, 8)))
_BEGINNINGS = [b"", b"\x1f\x8b\x08\0", _SMALL[:4], _SMALL[:100]]


@_FUZZ
@given(beginning=st.sampled_from(_BEGINNINGS), content=st.binary(max_size=2000))
def test_random_bytes_are_refused(path, beginning, content):
    assert code_of(path, beginning + content) is not None


@_FUZZ
@given(size=st.integers(0, len(_SMALL)), content=st.binary(max_size=600), pack=st.booleans())
def test_a_true_beginning_and_a_random_end(tmp_path, size, content, pack):
    content = _SMALL[:size] + content
    outcome(tmp_path / ("s.nii.gz" if pack else "s.nii"), packed(content) if pack else content)


@_FUZZ
@given(patches=st.lists(st.tuples(st.integers(0, 351), st.binary(min_size=1, max_size=4)), max_size=6))
def test_random_header_fields(tmp_path, patches):
    content = bytearray(_SMALL)
    for start, patch in patches:
        content[start : start + len(patch)] = patch
    outcome(tmp_path / "s.nii", bytes(content))


# A10


def test_what_is_written_is_read(tmp_path):
    rng = np.random.default_rng(10)
    for i in range(50):
        shape = tuple(int(size) for size in rng.integers(2, 14, 3))
        voxels = rng.normal(size=shape).astype(np.float32)
        path = tmp_path / f"map{i}.nii{'.gz' * (i % 2)}"
        write_volume(path, voxels, oblique_affine(shape))
        volume = outcome(path)
        assert isinstance(volume, Volume)
        np.testing.assert_array_equal(volume.voxels, voxels)
        np.testing.assert_allclose(volume.affine, oblique_affine(shape), atol=1e-5)
        header = nib.load(path).header
        for field in ("descrip", "aux_file", "db_name", "intent_name"):
            assert header[field].item() == b""
        assert len(header.extensions) == 0


# Files that are no files, and other formats


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "fifo.nii")
    (tmp_path / "loop.nii").symlink_to(tmp_path / "loop.nii")
    (tmp_path / "broken.nii").symlink_to(tmp_path / "gone.nii")
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "empty.nii.gz").touch()
    cases = {
        "gone.nii": "VOL-MISSING",
        "broken.nii": "VOL-MISSING",
        "loop.nii": "VOL-MISSING",
        "file/below.nii": "VOL-MISSING",
        "nul\0.nii": "VOL-MISSING",
        "n" * 300: "VOL-MISSING",
        ".": "VOL-KIND",
        "fifo.nii": "VOL-KIND",
        "empty.nii.gz": "VOL-EMPTY",
    }
    start = time.perf_counter()
    assert {name: code_of(tmp_path / name) for name in cases} == cases
    assert code_of(Path("/dev/zero")) == "VOL-KIND"
    assert time.perf_counter() - start < 1


def test_a_socket_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    with socket.socket(socket.AF_UNIX) as end:
        end.bind("s.nii")
        fault = outcome(Path("s.nii"))
    assert isinstance(fault, Fault)
    assert (fault.code, fault.reason) == ("VOL-KIND", "is a socket, not a file")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (bytes(128) + b"DICM" + bytes(300), "DICOM"),
        (b"<!DOCTYPE html><title>Please log in</title>" * 20, "text"),
        (b"../../.git/annex/objects/MD5E-s1--x.nii.gz\n", "text"),
        (b"PK\x03\x04" + bytes(400), "zip"),
        (bytes(400), "unknown"),
    ],
)
def test_other_formats_are_named(tmp_path, content, word):
    held = {"a.nii": content, "a.nii.gz": packed(content), "b.nii.gz": content, "bare": content}
    for name in held:
        fault = outcome(tmp_path / name, held[name])
        assert isinstance(fault, Fault)
        assert fault.code == "VOL-FORMAT"
        assert re.search(word, fault.reason)


def test_a_name_that_tells_otherwise_of_the_compression(tmp_path, sound):
    assert code_of(tmp_path / "a.nii", sound) == "VOL-FORMAT"
    assert code_of(tmp_path / "a.nii.gz", nifti(phantom())) == "VOL-FORMAT"
    assert code_of(tmp_path / "no-suffix", sound) is None
    assert code_of(tmp_path / "b.nii.gz", packed(b"")) == "VOL-EMPTY"
    assert code_of(tmp_path / "a.mgz", sound) == "VOL-FORMAT"
    mgh = b"\0\0\0\1" + bytes(400)
    for name, content in {"a.nii": mgh, "a.nii.gz": packed(mgh), "a.mgz": mgh, "a.mgh": packed(mgh)}.items():
        fault = outcome(tmp_path / name, content)
        assert isinstance(fault, Fault)
        assert (fault.code, "FreeSurfer" in fault.reason) == ("VOL-FORMAT", True)
