"""A scan inside a zip archive is read in place, as strictly as a file; an archive that tries tricks is refused."""

import gzip
import os
import stat
import struct
import zipfile

import nibabel as nib
import numpy as np
import pytest

from emoe_med.data import opening
from emoe_med.data.cache import FileDigests
from emoe_med.data.manifest import inspect_manifest
from emoe_med.data.opening import split_member
from emoe_med.data.volume import VolumeLimits, file_digest, read_volume
from emoe_med.errors import VolumeError

NAME = "T1/T1_unbiased_brain.nii.gz"
AFFINE = np.array([[-2.0, 0, 0, 9], [0, 1.5, 0, -12], [0, 0, 1, 4], [0, 0, 0, 1]])
VOXELS = np.random.default_rng(0).integers(1, 2**15, (9, 10, 11)).astype(np.int16)
IMAGE = nib.Nifti1Image(VOXELS, AFFINE).to_bytes()
PACKED = gzip.compress(IMAGE, mtime=0)


def pack(path, *members, method=zipfile.ZIP_DEFLATED):
    """An archive of (name or ZipInfo, bytes), as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members:
            if isinstance(name, zipfile.ZipInfo):
                name.compress_type = method
            archive.writestr(name, content)
    return path


def refused(path, *limits) -> tuple[str, str]:
    with pytest.raises(VolumeError) as caught:
        read_volume(path, *limits)
    (fault,) = caught.value.faults
    assert fault.file == str(path)
    return fault.code, fault.reason


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_member_is_read_as_the_file_is(tmp_path, method, ending):
    content = IMAGE if ending == ".nii" else PACKED
    file = tmp_path / f"a{ending}"
    file.write_bytes(content)
    member = pack(tmp_path / "b.zip", (f"T1/a{ending}", content), method=method) / f"T1/a{ending}"
    alone, inside = read_volume(file), read_volume(member)
    np.testing.assert_array_equal(inside.voxels, alone.voxels)
    np.testing.assert_array_equal(inside.affine, alone.affine)
    np.testing.assert_array_equal(inside.voxels, VOXELS[::-1])
    assert file_digest(member) == file_digest(file)
    assert not list(tmp_path.rglob("T1")), "nothing may be unpacked"


def test_the_file_and_the_member_are_told_apart(tmp_path):
    archive = pack(tmp_path / "x_20252_2_0.ZIP", ("a/b.nii", IMAGE))
    (tmp_path / "folder.zip").mkdir()
    assert split_member(archive / "a/b.nii") == (archive, "a/b.nii")
    assert split_member(archive) == (archive, "")
    assert split_member(tmp_path / "folder.zip/a.nii") == (tmp_path / "folder.zip/a.nii", "")
    assert split_member(tmp_path / "none.zip/a.nii") == (tmp_path / "none.zip/a.nii", "")
    assert refused(tmp_path / "none.zip/a.nii") == ("VOL-MISSING", "is not there")
    assert refused(archive / "a/c.nii") == ("VOL-MISSING", "is not in the archive")
    assert refused(archive / "a") == ("VOL-MISSING", "is not in the archive")


def test_the_limits_and_checks_of_a_volume_hold_inside(tmp_path):
    assert refused(pack(tmp_path / "a.zip", (NAME, PACKED)) / NAME, VolumeLimits(max_voxels=100))[0] == "VOL-SIZE"
    broken = bytearray(PACKED)
    broken[-6] ^= 1  # gzip's own checksum; the archive's is right
    for number, (content, code) in enumerate(
        [
            (bytes(broken), "VOL-CRC"),
            (PACKED[:-20], "VOL-TRUNC"),
            (PACKED + b"tail", "VOL-TRAIL"),
            (gzip.compress(PACKED), "VOL-SIZE"),
            (gzip.compress(IMAGE[:400]), "VOL-TRUNC"),
            (b"not a volume", "VOL-FORMAT"),
        ]
    ):
        assert refused(pack(tmp_path / f"{number}.zip", (NAME, content)) / NAME)[0] == code


def flip(archive, needle: bytes, offset=0, xor=1):
    content = bytearray(archive.read_bytes())
    content[content.index(needle) + offset] ^= xor
    archive.write_bytes(content)
    return archive


def test_a_flipped_bit_in_the_archive_is_seen(tmp_path):
    stored = pack(tmp_path / "a.zip", (NAME[:-3], IMAGE), method=zipfile.ZIP_STORED)
    voxels = IMAGE[-40:-20]  # gzip would see it; a plain volume has the archive's checksum alone
    code, reason = refused(flip(stored, voxels) / NAME[:-3])
    assert code == "VOL-CRC"
    assert "Bad CRC-32" in reason


def test_an_archive_that_was_cut_or_is_none(tmp_path):
    whole = pack(tmp_path / "a.zip", (NAME, PACKED))
    (tmp_path / "b.zip").write_bytes(whole.read_bytes()[:-30])
    (tmp_path / "c.zip").write_bytes(b"PK\x03\x04 but nothing more")
    (tmp_path / "d.zip").write_bytes(b"")
    for name, code in (("b", "VOL-FORMAT"), ("c", "VOL-FORMAT"), ("d", "VOL-EMPTY")):
        assert refused(tmp_path / f"{name}.zip" / NAME)[0] == code


def test_bytes_that_deflate_cannot_have_written(tmp_path):
    archive = pack(tmp_path / "a.zip", (NAME, IMAGE))
    content = bytearray(archive.read_bytes())
    start = 30 + len(NAME) + 200
    content[start : start + 64] = bytes(64)
    archive.write_bytes(content)
    assert refused(archive / NAME)[0] == "VOL-CRC"


def info(name=NAME, **changes):
    made = zipfile.ZipInfo(name)
    for field, value in changes.items():
        setattr(made, field, value)
    return made


def test_links_folders_and_empty_members_are_no_volumes(tmp_path):
    link = pack(tmp_path / "a.zip", (info(external_attr=(stat.S_IFLNK | 0o777) << 16), "/etc/passwd"))
    assert refused(link / NAME) == ("VOL-KIND", "is a link in an archive, not a file")
    empty = pack(tmp_path / "b.zip", (NAME, b""), ("T1/", b""))
    assert refused(empty / NAME)[0] == "VOL-EMPTY"
    assert refused(empty / "T1")[0] == "VOL-MISSING"


def test_what_could_be_read_in_two_ways_or_without_bound_is_refused(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        twice = pack(tmp_path / "a.zip", (NAME, PACKED), (NAME, PACKED))
    assert refused(twice / NAME) == ("VOL-FORMAT", "archive holds 2 members of this name")
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):  # inflated by Python in one piece
        other = pack(tmp_path / f"{method}.zip", (NAME, bytes(10**6)), method=method)
        assert refused(other / NAME) == ("VOL-FORMAT", "is packed by another method than deflate")
    secret = pack(tmp_path / "b.zip", (NAME, PACKED))
    flip(secret, b"PK\x01\x02", offset=8)  # the flag of an encrypted member
    assert refused(secret / NAME) == ("VOL-FORMAT", "is encrypted")


def set_size(archive, size):
    """Let an archive lie about the size of its one member, in both of its headers."""
    content = bytearray(archive.read_bytes())
    for signature, place in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        start = content.index(signature) + place
        content[start : start + 4] = struct.pack("<I", size)
    archive.write_bytes(content)
    return archive


def test_bombs_cost_no_memory(tmp_path):
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    huge = set_size(pack(tmp_path / "a.zip", (NAME[:-3], IMAGE)), 2**32 - 2)
    assert refused(huge / NAME[:-3])[0] == "VOL-SIZE"
    # 2 GiB as told, 40 MiB in truth, behind a header of 512^3 doubles
    header = nib.Nifti1Header()
    header.set_data_shape((512, 512, 512))
    header.set_data_dtype(np.float64)
    header.set_sform(AFFINE, 1)
    header["magic"], header["vox_offset"] = b"n+1\0", 352
    bomb = pack(tmp_path / "b.zip", (NAME[:-3], header.binaryblock + bytes(40 << 20)))
    assert refused(set_size(bomb, (1 << 30) + 500) / NAME[:-3])[0] in ("VOL-CRC", "VOL-TRUNC")
    # gzip in deflate: 40 MiB of zeros after a small volume
    nested = pack(tmp_path / "c.zip", (NAME, gzip.compress(IMAGE + bytes(40 << 20))))
    assert refused(nested / NAME)[0] == "VOL-SIZE"
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown_mib < 350, f"{grown_mib:.0f} MiB"


def test_an_endless_list_of_members_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "_MAX_LIST_BYTES", 10_000)
    archive = pack(tmp_path / "a.zip", *((f"{i:0200}", b"x") for i in range(60)), (NAME, PACKED))
    code, reason = refused(archive / NAME)
    assert code == "VOL-SIZE"
    assert reason.startswith("archive has a list of members")


def test_names_lead_nowhere(tmp_path):
    """Members called `../x` or `/etc/passwd` are names like any other: never unpacked, never a path."""
    archive = pack(tmp_path / "data/a.zip", ("../../escape.nii", IMAGE), ("/etc/passwd", b"x"), (NAME, PACKED))
    assert read_volume(archive / NAME).voxels.shape == VOXELS.shape
    table = tmp_path / "m.csv"
    table.write_text(f"image,age\na.zip/{NAME},50.5\na.zip/../../escape.nii,60.5\na.zip//etc/passwd,61.5\n")
    manifest, faults = inspect_manifest(table, tmp_path / "data")
    assert [(fault.row, fault.code) for fault in faults] == [(3, "MAN-PATH")]
    assert refused(manifest.scans[1].image)[0] == "VOL-MISSING"  # the member `etc/passwd` is not there
    assert not (tmp_path / "escape.nii").exists()


def test_a_manifest_names_members(tmp_path):
    archive = pack(tmp_path / "data/1000001_20252_2_0.zip", (NAME, PACKED), ("T1/b.nii.gz", PACKED))
    os.symlink(archive, tmp_path / "data/again.zip")
    outside = pack(tmp_path / "elsewhere.zip", (NAME, PACKED))
    os.symlink(outside, tmp_path / "data/out.zip")
    table = tmp_path / "m.csv"
    rows = (
        f"1000001_20252_2_0.zip/{NAME}",
        "1000001_20252_2_0.zip/T1/b.nii.gz",
        f"again.zip/{NAME}",
        f"out.zip/{NAME}",
    )
    table.write_text("image,age,session_id\n" + "".join(f"{row},5{i}.5,{i}\n" for i, row in enumerate(rows)))
    manifest, faults = inspect_manifest(table, tmp_path / "data")
    assert [(fault.row, fault.code, fault.reason) for fault in faults] == [
        (4, "MAN-IMAGE", "another name of the same file as row 2"),
        (5, "MAN-PATH", "a symbolic link leads outside the data root"),
    ]
    assert [scan.participant_id for scan in manifest.scans[:2]] == ["1000001", "1000001"]


def test_digests_of_members_are_remembered_until_the_archive_changes(tmp_path, monkeypatch):
    archive = pack(tmp_path / "a.zip", (NAME, PACKED), ("b.nii", IMAGE))
    digests = FileDigests(tmp_path / "memory.txt")
    first = [digests.of(archive / name) for name in (NAME, "b.nii")]
    assert first == [file_digest(archive / NAME), file_digest(archive / "b.nii")]
    again = FileDigests(tmp_path / "memory.txt")
    with monkeypatch.context() as patch:
        patch.setattr("emoe_med.data.cache.file_digest", lambda path: pytest.fail("the archive was read again"))
        assert [again.of(archive / name) for name in (NAME, "b.nii")] == first
    pack(archive, (NAME, gzip.compress(IMAGE, 1, mtime=0)), ("b.nii", IMAGE))
    os.utime(archive, ns=(1, 1))
    assert again.of(archive / NAME) == file_digest(archive / NAME) != first[0]
    assert str(tmp_path) not in (tmp_path / "memory.txt").read_text()
