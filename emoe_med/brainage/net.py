"""From a configuration to the network, its routed layers or gates, and the head that speaks in years."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from emoe_med.config import ModelConfig, VolumeViTConfig
from emoe_med.models.deep_moe import DeepMoE
from emoe_med.models.heads import HEADS, L1Head, SoftLabelHead, TrainingAges
from emoe_med.models.output import ModelOutput
from emoe_med.models.sfcn import SFCN, SFCNOptions
from emoe_med.models.vit import ViT
from emoe_med.moe import MoELayer

Net = SFCN | DeepMoE | ViT


class BrainAgeNet(nn.Module):
    """A network and its head in one module, so that one file of weights holds both."""

    def __init__(self, config: ModelConfig | VolumeViTConfig, ages: TrainingAges) -> None:
        super().__init__()
        self.head: SoftLabelHead | L1Head = HEADS[config.head](ages)
        self.net = MODELS[config.kind](config, self.head.outputs)

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
        net = self.net.net if isinstance(self.net, DeepMoE) else self.net
        return net.head if isinstance(net, ViT) else net.get_submodule("dropout")


def _sfcn(config: ModelConfig, outputs: int) -> SFCN | DeepMoE:
    options = SFCNOptions(config.channels, config.pooled, config.neck, config.stem, config.dropout)
    # the net first: arms of one seed start from the same weights, whatever layer they have
    net = SFCN(outputs, options)
    if config.moe is not None:
        net.moe = config.moe.build(config.channels[config.moe.after_block - 1])
        net.moe_after = config.moe.after_block
    return net if config.gating is None else DeepMoE(net, 3, 1, outputs, config.gating.options())


def _vit(config: VolumeViTConfig, outputs: int) -> ViT:
    return config.build(outputs, 1)


MODELS: dict[str, Callable[..., Net]] = {"sfcn": _sfcn, "vit": _vit}
