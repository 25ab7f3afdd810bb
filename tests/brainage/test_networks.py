"""Brain-age networks beside the plain SFCN, through the command line, on phantom heads."""

import json

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from emoe_med.brainage.__main__ import app
from emoe_med.brainage.inference import TrainedModel, pooled_features
from emoe_med.config import BrainAgeConfig
from emoe_med.data.cohort import write_cohort
from emoe_med.models.deep_moe import DeepMoE
from emoe_med.models.vit import ViT

RUN = """
name: {name}
data: {{spacing_mm: 8, oversample: 1, align: centred, folds: 3, val_share: 0.2}}
model: {{{model}, head: l1}}
training: {{epochs: {epochs}, batch_size: 4, lr: 3e-3, threads: 1, select: last}}
evaluation: {{bootstrap: 1000, flip_average: true}}
tracking: {{mlflow: false}}
"""
MODELS = {
    "deepmoe": (
        "channels: [8, 16], pooled: 2, neck: 8, dropout: 0.0, "
        "gating: {embedding: [6, 8], sparsity: 1e-2, held_share: 0.25}"
    ),
    "ermoe_ba": (
        "kind: vit, image_size: [20, 24, 20], patch_size: 4, width: 24, depth: 3, heads: 2, class_token: false, "
        "pool: mean, moe: {blocks: [0, 1], num_experts: 4, top_k: 2, router: {kind: ermoe}, "
        "experts: {kind: eigen, rank: 4}}"
    ),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    cohort = write_cohort(out / "synthetic", persons=20, seed=5, spacing_mm=8.0)
    for name, model in MODELS.items():
        (out / f"{name}.yaml").write_text(RUN.format(name=name, model=model, epochs=20))
        result = CliRunner().invoke(
            app, ["train", "--manifest", str(cohort), "--config", str(out / f"{name}.yaml"), "--out", str(out)]
        )
        assert result.exit_code == 0, result.output
    return out


def epochs_of(run_dir):
    events = [json.loads(line) for line in (run_dir / "journal.jsonl").read_text().splitlines()]
    return [event["values"] for event in events if "train/loss" in event.get("values", {})]


@pytest.mark.parametrize("name", MODELS)
def test_it_learns_the_age_of_phantoms(trained, name):
    run_dir = trained / name / "seed0-fold0"
    epochs = epochs_of(run_dir)
    assert epochs[-1]["train/task"] < 0.8 * epochs[0]["train/task"]
    table = pd.read_csv(run_dir / "predictions" / "test.csv")
    assert table["predicted_age"].std() > 3  # not one age for all


def test_gates_are_told_and_stand_still_at_last(trained):
    run_dir = trained / "deepmoe" / "seed0-fold0"
    found = json.loads((run_dir / "metrics.json").read_text())["channels"]
    assert [*found["layers"]] == ["blocks.0", "blocks.1"]
    assert found["macs"]["mean"] < found["macs"]["all_on"]
    assert found["mae_mean_gates"]["n"] > 0
    epochs = epochs_of(run_dir)
    assert [epoch["train/embedding"] > 0 for epoch in epochs] == [True] * 15 + [False] * 5
    assert len({epoch["router/active"] for epoch in epochs[15:]}) == 1


def test_each_routed_block_is_told(trained):
    run_dir = trained / "ermoe_ba" / "seed0-fold0"
    found = json.loads((run_dir / "metrics.json").read_text())["routing"]
    assert [*found] == ["block0", "block1"]
    last = epochs_of(run_dir)[-1]
    assert {"router/block0/cv", "router/block1/alpha", "expert/block1/E03/load"} <= set(last)


@pytest.mark.parametrize("name", MODELS)
def test_pooled_features_are_what_the_last_layer_sees(trained, name):
    model = TrainedModel.load(trained / name / "seed0-fold0")
    net = model.net.net
    image = torch.rand(2, 1, 20, 24, 20)
    with torch.no_grad(), pooled_features(model.net) as seen:
        output = model.net(image).output
    if isinstance(net, ViT):
        expected = net.head(seen[0])
    else:
        assert isinstance(net, DeepMoE)
        expected = net.net.head(seen[0][..., None, None, None]).flatten(1)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (
            {"kind": "vit", "image_size": [40, 48, 40], "patch_size": 8, "width": 8, "depth": 1, "heads": 1},
            "the box is",
        ),
        ({"kind": "vgg"}, "kind is not one of sfcn, vit"),
        ({"moe": {"after_block": 1}, "gating": {}}, "one of them"),
        ({"gating": {"held_share": 1}}, "held_share"),
        ({"gating": {}}, "epochs 1: one of DeepMoE's two stages has none"),
        ({"gating": {"held_share": 0.6}}, "one of DeepMoE's two stages has none"),
    ],
)
def test_what_cannot_work_is_refused(model, told):
    with pytest.raises(ValueError, match=told):
        BrainAgeConfig(name="x", model=model, training={"epochs": 1, "lr": 1e-3})
