"""Weights by name, compared with what a model has before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from emoe_med.errors import CheckpointError, Fault


def check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, torch.Size], path: Path) -> None:
    """Compare names and shapes; every difference is a fault of its own.

    Raises:
        CheckpointError: A name is missing or unknown, or a shape differs.
    """
    missing = sorted(set(expected) - set(found))
    faults = [Fault("CKPT-KEY", f"{name} is missing", str(path)) for name in missing]
    for name, tensor in sorted(found.items()):
        if name not in expected:
            faults.append(Fault("CKPT-KEY", f"{name} is unknown to this model", str(path)))
        elif tensor.shape != expected[name]:
            shapes = f"{list(tensor.shape)}, the model has {list(expected[name])}"
            faults.append(Fault("CKPT-SHAPE", f"{name} has shape {shapes}", str(path)))
    if faults:
        raise CheckpointError(*faults)
