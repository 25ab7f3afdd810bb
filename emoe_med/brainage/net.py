"""From a configuration to the network, its routed layers or gates, and the head that speaks in years."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from emoe_med.config import ModelConfig, VolumeViTConfig
from emoe_med.models.deep_moe import DeepMoE
from emoe_med.models.heads import HEADS, L1Head, SoftLabelHead, TrainingAges
from emoe_med.models.output import ModelOutput
from emoe_med.models.sfcn import SFCN, SFCNOptions
from emoe_med.models.single_gated import SingleGated
from emoe_med.models.vit import ViT
from emoe_med.moe import MoELayer

Net = SFCN | DeepMoE | SingleGated | ViT


class BrainAgeNet(nn.Module):
    """A network and its head in one module, so that one file of weights holds both.

    Args:
        config: Network and head.
        ages: Ages of the training scans.
        net: Used in place of the network of the configuration.
    """

    def __init__(self, config: ModelConfig | VolumeViTConfig, ages: TrainingAges, net: Any = None) -> None:
        super().__init__()
        self.head: SoftLabelHead | L1Head = HEADS[config.head](ages)
        self.net: Net = MODELS[config.kind](config, self.head) if net is None else net

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

    @property
    def last(self) -> nn.Module:
        """The module that is given the pooled features."""
        net = self.net
        if isinstance(net, DeepMoE | SingleGated):
            net = net.net if isinstance(net, DeepMoE) else net.base
        return net.head if isinstance(net, ViT) else net.get_submodule("dropout")


def _sfcn(config: ModelConfig, head: SoftLabelHead | L1Head) -> SFCN | DeepMoE | SingleGated:
    options = SFCNOptions(config.channels, config.pooled, config.neck, config.stem, config.dropout)
    # the net first: arms of one seed start from the same weights, whatever layer they have
    net = SFCN(head.outputs, options)
    if config.moe is not None:
        net.moe = config.moe.build(config.channels[config.moe.after_block - 1])
        net.moe_after = config.moe.after_block
    if config.single_gated is not None:
        gated = config.single_gated
        return SingleGated(net, gated.num_experts, gated.stages, head, gated.tau)
    return net if config.gating is None else DeepMoE(net, 3, 1, head.outputs, config.gating.options())


def _vit(config: VolumeViTConfig, head: SoftLabelHead | L1Head) -> ViT:
    return config.build(head.outputs, 1)


MODELS: dict[str, Callable[..., Net]] = {"sfcn": _sfcn, "vit": _vit}
