"""Bring published weights into a file that a run can start from."""

from __future__ import annotations

from pathlib import Path

from emoe_med.data.files import replace_file
from emoe_med.errors import ConfigError, Fault
from emoe_med.models.weights import check_whole, read_foreign, resized, write_weights


def import_file(
    source: Path,
    output: Path,
    image_size: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> str:
    """Check published weights, interpolate the position embedding on demand, write them; returns what they are.

    Raises:
        CheckpointError: Not readable, not whole, or without constants.
        ConfigError: The image does not divide into the patches.
    """
    weights = read_foreign(source, mean, std)
    options = check_whole(weights, source)
    if image_size is not None:
        if image_size % options.patch_size:
            reason = f"--image-size {image_size} does not divide into patches of {options.patch_size}"
            raise ConfigError(Fault("CLI-SIZE", reason))
        weights = resized(weights, image_size // options.patch_size, options.prefix)
    replace_file(output, write_weights(weights))
    classes = len(weights.tensors.get("head.bias", ())) or "no"
    branches = len({name.split(".")[1] for name in weights.tensors if ".moe." in name})
    edge = image_size or options.image_size[0]
    shape = f"width {options.width}, depth {options.depth}, patches of {options.patch_size}, images of {edge}"
    constants = f"mean {weights.mean}, std {weights.std}"
    return f"{output}: {shape}, {classes} classes, {branches} routed layers; {constants}"
