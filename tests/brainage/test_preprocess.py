"""From a raw head to the model's space: rows in are rows out, and what is written says where a point went."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from emoe_med.brainage import preprocess as verbs
from emoe_med.brainage.__main__ import app
from emoe_med.brainage.preprocess_files import stems
from emoe_med.data.grid import box_grid
from emoe_med.data.manifest import read_manifest
from emoe_med.data.prepare import SPACE, UNIT, Preparation, missing_extra, version
from emoe_med.data.scan import Scan
from emoe_med.data.volume import read_volume, write_volume

NEEDS_EXTRA = pytest.mark.skipif(bool(missing_extra()), reason=f"the extra is not installed: {missing_extra()}")
HEADS = ("IXI012-HH-1211", "IXI212-HH-1643", "IXI519-HH-2240")
ELLIPSOID_MM = np.array([62.0, 78.0, 58.0])


def run(*arguments, code=0):
    result = CliRunner().invoke(app, ["preprocess", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def drawn_head(folder: Path, name: str, blob_mm=(20.0, -40.0, 30.0), angle_deg=8.0) -> None:
    """Write a brain of 4 mm voxels, turned, with two shells and a bright blob, and its mask."""
    angle = np.deg2rad(angle_deg)
    affine = np.eye(4)
    affine[:3, :3] = 4 * np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    shape = (50, 56, 48)
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2) + [3, -9, 6]
    points = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1) @ affine[:3, :3].T + affine[:3, 3]
    radius = np.linalg.norm((points - [3, -9, 6]) / ELLIPSOID_MM, axis=-1)
    voxels = 500 + 300 * (radius < 0.75) - 350 * (radius < 0.2)
    voxels = voxels + 1500 * np.exp(-(np.linalg.norm(points - blob_mm, axis=-1) ** 2) / (2 * 5**2))
    write_volume(folder / f"{name}.nii.gz", np.where(radius < 1, voxels, 20).astype(np.int16), affine)
    write_volume(folder / f"{name}_mask.nii.gz", radius < 1, affine)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Three rows that work, one broken file, one that is not there."""
    folder = tmp_path_factory.mktemp("raw")
    for index, name in enumerate(("a", "b", "c")):
        drawn_head(folder, name, angle_deg=8.0 - 6 * index)
    whole = (folder / "a.nii.gz").read_bytes()
    (folder / "broken.nii.gz").write_bytes(whole[: len(whole) // 2])
    lines = ["participant_id,image,mask,age,site,note", "P-1,a.nii.gz,a_mask.nii.gz,40.5,x,first"]
    lines += ["P-2,broken.nii.gz,a_mask.nii.gz,50,x,", "P-3,gone.nii.gz,a_mask.nii.gz,60,x,"]
    lines += ["P-4,b.nii.gz,b_mask.nii.gz,70,y,", "P-5,c.nii.gz,c_mask.nii.gz,30,y,last"]
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def light(cohort, tmp_path_factory):
    out = tmp_path_factory.mktemp("light")
    result = run("--manifest", cohort / "manifest.csv", "-o", out, "--spacing", 4, "--steps", "light", code=8)
    assert "VOL-TRUNC" in result.stderr
    assert "row 3" in result.stderr
    return out


def test_rows_in_are_rows_out_and_failed_ones_are_named(light):
    table = pd.read_csv(light / "manifest.csv", dtype=str, keep_default_na=False)
    assert list(table["participant_id"]) == ["P-1", "P-2", "P-3", "P-4", "P-5"]
    assert list(table["status"] == "failed") == [False, True, True, False, False]
    assert list(table["age"]) == ["40.5", "50", "60", "70", "30"]
    assert list(table["note"]) == ["first", "", "", "", "last"]
    assert table["reason"][1].startswith("VOL-TRUNC")
    assert table["reason"][2].startswith("VOL-MISSING")
    assert (table["image"] == "").equals(table["status"] == "failed")
    qc = pd.read_csv(light / "qc.tsv", sep="\t")
    assert list(qc["row"]) == [2, 3, 4, 5, 6]
    assert qc["similarity"].notna().tolist() == [True, False, False, True, True]
    page = (light / "qc.html").read_text()
    assert page.count("<figure") == 5
    assert page.count("data:image/jpeg") == 3
    assert "http" not in page


def test_the_new_manifest_can_be_read_once_failed_rows_are_taken_out(light, tmp_path):
    table = pd.read_csv(light / "manifest.csv", dtype=str, keep_default_na=False)
    table[table["status"] != "failed"].to_csv(tmp_path / "kept.csv", index=False)
    manifest = read_manifest(tmp_path / "kept.csv", light)
    assert [scan.participant_id for scan in manifest.scans] == ["P-1", "P-4", "P-5"]
    assert all(scan.mask and scan.image for scan in manifest.scans)


def test_a_volume_lies_in_the_box_with_the_brains_mean_at_its_unit(light, cohort):
    stem = light / "sub-P1" / "anat" / f"sub-P1_space-{SPACE}_res-4_desc-"
    volume, mask = read_volume(Path(f"{stem}preproc_T1w.nii.gz")), read_volume(Path(f"{stem}brain_mask.nii.gz"))
    shape, affine = box_grid(4.0)
    assert volume.voxels.shape == mask.voxels.shape == shape
    np.testing.assert_allclose(volume.affine, affine)
    assert nib.load(f"{stem}preproc_T1w.nii.gz").header["sform_code"] == 4
    assert np.all(volume.voxels[mask.voxels == 0] == 0)
    assert volume.voxels[mask.voxels > 0].mean() == pytest.approx(UNIT, rel=0.03)
    # the volume of the brain, less what the affine stretched, is that of the mask
    matrix = np.loadtxt(light / "sub-P1" / "anat" / f"sub-P1_from-T1w_to-{SPACE}_mode-image_xfm.txt")
    drawn_ml = 4 / 3 * np.pi * np.prod(ELLIPSOID_MM) / 1000
    assert (mask.voxels.sum() * 0.064) * np.linalg.det(matrix) == pytest.approx(drawn_ml, rel=0.03)


def test_a_planted_blob_lands_where_the_written_affine_says(light):
    matrix = np.loadtxt(light / "sub-P1" / "anat" / f"sub-P1_from-T1w_to-{SPACE}_mode-image_xfm.txt")
    assert matrix.shape == (4, 4)
    expected = np.linalg.inv(matrix) @ [20.0, -40.0, 30.0, 1.0]  # the sidecar: MNI to scanner; so invert it
    volume = read_volume(light / "sub-P1" / "anat" / f"sub-P1_space-{SPACE}_res-4_desc-preproc_T1w.nii.gz")
    bright = np.clip(volume.voxels - 1.15 * np.percentile(volume.voxels[volume.voxels > 0], 90), 0, None)
    index = [(bright * i).sum() / bright.sum() for i in np.indices(bright.shape)]
    found = volume.affine @ [*index, 1.0]
    assert np.abs(found - expected)[:3].max() < 4.0  # one voxel


def test_sidecars_state_the_steps_and_no_person(light):
    texts = [path.read_text() for path in sorted(light.rglob("*_T1w.json"))]
    assert len(texts) == 3
    sidecars = [json.loads(text) for text in texts]
    assert {json.dumps(sidecar["Steps"], sort_keys=True) for sidecar in sidecars} == {
        json.dumps(Preparation(4.0, "light").steps(), sort_keys=True)
    }
    for text, sidecar in zip(texts, sidecars, strict=True):
        assert sidecar["ChainHash"] == Preparation(4.0, "light").digest()
        assert sidecar["Steps"]["SkullStrip"].startswith("none")
        assert sidecar["Steps"]["BiasField"] == "none"
        assert sidecar["SkullStripped"] is True
        assert not any(word in text for word in ("P-1", "P1", "a.nii", "raw"))
    assert Preparation(4.0, "light").digest() != Preparation(2.0, "light").digest()


def times(out):
    return {path: path.stat().st_mtime_ns for path in out.rglob("sub-*/**/*") if path.is_file()}


def test_what_is_done_is_kept_and_what_is_not_whole_is_made_anew(light, cohort, monkeypatch):
    arguments = ("--manifest", cohort / "manifest.csv", "-o", light, "--spacing", 4, "--steps", "light")
    before, qc = times(light), (light / "qc.tsv").read_bytes()
    worked = []
    real = verbs.prepare_head
    monkeypatch.setattr(verbs, "prepare_head", lambda image, *rest: worked.append(image.name) or real(image, *rest))
    run(*arguments, code=8)
    assert worked == ["broken.nii.gz"]
    assert times(light) == before
    assert (light / "qc.tsv").read_bytes() == qc
    mask = light / "sub-P4" / "anat" / f"sub-P4_space-{SPACE}_res-4_desc-brain_mask.nii.gz"
    whole = mask.read_bytes()
    mask.write_bytes(whole[:-1])  # as a full disk would leave it
    (light / "sub-P5" / "anat" / f"sub-P5_space-{SPACE}_res-4_desc-preproc_T1w.json").unlink()  # killed before the end
    worked.clear()
    run(*arguments, code=8)
    assert worked == ["broken.nii.gz", "b.nii.gz", "c.nii.gz"]
    assert mask.read_bytes() == whole
    assert not list(light.rglob(".tmp-*"))


@pytest.mark.timeout(900)  # two processes import torch and MONAI anew
def test_processes_side_by_side_give_the_same_bytes(light, cohort, tmp_path):
    arguments = ("--spacing", 4, "--steps", "light", "--jobs", 2)
    run("--manifest", cohort / "manifest.csv", "-o", tmp_path, *arguments, code=8)
    files = [path.relative_to(light) for path in light.rglob("*") if path.is_file() and path.name != "local.log"]
    assert len(files) == 3 * 5 + 4
    for file in files:
        assert (tmp_path / file).read_bytes() == (light / file).read_bytes(), file


def test_results_within_the_folder_of_the_heads_are_no_heads_the_next_time(tmp_path):
    (tmp_path / "heads").mkdir()
    drawn_head(tmp_path / "heads", "a")
    arguments = ("--manifest", tmp_path / "heads", "-o", tmp_path / "heads" / "out", "--spacing", 8, "--steps", "light")
    run(*arguments)
    first = (tmp_path / "heads" / "out" / "manifest.csv").read_text()
    assert len(first.splitlines()) == 2
    run(*arguments)
    assert (tmp_path / "heads" / "out" / "manifest.csv").read_text() == first


def test_results_among_the_heads_are_refused(tmp_path):
    drawn_head(tmp_path, "a")
    before = set(tmp_path.iterdir())
    assert "PREP-OUT" in run("--manifest", tmp_path, "-o", tmp_path, "--steps", "light", code=2).stderr
    assert set(tmp_path.iterdir()) == before


def test_one_head_under_two_names_is_told(tmp_path):
    drawn_head(tmp_path, "a")
    for name in ("a.nii.gz", "a_mask.nii.gz"):
        (tmp_path / name.replace("a", "b", 1)).write_bytes((tmp_path / name).read_bytes())
    (tmp_path / "m.csv").write_text("image,mask\na.nii.gz,a_mask.nii.gz\nb.nii.gz,b_mask.nii.gz\n")
    for _ in range(2):  # made, then found done
        run("--manifest", tmp_path / "m.csv", "-o", tmp_path / "o", "--steps", "light", "--spacing", 8)
        qc = pd.read_csv(tmp_path / "o" / "qc.tsv", sep="\t", keep_default_na=False)
        assert qc["reason"].str.contains("the same image as row 2").tolist() == [False, True]
        assert qc.loc[1, "status"] == "check"


def test_nothing_usable_is_exit_code_3(cohort, tmp_path):
    (tmp_path / "m.csv").write_text("image,mask\nbroken.nii.gz,a_mask.nii.gz\n")
    run("--manifest", tmp_path / "m.csv", "--data-root", cohort, "-o", tmp_path / "o", "--steps", "light", code=3)
    assert (tmp_path / "o" / "qc.html").is_file()


def test_a_missing_extra_or_mask_is_one_line(cohort, tmp_path, monkeypatch):
    (tmp_path / "m.csv").write_text("image\na.nii.gz\n")
    arguments = ("--manifest", tmp_path / "m.csv", "--data-root", cohort, "-o", tmp_path / "o")
    assert "PREP-MASK" in run(*arguments, "--steps", "light", code=3).stderr
    monkeypatch.setattr("emoe_med.data.prepare.EXTRA", ("no_such_package",))
    for steps in ("auto", "full"):
        (line,) = run(*arguments, "--steps", steps, code=2).stderr.splitlines()
        assert "PREP-EXTRA" in line
        assert "pip install" in line
    assert not (tmp_path / "o").exists()


def test_dicom_gets_the_line_to_run(tmp_path):
    folder = tmp_path / "dicom"
    folder.mkdir()
    (folder / "IM0001").write_bytes(bytes(128) + b"DICM" + bytes(500))
    out = ("-o", tmp_path / "o", "--steps", "light")
    assert "dcm2niix" in run("--manifest", folder, *out, code=3).stderr
    for image in ("dicom/IM0001", "dicom"):
        (tmp_path / "m.csv").write_text(f"image,mask\n{image},dicom/IM0001\n")
        assert "dcm2niix" in run("--manifest", tmp_path / "m.csv", *out, code=3).stderr
        assert "dcm2niix" in pd.read_csv(tmp_path / "o" / "manifest.csv")["reason"].item()


def test_a_source_tree_that_was_never_installed_has_no_version():
    assert version("no-such-package") == "unknown"
    assert version("numpy") == np.__version__


def test_names_are_bids_labels_and_never_twice():
    def scan(row, person, session=""):
        return Scan(row=row, image=Path("x"), age=None, participant_id=person, session_id=session)

    scans = [scan(2, "sub-01", "ses-2_run-1"), scan(3, "IXI012-HH-1211", "2"), scan(4, "a_b"), scan(5, "ab")]
    assert stems([*scans, scan(6, "folder/some scan.nii.gz")]) == [
        "sub-01/ses-2/anat/sub-01_ses-2_run-1",
        "sub-IXI012HH1211/ses-2/anat/sub-IXI012HH1211_ses-2",
        "sub-ab/anat/sub-ab",
        "sub-abrow5/anat/sub-abrow5",
        "sub-somescan/anat/sub-somescan",
    ]


def test_two_persons_of_the_same_letters_share_no_folder():
    scans = [("1-12", "ses-1"), ("11-2", "ses-1"), ("11-2", "ses-2"), ("sub-1-12", "ses-2"), ("1-12", "ses-2")]
    rows = [
        Scan(row=row, image=Path("x"), age=None, participant_id=person, session_id=session)
        for row, (person, session) in enumerate(scans, start=2)
    ]
    assert stems(rows) == [
        "sub-112/ses-1/anat/sub-112_ses-1",
        "sub-112row3/ses-1/anat/sub-112row3_ses-1",
        "sub-112row3/ses-2/anat/sub-112row3_ses-2",
        "sub-112/ses-2/anat/sub-112_ses-2",
        "sub-112/ses-2/anat/sub-112_ses-2_acq-row6",
    ]


# Real heads


@pytest.fixture(scope="module")
def real_manifest(real_data, tmp_path_factory):
    """Three heads of 2 mm with label maps."""
    folder = tmp_path_factory.mktemp("real")
    lines = ["participant_id,image,age,labels"]
    lines += [f"{n},t1/{n}_T1w.nii.gz,40,dlmuse/{n}_dlmuse.nii.gz" for n in HEADS]
    (folder / "m.csv").write_text("\n".join(lines) + "\n")
    return folder / "m.csv"


def test_real_heads_by_the_light_path(real_data, real_manifest, tmp_path):
    run(
        "--manifest",
        real_manifest,
        "--data-root",
        real_data / "ixi",
        "-o",
        tmp_path,
        "--spacing",
        2,
        "--steps",
        "light",
    )
    qc = pd.read_csv(tmp_path / "qc.tsv", sep="\t")
    assert (qc["similarity"] > 0.7).all()
    assert qc["brain_ml"].between(1000, 1900).all()


@NEEDS_EXTRA
def test_real_heads_by_the_full_path(real_data, real_manifest, tmp_path):
    run(
        "--manifest", real_manifest, "--data-root", real_data / "ixi", "-o", tmp_path, "--spacing", 2, "--steps", "full"
    )
    qc = pd.read_csv(tmp_path / "qc.tsv", sep="\t")
    assert (qc["similarity"] > 0.7).all()
    assert (qc["field_range"] > 1.05).all()
    for name in HEADS:
        labels = read_volume(real_data / "ixi" / "dlmuse" / f"{name}_dlmuse.nii.gz")
        truth_ml = (labels.voxels > 0).sum() * 8 / 1000
        assert qc.loc[qc["participant_id"] == name, "brain_ml"].item() == pytest.approx(truth_ml, rel=0.05)


@NEEDS_EXTRA
@pytest.mark.parametrize(
    "head", ["ixi_guys/IXI533-Guys-1066_raw_T1w.nii.gz", "aomic_piop2/sub-0001_T1.mgz", "aomic_piop2/sub-0002_T1.mgz"]
)
def test_heads_of_other_scanners_by_the_full_path(real_data, tmp_path, head):
    (tmp_path / "m.csv").write_text(f"image\n{head}\n")
    arguments = ("--data-root", real_data / "scans", "-o", tmp_path / "o", "--spacing", 2, "--steps", "full")
    run("--manifest", tmp_path / "m.csv", *arguments)
    qc = pd.read_csv(tmp_path / "o" / "qc.tsv", sep="\t")
    assert qc["similarity"].item() > 0.65
    assert 900 < qc["brain_ml"].item() < 2000


@NEEDS_EXTRA
def test_what_is_no_head_fails_by_name(tmp_path):
    noise = np.random.default_rng(0).normal(100, 10, (60, 60, 60)).astype(np.float32)
    write_volume(tmp_path / "noise.nii.gz", noise, np.diag([3.0, 3.0, 3.0, 1.0]))
    (tmp_path / "m.csv").write_text("image\nnoise.nii.gz\n")
    run("--manifest", tmp_path / "m.csv", "-o", tmp_path / "o", "--steps", "full", "--spacing", 4)
    status = pd.read_csv(tmp_path / "o" / "qc.tsv", sep="\t")["status"].item()
    assert status in ("check", "failed")
