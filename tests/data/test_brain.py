"""The deterministic chain and its cache, on small heads made of ellipsoids."""

import hashlib
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_disk import small_disk

from emoe_med.data.brain import ChainOptions
from emoe_med.data.cache import FileDigests, HeadDataset
from emoe_med.data.grid import box_grid
from emoe_med.data.manifest import Scan
from emoe_med.data.volume import write_volume
from emoe_med.errors import StorageError, VolumeError

CENTRED = ChainOptions(spacing_mm=8, align="centred")


def ball(shape=(30, 34, 28), spacing=6.0, centre_mm=(10, -20, 15), radii_mm=(60, 75, 55)):
    """A head with a bright left front: voxels, affine and mask, RAS."""
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = np.asarray(centre_mm) - spacing * (np.array(shape) - 1) / 2
    axes = [affine[i, 3] + spacing * np.arange(n) - centre_mm[i] for i, n in enumerate(shape)]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    mask = (x / radii_mm[0]) ** 2 + (y / radii_mm[1]) ** 2 + (z / radii_mm[2]) ** 2 < 1
    voxels = np.where(mask, 100 + 40 * ((x < -20) & (y > 20)) + 10 * np.sin(z / 9), 0).astype(np.float32)
    return voxels, affine, mask


def write_scan(folder: Path, name="a", row=2, voxels=None, mask=True) -> Scan:
    made, affine, inside = ball()
    voxels = made if voxels is None else voxels
    image, mask_file = folder / f"{name}_T1w.nii.gz", folder / f"{name}_mask.nii.gz"
    write_volume(image, voxels, affine)
    if mask:
        write_volume(mask_file, inside.astype(np.uint8), affine)
    return Scan(row=row, image=image, age=50.0, participant_id=name, session_id="", mask=mask_file if mask else None)


def test_a_head_lands_in_the_box_with_left_on_the_left(tmp_path):
    heads = HeadDataset([write_scan(tmp_path)], CENTRED, tmp_path / "cache")
    item = heads[0]
    assert item["image"].shape == (1, *box_grid(8.0)[0])
    assert item["image"].dtype == torch.float16
    assert (item["row"].item(), item["age"].item(), item["weight"].item()) == (2, 50.0, 1.0)
    assert item["similarity"].isnan()
    image = item["image"][0].float()
    bright = (image > 1).nonzero().float().mean(0)
    inside = (image != 0).nonzero().float().mean(0)
    assert bright[0] < inside[0]  # x grows to the right in RAS
    assert bright[1] > inside[1]
    middle = (torch.tensor(image.shape) - 1) / 2
    assert (inside - middle).abs().max() < 0.6  # voxels of 8 mm


def test_background_is_exactly_zero_and_intensity_has_no_scale(tmp_path):
    voxels, _, _ = ball()
    one = HeadDataset([write_scan(tmp_path, "a")], CENTRED, tmp_path / "cache")[0]["image"]
    other = HeadDataset([write_scan(tmp_path, "b", voxels=7 * voxels)], CENTRED, tmp_path / "cache")[0]["image"]
    torch.testing.assert_close(one, other)
    assert (one == 0).float().mean() > 0.5


def test_the_edge_of_the_brain_is_not_darkened(tmp_path):
    voxels, _, mask = ball()
    flat = np.where(mask, 100.0, 0).astype(np.float32)
    image = HeadDataset([write_scan(tmp_path, voxels=flat)], CENTRED, tmp_path / "cache")[0]["image"].float()
    assert image.abs().max() < 0.02  # a constant brain is its own mean everywhere
    assert voxels.shape == flat.shape


def test_a_whole_head_keeps_its_dark_inside(tmp_path):
    voxels, _, mask = ball()
    hollow = voxels.copy()
    hollow[12:18, 14:20, 12:16] = 5
    scan = write_scan(tmp_path, voxels=hollow, mask=False)
    image = HeadDataset([scan], replace(CENTRED, mask="head"), tmp_path / "cache")[0]["image"].float()
    assert (image < -3).sum() > 5
    assert mask.any()


def test_every_way_to_store_a_head_gives_the_same_volume(tmp_path):
    voxels, affine, mask = ball()
    reference = HeadDataset([write_scan(tmp_path)], CENTRED, tmp_path / "cache")[0]["image"]
    for flips in ((0,), (1, 2), (0, 1, 2)):
        flipped = affine.copy()
        for axis in flips:
            flipped[:3, 3] += flipped[:3, axis] * (voxels.shape[axis] - 1)
            flipped[:3, axis] *= -1
        name = "f" + "".join(map(str, flips))
        image, mask_file = tmp_path / f"{name}.nii.gz", tmp_path / f"{name}_mask.nii.gz"
        write_volume(image, np.flip(voxels, flips), flipped)
        write_volume(mask_file, np.flip(mask, flips).astype(np.uint8), flipped)
        scan = Scan(row=3, image=image, age=50.0, participant_id=name, session_id="", mask=mask_file)
        got = HeadDataset([scan], CENTRED, tmp_path / "cache")[0]["image"]
        torch.testing.assert_close(got, reference, atol=2e-2, rtol=0)


def test_a_mask_on_another_grid_is_brought_to_the_image(tmp_path):
    scan = write_scan(tmp_path)
    _, affine, mask = ball()
    shifted = affine.copy()
    shifted[:3, 3] -= 6.0 * 2
    write_volume(scan.mask, np.pad(mask, 2).astype(np.uint8), shifted)
    got = HeadDataset([scan], CENTRED, tmp_path / "cache")[0]["image"]
    want = HeadDataset([write_scan(tmp_path, "b")], CENTRED, tmp_path / "cache")[0]["image"]
    assert torch.equal(got, want)


def test_without_a_mask_a_model_of_brains_refuses_and_a_model_of_heads_does_not(tmp_path):
    scan = write_scan(tmp_path, mask=False)
    with pytest.raises(VolumeError, match="no mask or labels") as refused:
        HeadDataset([scan], CENTRED, tmp_path / "cache")[0]
    assert refused.value.faults[0].row == 2
    assert str(scan.image) in str(refused.value)
    whole = HeadDataset([scan], replace(CENTRED, mask="head"), tmp_path / "cache")[0]["image"]
    assert (whole != 0).any()


def test_faults_of_all_scans_are_found_at_once(tmp_path):
    good = write_scan(tmp_path, "good", row=2)
    cut = write_scan(tmp_path, "cut", row=3)
    cut.image.write_bytes(cut.image.read_bytes()[:-20])
    missing = replace(good, row=4, image=tmp_path / "nowhere.nii.gz")
    for jobs in (0, 2):
        first, second, third = HeadDataset([good, cut, missing], CENTRED, tmp_path / f"cache{jobs}").build(jobs)
        assert first.fault is None
        assert second.fault.row == 3
        assert second.fault.code in ("VOL-TRUNC", "VOL-CRC")
        assert third.fault.code == "VOL-MISSING"


def cache_files(folder: Path):
    return sorted(folder.glob("*/*.pt"))


def test_a_file_that_is_not_the_manifest_s_is_refused_though_it_is_in_the_cache(tmp_path):
    scan = write_scan(tmp_path, row=7)
    right = replace(scan, sha256=hashlib.sha256(scan.image.read_bytes()).hexdigest())
    assert torch.equal(*(HeadDataset([each], CENTRED, tmp_path / "cache")[0]["image"] for each in (scan, right)))
    wrong = replace(scan, sha256="0" * 64)
    (reading,) = HeadDataset([wrong], CENTRED, tmp_path / "cache").build()
    assert (reading.fault.code, reading.fault.row) == ("VOL-DIGEST", 7)


def test_the_cache_follows_content_and_chain(tmp_path):
    scan = write_scan(tmp_path)
    cache = tmp_path / "cache"
    first = HeadDataset([scan], CENTRED, cache)[0]["image"]
    assert len(cache_files(cache)) == 1
    voxels, affine, _ = ball()
    voxels[voxels > 0] += np.linspace(0, 50, (voxels > 0).sum())
    write_volume(scan.image, voxels, affine)
    assert not torch.equal(HeadDataset([scan], CENTRED, cache)[0]["image"], first)
    coarse = HeadDataset([scan], replace(CENTRED, spacing_mm=16), cache)[0]["image"]
    assert coarse.shape != first.shape
    assert len(cache_files(cache)) == 3
    assert ChainOptions(4).digest() == ChainOptions(4.0).digest() != ChainOptions(2).digest()


def test_damaged_entries_are_never_served(tmp_path):
    scan = write_scan(tmp_path)
    cache = tmp_path / "cache"
    heads = HeadDataset([scan], CENTRED, cache)
    want = heads[0]["image"]
    (file,) = cache_files(cache)
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[rng.integers(len(damaged))] ^= 1 << rng.integers(8)
        file.write_bytes(damaged)
        assert torch.equal(heads[0]["image"], want)
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        assert torch.equal(heads[0]["image"], want)


@pytest.mark.parametrize("jobs", [0, 2])
def test_an_entry_is_written_whole_or_not_at_all(tmp_path, monkeypatch, jobs):
    scans = [write_scan(tmp_path), write_scan(tmp_path, "b", voxels=2 * ball()[0])]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))  # it may be another file system
    with small_disk(tmp_path / "disk", 160) as disk:
        heads = HeadDataset(scans, CENTRED, disk)
        (disk / "ballast").write_bytes(b"x" * 140_000)
        with pytest.raises(StorageError, match="No space left") as caught:
            heads.build(jobs)
        assert "\n" not in str(caught.value)
        assert not [path for path in heads.folder.iterdir() if path.suffix != ".csv"]
        (disk / "ballast").unlink()
        assert all(reading.fault is None for reading in heads.build(jobs))


@pytest.mark.parametrize("jobs", [0, 2])
def test_digests_that_cannot_be_remembered_are_one_line(tmp_path, jobs):
    heads = HeadDataset([write_scan(tmp_path)], CENTRED, tmp_path / "cache")
    heads.digests.memory = Path("/dev/full")
    for _ in range(2):
        with pytest.raises(StorageError, match="No space left") as caught:
            heads.build(jobs)
        assert "\n" not in str(caught.value)


def test_a_second_start_reads_no_file(tmp_path, monkeypatch):
    scan = write_scan(tmp_path)
    HeadDataset([scan], CENTRED, tmp_path / "cache")[0]
    monkeypatch.setattr("emoe_med.data.cache.file_digest", lambda path: pytest.fail("read again"))
    HeadDataset([scan], CENTRED, tmp_path / "cache")[0]
    memory = (tmp_path / "cache" / "file-digests.txt").read_text()
    assert "a_T1w" not in memory


def test_file_digests_survive_a_cut_line(tmp_path):
    file = tmp_path / "x"
    file.write_bytes(b"abc")
    digests = FileDigests(tmp_path / "memory")
    want = digests.of(file)
    (tmp_path / "memory").write_text((tmp_path / "memory").read_text() + "half a line")
    assert FileDigests(tmp_path / "memory").of(file) == want


def test_one_image_under_two_names_has_one_content(tmp_path):
    a, b = write_scan(tmp_path, "a"), write_scan(tmp_path, "b", row=3)
    other = write_scan(tmp_path, "c", row=4, voxels=np.roll(ball()[0], 1, axis=2))
    heads = HeadDataset([a, b, other], CENTRED, tmp_path / "cache")
    contents = [reading.content for reading in heads.build()]
    assert contents[0] == contents[1] != contents[2]


def test_real_heads_land_on_the_template(tmp_path, real_data):
    import pandas as pd

    from emoe_med.data.grid import template

    table = pd.read_csv(real_data / "ixi" / "manifest.csv").head(2)
    scans = [
        Scan(
            row=i + 2,
            image=real_data / "ixi" / r.image,
            age=r.age,
            participant_id=str(i),
            session_id="",
            labels=real_data / "ixi" / r.labels,
        )
        for i, r in enumerate(table.itertuples())
    ]
    heads = HeadDataset(scans, ChainOptions(spacing_mm=4), tmp_path)
    voxels, _ = template(4.0)
    brain = torch.from_numpy(voxels.copy()) > 0.1
    for item in heads:
        inside = item["image"][0] != 0
        dice = 2 * (inside & brain).sum() / (inside.sum() + brain.sum())
        assert dice > 0.9
        assert item["similarity"] > 0.6


def test_a_warm_start_reads_no_volume_and_tells_the_same(tmp_path, monkeypatch):
    scans = [write_scan(tmp_path, name, row) for row, name in enumerate("abc", start=2)]
    cold = HeadDataset(scans, CENTRED, tmp_path / "cache").build()
    memory = next((tmp_path / "cache").rglob("readings-*.jsonl"))
    with memory.open("a") as file:
        file.write("f" * 64 + ' {"fault": null, "cont')  # cut short by a crash
    assert str(tmp_path) not in memory.read_text()
    with monkeypatch.context() as patch:
        patch.setattr(HeadDataset, "entry", lambda self, index: pytest.fail("a volume was read"))
        patch.setattr("emoe_med.data.cache.file_digest", lambda path: pytest.fail("a file was read"))
        warm = HeadDataset(scans, CENTRED, tmp_path / "cache").build()
        some = HeadDataset(scans, CENTRED, tmp_path / "cache").build(indices=[2, 0])
    assert repr(warm) == repr(cold)  # NaN is not equal to itself
    assert repr(some) == repr([cold[2], cold[0]])


def test_memory_is_not_trusted_beyond_what_it_knows(tmp_path):
    scans = [write_scan(tmp_path, name, row) for row, name in enumerate("ab", start=2)]
    heads = HeadDataset(scans, CENTRED, tmp_path / "cache")
    before = heads.build()
    next(heads.folder.glob("*.pt")).unlink()  # an entry is gone: it is made again
    write_scan(tmp_path, "b", 3, voxels=2 + ball()[0])  # a scan is another
    again = HeadDataset(scans, CENTRED, tmp_path / "cache").build()
    assert len(list(heads.folder.glob("*.pt"))) >= 2
    assert repr(again[0]) == repr(before[0])
    assert again[1].voxels != before[1].voxels
    wrong = replace(scans[0], sha256="0" * 64)  # the manifest wants another file
    (reading,) = HeadDataset([wrong], CENTRED, tmp_path / "cache").build()
    assert reading.fault.code == "VOL-DIGEST"
    (reading,) = HeadDataset([replace(scans[0], warped=True)], CENTRED, tmp_path / "cache").build()
    assert reading.fault.code == "CON-WARPED"
    scans[0].image.unlink()
    assert HeadDataset(scans, CENTRED, tmp_path / "cache").build()[0].fault.code == "VOL-MISSING"
