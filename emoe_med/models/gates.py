"""Gates on channels: one non-negative factor for each sample and channel of a convolution's output."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor

UNGATED: Mapping[str, Tensor] = MappingProxyType({})


def gated(x: Tensor, gate: Tensor | None) -> Tensor:
    """Scale the channels of a map [B, C, ...] by a gate [B, C]; without one, return the map."""
    return x if gate is None else x * gate.to(x.dtype).reshape(*gate.shape, *[1] * (x.ndim - 2))
