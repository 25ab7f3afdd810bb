"""A model of preprocessed volumes: they are not aligned again, raw heads go the same way first, others are named."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from command_line import typed

from emoe_med.brainage import inference
from emoe_med.brainage.__main__ import app
from emoe_med.data.brain import ChainOptions
from emoe_med.data.cache import HeadDataset
from emoe_med.data.cohort import write_cohort
from emoe_med.data.fingerprint import MEASURES
from emoe_med.data.manifest import read_manifest
from emoe_med.data.prepare import Preparation, missing_extra
from emoe_med.data.sidecar import steps_digest
from emoe_med.data.volume import read_volume, write_volume
from emoe_med.errors import VolumeError
from emoe_med.training.checkpoint import CheckpointFolder

NEEDS_EXTRA = pytest.mark.skipif(bool(missing_extra()), reason=f"the extra is not installed: {missing_extra()}")
TINY = """
name: tiny
data: {spacing_mm: 8, oversample: 2, align: affine, mask: brain}
model: {stem: 1, channels: [4, 8], pooled: 1, neck: 8, dropout: 0.0, head: l1}
training: {epochs: 2, batch_size: 2, lr: 3e-3, threads: 1, select: last}
evaluation: {bootstrap: 1000}
tracking: {mlflow: false}
"""


run = typed(app)


def ages(run_dir: Path, source: Path, out: Path, code=0) -> pd.DataFrame:
    run("predict", "--run", run_dir, "-i", source, "-o", out / "ages.csv", "--data-root", "/", code=code)
    return pd.read_csv(out / "ages.csv", dtype={"reason": "str"}).fillna({"reason": ""})


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    """Manifest of five synthetic heads with masks: two to train on, one to validate, two to test."""
    manifest = write_cohort(tmp_path_factory.mktemp("raw") / "c", persons=5, seed=3, spacing_mm=6.0, repeat_share=0)
    table = pd.read_csv(manifest).drop(columns="labels")
    table["split"] = ["train", "train", "val", "test", "test"]
    table.to_csv(manifest, index=False)
    return manifest


@pytest.fixture(scope="module")
def prepared(raw, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("prepared")
    run("preprocess", "--manifest", raw, "-o", out, "--spacing", 4, "--steps", "light")
    return out / "manifest.csv"


@pytest.fixture(scope="module")
def model(prepared, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    (out / "tiny.yaml").write_text(TINY)
    run("train", "--manifest", prepared, "--config", out / "tiny.yaml", "--out", out)
    return out / "tiny" / "seed0-fold0"


def contract(run_dir: Path) -> dict:
    checkpoint = CheckpointFolder(run_dir).load("last")
    assert checkpoint is not None
    return checkpoint.state["meta"]


def some(manifest: Path, folder: Path, rows=(3, 4)) -> Path:
    """Write rows of a manifest with absolute paths; without a choice those of the test scans."""
    table = pd.read_csv(manifest).iloc[list(rows)]
    for name in ("image", "mask"):
        table[name] = [str(manifest.parent / file) for file in table[name]]
    table.drop(columns=["status", "reason"], errors="ignore").to_csv(folder / "some.csv", index=False)
    return folder / "some.csv"


def test_the_contract_names_the_steps_of_the_training_scans(model):
    stated = contract(model)["strip"]
    assert stated["prepared"] == Preparation(4.0, "light").steps()
    told = json.loads((model / "metrics.json").read_text())["data"]["preprocessed"]
    assert told == "light path; skull strip none: mask as given; bias field none"
    assert stated["stated"] == {json.dumps(stated["prepared"], sort_keys=True): 2}


def test_what_was_written_is_seen_as_it_is(prepared, tmp_path):
    """At the spacing of the files the network's voxels are those of the files, under the chain's intensity rule."""
    scans = read_manifest(prepared, prepared.parent).scans
    heads = HeadDataset(scans, ChainOptions(4.0), tmp_path)
    entry = heads.entry(0)
    volume, mask = read_volume(scans[0].image), read_volume(scans[0].mask)
    inside = mask.voxels > 0
    mean = volume.voxels[inside].mean(dtype=np.float64)
    expected = np.where(inside, np.clip((volume.voxels / mean - 1) / 0.25, -4, 3), 0)
    np.testing.assert_allclose(entry["image"][0].float(), expected, atol=5e-3)  # float16
    assert torch.equal(entry["matrix"], torch.eye(4, dtype=torch.float64))
    figures = heads.sidecars[0].figures
    assert float(entry["similarity"]) == pytest.approx(figures["similarity"], abs=0.05)  # of the head, not the box
    scale = entry["fingerprint"][list(MEASURES).index("scale")]
    assert float(scale) == pytest.approx(np.cbrt(np.prod([figures[f"scale_{a}"] for a in "xyz"])), rel=0.02)


def test_a_raw_head_and_its_volume_get_one_prediction(model, raw, prepared, tmp_path):
    of_raw = ages(model, some(raw, tmp_path), tmp_path)
    of_volume = ages(model, some(prepared, tmp_path), tmp_path)
    numbers = ["predicted_age", "lower", "upper", "similarity", "ood_score"]
    pd.testing.assert_frame_equal(of_raw[numbers], of_volume[numbers])
    pd.testing.assert_frame_equal(of_raw[["status", "reason"]], of_volume[["status", "reason"]])
    assert not of_raw["reason"].str.contains("states|in training").any()
    assert of_raw["image"].tolist() == pd.read_csv(some(raw, tmp_path))["image"].tolist()  # as it was asked for
    kept = list((model.parent.parent / "cache").rglob("*_T1w.nii.gz"))
    assert len(kept) == 2
    assert not any(name in str(file) for file in kept for name in of_raw["participant_id"])
    before = [file.stat().st_mtime_ns for file in kept]
    again = ages(model, some(raw, tmp_path), tmp_path)
    pd.testing.assert_frame_equal(again, of_raw)
    assert [file.stat().st_mtime_ns for file in kept] == before


def test_evaluate_takes_raw_heads_and_knows_those_of_the_training(model, raw, prepared, tmp_path):
    found = []
    for manifest in (some(raw, tmp_path), some(prepared, tmp_path)):
        result = run("evaluate", "--run", model, "--manifest", manifest, "--data-root", "/", "--json")
        found.append(json.loads(result.stdout)["test"]["mae"]["value"])
    assert found[0] == found[1]
    arguments = ("--manifest", some(raw, tmp_path, rows=(0, 4)), "--data-root", "/")
    (line,) = [
        text for text in run("evaluate", "--run", model, *arguments, code=3).output.splitlines() if "error" in text
    ]
    assert "EVAL-SEEN" in line
    assert "row 2" in line


def test_a_raw_head_that_cannot_be_prepared_is_refused_by_name(model, raw, tmp_path):
    table = pd.read_csv(some(raw, tmp_path))
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(Path(table["image"][0]).read_bytes()[:-100])
    table.loc[0, "image"] = str(broken)
    table.to_csv(tmp_path / "some.csv", index=False)
    found = ages(model, tmp_path / "some.csv", tmp_path, code=8)
    assert found["status"].tolist()[0] == "refused"
    assert found["reason"][0].startswith("VOL-")
    assert found["image"][0] == str(broken)
    assert found["predicted_age"].isna().tolist() == [True, False]


def test_an_altered_volume_is_no_longer_vouched_for(model, prepared, tmp_path):
    """Shifted by two voxels, its sidecar as it was: aligned as any other head."""
    table = pd.read_csv(some(prepared, tmp_path))
    source = Path(table["image"][0])
    (tmp_path / "v").mkdir()
    for file in source.parent.iterdir():
        shutil.copy(file, tmp_path / "v" / file.name)
    moved = tmp_path / "v" / source.name
    mask = tmp_path / "v" / Path(table["mask"][0]).name
    for file in (moved, mask):
        volume = read_volume(file)
        write_volume(file, np.roll(volume.voxels, 2, axis=0).astype(np.int16), volume.affine)
    table.loc[0, ["image", "mask"]] = str(moved), str(mask)
    table.head(1).to_csv(tmp_path / "some.csv", index=False)
    scans = read_manifest(tmp_path / "some.csv", Path("/"), require_age=False).scans
    heads = HeadDataset(scans, ChainOptions(4.0), tmp_path / "cache")
    assert heads.sidecars == [None]
    assert abs(heads.entry(0)["matrix"][0, 3]) > 4  # mm, found anew


def test_a_grid_that_is_not_the_one_of_the_sidecar_is_refused(prepared, tmp_path):
    (scan,) = read_manifest(some(prepared, tmp_path, rows=(4,)), Path("/"), require_age=False).scans
    for file in scan.image.parent.iterdir():
        shutil.copy(file, tmp_path / file.name)
    file = tmp_path / scan.image.name.replace(".nii.gz", ".json")
    sidecar = json.loads(file.read_text())
    sidecar["Steps"]["SpacingMm"] = 8.0
    file.write_text(json.dumps(sidecar | {"ChainHash": steps_digest(sidecar["Steps"])}))
    moved = replace(scan, image=tmp_path / scan.image.name, mask=tmp_path / scan.mask.name)
    with pytest.raises(VolumeError, match="VOL-SPACE"):
        HeadDataset([moved], ChainOptions(4.0), tmp_path / "cache").entry(0)


def test_other_steps_are_named(model, raw, tmp_path):
    manifest = some(raw, tmp_path, rows=(4,))
    root = ("--data-root", "/", "--spacing", 8, "--steps", "light")
    run("preprocess", "--manifest", manifest, "-o", tmp_path / "o", *root)
    found = ages(model, tmp_path / "o", tmp_path)
    assert (found["status"] == "check").all()
    assert found["reason"].str.contains("preprocessing: SpacingMm is 8.0, in training 4.0").all()


def test_rows_of_two_kinds_are_refused(raw, prepared, model, tmp_path):
    table = pd.read_csv(prepared).drop(columns=["status", "reason"])
    one = pd.read_csv(raw).loc[2]
    for name in ("image", "mask"):
        table[name] = [str(prepared.parent / file) for file in table[name]]
        table.loc[2, name] = str(raw.parent / one[name])
    table.to_csv(tmp_path / "mixed.csv", index=False)
    arguments = ("--manifest", tmp_path / "mixed.csv", "--out", tmp_path / "runs", "--data-root", "/")
    told = run("train", "--config", model.parent.parent / "tiny.yaml", *arguments, code=3).output
    (line,) = [line for line in told.splitlines() if line.startswith("error")]
    assert "MAN-STEPS" in line
    assert "row 4" in line


def test_a_folder_of_volumes_is_read_with_its_masks(model, prepared, tmp_path):
    found = ages(model, prepared.parent, tmp_path)
    assert len(found) == 5
    assert not found["reason"].str.contains("states|in training").any()


@pytest.fixture
def of_full_path(monkeypatch):
    """Make every model one of volumes of the full path, whose packages are missing."""
    monkeypatch.setattr("emoe_med.data.prepare.EXTRA", ("no_such_package",))
    steps = {**Preparation(4.0, "light").steps(), "Path": "full"}
    load = inference.TrainedModel.load

    def changed(run_dir):
        found = load(run_dir)
        found.contract["strip"] |= {"prepared": steps, "stated": {json.dumps(steps, sort_keys=True): 3}}
        return found

    monkeypatch.setattr(inference.TrainedModel, "load", changed)


@pytest.mark.usefixtures("of_full_path")
def test_without_the_extra_a_raw_head_is_one_line(model, raw, prepared, tmp_path):
    arguments = ("predict", "--run", model, "-o", tmp_path / "ages.csv", "--data-root", "/", "-i")
    lines = run(*arguments, some(raw, tmp_path), code=2).stderr.splitlines()
    (line,) = [line for line in lines if not line.startswith("note")]
    assert "PREP-EXTRA" in line
    run(*arguments, some(prepared, tmp_path))  # what is preprocessed needs none


@pytest.mark.usefixtures("of_full_path")
def test_an_altered_volume_goes_the_light_way_and_is_flagged(model, raw, prepared, tmp_path):
    """Turned or cut short since `preprocess` wrote it: mended where that is safe, else refused by itself."""
    shutil.copytree(prepared.parent, tmp_path / "p")
    table = pd.read_csv(tmp_path / "p" / "manifest.csv", dtype=str)
    for name in ("image", "mask"):
        table[name] = [str(tmp_path / "p" / file) for file in table[name]]
    turned, cut = Path(table.loc[0, "image"]), Path(table.loc[1, "image"])
    whole = read_volume(turned)
    write_volume(
        turned, whole.voxels[::-1], whole.affine @ np.array([[-1, 0, 0, len(whole.voxels) - 1.0], *np.eye(4)[1:]])
    )
    cut.write_bytes(cut.read_bytes()[:-40])
    table.loc[2, ["image", "mask"]] = [str(raw.parent / pd.read_csv(raw).loc[2, name]) for name in ("image", "mask")]
    table.to_csv(tmp_path / "m.csv", index=False)
    found = ages(model, tmp_path / "m.csv", tmp_path, code=8)
    assert found["status"].tolist() == ["check", "refused", "refused", "check", "check"]
    assert "VOL-TRUNC" in found.loc[1, "reason"]
    assert "PREP-EXTRA" in found.loc[2, "reason"]  # a whole head alone needs the skull strip
    assert "Path is light, in training full" in found.loc[0, "reason"]
    as_it_was = ages(model, prepared.parent, tmp_path).loc[0, "predicted_age"]
    assert found.loc[0, "predicted_age"] == pytest.approx(as_it_was, abs=1)


def test_rows_that_preprocessing_lost_keep_their_names_and_reasons(model, raw, tmp_path):
    table = pd.read_csv(raw, dtype=str)
    for name in ("image", "mask"):
        table[name] = [str(raw.parent / file) for file in table[name]]
    bad = tmp_path / "cut.nii.gz"
    bad.write_bytes(Path(table.loc[1, "image"]).read_bytes()[:-40])
    table.loc[1, "image"] = str(bad)
    table.to_csv(tmp_path / "raw.csv", index=False)
    run("preprocess", "--manifest", tmp_path / "raw.csv", "--data-root", "/", "-o", tmp_path / "p", "--steps", "light",
        "--spacing", 4, code=8)  # fmt: skip
    run("predict", "--run", model, "-i", tmp_path / "p" / "manifest.csv", "-o", tmp_path / "a.csv", code=8)
    found = pd.read_csv(tmp_path / "a.csv", dtype={"participant_id": str}).fillna({"reason": ""})
    assert found["row"].tolist() == [2, 3, 4, 5, 6]
    assert found["participant_id"].tolist() == table["participant_id"].tolist()
    assert found.loc[1, "status"] == "refused"
    assert "MAN-FAILED preprocessing failed: VOL-TRUNC" in found.loc[1, "reason"]


@NEEDS_EXTRA
def test_a_stripped_head_is_refused_by_the_full_path(real_data, tmp_path):
    name = "IXI012-HH-1211"
    head = read_volume(real_data / "ixi" / "t1" / f"{name}_T1w.nii.gz")
    labels = read_volume(real_data / "ixi" / "dlmuse" / f"{name}_dlmuse.nii.gz")
    write_volume(tmp_path / "a.nii.gz", np.where(labels.voxels > 0, head.voxels, 0), head.affine)
    (tmp_path / "m.csv").write_text("image\na.nii.gz\n")
    run("preprocess", "--manifest", tmp_path / "m.csv", "-o", tmp_path / "o", "--steps", "full", code=3)
    assert "VOL-STRIPPED" in pd.read_csv(tmp_path / "o" / "qc.tsv", sep="\t")["reason"].item()
