"""A single-gated mixture through the vision command line, on real digits."""

import json

import numpy as np
import pandas as pd
import pytest
from command_line import typed
from sklearn.metrics import normalized_mutual_info_score

from emoe_med.data.images import ImageDataset, list_images
from emoe_med.vision.__main__ import app
from emoe_med.vision.evaluate import TrainedClassifier

RUN = """
name: tiny_gated
data: {dataset: digits, resize: 8, val_share: 0.1, train_images: 600}
augment: {crop: pad, pad: 1, mixup: 0.2}
loss: {label_smoothing: 0.1}
model:
  kind: resnet
  image_size: 8
  stem: cifar
  width: 0.125
  single_gated: {num_experts: 3, stages: 3, expert_epochs: 2, tau: 0.6}
training: {epochs: 6, batch_size: 30, lr: 5e-3, threads: 1, select: last}
evaluation: {bootstrap: 1000}
tracking: {mlflow: false}
"""


run = typed(app)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    (out / "run.yaml").write_text(RUN)
    run("train", "--config", out / "run.yaml", "--out", out)
    return out / "tiny_gated" / "seed0"


@pytest.fixture(scope="module")
def metrics(trained):
    return json.loads((trained / "metrics.json").read_text())


def test_it_learns_digits_and_the_curve_holds_the_run_itself(metrics, trained):
    assert metrics["test"]["top1"]["low"] > 40  # ten classes; chance is 10
    curve = metrics["early_exit"]["curve"]
    assert metrics["early_exit"]["tau"] == 0.6
    (mine,) = [point for point in curve if point["tau"] == 0.6]
    assert mine["score"] == metrics["test"]["top1"]
    assert 0 < mine["answered_alone"] < 1
    costs, alone = ([point[name] for point in curve] for name in ("macs", "answered_alone"))
    assert costs[:-1] == sorted(costs[:-1])  # near 1 an unsure gate runs several experts, which costs more than one
    assert alone == sorted(alone, reverse=True)
    cost = metrics["early_exit"]["macs"]
    assert costs[0] == cost["base"] + cost["gate"]
    assert curve[-1]["tau"] is None
    assert costs[-1] == sum(cost.values())
    assert "not on the allow-list" not in (trained / "local.log").read_text()


def test_routing_is_told_as_that_of_any_layer(metrics, trained):
    gate = metrics["routing"]["gate"]
    assert sum(gate[f"load/E{k:02d}"] for k in range(3)) == pytest.approx(1)
    assert {"cv", "dead", "output_cosine", "output_cka"} <= set(gate)
    model = TrainedClassifier.load(trained)
    listing = list_images("digits", None)
    model.net.tau = None
    data = ImageDataset(listing.test, 8, 1)
    sent = [(out.routing["gate"].expert_index[:, 0], batch["label"]) for batch, out in model.outputs(data)]
    assert gate["nmi"] == pytest.approx(normalized_mutual_info_score(*map(np.concatenate, zip(*sent, strict=True))))
    table = pd.read_csv(trained / "predictions" / "test.csv")
    base = [model.net.base(image).output.argmax(1) == batch["label"] for batch, image in model.inputs(data)]
    lost = 100 * (np.mean(table["rank"] == 0) - np.mean(np.concatenate(base)))
    assert gate["error_without_branch"]["value"] == pytest.approx(lost)
    assert gate["error_permuted_routing"]["n"] == len(table)


def test_every_verb_takes_it(trained):
    assert "top1" in run("evaluate", "--run", trained).output
    assert "early_exit" in json.loads((trained / "metrics.json").read_text())
    assert "ridge" in run("fewshot", "--run", trained, "--shots", "5", "--draws", "2").output
    assert "gate" in run("heatmap", "--run", trained).output
    table = pd.read_csv(trained / "expert_maps" / "expert_class.csv")
    served = table[table["layer"] == "gate"].groupby("class")["patches"].sum()
    assert served.between(0, 1).all()  # of the images of a class, those that the base does not answer alone


def test_resume_of_a_finished_run_touches_nothing(trained):
    before = (trained / "metrics.json").stat().st_mtime_ns
    run("train", "--config", trained.parent.parent / "run.yaml", "--out", trained.parent.parent, "--resume")
    assert (trained / "metrics.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("assignment", "told"),
    [
        ("training.epochs=3", "gate and experts leave none"),
        ("model.single_gated.stages=5", "the net has 4"),
        ("model.single_gated.tau=2", "tau"),
        ("model.single_gated.num_experts=601", "CFG-EXPERTS"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, assignment, told):
    (tmp_path / "run.yaml").write_text(RUN)
    result = run("train", "--config", tmp_path / "run.yaml", "--out", tmp_path, "--set", assignment, code=2)
    assert told in result.output
