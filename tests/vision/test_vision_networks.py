"""Networks without tokens through the vision command line, on real digits."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from emoe_med.vision.__main__ import app
from emoe_med.vision.evaluate import TrainedClassifier

RESNET = """
name: tiny_resnet
data: {dataset: digits, resize: 8, val_share: 0.1, train_images: 600}
augment: {crop: pad, pad: 1}
model: {kind: resnet, image_size: 8, stem: cifar, width: 0.125}
training: {epochs: 3, batch_size: 30, lr: 5e-3, threads: 1, select: last}
evaluation: {bootstrap: 1000, routing_images: 50}
tracking: {mlflow: false}
"""


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    (out / "run.yaml").write_text(RESNET)
    run("train", "--config", out / "run.yaml", "--out", out)
    return out / "tiny_resnet" / "seed0"


def test_a_resnet_learns_digits(resnet):
    metrics = json.loads((resnet / "metrics.json").read_text())
    assert metrics["test"]["top1"]["low"] > 60  # ten classes; chance is 10
    assert "routing" not in metrics
    test = pd.read_csv(resnet / "predictions" / "test.csv")
    assert metrics["test"]["top1"]["value"] == pytest.approx(100 * (test["label"] == test["predicted"]).mean())


def test_its_pooled_features_are_probed(resnet):
    found = json.loads(run("fewshot", "--run", resnet, "--shots", "10", "--draws", "2", "--json").output)
    assert [*found["10"]] == ["mean"]
    assert found["10"]["mean"]["ridge"]["value"] > 50


def test_it_has_no_heat_map(resnet):
    assert "HEAT-NONE" in run("heatmap", "--run", resnet, code=2).output


def test_the_trained_net_is_the_one_kept(resnet):
    model = TrainedClassifier.load(resnet)
    assert model.net.options.width == 0.125
    assert np.isfinite(torch.cat([p.flatten() for p in model.net.parameters()]).detach().numpy()).all()
