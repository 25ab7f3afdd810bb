"""Weights by name, compared with what a model has before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from emoe_med.errors import CheckpointError, Fault

TOLD = 8  # differences that are named; weights of another size differ in hundreds


def check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, torch.Size], path: Path) -> None:
    """Compare names and shapes; the first differences are faults of their own, those of the outermost names first.

    Raises:
        CheckpointError: A name is missing or unknown, or a shape differs.
    """
    faults = []
    for name in sorted({*found, *expected}, key=lambda name: (name.count("."), name)):
        if name not in found:
            faults.append(Fault("CKPT-KEY", f"{name} is missing", str(path)))
        elif name not in expected:
            faults.append(Fault("CKPT-KEY", f"{name} is unknown to this model", str(path)))
        elif found[name].shape != expected[name]:
            shapes = f"{list(found[name].shape)}, the model has {list(expected[name])}"
            faults.append(Fault("CKPT-SHAPE", f"{name} has shape {shapes}", str(path)))
    if len(faults) > TOLD:
        more = f"and {len(faults) - TOLD} more names or shapes differ: these are weights of another network"
        faults[TOLD:] = [Fault(faults[TOLD].code, more, str(path))]
    if faults:
        raise CheckpointError(*faults)


def axis_size(found: Mapping[str, Tensor], name: str, axis: int = 0) -> int:
    """Return the length of an axis; 0 without such a tensor or axis, which a comparison of shapes will tell."""
    return found[name].shape[axis] if name in found and found[name].ndim > axis else 0


@torch.no_grad()
def load_by_name(net: nn.Module, found: Mapping[str, Tensor], path: Path, head: str) -> bool:
    """Put weights into a network of the same names; everything is compared before anything is changed.

    Args:
        net: Changed in place.
        found: By name.
        path: Named in a refusal.
        head: Name of the last layer.

    Returns:
        Whether the head was taken over; it is left as it was where it has another number of classes, or is missing.

    Raises:
        CheckpointError: CKPT-KEY, CKPT-SHAPE: each difference.
    """
    own = net.state_dict()
    weight = f"{head}.weight"
    has_head = weight in found and found[weight].shape == own[weight].shape
    if not has_head:
        found = {name: tensor for name, tensor in found.items() if not name.startswith(f"{head}.")}
    expected = {name: tensor.shape for name, tensor in own.items() if has_head or not name.startswith(f"{head}.")}
    check_tensors(found, expected, path)
    net.load_state_dict({**own, **found})
    return has_head
