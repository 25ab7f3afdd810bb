"""DeepMoE: a shallow network looks at the sample first and says which channels of a convolutional net it needs.

Source: Wang et al. 2019, arXiv 1806.01531, in the structure of the port within M3ViT's published code. Letters: d width
of the embedding, C channels of all gated convolutions together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, Self

import torch
from monai.networks.blocks import Convolution
from torch import Tensor, nn

from emoe_med.models.gates import dense_macs, gated, gated_macs
from emoe_med.models.output import ModelOutput
from emoe_med.models.resnet import ResNet
from emoe_med.models.sfcn import SFCN
from emoe_med.moe import MoELayer


@dataclass(frozen=True)
class DeepMoEOptions:
    """Options of `DeepMoE`.

    Attributes:
        embedding: channels of the embedding's 3 x 3 convolutions, each of stride 2; d is the last.
        convolutions: `inner`: gates within blocks, the width of the stream stays whole; `all`: every convolution but
            those of shortcuts.
        sparsity: lambda, weight of the gates' L1 norm, summed over layers and averaged over samples.
    """

    embedding: tuple[int, ...] = (64, 128, 256, 512)
    convolutions: Literal["inner", "all"] = "all"
    sparsity: float = 1e-3


class DeepMoE(nn.Module):
    """Embedding e >= 0 of the sample; gates ReLU(W e) on the normalised output of each gated convolution.

    e is the pooled embedding, as in the re-implementation, not its classifier's logits as in the port: those may sum to
    less than 0, where every gate of the published start is shut, and a net of one output would have one of them. It is
    scaled so that gates start at about 1 under W's published start, uniform in (-0.5, 1).
    """

    def __init__(self, net: ResNet | SFCN, axes: int, channels: int, outputs: int, options: DeepMoEOptions) -> None:
        """Put gates on a network.

        Args:
            net: The network; its `places` are gated.
            axes: 2 for images, 3 for volumes.
            channels: Of the input.
            outputs: O, of the network and of the embedding's own answer.
            options: See `DeepMoEOptions`.
        """
        super().__init__()
        self.options, self.net = options, net
        inner = options.convolutions == "inner"
        self.sizes = {
            name: len(place.convolution.weight)
            for name, place in net.places().items()
            if place.gated is not None and (place.inner or not inner)
        }
        self.embedding = nn.Sequential(
            *(
                Convolution(axes, a, b, strides=2, kernel_size=3, act="relu", norm="batch", bias=False)
                for a, b in pairwise([channels, *options.embedding])
            )
        )
        width = options.embedding[-1]
        self.answer = nn.Linear(width, outputs)
        self.gate = nn.Linear(width, sum(self.sizes.values()), bias=False)
        nn.init.uniform_(self.gate.weight, -0.5, 1.0)
        # a normalised channel is 0.4 on average behind ReLU, W is 0.25: this makes the gates 1
        self.scale = 1 / (0.25 * 0.4 * width)
        self.held = False
        self._dense: dict[tuple[int, ...], dict[str, int]] = {}

    def hold_gating(self, held: bool) -> None:
        """Begin or end the second stage, in which embedding and gates stand still and only the network learns."""
        self.held = held
        for part in (self.embedding, self.gate, self.answer):
            part.requires_grad_(not held)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set the mode; an embedding that is held keeps its statistics."""
        super().train(mode)
        if self.held:
            self.embedding.eval()
        return self

    def forward(self, image: Tensor) -> ModelOutput:
        """Map images [B, C, H, W] or volumes [B, C, X, Y, Z] to outputs [B, O], with the gates that were used.

        Until the gating is held, `aux_loss` is the sparsity loss and `side_output` the embedding's own answer. A single
        sample outside training runs without the channels that are off; in a batch these are multiplied by zero.
        """
        embedded = self._embedded(image)
        gates = self._gates(embedded)
        alone = not self.training and len(image) == 1
        with gated(self.net.places(), gates, skip=alone):
            out = self.net(image)
        if self.held:
            return replace(out, gates=gates)
        norm = torch.cat([*gates.values()], dim=1).sum(1).mean()
        return replace(
            out,
            aux_loss=out.aux_loss + self.options.sparsity * norm,
            side_output=self.answer(embedded),
            gates=gates,
        )

    def _embedded(self, image: Tensor) -> Tensor:
        return self.embedding(image).flatten(2).mean(2)

    def _gates(self, embedded: Tensor) -> dict[str, Tensor]:
        with torch.autocast(embedded.device.type, enabled=False):
            gates = torch.relu(self.gate(embedded.float() * self.scale))
        return dict(zip(self.sizes, gates.split([*self.sizes.values()], dim=1), strict=True))

    def macs(self, image: Tensor, gates: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        """Count multiply-adds of samples like the image [1, C, ...]: with these gates, float64 [B], and with all on.

        Both include the embedding and the gates' own map; neither the embedding's answer, which nobody reads. At
        least one channel of a layer is computed where samples run one at a time, which this leaves out.
        """
        shape, places = tuple(image.shape[1:]), self.net.places()
        if shape not in self._dense:
            gating = sum(dense_macs(self.embedding, image).values()) + self.gate.weight.numel()
            self._dense[shape] = {**dense_macs(self.net, image), "gating": gating}
        found, names = dict(self._dense[shape]), {module: name for name, module in self.net.named_modules()}
        convolutions = {name: found.pop(names[place.convolution]) for name, place in places.items()}
        rest = sum(found.values())
        return gated_macs(places, convolutions, gates) + rest, sum(convolutions.values()) + rest

    def probed(self, image: Tensor) -> dict[str, Tensor]:
        """Return what a head could see of images [B, F]: the pooled features behind the gates."""
        assert isinstance(self.net, ResNet)
        with gated(self.net.places(), self._gates(self._embedded(image))):
            return self.net.probed(image)

    def routed_layers(self) -> dict[str, MoELayer]:
        """Return none: channels are gated, no token is routed."""
        return {}

    def no_weight_decay(self) -> list[nn.Parameter]:
        """The gates' map: the sparsity loss is what pulls at it."""
        return [*self.gate.parameters()]
