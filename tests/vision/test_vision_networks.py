"""Networks without tokens through the vision command line and the training loop, on real digits."""

import json
import os
import signal

import numpy as np
import pandas as pd
import pytest
import torch
from command_line import typed
from safetensors.torch import save_file
from torch.utils.data import Subset

from emoe_med.data.image_layouts import Pixels
from emoe_med.data.images import ImageDataset, list_images
from emoe_med.errors import Interrupted
from emoe_med.models.resnet import ResNet, ResNetOptions
from emoe_med.models.weights import read_weights
from emoe_med.training.checkpoint import CheckpointFolder, load_model_state
from emoe_med.training.loop import fit
from emoe_med.training.tracking import Tracker
from emoe_med.vision.__main__ import app
from emoe_med.vision.config import VisionConfig
from emoe_med.vision.evaluate import TrainedClassifier, predict
from emoe_med.vision.fewshot import features
from emoe_med.vision.net import build_net
from emoe_med.vision.task import VisionTask

RESNET = """
name: tiny_resnet
data: {dataset: digits, resize: 8, val_share: 0.1, train_images: 600}
augment: {crop: pad, pad: 1}
model: {kind: resnet, image_size: 8, stem: cifar, width: 0.125}
training: {epochs: 3, batch_size: 30, lr: 5e-3, threads: 1, select: last}
evaluation: {bootstrap: 1000, routing_images: 50}
tracking: {mlflow: false}
"""
GATING = ", gating: {embedding: [12, 16], sparsity: 1e-2, held_share: 0.34}"


run = typed(app)


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


def test_published_weights_are_started_from(tmp_path):
    torch.manual_seed(9)
    published = ResNet(7, ResNetOptions(stem="cifar", in_channels=1, width=0.125))
    # torchvision's files do not count the batches of their norms
    state = {name: tensor for name, tensor in published.state_dict().items() if "num_batches" not in name}
    save_file(state, tmp_path / "published.safetensors")
    file, constants = tmp_path / "start.safetensors", ("--mean", "0.3", "--std", "0.4")
    told = run("import-weights", tmp_path / "published.safetensors", "-o", file, *constants).output
    assert "ResNet-18, width 0.125, inner 1, 7 classes" in told.replace("\n", " ")
    start = read_weights(file)
    config = VisionConfig(
        name="x",
        data={"dataset": "digits", "resize": 8},
        model={"kind": "resnet", "image_size": 8, "stem": "cifar", "width": 0.125, "weights": str(file)},
        training={"epochs": 1, "lr": 1e-3},
    )
    net = build_net(config.model, 1, 10, start)
    assert torch.equal(net.layer4[1].conv2.weight, published.layer4[1].conv2.weight)
    assert net.fc.weight.shape == (10, 64)
    save_file({**published.state_dict(), "conv2.weight": torch.ones(1)}, tmp_path / "other.safetensors")
    refused = run("import-weights", tmp_path / "other.safetensors", "-o", tmp_path / "no", *constants, code=4).output
    assert "CKPT-KEY" in refused


def test_it_has_no_heat_map(resnet):
    assert "HEAT-NONE" in run("heatmap", "--run", resnet, code=2).output


def test_the_trained_net_is_the_one_kept(resnet):
    model = TrainedClassifier.load(resnet)
    assert model.net.options.width == 0.125
    assert np.isfinite(torch.cat([p.flatten() for p in model.net.parameters()]).detach().numpy()).all()


def test_a_listing_by_class_is_evaluated_in_mixed_batches_and_told_in_its_order(resnet):
    model, test = TrainedClassifier.load(resnet), list_images("digits", None).test
    order = np.argsort(test.labels, kind="stable")
    data = ImageDataset(Pixels(test.pixels[order], test.labels[order]), 8, 1)
    batches = [batch["label"].unique() for batch, _ in model.inputs(data)]
    assert min(map(len, batches[:-1])) > 3
    table = predict(model, data)
    assert table["row"].tolist() == list(range(len(data)))
    assert table["label"].tolist() == np.sort(test.labels).tolist()
    found = features(model, data)["mean"]
    np.testing.assert_allclose(features(model, Subset(data, [250]))["mean"][0], found[250], rtol=1e-4, atol=1e-5)
    assert not np.allclose(found[250], found[251], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def deep_moe(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    text = (
        RESNET.replace("tiny_resnet", "tiny_deepmoe")
        .replace("0.125", "0.125" + GATING)
        .replace("epochs: 3", "epochs: 6")
    )
    (out / "run.yaml").write_text(text)
    run("train", "--config", out / "run.yaml", "--out", out)
    return out / "tiny_deepmoe" / "seed0"


def test_a_deep_moe_learns_digits_and_tells_what_it_leaves_out(deep_moe):
    metrics = json.loads((deep_moe / "metrics.json").read_text())
    assert metrics["test"]["top1"]["low"] > 30  # chance is 10
    found = metrics["channels"]
    assert len(found["layers"]) == 17
    for layer in found["layers"].values():
        assert layer["never"] + layer["sometimes"] + layer["always"] == pytest.approx(1)
        assert layer["always"] <= layer["active"] <= 1 - layer["never"] + 1e-9
    assert 0.1 < found["active"] < 1
    macs = found["macs"]
    assert macs["least"] <= macs["mean"] <= macs["most"] <= macs["all_on"]
    assert macs["least"] < macs["most"]
    assert found["error_mean_gates"]["n"] == 50


def test_its_stages_are_in_the_record(deep_moe):
    events = [json.loads(line) for line in (deep_moe / "journal.jsonl").read_text().splitlines()]
    epochs = [event["values"] for event in events if "train/loss" in event.get("values", {})]
    assert [epoch["train/embedding"] > 0 for epoch in epochs] == [True] * 4 + [False] * 2
    assert [epoch["train/aux"] > 0 for epoch in epochs] == [True] * 4 + [False] * 2
    assert epochs[4]["router/active"] == epochs[5]["router/active"]  # the gating stands still
    assert epochs[0]["router/active"] != epochs[3]["router/active"]
    assert epochs[5]["router/macs"] > 0
    assert epochs[5]["val/loss"] != epochs[4]["val/loss"]


def test_its_gated_features_are_probed(deep_moe):
    found = json.loads(run("fewshot", "--run", deep_moe, "--shots", "5", "--draws", "2", "--json").output)
    assert found["5"]["mean"]["ridge"]["value"] > 20


class Signalled(VisionTask):
    """Sends its own process a signal in the n-th call of `prepare`; 0 is never."""

    call = 0

    def prepare(self, batch, train, keys):
        self.call -= 1
        if self.call == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().prepare(batch, train, keys)


@pytest.mark.parametrize("call", [8, 13])
def test_two_stages_resume_bit_for_bit(call, tmp_path):
    model = {
        "kind": "resnet", "image_size": 8, "stem": "cifar", "width": 0.0625,
        "gating": {"embedding": [4, 6], "held_share": 0.5},
    }  # fmt: skip
    training = {"epochs": 4, "batch_size": 10, "lr": 1e-2, "threads": 1, "weight_decay": 0.1, "ema_decay": 0.9}
    config = VisionConfig(name="x", data={"dataset": "digits", "resize": 8}, model=model, training=training)
    data = ImageDataset(list_images("digits", None).train, 8, 1)
    meta = {"classes": list("0123456789"), "channels": 1, "mean": (0.3,), "std": (0.3,)}

    def train(folder, call=0, resume=False):
        task = Signalled(config, data, range(40), range(40, 50), {}, meta)
        task.call = call
        with Tracker(folder, uri="none", strict=True) as tracker:
            return fit(task, config.training, folder, tracker, resume)

    def outcome(folder):
        state = CheckpointFolder(folder).load("last").state
        return state["files"], state["random"], state["position"]["history"]

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    result = train(whole)
    with pytest.raises(Interrupted):  # epochs of 4 steps and a validation: amid either stage
        train(stopped, call)
    train(stopped, resume=True)
    assert outcome(stopped) == outcome(whole)
    weights, _ = load_model_state(result.checkpoint)
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
