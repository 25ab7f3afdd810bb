"""The verb `maps` on a small synthetic arm: every file, read back by other programs."""

import json
import re
import shutil

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from emoe_med.brainage.__main__ import app
from emoe_med.data.cohort import write_cohort
from emoe_med.data.phantom import LABELS
from emoe_med.training.amend import amend

CONFIG = """
name: tiny
data: {spacing_mm: 8, align: centred, folds: 2, val_share: 0.3}
model: {stem: 1, channels: [4, 8], pooled: 1, neck: 8, dropout: 0.0, head: l1,
        moe: {after_block: 1, num_experts: 3, router: {kind: eigen, rank: 3}, experts: {kind: mlp, hidden: 2}}}
training: {epochs: 2, batch_size: 4, lr: 3e-3, threads: 1}
evaluation: {bootstrap: 1000}
tracking: {mlflow: false}
"""
PERSONS = 21


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cohort") / "synthetic"
    return write_cohort(folder, persons=PERSONS, seed=5, spacing_mm=8.0, repeat_share=0.1)


@pytest.fixture(scope="module")
def arm(manifest, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    (out / "tiny.yaml").write_text(CONFIG)
    for seed, fold in ((0, "all"), (1, "0"), (1, "1")):
        train = ("train", "--manifest", manifest, "--config", out / "tiny.yaml", "--out", out, "--fold", fold)
        run(*train, "--set", f"training.seed={seed}")
    shutil.copytree(out / "tiny" / "expert_maps", out / "made by train")
    for checkpoint in (out / "tiny").glob("seed*/checkpoints/step-*"):
        amend(checkpoint, {"synthetic": True})  # as `demo` says from the start: no lower limit of persons
    return out / "tiny"


@pytest.fixture(scope="module")
def maps(arm, manifest):
    run("maps", "--run", arm, "--manifest", manifest, "--contribution", 8, "--occlusion", 4)
    return arm / "expert_maps"


def test_every_volume_is_listed_named_and_true(maps):
    index = json.loads((maps / "maps.json").read_text())
    assert index["experts"] == ["E00", "E01", "E02"]
    assert (index["cell_mm"], index["subjects"], len(index["runs"])) == (16.0, PERSONS, 4)
    quantities = [(item["quantity"], item["expert"]) for item in index["maps"]]
    for expert in index["experts"]:
        assert {(q, expert) for q in ("occupancy", "gate", "contribution")} <= set(quantities)
    group = {
        "contribution",
        "occlusion",
        "contributionage",
        "occlusionage",
        "entropy",
        "margin",
        "coverage",
        "topexpert",
    }
    assert {(q, None) for q in group} <= set(quantities)
    total, measured = 0, {"contribution": 8, "occlusion": 8}  # two of each run at least
    for item in index["maps"]:
        image = nib.load(maps / item["file"])
        voxels = image.get_fdata()
        assert image.shape == (20, 24, 20)
        assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
        assert bytes(image.header["descrip"]).strip(b"\0") == b""
        assert voxels[voxels != 0].min() >= item["low"] - 1e-6  # 0 outside the brain
        assert voxels.max() == pytest.approx(max(item["high"], 0), abs=1e-6) or item["kind"] == "diverging"
        sidecar = json.loads((maps / item["file"].replace(".nii.gz", ".json")).read_text())
        assert sidecar["Smoothing"] == "none"
        assert sidecar["CellSizeMm"] == 16.0
        assert sidecar["Subjects"] == measured.get(item["quantity"].removesuffix("age"), PERSONS)
        assert set(sidecar["Runs"]) == set(index["runs"])
        total = total + voxels if item["quantity"] == "occupancy" else total
    inside = total > 0
    np.testing.assert_allclose(total[inside], 1, atol=1e-5)
    assert 0.1 < inside.mean() < 0.5


def test_training_ends_with_the_same_files_for_all_folds(arm, maps):
    """Of 21 persons taken for real: of contribution and occlusion too, with the parcels called by their names."""
    folder = arm.parent / "made by train"
    assert {path.name for path in folder.iterdir()} == {path.name for path in maps.iterdir()}
    index = json.loads((folder / "maps.json").read_text())
    assert (index["subjects"], index["subjects_contribution"], index["subjects_occlusion"]) == (PERSONS,) * 3
    assert pd.read_csv(folder / "parcels.csv")["name"].tolist() == list(LABELS[1:])
    coverage = nib.load(folder / next(item["file"] for item in index["maps"] if item["quantity"] == "coverage"))
    shown = coverage.get_fdata()[coverage.get_fdata() > 0]
    assert shown.min() > 0.8  # in 20 of 21 persons, some of whom have a second head without


def test_training_makes_no_maps_where_the_run_file_says_so(manifest, tmp_path):
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    train = ("train", "--manifest", manifest, "--config", tmp_path / "tiny.yaml", "--out", tmp_path, "--fold", "all")
    run(*train, "--set", "evaluation.maps=false", "--set", "training.epochs=1")
    assert (tmp_path / "tiny" / "summary.json").is_file()
    assert not list(tmp_path.rglob("expert_maps"))


def test_nilearn_lays_the_map_over_the_head(maps):
    from nilearn.image import resample_to_img

    index = json.loads((maps / "maps.json").read_text())
    winner = next(item["file"] for item in index["maps"] if item["quantity"] == "topexpert")
    head = nib.load(maps / index["background"])
    over = resample_to_img(
        nib.load(maps / winner), head, interpolation="nearest", force_resample=True, copy_header=True
    ).get_fdata()
    table = pd.read_csv(maps / "dseg.tsv", sep="\t")
    assert set(np.unique(over)) <= {0, *table["index"]}
    assert (over[head.get_fdata() == 0] > 0).mean() < 0.01
    assert table["color"].is_unique


def test_tables_are_over_the_labels_of_each_head(maps):
    regions, parcels = pd.read_csv(maps / "regions.csv"), pd.read_csv(maps / "parcels.csv")
    assert len(regions) == 3 * (len(LABELS) - 1)
    assert regions["name"].drop_duplicates().tolist() == list(LABELS[1:])
    sums = regions.groupby("parcel")["occupancy"].sum()
    np.testing.assert_allclose(sums, 1, atol=1e-4)
    assert (regions["occupancy_low"] <= regions["occupancy"] + 1e-6).all()
    assert regions["p"].equals(regions[["p_random", "p_rotated"]].max(axis=1))
    assert regions["p"].between(1 / 1001, 1).all()
    assert (regions["q"] >= regions["p"] - 1e-9).all()
    assert parcels["covered"].between(0.5, 1).all()
    assert (parcels["n_subjects"] == PERSONS).all()
    pair = regions[regions["name"].isin(["left_ventricle", "right_ventricle"])].pivot(
        index="expert", columns="name", values="laterality"
    )
    np.testing.assert_allclose(pair["left_ventricle"], pair["right_ventricle"], atol=0.05)
    atlas = json.loads((maps / "maps.json").read_text())["atlas"]
    labels = nib.load(maps / atlas["file"])
    world = nib.affines.apply_affine(labels.affine, np.argwhere(labels.get_fdata() == LABELS.index("left_ventricle")))
    assert world[:, 0].mean() < 0


def test_stability_and_sanity_say_what_they_found(maps):
    found = json.loads((maps / "stability.json").read_text())
    assert len(found["pairs"]) == 6
    assert found["by_kind"]["other seed, same fold"]["pairs"] == 2
    assert found["stable"] in (True, False)
    assert found["position_only"]["heads"] >= PERSONS  # each by two runs of one fold
    assert 0 < found["position_only"]["by_place"]["value"] <= 1
    assert found["turned_patches"]["matched_r"]["high"] > found["random_router"]["matched_r"]["high"]
    checks = {check["name"]: check for check in json.loads((maps / "sanity.json").read_text())["checks"]}
    assert list(checks) == [
        *("shift", "mirror", "position_only", "random_router", "outside_brain", "experts_alive", "occlusion")
    ]
    assert checks["shift"]["value"] > 0.9  # convolutions and no position
    assert checks["shift"]["details"]["stayed_in_place"]["value"] < checks["shift"]["value"]
    assert 0 < checks["outside_brain"]["value"] < 0.6
    assert all(len(check["text"]) > 40 for check in checks.values())
    assert (maps / "montage.png").read_bytes()[:4] == b"\x89PNG"


def test_no_person_is_in_any_file(maps, manifest):
    ids = pd.read_csv(manifest)["participant_id"].unique()
    for path in maps.iterdir():
        assert "sub-" not in path.name
        if path.suffix in (".json", ".csv", ".tsv"):
            text = path.read_text()
            assert not any(person in text for person in ids)
            assert str(manifest.parent) not in text


def test_one_run_of_few_real_heads_is_refused_and_more_heads_are_not(arm, manifest, tmp_path):
    one = tmp_path / "real" / "seed0-fold0"
    shutil.copytree(arm / "seed0-fold0", one)
    for checkpoint in (one / "checkpoints").glob("step-*"):
        amend(checkpoint, {"synthetic": False})
    again = ("maps", "--run", one, "--manifest", manifest, "--cache", arm.parent / "cache", "--occlusion", 0)
    assert re.search(r"MAPS-FEW .*heads 1\d.*; 20 are needed", run(*again, code=3).output)
    assert "--contribution 8" in run(*again, "--everyone", "--contribution", 8, code=3).output
    assert not (one / "expert_maps").exists()
    run(*again, "--everyone", "--contribution", 0)
    index = json.loads((one / "expert_maps" / "maps.json").read_text())
    assert index["held_out"] is False
    assert "contribution" not in {item["quantity"] for item in index["maps"]}
    assert index["verdict"].startswith("not tested")


def test_without_heads_there_is_only_what_was_made(arm, maps, tmp_path):
    page = (maps / "viewer.html").read_bytes()
    (maps / "viewer.html").unlink()
    assert "cells of 16 mm" in run("maps", "--run", arm).output
    assert (maps / "viewer.html").read_bytes() == page
    assert "CLI-MANIFEST" in run("maps", "--run", arm, "--atlas", "other.nii.gz", code=2).output
    shutil.copytree(arm / "seed0-fold0", tmp_path / "seed0-fold0", ignore=shutil.ignore_patterns("expert_maps"))
    assert "name the heads by --manifest" in run("maps", "--run", tmp_path / "seed0-fold0", code=2).output


def test_heads_that_were_only_centred_take_no_atlas(arm, manifest, tmp_path):
    table = tmp_path / "names.tsv"
    table.write_text("index\tname\n1\tone\n")
    refused = run("maps", "--run", arm, "--manifest", manifest, "--atlas", "aal", "--labels", table, code=2)
    assert "MAPS-SPACE" in refused.output
