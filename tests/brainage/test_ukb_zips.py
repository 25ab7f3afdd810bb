"""UK Biobank bulk items, zipped and unzipped, from `manifest ukb` to the cache; warped ones have their own contract."""

import shutil
import zipfile

import numpy as np
import pandas as pd
import pytest

from emoe_med.brainage.build_manifest import write_manifest
from emoe_med.brainage.cohort import chain_options, prepare_cohort
from emoe_med.brainage.manifest_ukb import from_ukb
from emoe_med.brainage.preprocess import preprocess
from emoe_med.config import BrainAgeConfig
from emoe_med.data.grid import template
from emoe_med.data.manifest import read_manifest
from emoe_med.data.volume import write_volume
from emoe_med.errors import DataError

CONFIG = BrainAgeConfig.model_validate(
    {"name": "a", "data": {"spacing_mm": 8}, "training": {"epochs": 1, "lr": 1e-3, "batch_size": 2}}
)
# MNI152_T1_1mm counts its millimetres from the right, the front of its x axis at +90
TO_TEMPLATE = np.array([[-1.0, 0, 0, 90], [0, 1, 0, 126], [0, 0, 1, 72], [0, 0, 0, 1]])


def fill(folder, seed):
    """The files of a bulk item: a brain of its own, its mask, its transform, and the same brain warped."""
    voxels, affine = template(8.0)
    voxels = 1000 * np.array(voxels) * np.random.default_rng(seed).uniform(0.9, 1.1, voxels.shape)
    moved = affine.copy()
    moved[:3, 3] += (12, -7, 20)
    mask = voxels > 100
    (folder / "T1" / "transforms").mkdir(parents=True)
    write_volume(folder / "T1/T1_unbiased_brain.nii.gz", np.where(mask, voxels, 0).astype(np.float32), moved)
    write_volume(folder / "T1/T1_brain_mask.nii.gz", mask, moved)
    write_volume(folder / "T1/T1_brain_to_MNI.nii.gz", np.where(mask, voxels, 0).astype(np.float32), affine)
    # right-handed, so FSL's x counts from the last voxel
    to_fsl = np.diag([-8.0, 8, 8, 1])
    to_fsl[0, 3] = 8.0 * (len(voxels) - 1)
    np.savetxt(folder / "T1/transforms/T1_to_MNI_linear.mat", TO_TEMPLATE @ affine @ np.linalg.inv(to_fsl))


@pytest.fixture(scope="module")
def bulk(tmp_path_factory):
    """Four persons: two unzipped, two zipped, one of them with a second session; and a broken archive."""
    root = tmp_path_factory.mktemp("bulk")
    names = ["1000001_20252_2_0", "1000002_20252_2_0", "1000003_20252_2_0", "1000003_20252_3_0", "1000004_20252_2_0"]
    for seed, name in enumerate(names):
        fill(root / name, seed)
        if seed > 1:
            shutil.make_archive(str(root / name), "zip", root / name)
            shutil.rmtree(root / name)
    (root / "1000005_20252_2_0.zip").write_bytes((root / f"{names[2]}.zip").read_bytes()[:-50])
    with zipfile.ZipFile(root / "1000006_20252_2_0.zip", "w") as archive:
        archive.writestr("../T1/T1_unbiased_brain.nii.gz", b"x")
    fields = pd.DataFrame({"eid": range(1000001, 1000007), "p31": 1})
    fields["p21003_i2"] = [60.5, 61.5, 62.5, 63.5, 64.5, 65.5]
    fields["p21003_i3"] = ["", "", "65", "", "", ""]
    fields.to_csv(root / "fields.csv", index=False)
    return root


def manifest_of(bulk, out, warped=False):
    built = from_ukb(bulk, bulk / "fields.csv", warped)
    write_manifest(built, out)
    return built, read_manifest(out, bulk)


def test_zipped_and_unzipped_items_become_rows_alike(bulk, tmp_path):
    built, manifest = manifest_of(bulk, tmp_path / "m.csv")
    assert built.rows[["participant_id", "session_id", "age"]].to_numpy().tolist() == [
        ["1000001", "2", "60.5"],
        ["1000002", "2", "61.5"],
        ["1000003", "2", "62.5"],
        ["1000003", "3", "65"],
        ["1000004", "2", "63.5"],
    ]
    row = built.rows.iloc[3]
    item = "1000003_20252_3_0.zip/T1"
    assert row["image"] == f"{item}/T1_unbiased_brain.nii.gz"
    assert row["mask"] == f"{item}/T1_brain_mask.nii.gz"
    assert row["transform"] == f"{item}/transforms/T1_to_MNI_linear.mat"
    assert {each.path: each.reason for each in built.skipped} == {
        "1000005_20252_2_0.zip": "is not a whole zip archive (File is not a zip file)",
        "1000006_20252_2_0.zip": "no folder T1 in it",
    }
    assert built.notes == ()
    assert all(scan.transform for scan in manifest.scans)


def test_a_zipped_scan_shares_the_cache_with_the_same_scan_unzipped(bulk, tmp_path):
    _, manifest = manifest_of(bulk, tmp_path / "m.csv")
    options = chain_options(CONFIG, manifest)
    assert (options.align, options.mask) == ("given", "brain")
    cohort = prepare_cohort(manifest, options, tmp_path / "cache")
    for reading in cohort.readings:
        assert reading.similarity > 0.7
    np.testing.assert_allclose(cohort.heads.entry(3)["matrix"][:3, 3], (12, -7, 20), atol=1e-4)
    entries = sorted(path.name for path in cohort.heads.folder.glob("*.pt"))
    assert len(entries) == 5
    copy = tmp_path / "unzipped"
    shutil.copytree(bulk, copy)
    for archive in sorted(copy.glob("*_20252_*.zip")):
        if archive.name[:7] < "1000005":
            shutil.unpack_archive(archive, archive.with_suffix(""))
            archive.unlink()
    _, again = manifest_of(copy, tmp_path / "again.csv")
    assert not any(".zip" in str(scan.image) for scan in again.scans)
    prepare_cohort(again, options, tmp_path / "cache")
    assert sorted(path.name for path in cohort.heads.folder.glob("*.pt")) == entries


def test_warped_scans_have_a_contract_of_their_own(bulk, tmp_path):
    _, warped = manifest_of(bulk, tmp_path / "w.csv", warped=True)
    assert all(scan.warped for scan in warped.scans)
    options = chain_options(CONFIG, warped)
    assert options.contract()["align"] == "warped"
    prepare_cohort(warped, options, tmp_path / "cache")
    _, native = manifest_of(bulk, tmp_path / "n.csv")
    for manifest, other in ((native, options), (warped, chain_options(CONFIG, native))):
        with pytest.raises(DataError) as caught:
            prepare_cohort(manifest, other, tmp_path / "cache")
        assert [fault.code for fault in caught.value.faults] == ["CON-WARPED"] * 5
    # one table with both is refused before anything is read
    both = pd.concat([pd.read_csv(tmp_path / name, dtype=str) for name in ("w.csv", "n.csv")])
    both.iloc[[0, 6]].to_csv(tmp_path / "both.csv", index=False)
    with pytest.raises(DataError, match="MAN-WARPED"):
        chain_options(CONFIG, read_manifest(tmp_path / "both.csv", bulk))


def test_preprocessing_does_not_pass_a_warped_scan_off_as_native(bulk, tmp_path):
    manifest_of(bulk, tmp_path / "w.csv", warped=True)
    outcomes = preprocess(tmp_path / "w.csv", tmp_path / "out", spacing_mm=4, path="light", data_root=bulk)
    assert [outcome.faults[0].code for outcome in outcomes] == ["CON-WARPED"] * 5
    manifest_of(bulk, tmp_path / "n.csv")
    rows = pd.read_csv(tmp_path / "n.csv", dtype=str).tail(1)  # zipped
    rows.to_csv(tmp_path / "n.csv", index=False)
    outcomes = preprocess(tmp_path / "n.csv", tmp_path / "out2", spacing_mm=4, path="light", data_root=bulk)
    assert not any(outcome.faults for outcome in outcomes)
    made = pd.read_csv(tmp_path / "out2/manifest.csv", dtype=str)
    assert "transform" not in made  # it led from the scanner, and these are in the template's space


def test_what_the_column_warped_may_say(tmp_path):
    (tmp_path / "a.nii").write_bytes(b"x")
    (tmp_path / "T1_brain_to_MNI.nii.gz").write_bytes(b"x")
    table = tmp_path / "m.csv"
    table.write_text("image,age\na.nii,50.5\nT1_brain_to_MNI.nii.gz,60.5\n")
    assert [scan.warped for scan in read_manifest(table).scans] == [False, True]  # by its name
    table.write_text("image,age,warped\na.nii,50.5,Yes\nT1_brain_to_MNI.nii.gz,60.5,no\n")
    assert [scan.warped for scan in read_manifest(table).scans] == [True, False]
    table.write_text("image,age,warped\na.nii,50.5,maybe\nT1_brain_to_MNI.nii.gz,60.5,\n")
    with pytest.raises(DataError, match="MAN-WARPED"):
        read_manifest(table)


def test_an_unusable_scan_is_named_though_its_archive_lists_no_folders(tmp_path):
    with zipfile.ZipFile(tmp_path / "1000001_20252_2_0.zip", "w") as archive:
        archive.writestr("T1/unusable/T1.nii.gz", b"x")
    (tmp_path / "fields.csv").write_text("eid,p21003_i2\n1000001,60.5\n")
    (skipped,) = from_ukb(tmp_path, tmp_path / "fields.csv").skipped
    assert "marked unusable by UK Biobank" in str(skipped)
