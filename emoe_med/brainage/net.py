"""From a configuration to the network: SFCN, its routed layer, and the head that speaks in years."""

from __future__ import annotations

from torch import Tensor, nn

from emoe_med.config import ModelConfig
from emoe_med.models.heads import HEADS, L1Head, SoftLabelHead, TrainingAges
from emoe_med.models.output import ModelOutput
from emoe_med.models.sfcn import SFCN, SFCNOptions
from emoe_med.moe import MoELayer


class BrainAgeNet(nn.Module):
    """A network and its head in one module, so that one file of weights holds both."""

    def __init__(self, config: ModelConfig, ages: TrainingAges) -> None:
        super().__init__()
        self.head: SoftLabelHead | L1Head = HEADS[config.head](ages)
        options = SFCNOptions(config.channels, config.pooled, config.neck, config.stem, config.dropout)
        # the net first: arms of one seed start from the same weights, whatever layer they have
        self.net = SFCN(self.head.outputs, options)
        if config.moe is not None:
            self.net.moe = config.moe.build(config.channels[config.moe.after_block - 1])
            self.net.moe_after = config.moe.after_block

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
        return {} if self.net.moe is None else {f"block{self.net.moe_after}": self.net.moe}
