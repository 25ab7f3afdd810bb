"""From a configuration to the network: SFCN, its routed layer, and the head that speaks in years."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from emoe_med.config import ModelConfig
from emoe_med.models.heads import HEADS, L1Head, SoftLabelHead, TrainingAges
from emoe_med.models.output import ModelOutput
from emoe_med.models.sfcn import SFCN, SFCNOptions
from emoe_med.models.single_gated import SingleGated
from emoe_med.moe import MoELayer


class BrainAgeNet(nn.Module):
    """A network and its head in one module, so that one file of weights holds both.

    Args:
        config: Network and head.
        ages: Ages of the training scans.
        net: Used in place of the network of the configuration.
    """

    def __init__(self, config: ModelConfig, ages: TrainingAges, net: nn.Module | None = None) -> None:
        super().__init__()
        self.head: SoftLabelHead | L1Head = HEADS[config.head](ages)
        self.net: Any = self._built(config) if net is None else net

    def _built(self, config: ModelConfig) -> SFCN | SingleGated:
        options = SFCNOptions(config.channels, config.pooled, config.neck, config.stem, config.dropout)
        # the net first: arms of one seed start from the same weights, whatever layer they have
        net = SFCN(self.head.outputs, options)
        if config.moe is not None:
            net.moe = config.moe.build(config.channels[config.moe.after_block - 1])
            net.moe_after = config.moe.after_block
        gated = config.single_gated
        return net if gated is None else SingleGated(net, gated.num_experts, gated.stages, self.head, gated.tau)

    @property
    def backbone(self) -> SFCN:
        """The network whose pooled features speak for a scan: all of it, or the base of a single-gated mixture."""
        return self.net.base if isinstance(self.net, SingleGated) else self.net

    def forward(self, image: Tensor) -> ModelOutput:
        """Map images [B, 1, X, Y, Z] to the raw output and the routing."""
        return self.net(image)

    def ages(self, image: Tensor, flip_average: bool = False) -> tuple[Tensor, ModelOutput]:
        """Predict ages [B] in years; `flip_average` adds the mirrored head (axis X is left-right in RAS)."""
        out = self.net(image)
        age = self.head.predict(out.output)
        if flip_average:
            age = (age + self.head.predict(self.net(image.flip(2)).output)) / 2
        return age, out

    def routed_layers(self) -> dict[str, MoELayer]:
        """Return the routed layers by the names that `ModelOutput.routing` uses."""
        return self.net.routed_layers()
