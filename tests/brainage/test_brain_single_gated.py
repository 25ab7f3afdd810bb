"""A single-gated mixture through the brain-age command line, on a small synthetic cohort."""

import json

import numpy as np
import pandas as pd
import pytest
from command_line import typed

from emoe_med.brainage.__main__ import app
from emoe_med.brainage.inference import TrainedModel

RUN = """
name: tiny_gated
data: {spacing_mm: 8, oversample: 1, align: centred, folds: 3, val_share: 0.3}
augment: {flip: 0.5, shift_voxels: 1}
model:
  stem: 1
  channels: [4, 8]
  pooled: 1
  neck: 8
  dropout: 0.2
  head: soft_label
  single_gated: {num_experts: 2, stages: 1, expert_epochs: 1, tau: 0.3}
training: {epochs: 3, batch_size: 4, lr: 3e-3, threads: 1, select: last}
evaluation: {bootstrap: 1000}
tracking: {mlflow: false}
"""


run = typed(app)


@pytest.fixture(scope="module")
def trained(cohort, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    (out / "run.yaml").write_text(RUN)
    run("train", "--manifest", cohort, "--config", out / "run.yaml", "--out", out, "--fold", "0")
    return out / "tiny_gated" / "seed0-fold0"


def test_the_run_is_told_like_any_other(trained):
    metrics = json.loads((trained / "metrics.json").read_text())
    gate = metrics["routing"]["gate"]
    assert {"mae_without_branch", "mae_permuted_routing", "cv", "dead", "load/E01"} <= set(gate)
    curve = metrics["early_exit"]["curve"]
    (mine,) = [point for point in curve if point["tau"] == 0.3]
    # the run averages over no view, so that both look at the volume as it is
    for name in ("value", "low", "high", "n"):
        assert mine["score"][name] == pytest.approx(metrics["test"]["mae"][name], abs=1e-3)
    costs = [point["macs"] for point in curve[:-1]]
    assert costs == sorted(costs)
    assert "Routing" in (trained / "report" / "report.html").read_text()
    assert (trained.parent / "summary.json").is_file()


def test_it_is_scored_again_and_predicts(trained, cohort, tmp_path):
    before = json.loads((trained / "metrics.json").read_text())
    run("evaluate", "--run", trained)
    after = json.loads((trained / "metrics.json").read_text())
    assert after["early_exit"] == before["early_exit"]
    assert after["routing"] == before["routing"]
    run("predict", "--run", trained, "-i", cohort, "-o", tmp_path / "ages.csv")
    ages = pd.read_csv(tmp_path / "ages.csv")
    assert np.isfinite(ages["predicted_age"]).any()
    assert TrainedModel.load(trained).net.net.tau == 0.3
    run("export", "--run", trained, "-o", tmp_path / "bundle")  # reads itself back and predicts


def test_one_number_has_no_early_exit(cohort, tmp_path):
    (tmp_path / "run.yaml").write_text(RUN)
    command = ("train", "--manifest", cohort, "--config", tmp_path / "run.yaml", "--out", tmp_path, "--fold", "0")
    assert "one number" in run(*command, "--set", "model.head=l1", code=2).output
    run(*command, "--set", "model.head=l1", "--set", "model.single_gated.tau=null")
    metrics = json.loads((tmp_path / "tiny_gated" / "seed0-fold0" / "metrics.json").read_text())
    assert [point["tau"] for point in metrics["early_exit"]["curve"]] == [0.0, None]
    moe = "model.moe={after_block: 1, num_experts: 3, router: {kind: eigen, rank: 3}}"
    assert "one of them" in run(*command, "--set", moe, code=2).output
