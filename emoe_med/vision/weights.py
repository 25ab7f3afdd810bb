"""Bring published weights into a file that a run can start from."""

from __future__ import annotations

from pathlib import Path

import torch

from emoe_med.errors import CheckpointError, ConfigError, Fault
from emoe_med.models.resnet import ResNet, ResNetOptions
from emoe_med.models.state import axis_size, check_tensors
from emoe_med.models.weights import ViTWeights, check_whole, read_foreign, resized, write_weights
from emoe_med.storage import replace_file


def import_file(
    source: Path,
    output: Path,
    image_size: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> str:
    """Check published weights, interpolate the position embedding on demand, write them; returns what they are.

    Raises:
        CheckpointError: Not readable, not whole, not finite, or without constants.
        ConfigError: The image does not divide into the patches, or the constants cannot be.
        StorageError: It cannot be written there.
    """
    if (mean is None) != (std is None):
        raise ConfigError(Fault("CLI-NUMBERS", "--mean and --std go together"))
    weights = read_foreign(source, mean, std)
    if "layer1.0.conv1.weight" in weights.tensors:
        if image_size is not None:
            raise ConfigError(Fault("CLI-SIZE", "--image-size: a ResNet has no position embedding", str(source)))
        what = _resnet(weights, source)
    else:
        weights, what = _transformer(weights, source, image_size)
    replace_file(output, write_weights(weights))
    return f"{output}: {what}; mean {weights.mean}, std {weights.std}"


def _transformer(weights: ViTWeights, source: Path, image_size: int | None) -> tuple[ViTWeights, str]:
    options = check_whole(weights, source)
    if image_size is not None:
        if image_size < 1 or image_size % options.patch_size:
            reason = f"--image-size {image_size} does not divide into patches of {options.patch_size}"
            raise ConfigError(Fault("CLI-SIZE", reason))
        weights = resized(weights, image_size // options.patch_size, options.prefix)
    classes = axis_size(weights.tensors, "head.bias") or "no"
    branches = len({name.split(".")[1] for name in weights.tensors if ".moe." in name})
    edge = image_size or options.image_size[0]
    shape = f"width {options.width}, depth {options.depth}, patches of {options.patch_size}, images of {edge}"
    return weights, f"{shape}, {classes} classes, {branches} routed layers"


def _resnet(weights: ViTWeights, source: Path) -> str:
    """Compare every name and shape with the network that the file seems to be of; a head may be missing."""
    found = weights.tensors
    for name in ("conv1.weight", "layer1.0.conv1.weight"):
        if name not in found or found[name].ndim != 4 or not found[name].numel():
            raise CheckpointError(Fault("CKPT-KEY", f"holds no {name} of a ResNet", str(source)))
    options, classes = ResNetOptions.of(found), axis_size(found, "fc.bias")
    with torch.device("meta"):
        own = ResNet(classes or 1, options).state_dict()
    # files of before torch 0.4.1, torchvision's among them, do not have these; nothing is computed from them
    found.update({name: torch.tensor(0) for name in own if name.endswith(".num_batches_tracked") and name not in found})
    check_tensors(found, {name: t.shape for name, t in own.items() if classes or not name.startswith("fc.")}, source)
    return f"ResNet-{options.depth}, width {options.width:g}, inner {options.inner:g}, {classes or 'no'} classes"
