"""Gates on the channels of convolutions, each sample with its own: how they are applied, and what they save.

A gate is 0 (the channel is off) or a positive factor on the channel's normalised output. B samples, C channels.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Place:
    """Where a convolution stands in its network; networks that can be gated return theirs by name, in running order.

    Attributes:
        convolution: `nn.Conv2d` or `nn.Conv3d`.
        gated: Module whose output a gate scales, the norm behind the convolution; None where there may be no gate.
        source: Name of the convolution whose gated channels are all that it sees; None where it sees others too.
        inner: Whether all that its channels reach is the next convolution (no shortcut passes by).
    """

    convolution: Any
    gated: nn.Module | None
    source: str | None
    inner: bool


@contextmanager
def gated(places: Mapping[str, Place], gates: Mapping[str, Tensor], skip: bool = False) -> Generator[None]:
    """Let every forward pass inside use the gates [B, C], by name of the place; they work on the normalised output.

    With `skip`, for one sample, channels that are off are left out of the convolutions that make and that read them;
    else they are multiplied by zero.
    """
    with ExitStack() as stack:
        for name, place in places.items():
            gate, source = gates.get(name), gates.get(place.source or "")
            if gate is not None and place.gated is not None:
                stack.enter_context(place.gated.register_forward_hook(partial(_scale, gate)))
            if skip and (gate is not None or source is not None):
                stack.enter_context(_skipping(place.convolution, source, gate))
        yield


def _scale(gate: Tensor, module: nn.Module, given: Any, x: Tensor) -> Tensor:
    return x * gate.to(x.dtype).reshape(*gate.shape, *[1] * (x.ndim - 2))


@contextmanager
def _skipping(convolution: Any, source: Tensor | None, gate: Tensor | None) -> Generator[None]:
    """Leave channels that are off out of one convolution; the channels it does not make are zero."""
    reads, makes = (None if g is None else _on(g) for g in (source, gate))

    def forward(x: Tensor) -> Tensor:
        weight, bias = convolution.weight, convolution.bias
        if reads is not None:
            x, weight = x[:, reads], weight[:, reads]
        if makes is None:
            return convolution._conv_forward(x, weight, bias)
        made = convolution._conv_forward(x, weight[makes], None if bias is None else bias[makes])
        whole = made.new_zeros(1, len(convolution.weight), *made.shape[2:])
        return whole.index_copy(1, makes, made)

    convolution.forward = forward
    try:
        yield
    finally:
        vars(convolution).pop("forward", None)


def _on(gate: Tensor) -> Tensor:
    """Return the channels of one sample that are on; at least one, as a convolution of none does not run."""
    on = gate[0].nonzero().squeeze(1)
    return on if len(on) else on.new_zeros(1)


@torch.no_grad()
def dense_macs(net: nn.Module, image: Tensor) -> dict[str, int]:
    """Count the multiply-adds of one image in every convolution and linear map that runs once, by module name."""
    found: dict[str, int] = {}

    def count(name: str, module: Any, given: Any, x: Tensor) -> None:
        found[name] = module.weight.numel() * (x[0].numel() // len(module.weight))

    training = net.training
    with ExitStack() as stack:
        for name, module in net.named_modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d | nn.Linear):
                stack.enter_context(module.register_forward_hook(partial(count, name)))
        net.eval()(image[:1])
    net.train(training)
    return found


def gated_macs(places: Mapping[str, Place], dense: Mapping[str, int], gates: Mapping[str, Tensor]) -> Tensor:
    """Count the multiply-adds of each sample in the convolutions, float64 [B], where off channels are left out.

    Args:
        places: Of the network.
        dense: Multiply-adds of each place with all channels.
        gates: [B, C] each.
    """
    shares = {name: (gate > 0).double().mean(1) for name, gate in gates.items()}
    total = next(iter(shares.values())).new_zeros(())
    for name, place in places.items():
        total = total + dense[name] * shares.get(name, 1.0) * shares.get(place.source or "", 1.0)
    return total
