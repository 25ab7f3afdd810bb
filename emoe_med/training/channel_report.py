"""What a channel-gated network does: which channels are on, the multiply-adds left, and what the choice is worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emoe_med.models.deep_moe import DeepMoE


class ChannelUse:
    """Add up over samples which channels are on, and the multiply-adds of each sample."""

    def __init__(self, net: DeepMoE) -> None:
        self.net = net
        self.samples, self.dense = 0, 0
        self._on: dict[str, Tensor] = {}
        self._gates: dict[str, Tensor] = {}
        self._macs: list[Tensor] = []

    def update(self, image: Tensor, gates: Mapping[str, Tensor]) -> None:
        """Add a batch of images [B, ...] and the gates [B, C] that they were seen with."""
        macs, self.dense = self.net.macs(image[:1], gates)
        self._macs.append(macs.cpu())
        self.samples += len(image)
        for name, gate in gates.items():
            self._on[name] = self._on.get(name, 0) + (gate > 0).sum(0).cpu()
            self._gates[name] = self._gates.get(name, 0) + gate.sum(0).double().cpu()

    def rates(self) -> dict[str, Tensor]:
        """Return of each layer the share of samples [C] that each channel is on for."""
        return {name: on.double() / self.samples for name, on in self._on.items()}

    def mean_gates(self) -> Tensor:
        """Return the mean gate [C] of all channels, layers in order."""
        return torch.cat([*self._gates.values()]) / self.samples

    def metrics(self) -> dict[str, float]:
        """Return figures by the names of the record; `router/macs` in millions."""
        rates = self.rates()
        found = {f"router/{name.replace('.', '_')}/active": float(rate.mean()) for name, rate in rates.items()}
        found["router/active"] = float(torch.cat([*rates.values()]).mean())
        found["router/macs"] = float(torch.cat(self._macs).mean()) / 1e6
        return found

    def summary(self) -> dict[str, Any]:
        """Return the share of channels on, the multiply-adds, and of each layer how its channels are used.

        `never`, `sometimes` and `always` are shares of the layer's channels; `gate` is the mean of those on.
        """
        macs, rates = torch.cat(self._macs), self.rates()
        layers = {}
        for name, rate in rates.items():
            never, always = float((rate == 0).double().mean()), float((rate == 1).double().mean())
            gate = float(self._gates[name].sum() / self._on[name].sum().clamp_min(1))
            use = {"never": never, "sometimes": 1 - never - always, "always": always}
            layers[name] = {"active": float(rate.mean()), **use, "gate": gate}
        counts = {"mean": float(macs.mean()), "least": float(macs.min()), "most": float(macs.max())}
        active = float(torch.cat([*rates.values()]).mean())
        return {"active": active, "macs": {**counts, "all_on": self.dense}, "layers": layers}


def describe_channels(
    net: DeepMoE,
    errors: Callable[[], np.ndarray],
    compare: Callable[[np.ndarray, np.ndarray], Mapping[str, Any]],
    metric: str,
) -> dict[str, Any]:
    """Tell which channels of a network are on, and what it is worth that each sample has its own.

    Args:
        net: The network that `errors` runs.
        errors: Runs the model over the evaluation set and returns the error [S] of each sample.
        compare: Estimates the mean of the first errors minus the mean of the second, with its interval.
        metric: Name of the mean error.

    Returns:
        `ChannelUse.summary`, and `<metric>_mean_gates`: gain in error where all samples have the mean gates.
    """
    use = ChannelUse(net)
    handle = net.register_forward_hook(lambda module, given, out: use.update(given[0], out.gates))
    try:
        intact = errors()
    finally:
        handle.remove()
    mean = use.mean_gates()
    # the mean is not negative, so that the ReLU behind leaves it as it is
    handle = net.gate.register_forward_hook(lambda module, given, x: mean.to(x).expand_as(x))
    try:
        changed = errors()
    finally:
        handle.remove()
    return {**use.summary(), f"{metric}_mean_gates": compare(changed, intact)}
