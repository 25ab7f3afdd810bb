"""A contract that cannot be broken in silence: real heads broken on purpose, each named; whole ones let through."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from broken_scans import BREAKS, OF_THE_MASK, oppose_handedness, write_head
from typer.testing import CliRunner

from emoe_med.brainage.__main__ import app
from emoe_med.data.prepare import missing_extra
from emoe_med.data.volume import read_volume

TINY = """
name: tiny
data: {{spacing_mm: 4, oversample: 2, align: {align}, mask: {mask}}}
model: {{stem: 2, channels: [4, 8], pooled: 2, neck: 8, dropout: 0.0, head: l1}}
training: {{epochs: 2, batch_size: 8, lr: 3e-3, threads: 1, select: last}}
evaluation: {{bootstrap: 1000}}
tracking: {{mlflow: false}}
"""


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert code is None or result.exit_code == code, result.output
    return result


def heads(real_data, start, stop) -> pd.DataFrame:
    table = pd.read_csv(real_data / "ixi" / "manifest.csv").iloc[start:stop]
    for column in ("image", "labels"):
        table[column] = [str(real_data / "ixi" / name) for name in table[column]]
    return table


def read_head(scan: pd.Series):
    image, labels = (read_volume(Path(scan[name])) for name in ("image", "labels"))
    return image.voxels, image.affine, labels.voxels > 0


def train(table: pd.DataFrame, folder, align="affine", mask="auto"):
    """Train a small net on the first scans of a table, validate on the next 6, test on the last 4."""
    folder.mkdir(exist_ok=True)
    split = ["train"] * (len(table) - 10) + ["val"] * 6 + ["test"] * 4
    table.assign(split=split).to_csv(folder / "manifest.csv", index=False)
    (folder / "tiny.yaml").write_text(TINY.format(align=align, mask=mask))
    run("train", "--manifest", folder / "manifest.csv", "--config", folder / "tiny.yaml", "--out", folder / "runs",
        "--data-root", "/")  # fmt: skip
    return folder / "runs" / "tiny" / "seed0-fold0"


def predict(run_dir, table: pd.DataFrame, folder, code=0) -> pd.DataFrame:
    table.to_csv(folder / "given.csv", index=False)
    run("predict", "--run", run_dir, "-i", folder / "given.csv", "-o", folder / "ages.csv", "--data-root", "/",
        code=code)  # fmt: skip
    return pd.read_csv(folder / "ages.csv", dtype={"reason": "str"}).fillna({"reason": ""})


@pytest.fixture(scope="module")
def model(real_data, tmp_path_factory):
    return train(heads(real_data, 0, 38), tmp_path_factory.mktemp("brains"))


@pytest.fixture(scope="module")
def one(real_data):
    """A head that no run here has seen: voxels, affine, brain mask."""
    return read_head(heads(real_data, 60, 61).iloc[0])


@pytest.fixture(scope="module")
def found(model, one, real_data, tmp_path_factory) -> pd.DataFrame:
    """What `predict` says of every broken head and of whole ones, by name."""
    folder = tmp_path_factory.mktemp("broken")
    rows = {each.__name__: write_head(folder, each.__name__, each(*one)) for each in BREAKS}
    other = heads(real_data, 61, 62).iloc[0]
    rows["mask_of_another_head"] = rows["no_mask"] | {"mask": other["labels"]}
    rows["opposite_handedness"] = write_head(folder, "handed", one)
    oppose_handedness(folder / "handed.nii.gz")
    rows["too_old"] = write_head(folder, "too_old", one)
    table = pd.DataFrame.from_dict(rows, orient="index").assign(age=50.0)
    table["image"] = [str(folder / name) for name in table["image"]]
    table["mask"] = [name if name.startswith("/") or not name else str(folder / name) for name in table["mask"]]
    table.loc["mask_of_another_head", "image"] = str(folder / "copy.nii.gz")
    (folder / "copy.nii.gz").write_bytes((folder / "no_mask.nii.gz").read_bytes())
    table.loc["too_old", "age"] = 97.0
    whole = heads(real_data, 62, 70)[["image", "labels", "age"]].rename(columns={"labels": "mask"})
    whole.index = [f"whole{i}" for i in range(len(whole))]
    table = pd.concat([table, whole])
    answer = predict(model, table.assign(participant_id=table.index), folder, code=8)
    assert len(answer) == len(table)
    return answer.set_index("participant_id").loc[table.index]


EXPECTED = {each.__name__: words for each, words in BREAKS.items()} | {
    "mask_of_another_head": ("brain mask", "registration"),
    "opposite_handedness": ("opposite handedness",),
    "too_old": ("outside the training ages",),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_no_break_is_silent_and_the_step_is_named(found, name):
    row = found.loc[name]
    assert row["status"] in ("check", "refused")
    assert any(word in row["reason"] for word in EXPECTED[name]), row["reason"]
    assert np.isnan(row["predicted_age"]) == (row["status"] == "refused")


@pytest.mark.parametrize(
    "name", ["pure_noise", "a_ball", "one_slice_repeated", "upside_down", "whole_head_as_mask", "centimetres"]
)
def test_what_is_no_head_gets_no_age(found, name):
    assert found.loc[name, "status"] == "refused"


def test_whole_heads_pass(found):
    whole = found[found.index.str.fullmatch(r"whole\d")]
    flagged = whole[whole["status"] != "ok"]
    assert len(flagged) <= 1, flagged["reason"].tolist()


def test_an_interval_and_a_contract_stand_in_every_row(found, model):
    told = json.loads((model / "metrics.json").read_text())
    assert set(found["contract"]) == {told["contract"]}
    good = found.loc["whole0"]
    half = told["interval"]["half_width"]
    assert (good["lower"], good["upper"]) == pytest.approx(
        (good["predicted_age"] - half, good["predicted_age"] + half), abs=2e-3
    )
    assert good["level"] == told["interval"]["level"] == 0.8  # of six validation persons
    assert 0 <= good["ood_percentile"] <= 100
    assert not good["in_training"]


@pytest.mark.faults  # 65 heads through the skull strip: eight minutes of two free cores
@pytest.mark.timeout(3600)
@pytest.mark.skipif(bool(missing_extra()), reason=f"the extra is not installed: {missing_extra()}")
def test_no_break_of_a_raw_head_is_silent_by_the_full_path(real_data, one, tmp_path):
    """All heads go through strip and bias field first, which take out shading; masks that are given do not count."""
    heads(real_data, 0, 38).drop(columns="labels").to_csv(tmp_path / "raw.csv", index=False)
    run("preprocess", "--manifest", tmp_path / "raw.csv", "--data-root", "/", "-o", tmp_path / "prepared",
        "--steps", "full", "--spacing", 2, "--jobs", 2)  # fmt: skip
    table = pd.read_csv(tmp_path / "prepared" / "manifest.csv").drop(columns=["status", "reason"])
    for column in ("image", "mask"):
        table[column] = [str(tmp_path / "prepared" / name) for name in table[column]]
    run_dir = train(table, tmp_path / "model")
    ways = {each.__name__: each for each in BREAKS if each not in OF_THE_MASK}
    rows = {name: write_head(tmp_path, name, each(*one))["image"] for name, each in ways.items()}
    rows["stripped"] = write_head(tmp_path, "stripped", (np.where(one[2], one[0], 0), one[1], None))["image"]
    rows["opposite_handedness"] = write_head(tmp_path, "handed", one)["image"]
    oppose_handedness(tmp_path / "handed.nii.gz")
    rows["whole"] = write_head(tmp_path, "whole", one)["image"]
    (tmp_path / "too_old.nii.gz").write_bytes((tmp_path / "whole.nii.gz").read_bytes())
    rows["too_old"] = "too_old.nii.gz"
    given = pd.DataFrame({"participant_id": list(rows), "image": [str(tmp_path / file) for file in rows.values()]})
    given["age"] = np.where(given["participant_id"] == "too_old", 97.0, 50.0)
    answer = predict(run_dir, given, tmp_path, code=8).set_index("participant_id")
    silent = set(answer.index[answer["status"] == "ok"])
    # 28 training heads leave room for a little less sharpness; with 131 these two are flagged (docs/preprocessing.md)
    blunt = {"thick_slices_repeated", "registered_to_the_template"}
    assert silent - blunt == {"whole", "shaded"}, answer[["status", "reason"]].to_string()
    mended, whole = answer.loc[["shaded", "whole"], "predicted_age"]
    assert mended == pytest.approx(whole, abs=1)


def test_a_scan_of_the_training_set_is_told(model, real_data, tmp_path):
    table = heads(real_data, 0, 1)
    (row,) = predict(model, table, tmp_path).itertuples()
    assert row.in_training
    assert row.status == "check"
    assert "trained or selected on this image" in row.reason
    moved = read_volume(__import__("pathlib").Path(table.iloc[0]["image"]))
    mask = read_volume(__import__("pathlib").Path(table.iloc[0]["labels"])).voxels > 0
    again = write_head(
        tmp_path, "again", (moved.voxels, moved.affine, np.roll(mask, 1, 0))
    )  # another mask, so another volume
    table = pd.DataFrame([{name: str(tmp_path / file) for name, file in again.items()}])
    (row,) = predict(model, table, tmp_path).itertuples()
    assert row.in_training


def test_a_model_of_whole_heads_names_the_strip_of_a_brain(real_data, one, tmp_path):
    table = heads(real_data, 0, 30).drop(columns="labels")
    run_dir = train(table, tmp_path / "whole")
    assert json.loads((run_dir / "metrics.json").read_text())["data"]["used"] == "the whole head, unaligned"
    voxels, affine, mask = one
    files = [write_head(tmp_path, "stripped", (np.where(mask, voxels, 0), affine, None))]
    files += [write_head(tmp_path, "head", (voxels, affine, None))]
    given = pd.DataFrame({"image": [str(tmp_path / file["image"]) for file in files]})
    stripped, head = predict(run_dir, given, tmp_path, code=None).itertuples()
    assert stripped.status != "ok"
    assert "skull strip" in stripped.reason
    assert "skull strip" not in head.reason


def test_a_model_of_stripped_volumes_names_the_strip_of_a_head(real_data, one, tmp_path):
    table = heads(real_data, 0, 30)
    for index, scan in table.iterrows():
        voxels, affine, mask = read_head(scan)
        table.loc[index, "image"] = str(
            tmp_path / write_head(tmp_path, f"s{index}", (np.where(mask, voxels, 0), affine, None))["image"]
        )
    run_dir = train(table.drop(columns="labels"), tmp_path / "stripped")
    voxels, affine, mask = one
    files = [write_head(tmp_path, "head", (voxels, affine, None))]
    files += [write_head(tmp_path, "brain", (np.where(mask, voxels, 0), affine, None))]
    given = pd.DataFrame({"image": [str(tmp_path / file["image"]) for file in files]})
    head, stripped = predict(run_dir, given, tmp_path, code=None).itertuples()
    assert head.status != "ok"
    assert "skull strip" in head.reason
    assert "skull strip" not in stripped.reason
