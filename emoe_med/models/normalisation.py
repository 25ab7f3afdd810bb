"""The constants that pixels are normalised by; needs no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from emoe_med.errors import CheckpointError, Fault


def flaw(mean: Sequence[float], std: Sequence[float], channels: int | None = None) -> str | None:
    """Say why pixels in 0 to 1 cannot be normalised as (pixel - mean) / std; None where they can.

    Args:
        mean: [C].
        std: [C].
        channels: C, as far as it is known: one value would serve all channels in silence.
    """
    if len(mean) != len(std) or not mean:
        return f"{len(mean)} means and {len(std)} standard deviations"
    if channels is not None and len(mean) != channels:
        return f"{len(mean)} means and standard deviations for {channels} channels"
    if not all(0 <= value <= 1 for value in mean):  # nor is a NaN
        return f"means {list(mean)} are not within 0 and 1, as pixels are"
    if not all(0 < value <= 1 for value in std):
        return f"standard deviations {list(std)} are not above 0 and up to 1"
    return None


def published_constants(path: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Read mean and std [C] from timm's or Hugging Face's configuration beside a file of weights.

    Raises:
        CheckpointError: WGT-NORM, there is none, or none that can be read.
    """
    for name, keys in (("config.json", ("mean", "std")), ("preprocessor_config.json", ("image_mean", "image_std"))):
        beside = path.with_name(name)
        if not beside.is_file():
            continue
        try:
            content = json.loads(beside.read_text("utf-8"))
            content = content.get("pretrained_cfg", content)
            if keys[0] in content:
                mean, std = (tuple(float(value) for value in content[key]) for key in keys)
                return mean, std
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(Fault("WGT-NORM", f"has no usable constants ({error})", str(beside))) from error
    hint = "give --mean and --std as its authors trained it, e.g. 0.5,0.5,0.5"
    raise CheckpointError(Fault("WGT-NORM", "no constants to normalise pixels by lie beside it", str(path), hint=hint))
