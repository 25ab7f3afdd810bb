"""The command line as a person uses it: a small synthetic cohort through every verb, and what goes wrong."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from command_line import typed
from typer.testing import CliRunner

from emoe_med.brainage.__main__ import app
from emoe_med.data.cohort import write_cohort
from emoe_med.training.seal import sealed

REPOSITORY = Path(__file__).parent.parent.parent
TINY = """
name: {name}
data: {{spacing_mm: 8, oversample: 1, align: centred, folds: 3, val_share: 0.3}}
augment: {{flip: 0.5, shift_voxels: 1}}
model: {{stem: 1, channels: [4, 8], pooled: 1, neck: 8, dropout: 0.2, head: l1{moe}}}
training: {{epochs: 2, batch_size: 4, lr: 3e-3, threads: 1}}
evaluation: {{bootstrap: 1000}}
tracking: {{mlflow: {mlflow}}}
"""
LAYER = ", moe: {after_block: 1, num_experts: 3, router: {kind: eigen, rank: 3}, experts: {kind: mlp, hidden: 2}}"


run = typed(app)


def write_config(folder: Path, name: str, moe: str = "", mlflow: str = "false") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(TINY.format(name=name, moe=moe, mlflow=mlflow))
    return path


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cohort") / "synthetic"
    return write_cohort(folder, persons=21, seed=5, spacing_mm=8.0)


@pytest.fixture(scope="module")
def trained(cohort, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    for name, moe in (("tiny_emoe", LAYER), ("tiny_cnn", "")):
        config = write_config(out, name, moe, mlflow="true" if moe else "false")
        run("train", "--manifest", cohort, "--config", config, "--out", out, "--fold", "0,1")
    return out


def test_help_is_quick_and_loads_nothing_heavy():
    code = (
        "import sys; import emoe_med.brainage.__main__, emoe_med.config; "
        "print({'torch', 'monai', 'mlflow', 'pandas', 'numpy'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
    for verb in (
        "train",
        "predict",
        "preprocess",
        "export",
        "selftest",
        "evaluate",
        "check",
        "compare",
        "demo",
        "ui",
        "sync",
        "doctor",
        "manifest",
    ):
        assert "Example" in run(verb, "--help").output or verb == "manifest"


def test_training_leaves_the_run_folder_of_the_design(trained):
    run_dir = trained / "tiny_emoe" / "seed0-fold0"
    for name in (
        "config.yaml",
        "environment.json",
        "splits.csv",
        "journal.jsonl",
        "metrics.json",
        "report/report.html",
    ):
        assert (run_dir / name).is_file(), name
    metrics = json.loads((run_dir / "metrics.json").read_text())
    for name in ("mae", "rmse", "pearson_r", "spearman_r", "r2", "skill", "r_pad_age"):
        assert {"value", "low", "high", "n"} <= set(metrics["test"][name])
    assert {"by_age", "by_sex", "by_site", "corrected", "val"} <= set(metrics)
    routing = metrics["routing"]["block1"]
    assert 0 <= routing["cv"] < 1.5
    assert routing["orthonormality_error"] < 1e-4
    assert routing["captured_variance"] > 0.9
    assert {"mae_permuted_routing", "mae_without_branch", "branch_over_stream"} <= set(routing)
    assert {"output_cosine", "output_cka", "overlap_w1", "overlap_w2", "max_vio_batch"} <= set(routing)
    assert "routing" not in json.loads((trained / "tiny_cnn" / "seed0-fold0" / "metrics.json").read_text())


def test_no_person_is_in_two_splits_and_folds_share_no_test_person(trained, cohort):
    scans = pd.read_csv(cohort)
    seen = []
    for fold in (0, 1):
        splits = pd.read_csv(trained / "tiny_emoe" / f"seed0-fold{fold}" / "splits.csv")
        joined = splits.assign(person=scans["participant_id"].to_numpy())
        assert (joined.groupby("person")["split"].nunique() == 1).all()
        seen.append(set(joined.loc[joined["split"] == "test", "person"]))
    assert not seen[0] & seen[1]
    one = pd.read_csv(trained / "tiny_cnn" / "seed0-fold0" / "splits.csv")
    other = pd.read_csv(trained / "tiny_emoe" / "seed0-fold0" / "splits.csv")
    pd.testing.assert_frame_equal(one, other)


def test_nothing_that_names_a_person_leaves_the_manifest(trained, cohort):
    ids = pd.read_csv(cohort)["participant_id"].unique()
    secrets = [*map(str, ids), str(cohort.parent)]
    for path in (trained / "tiny_emoe").rglob("*"):
        if path.is_file() and path.name != "local.log":
            content = path.read_bytes()
            assert not [secret for secret in secrets if secret.encode() in content], path
    for path in (trained / "mlflow.db", *(trained / "mlartifacts").rglob("*.*")):
        content = path.read_bytes()
        assert not [secret for secret in secrets if secret.encode() in content], path


def test_a_second_start_is_refused_and_resume_skips_what_is_done(trained, cohort):
    config = trained / "tiny_emoe.yaml"
    again = ("train", "--manifest", cohort, "--config", config, "--out", trained, "--fold", "0")
    refused = run(*again, code=2)
    assert "RUN-EXISTS" in refused.output
    assert "--resume" in refused.output
    before = (trained / "tiny_emoe" / "seed0-fold0" / "metrics.json").stat().st_mtime_ns
    run(*again, "--resume")
    assert (trained / "tiny_emoe" / "seed0-fold0" / "metrics.json").stat().st_mtime_ns == before


def test_a_run_that_failed_in_its_last_file_is_finished_by_resume(cohort, tmp_path):
    config = write_config(tmp_path, "late")
    command = ("train", "--manifest", cohort, "--config", config, "--out", tmp_path)
    run_dir = tmp_path / "late" / "seed0-fold0"
    run_dir.mkdir(parents=True)
    (run_dir / "report").write_text("in the way")
    failed = run(*command, code=6).output
    assert "error STORE-OS" in failed
    assert str(run_dir / "report") in failed
    assert (run_dir / "metrics.json").is_file()
    (run_dir / "report").unlink()
    run(*command, "--resume")
    assert (run_dir / "report" / "report.html").is_file()
    journal = [json.loads(line) for line in (run_dir / "journal.jsonl").read_text().splitlines()]
    assert [event["folder"] for event in journal if event["kind"] == "artifact"] == ["report", "metrics"]
    assert sum("test/mae" in event.get("values", {}) for event in journal) == 1


@pytest.mark.parametrize("option", ["--out", "--cache"])
def test_a_folder_that_cannot_be_made_is_one_line(cohort, tmp_path, option):
    (tmp_path / "file").touch()
    config = write_config(tmp_path, "nowhere")
    where = {"--out": tmp_path / "out", "--cache": tmp_path / "cache"} | {option: tmp_path / "file" / "x"}
    places = [part for place in where.items() for part in place]
    lines = run("train", "--manifest", cohort, "--config", config, *places, code=6).output.splitlines()
    assert [line for line in lines if line.startswith("error")] == lines[-1:]


def test_evaluate_again_gives_the_same_figures(trained):
    path = trained / "tiny_cnn" / "seed0-fold0" / "metrics.json"
    before, table = json.loads(path.read_text()), (path.parent / "predictions" / "test.csv").read_text()
    shown = run("evaluate", "--run", path.parent).output
    after = json.loads(path.read_text())
    assert after["test"]["mae"]["value"] == pytest.approx(before["test"]["mae"]["value"], abs=1e-4)
    assert after["by_site"].keys() == before["by_site"].keys()
    assert "mae" in shown
    again = (path.parent / "predictions" / "test.csv").read_text()
    assert [line.split(",")[:5] for line in again.splitlines()] == [line.split(",")[:5] for line in table.splitlines()]


def test_evaluate_again_renews_the_report_and_the_correction(trained, cohort, tmp_path):
    run_dir = tmp_path / "arm" / "seed0-fold0"
    shutil.copytree(trained / "tiny_cnn" / "seed0-fold0", run_dir)
    for name in ("val", "test"):  # a model good enough for Cole, at sites that are numbers
        path = run_dir / "predictions" / f"{name}.csv"
        table = pd.read_csv(path).assign(site=["", *["11025"] * (len(pd.read_csv(path)) - 1)])
        table.assign(predicted_age=10 + 0.8 * table["age"]).to_csv(path, index=False)
    run("evaluate", "--run", run_dir, "--bias", "cole")
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert set(metrics["by_site"]) == {"11025", "unknown", "macro_mean"}
    assert metrics["corrected"]["bias"]["method"] == "cole"
    test = pd.read_csv(run_dir / "predictions" / "test.csv", dtype={"site": "str"})
    np.testing.assert_allclose(test["predicted_age_corrected"], test["age"], atol=1e-3)
    assert set(test["site"].dropna()) == {"11025"}
    for page in (run_dir / "report" / "report.html", run_dir / "report" / "shared" / "report.html"):
        assert "Method cole" in page.read_text()
    scan = pd.read_csv(cohort).head(1)
    scan.assign(age=np.nan).to_csv(tmp_path / "one.csv", index=False)
    one = ("predict", "--run", run_dir, "-i", tmp_path / "one.csv", "--data-root", cohort.parent)
    run(*one, "-o", tmp_path / "ages.csv")
    (found,) = pd.read_csv(tmp_path / "ages.csv").itertuples()
    assert found.predicted_age_corrected == pytest.approx((found.predicted_age - 10) / 0.8, abs=2e-3)
    run("evaluate", "--run", run_dir)  # without the age there is nothing to correct by
    run(*one, "-o", tmp_path / "ages.csv")
    assert pd.read_csv(tmp_path / "ages.csv")["predicted_age_corrected"].isna().all()


def test_a_correction_that_the_slope_forbids_is_refused(trained, tmp_path):
    run_dir = tmp_path / "seed0-fold0"
    shutil.copytree(trained / "tiny_cnn" / "seed0-fold0", run_dir)
    val = pd.read_csv(run_dir / "predictions" / "val.csv")
    val.assign(predicted_age=50.0).to_csv(run_dir / "predictions" / "val.csv", index=False)
    before = (run_dir / "metrics.json").read_bytes()
    assert "BIAS-SLOPE" in run("evaluate", "--run", run_dir, "--bias", "cole", code=3).output
    assert (run_dir / "metrics.json").read_bytes() == before
    (run_dir / "metrics.json").unlink()
    assert "train --resume" in run("evaluate", "--run", run_dir, code=3).output


def test_evaluate_elsewhere_refuses_what_the_run_has_seen(trained, cohort, tmp_path):
    run_dir = trained / "tiny_cnn" / "seed0-fold0"
    refused = run("evaluate", "--run", run_dir, "--manifest", cohort, code=3).output
    splits = pd.read_csv(run_dir / "splits.csv")["split"]
    assert refused.count("EVAL-SEEN") == (splits != "test").sum()
    other = write_cohort(tmp_path / "other", persons=6, seed=9, spacing_mm=8.0)
    run("evaluate", "--run", run_dir, "--manifest", other)
    (metrics,) = run_dir.glob("evaluations/*/metrics.json")
    assert json.loads(metrics.read_text())["test"]["mae"]["n"] == 6


def unseen(run_dir, cohort) -> pd.DataFrame:
    """Return the rows of a manifest that a run was neither trained nor selected on."""
    splits = pd.read_csv(run_dir / "splits.csv")["split"]
    return pd.read_csv(cohort)[(splits == "test").to_numpy()].reset_index(drop=True)


def test_predict_gives_a_row_for_every_scan(trained, cohort, tmp_path):
    scans = unseen(trained / "tiny_emoe" / "seed0-fold0", cohort)
    rows = scans.head(5).copy()
    rows["image"] = [str(cohort.parent / image) for image in rows["image"]]
    rows["mask"] = [str(cohort.parent / mask) for mask in rows["mask"]]
    rows = rows.drop(columns="labels")
    rows.loc[1, "age"] = np.nan
    rows.loc[2, "age"] = 99.0
    cut = tmp_path / "cut.nii.gz"
    cut.write_bytes(Path(rows.loc[3, "image"]).read_bytes()[:-30])
    rows.loc[3, "image"] = str(cut)
    rows.loc[4, "image"] = str(tmp_path / "nowhere.nii.gz")
    manifest = tmp_path / "manifest.csv"
    rows.to_csv(manifest, index=False)
    output = tmp_path / "ages.csv"
    run("predict", "--run", trained / "tiny_emoe" / "seed0-fold0", "-i", manifest, "-o", output,
        "--data-root", "/", code=8)  # fmt: skip
    found = pd.read_csv(output)
    assert len(found) == 5
    assert found["status"].tolist() == ["ok", "ok", "check", "refused", "refused"]
    assert found["predicted_age"].notna().tolist() == [True, True, True, False, False]
    assert found["participant_id"].tolist()[:3] == scans["participant_id"].tolist()[:3]
    assert "outside the training ages" in found.loc[2, "reason"]
    assert found["predicted_age_corrected"].notna().tolist() == [True, False, True, False, False]
    bias = json.loads((trained / "tiny_emoe" / "seed0-fold0" / "metrics.json").read_text())["corrected"]["bias"]
    in_range = found.loc[[0, 2], "age"].between(bias["age_low"], bias["age_high"])
    assert found.loc[[0, 2], "corrected_in_range"].tolist() == in_range.tolist()
    assert "VOL-" in found.loc[3, "reason"]


def test_check_holds_scans_against_a_run(trained, cohort, tmp_path):
    run_dir = trained / "tiny_cnn" / "seed0-fold0"
    run("check", "--manifest", cohort, "--run", run_dir, "--out", tmp_path)
    found = pd.read_csv(tmp_path / "check.csv").fillna({"reason": ""})
    splits = pd.read_csv(run_dir / "splits.csv")["split"]
    seen = found["reason"].str.contains("trained or selected on this image")
    assert seen.tolist() == (splits != "test").tolist()
    assert set(found.loc[seen, "status"]) == {"check"}
    page = (tmp_path / "scans.html").read_text()
    assert page.count("<img") == len(found)
    assert "overlap 0." in page
    broken = pd.read_csv(cohort)[splits == "test"].head(2)
    for column in ("image", "mask", "labels"):
        broken[column] = [str(cohort.parent / name) for name in broken[column]]
    image, mask = (nib.load(broken.iloc[0][column]) for column in ("image", "mask"))
    voxels, inside = image.get_fdata(), mask.get_fdata() > 0
    scores = (voxels - voxels[inside].mean()) / voxels[inside].std() + 0.02  # z-scores, almost without a mean
    nib.save(nib.Nifti1Image(scores.astype(np.float32), image.affine), tmp_path / "scores.nii.gz")
    broken.iloc[0, broken.columns.get_loc("image")] = str(tmp_path / "scores.nii.gz")
    stated = tmp_path / "stated.nii.gz"
    shutil.copy(broken.iloc[1]["image"], stated)
    (tmp_path / "stated.json").write_text('{"SkullStripped": true}')
    broken.iloc[1, broken.columns.get_loc("image")] = str(stated)
    broken.iloc[1, broken.columns.get_loc("age")] = 119
    broken.to_csv(tmp_path / "broken.csv", index=False)
    shown = run("check", "--manifest", tmp_path / "broken.csv", "--run", run_dir, "--out", tmp_path, "--data-root", "/",
                code=3).output  # fmt: skip
    (line,) = [line for line in shown.splitlines() if line.startswith("error")]
    assert line.startswith("error CON-BROKEN  broken.csv row 2  intensity scale")
    assert '<figure class="refused">' in (tmp_path / "scans.html").read_text()
    other = pd.read_csv(tmp_path / "check.csv").iloc[1]
    assert other["status"] == "check"
    assert "preprocessing: states other steps" in other["reason"]
    assert "age outside the training ages" in other["reason"]


def test_a_checkpoint_of_an_earlier_version_predicts_and_says_what_it_lacks(trained, cohort, tmp_path, caplog):
    run_dir = tmp_path / "arm" / "seed0-fold0"
    shutil.copytree(trained / "tiny_cnn" / "seed0-fold0", run_dir)
    for path in run_dir.glob("checkpoints/step-*/state.json"):
        state = json.loads(path.read_text())
        for name in ("strip", "fingerprint", "seen_voxels", "familiarity"):
            state["meta"].pop(name, None)
        path.write_bytes(sealed(state))
    metrics = json.loads((run_dir / "metrics.json").read_text())
    (run_dir / "metrics.json").write_text(json.dumps({k: v for k, v in metrics.items() if k != "interval"}))
    old, new = tmp_path / "old.csv", tmp_path / "new.csv"
    run("predict", "--run", trained / "tiny_cnn" / "seed0-fold0", "-i", cohort, "-o", new)
    caplog.clear()
    run("predict", "--run", run_dir, "-i", cohort, "-o", old)
    told = [record.message for record in caplog.records if "in this checkpoint" in record.message]
    assert [text.split(":")[1] for text in told] == [
        " no spread of training scans in this checkpoint",
        " no features of training scans in this checkpoint",
    ]
    found, want = pd.read_csv(old), pd.read_csv(new)
    np.testing.assert_array_equal(found["predicted_age"], want["predicted_age"])
    assert found[["ood_score", "lower", "upper"]].isna().all(axis=None)
    assert set(found["contract"]) != set(want["contract"])
    assert found["in_training"].tolist() == want["in_training"].tolist()  # digests of volumes were there before
    assert "CON-NONE" in run("check", "--manifest", cohort, "--run", run_dir, "--out", tmp_path, code=3).output
    run("evaluate", "--run", run_dir)
    assert json.loads((run_dir / "metrics.json").read_text())["interval"]["half_width"] > 0


def test_the_interval_is_in_every_output(trained):
    run_dir = trained / "tiny_cnn" / "seed0-fold0"
    metrics = json.loads((run_dir / "metrics.json").read_text())
    interval, state = metrics["interval"], next(run_dir.glob("checkpoints/step-*/state.json"))
    test = pd.read_csv(run_dir / "predictions" / "test.csv")
    np.testing.assert_allclose(test["upper"] - test["lower"], 2 * interval["half_width"], atol=2e-4)
    first = test.sort_values("age").drop_duplicates("person")
    inside = first["age"].between(first["lower"], first["upper"])
    assert interval["coverage"]["value"] == pytest.approx(inside.mean())
    page = (run_dir / "report" / "report.html").read_text()
    assert "Prediction interval" in page
    assert metrics["contract"] in page
    assert {"strip", "fingerprint", "seen_voxels"} <= set(json.loads(state.read_text())["meta"])


def test_predict_on_a_folder_finds_the_masks_beside_the_heads(trained, cohort, tmp_path):
    scans = unseen(trained / "tiny_emoe" / "seed0-fold0", cohort).head(2)
    for scan in scans.itertuples():
        name = Path(scan.image).name
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes((cohort.parent / scan.image).read_bytes())
        mask = name.replace("_T1w", "_desc-brain_mask")
        (tmp_path / "in" / mask).write_bytes((cohort.parent / scan.mask).read_bytes())
    run_dir = trained / "tiny_emoe" / "seed0-fold0"
    run("predict", "--run", run_dir, "-i", tmp_path / "in", "-o", tmp_path / "ages.csv")
    found = pd.read_csv(tmp_path / "ages.csv")
    assert found["status"].tolist() == ["ok", "ok"]
    assert found["participant_id"].tolist() == scans["participant_id"].tolist()
    written = pd.read_csv(tmp_path / "ages.csv", dtype="str")["predicted_age"]
    assert written.str.fullmatch(r"\d+\.\d{3}").all()
    for verb in (("predict", "-i", tmp_path, "-o", tmp_path / "none.csv"), ("evaluate",)):
        assert "holds no run" in run(*verb, "--run", run_dir.parent, code=2).output


def test_a_resume_with_another_configuration_or_manifest_touches_nothing(trained, cohort, tmp_path):
    config = trained / "tiny_emoe.yaml"
    run_dir = trained / "tiny_emoe" / "seed0-fold0"
    before = (run_dir / "config.yaml").read_text()
    start = ("train", "--manifest", cohort, "--config", config, "--out", trained, "--fold", "0", "--resume")
    assert "RUN-OTHER" in run(*start, "--set", "training.epochs=9", code=2).output
    other = tmp_path / "other.csv"
    other.write_text(cohort.read_text() + "\n")
    changed = ("--manifest", other, "--data-root", cohort.parent)
    assert "manifest was" in run(*start[:1], *changed, *start[3:], code=4).output
    assert (run_dir / "config.yaml").read_text() == before


def test_predict_agrees_with_the_evaluation(trained, cohort, tmp_path):
    run_dir = trained / "tiny_emoe" / "seed0-fold0"
    output = tmp_path / "ages.csv"
    run("predict", "--run", run_dir, "-i", cohort, "-o", output)
    found = pd.read_csv(output)
    test = pd.read_csv(run_dir / "predictions" / "test.csv")
    got = found["predicted_age"].to_numpy()[test["row"].to_numpy() - 2]
    np.testing.assert_allclose(got, test["predicted_age"], atol=2e-3)


def test_compare_shows_paired_differences(trained):
    shown = run("compare", trained / "tiny_cnn", trained / "tiny_emoe").output
    assert "| tiny_emoe |" in shown
    assert "needs 3 seeds" in shown
    result = json.loads(run("compare", trained / "tiny_cnn", trained / "tiny_emoe", "--json").output)
    assert result["tiny_emoe"]["difference"]["n"] == result["tiny_cnn"]["mae"]["n"]


def test_compare_refuses_arms_that_saw_other_scans(trained, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(trained / "tiny_cnn", copy)
    splits = copy / "seed0-fold0" / "splits.csv"
    splits.write_text(splits.read_text().replace("train", "val", 1))
    assert "another splits" in run("compare", trained / "tiny_emoe", copy, code=3).output


def test_what_is_tracked_shows_no_single_person(trained):
    for page in (trained / "mlartifacts").rglob("report.html"):
        assert "predicted age, years" not in page.read_text()
        assert "<img" not in page.read_text().split("<h2>Routing")[0]
    for path in (trained / "mlartifacts").rglob("metrics.json"):
        metrics = json.loads(path.read_text())
        groups = [found["mae"]["n"] for key in ("by_age", "by_sex", "by_site") for found in metrics[key].values()]
        assert all(n >= 5 for n in groups)
        assert metrics["counts"]["test"]["age_low"] % 5 == 0  # of nobody


def test_the_demo_leaves_other_folders_alone(tmp_path):
    (tmp_path / "cohort").mkdir()
    (tmp_path / "cohort" / "mine.txt").write_text("mine")
    assert "DEMO-FOLDER" in run("demo", "--out", tmp_path, code=2).output
    assert (tmp_path / "cohort" / "mine.txt").is_file()


def test_runs_are_nested_in_mlflow_and_finished(trained):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{trained / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "brainage"]
    runs = client.search_runs([experiment.experiment_id])
    parents = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    children = [r for r in runs if "mlflow.parentRunId" in r.data.tags]
    assert len(parents) == 1
    assert len(children) == 2
    assert {r.data.tags["mlflow.parentRunId"] for r in children} == {parents[0].info.run_id}
    assert {r.info.status for r in runs} == {"FINISHED"}
    metrics = children[0].data.metrics
    assert {"val/mae", "test/mae", "router/captured_variance", "expert/E00/load"} <= set(metrics)


def test_sync_sends_each_run_once_with_its_parent(trained, tmp_path):
    from mlflow.tracking import MlflowClient

    arm = tmp_path / "runs" / "tiny_cnn"  # trained without MLflow
    shutil.copytree(trained / "tiny_cnn", arm)
    store = f"sqlite:///{tmp_path / 'mine.db'}"
    shown = run("sync", "--out", tmp_path / "runs", "--uri", store).output.splitlines()
    assert [line.split(":")[0] for line in shown] == [str(arm), str(arm / "seed0-fold0"), str(arm / "seed0-fold1")]
    again = run("sync", "--out", tmp_path / "runs").output
    assert again.count(": 0 events sent") == 3
    client = MlflowClient(store)
    runs = client.search_runs([client.get_experiment_by_name("brainage").experiment_id])
    (parent,) = [r.info.run_id for r in runs if "mlflow.parentRunId" not in r.data.tags]
    assert [r.data.tags.get("mlflow.parentRunId") for r in runs].count(parent) == 2
    assert all("test/mae" in r.data.metrics for r in runs)
    assert "UI-NONE" in run("sync", "--out", tmp_path / "none", code=2).output
    refused = run("sync", "--out", tmp_path / "runs", "--uri", "https://elsewhere.example", code=2).output
    assert "another machine" in refused


def test_the_template_manifest_without_data_ends_in_one_message():
    result = run("train", "--manifest", REPOSITORY / "data_manifests" / "ukb.csv", code=3)
    errors = [line for line in result.output.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert "manifest ukb --bulk DIR --table" in errors[0]
    assert "--data-root" in errors[0]


def test_the_uk_biobank_command_works_on_a_tree_laid_out_that_way(tmp_path, real_data):
    """Real heads under UK Biobank's names: `manifest ukb`, then `train` as the README has it."""
    table = pd.read_csv(real_data / "ixi" / "manifest.csv").head(12)
    fields = []
    for number, scan in enumerate(table.itertuples()):
        eid = 1000001 + number
        folder = tmp_path / "bulk" / f"{eid}_20252_2_0" / "T1"
        folder.mkdir(parents=True)
        (folder / "T1.nii.gz").write_bytes((real_data / "ixi" / scan.image).read_bytes())
        labels = nib.load(real_data / "ixi" / scan.labels)
        mask = nib.Nifti1Image((np.asarray(labels.dataobj) > 0).astype(np.uint8), labels.affine)
        nib.save(mask, folder / "T1_brain_mask.nii.gz")
        fields.append({"eid": eid, "21003-2.0": scan.age, "31-0.0": number % 2, "54-2.0": 11025})
    pd.DataFrame(fields).to_csv(tmp_path / "fields.csv", index=False)
    manifest = tmp_path / "ukb.csv"
    run("manifest", "ukb", "--bulk", tmp_path / "bulk", "--table", tmp_path / "fields.csv", "-o", manifest)
    config = write_config(tmp_path, "ukb_tiny", LAYER)
    run("train", "--manifest", manifest, "--config", config, "--out", tmp_path / "runs",
        "--data-root", tmp_path / "bulk", "--set", "data.align=affine", "--set", "training.batch_size=2")  # fmt: skip
    metrics = json.loads((tmp_path / "runs" / "ukb_tiny" / "seed0-fold0" / "metrics.json").read_text())
    assert metrics["test"]["mae"]["n"] == 4


def test_rows_without_age_are_refused_by_row(real_data, tmp_path):
    result = run("train", "--manifest", real_data / "ixi" / "participants.csv", "--out", tmp_path, code=3)
    errors = [line for line in result.output.splitlines() if line.startswith("error")]
    assert len(errors) == 4
    assert all("row" in line and "age" in line for line in errors)
    assert not (tmp_path / "emoe").exists()


def test_bad_configuration_names_the_key(cohort, tmp_path):
    config = write_config(tmp_path, "bad")
    for assignment, told in (
        ("training.batch_sise=4", "training.batch_sise"),
        ("model.moe={after_block: 9}", "after_block"),
        ("model.moe={after_block: 1, router: {kind: eigen, rnk: 3}}", "rnk"),
        ("nonsense", "nonsense"),
    ):
        result = run("train", "--manifest", cohort, "--config", config, "--set", assignment, "--out", tmp_path, code=2)
        assert told in result.output
    assert "CFG-MISSING" in run("train", "--manifest", cohort, "--config", tmp_path / "no.yaml", code=2).output


def test_sigterm_saves_and_a_resume_gives_the_uninterrupted_result(cohort, tmp_path):
    config = write_config(tmp_path, "stopped", LAYER)
    command = [sys.executable, "-m", "emoe_med.brainage", "train", "--manifest", str(cohort), "--config", str(config)]
    command += ["--set", "training.epochs=12", "--cache", str(tmp_path / "cache")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(out, *more):
        return subprocess.Popen(
            [*command, "--out", str(out), *more], env=environment, stderr=subprocess.DEVNULL, cwd=REPOSITORY
        )

    whole = start(tmp_path / "whole")
    assert whole.wait(200) == 0
    stopped = start(tmp_path / "parts")
    journal = tmp_path / "parts" / "stopped" / "seed0-fold0" / "journal.jsonl"
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and (not journal.is_file() or journal.read_text().count("val/mae") < 2):
        time.sleep(0.02)
    stopped.terminate()
    assert stopped.wait(60) == 143
    resumed = start(tmp_path / "parts", "--resume")
    assert resumed.wait(200) == 0
    a, b = (
        (tmp_path / name / "stopped" / "seed0-fold0" / "predictions" / "test.csv").read_text()
        for name in ("whole", "parts")
    )
    assert a == b


def test_doctor_tells_versions():
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert json.loads(result.output)["facts"]["versions"]["torch"]
