"""Published weights that are not whole, and constants that cannot be: one line, the documented code, no file."""

import json
import math
import re

import pytest
import torch
from command_line import typed
from safetensors.torch import save_file

from emoe_med.errors import CheckpointError
from emoe_med.models.resnet import ResNet, ResNetOptions
from emoe_med.models.vit import ViT, ViTOptions
from emoe_med.vision.__main__ import app
from emoe_med.vision.weights import import_file

run = typed(app)
THREE = ("--mean", "0.5,0.4,0.3", "--std", "0.2,0.2,0.2")
TO_HUGGING_FACE = (  # the other way round than the table of the reader
    ("cls_token", "vit.embeddings.cls_token"),
    ("pos_embed", "vit.embeddings.position_embeddings"),
    ("patch_embed.proj", "vit.embeddings.patch_embeddings.projection"),
    ("blocks.", "vit.encoder.layer."),
    ("norm1", "layernorm_before"),
    ("norm2", "layernorm_after"),
    ("attn.proj", "attention.output.dense"),
    ("mlp.fc1", "intermediate.dense"),
    ("mlp.fc2", "output.dense"),
    ("head.", "classifier."),
)


def timm(depth=1):
    torch.manual_seed(0)
    return dict(ViT(5, ViTOptions((8, 8), 4, 3, width=8, depth=depth, heads=2)).state_dict())


def hugging_face():
    named = {}
    for name, tensor in timm().items():
        for ours, theirs in TO_HUGGING_FACE:
            name = name.replace(ours, theirs)
        if name.startswith("norm."):
            name = f"vit.layer{name}"
        if ".attn.qkv." in name:
            parts = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
            named |= {name.replace("attn.qkv", f"attention.attention.{part}"): value.clone() for part, value in parts}
        else:
            named[name] = tensor
    return named


def resnet():
    torch.manual_seed(0)
    return dict(ResNet(5, ResNetOptions(stem="cifar", width=1 / 16)).state_dict())


def refused(tmp_path, state, code=4, options=THREE, beside=None):
    """Return the line that the import of these weights ends with."""
    folder = tmp_path / "source"
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    if beside is not None:
        (folder / "config.json").write_text(json.dumps(beside))
    shown = run("import-weights", folder / "model.safetensors", "-o", tmp_path / "ours", *options, code=code).output
    assert [path.name for path in tmp_path.iterdir()] == ["source"], "nothing is written"
    assert shown.startswith("error ")
    (line,) = shown.splitlines()
    return line


@pytest.mark.parametrize("state", [timm, hugging_face, resnet])
def test_whole_weights_are_taken(tmp_path, state):
    save_file(state(), tmp_path / "model.safetensors")
    assert "5 classes" in run("import-weights", tmp_path / "model.safetensors", "-o", tmp_path / "ours", *THREE).output


@pytest.mark.parametrize("state", [timm, hugging_face, resnet])
def test_a_tensor_that_is_missing_or_of_another_rank_is_refused(tmp_path, state):
    whole = state()
    ours, source = tmp_path / "ours", tmp_path / "model.safetensors"
    for name in [name for name in whole if not name.startswith("layer") or name == "layer1.0.conv1.weight"]:
        rest, tensor = {other: value for other, value in whole.items() if other != name}, whole[name]
        for changed in (None, tensor.flatten()[:0], tensor.flatten()[0].clone(), tensor[None].clone()):
            if changed is not None and changed.shape == tensor.shape:
                continue
            if changed is None and name.endswith("num_batches_tracked"):
                continue  # torchvision's files have none
            save_file(rest if changed is None else {**rest, name: changed}, source)
            with pytest.raises(CheckpointError) as caught:
                import_file(source, ours, None, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
            assert all(fault.file == str(source) for fault in caught.value.faults), name
            assert not ours.exists()


@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_query_key_and_value_go_together(tmp_path, part):
    state = hugging_face()
    del state[f"vit.encoder.layer.0.attention.attention.{part}.weight"]
    assert "CKPT-KEY" in (line := refused(tmp_path, state))
    assert f"blocks.0.attn.{part}.weight" in line


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--mean", "0.5,0.4,0.3"), "CLI-NUMBERS  --mean and --std go together"),
        (("--std", "0.5,0.4,0.3"), "CLI-NUMBERS  --mean and --std go together"),
        (("--mean", "0.5,0.4,0.3", "--std", "0,0,0"), "standard deviations [0.0, 0.0, 0.0] are not above 0"),
        (("--mean", "0.5,0.4,0.3", "--std", "1,1,-1"), "are not above 0"),
        (("--mean", "0.5,0.4,0.3", "--std", "1,1,inf"), "are not above 0"),
        (("--mean", "nan,0,0", "--std", "1,1,1"), "means [nan, 0.0, 0.0] are not within 0 and 1"),
        (("--mean", "127,127,127", "--std", "1,1,1"), "are not within 0 and 1"),
        (("--mean", "0.5,0.5", "--std", "1,1"), "2 means and standard deviations for 3 channels"),
        (("--mean", "0.5", "--std", "1"), "1 means and standard deviations for 3 channels"),
        (("--mean", "0.5,0.5", "--std", "1,1,1"), "2 means and 3 standard deviations"),
        ((*THREE, "--image-size", "0"), "CLI-SIZE  --image-size 0"),
        ((*THREE, "--image-size", "-8"), "CLI-SIZE  --image-size -8"),
    ],
)
def test_options_that_cannot_be_are_one_line(tmp_path, options, told):
    assert told in refused(tmp_path, timm(), code=2, options=options)


@pytest.mark.parametrize(
    ("beside", "told"),
    [
        ({"mean": [0.5, 0.5], "std": [0.5, 0.5, 0.5]}, "2 means and 3 standard deviations"),
        ({"pretrained_cfg": {"mean": [0.5] * 3, "std": [0] * 3}}, "are not above 0"),
        ({"mean": [math.nan] * 3, "std": [0.5] * 3}, "are not within 0 and 1"),
        ({"mean": 0.5, "std": 0.5}, "has no usable constants"),
        ([], "has no usable constants"),
    ],
)
def test_constants_beside_the_file_that_cannot_be_are_one_line(tmp_path, beside, told):
    line = refused(tmp_path, timm(), options=(), beside=beside)
    assert "WGT-NORM" in line
    assert told in line


def test_weights_that_are_no_numbers_or_no_network_are_one_line(tmp_path):
    for number, (state, code, options, told) in enumerate(
        (
            ({**timm(), "norm.bias": torch.tensor([0, math.nan] * 4)}, 4, THREE, "WGT-NAN"),
            (timm(depth=0), 4, THREE, "blocks of a ViT"),
            (resnet(), 2, (*THREE, "--image-size", "99"), "a ResNet has no position embedding"),
        )
    ):
        (folder := tmp_path / str(number)).mkdir()
        assert told in refused(folder, state, code, options)


def test_places_that_cannot_be_are_one_line(tmp_path):
    source = tmp_path / "model.safetensors"
    save_file(timm(), source)
    (tmp_path / "text.pth").write_text("no weights")
    for given, output, code, told in (
        (source, tmp_path / "nowhere" / "ours", 6, "error STORE-WRITE"),
        (tmp_path, tmp_path / "ours", 4, "is a folder; name the file"),
        (tmp_path / "none", tmp_path / "ours", 4, "is not there"),
        (tmp_path / "text.pth", tmp_path / "ours", 4, "none of torch's files, is damaged, or holds more than tensors"),
    ):
        (line,) = run("import-weights", given, "-o", output, *THREE, code=code).output.splitlines()
        assert told in line
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "text.pth"}


@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        ({"mean": "[0.5", "std": "[0.5]"}, "WGT-FILE.*no usable normalisation constants"),
        ({"mean": "3", "std": "[0.5]"}, "WGT-FILE.*no usable"),
        ({"mean": "[0.5]", "std": "[0]"}, "WGT-FILE.*not above 0"),
        ({"mean": "[0.5, 0.5, 0.5]", "std": "[0.5, 0.5, 0.5]"}, "WGT-NORM.*3 means.* for 1 channels of digits"),
    ],
)
def test_a_run_does_not_start_from_constants_that_cannot_be(tmp_path, metadata, told):
    path = tmp_path / "ours.safetensors"
    save_file(timm(), path, metadata)
    started = ("train", "--out", tmp_path / "runs", "--set", f"model.weights={path}")
    (line,) = run(*started, code=4).output.splitlines()
    assert re.search(told, line)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("constants", "told"),
    [
        (("[0.5, 0.5]", "[0.5, 0.5]"), "CFG-NORM  data.mean and data.std: 2 means"),
        (("[0.5]", "[0]"), "not above 0"),
        (("[]", "[]"), "0 means"),
        (("[.nan]", "[1]"), "not within 0 and 1"),
    ],
)
def test_a_run_does_not_start_with_constants_for_other_channels(tmp_path, constants, told):
    given = [
        part
        for name, value in zip(("mean", "std"), constants, strict=True)
        for part in ("--set", f"data.{name}={value}")
    ]
    (line,) = run("train", "--out", tmp_path / "runs", *given, code=2).output.splitlines()
    assert told in line
    assert not (tmp_path / "runs").exists()
