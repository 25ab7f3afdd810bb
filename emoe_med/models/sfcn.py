"""SFCN, the plain 3D CNN of brain age, with an optional routed layer on one of its feature maps.

Source: Peng et al. 2021, Medical Image Analysis 68, 101871; 2,952,936 parameters at its published shape.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from monai.networks.blocks import Convolution
from torch import Tensor, nn

from emoe_med.models.gates import Place
from emoe_med.models.output import ModelOutput
from emoe_med.moe import MoELayer, Routing


@dataclass(frozen=True)
class SFCNOptions:
    """Options of `SFCN`.

    Attributes:
        channels: of the 3^3 convolution blocks; the published net has 32, 64, 128, 256, 256.
        pooled: how many of those blocks, from the first, halve the map; all five as published. A coarse input
            has too few voxels for that.
        neck: channels of the closing 1^3 convolution.
        stem: edge of the voxel cube that is folded into channels first (1 = off): a cheap first stage on CPU.
        dropout: before the last convolution.
    """

    channels: tuple[int, ...] = (32, 64, 128, 256, 256)
    pooled: int = 5
    neck: int = 64
    stem: int = 1
    dropout: float = 0.5


class SFCN(nn.Module):
    """Blocks [conv3 -> BN -> max-pool 2 -> ReLU], then conv1 -> BN -> ReLU -> mean -> dropout -> conv1.

    Batch norm stands before pooling, as published. The average pool is global, which is the published
    (5, 6, 5) pool at the published input of 160 x 192 x 160 and lets the net take any other shape.
    """

    # tokens whose cell holds less brain than this see no router
    MIN_BRAIN_SHARE = 0.1

    def __init__(
        self, outputs: int, options: SFCNOptions, moe: MoELayer | None = None, moe_after: int | None = None
    ) -> None:
        super().__init__()
        self.options = options
        self.moe = moe
        self.moe_after = moe_after
        widths = [options.stem**3, *options.channels]
        self.blocks = nn.ModuleList(
            Convolution(3, before, after, kernel_size=3, act=None, norm="batch") for before, after in pairwise(widths)
        )
        self.neck = Convolution(3, widths[-1], options.neck, kernel_size=1, act="relu", norm="batch")
        self.dropout = nn.Dropout(options.dropout)
        self.head = nn.Conv3d(options.neck, outputs, kernel_size=1)

    def cell(self, block: int) -> int:
        """Return the edge, in input voxels, of one voxel of the map after `block` (counted from 1)."""
        return self.options.stem * 2 ** min(block, self.options.pooled)

    def receptive_field(self, block: int) -> int:
        """Return the edge, in input voxels, of what one voxel of the map after `block` (counted from 1) can see."""
        seen = jump = self.options.stem
        for number in range(block):
            seen += 2 * jump
            if number < self.options.pooled:
                seen += jump
                jump *= 2
        return seen

    def routed_layers(self) -> dict[str, MoELayer]:
        """Return the routed layer by the name that `ModelOutput.routing` uses."""
        return {} if self.moe is None else {f"block{self.moe_after}": self.moe}

    def places(self) -> dict[str, Place]:
        """Return where the convolutions stand, for a net without a routed layer; see `gates.Place`."""
        names = [f"blocks.{number}" for number in range(len(self.blocks))]
        found = {
            name: Place(block.conv, block, source, inner=True)
            for name, source, block in zip(names, [None, *names], self.blocks, strict=False)
        }
        return {**found, "neck": Place(self.neck.conv, None, names[-1], inner=True)}

    def forward(self, image: Tensor) -> ModelOutput:
        """Map an image [B, 1, X, Y, Z], exactly 0 outside the head, to outputs [B, O]."""
        stages = self.moe_after or 0
        x = self.until(image, stages)
        aux_loss, routing, token_mask = x.new_zeros(()), {}, {}
        if self.moe is not None:
            mask = self.token_mask(image)
            x, routed = self.route(self.moe, x, mask)
            name = f"block{stages}"
            routing[name], token_mask[name] = routed, mask
            aux_loss = aux_loss + routed.aux_loss
        return ModelOutput(self.answer(self.beyond(x, stages)), aux_loss, routing, token_mask)

    @property
    def num_features(self) -> int:
        """Pooled features that an answer is read from."""
        return self.options.neck

    def until(self, image: Tensor, stages: int) -> Tensor:
        """Return the map [B, C, X', Y', Z'] behind the first so many blocks; 0 is the folded image alone."""
        x = fold_space(image, self.options.stem) if self.options.stem > 1 else image
        return self._through(x, range(stages))

    def beyond(self, x: Tensor, stages: int) -> Tensor:
        """Return the pooled features [B, F, 1, 1, 1] of a map behind so many blocks."""
        x = self._through(x, range(stages, len(self.blocks)))
        return self.neck(x).mean(dim=(2, 3, 4), keepdim=True)

    def answer(self, features: Tensor) -> Tensor:
        """Map pooled features [B, F, 1, 1, 1] to outputs [B, O]."""
        with torch.autocast(features.device.type, enabled=False):  # bfloat16 rounds an age to an eighth of a year
            return self.head(self.dropout(features.to(self.head.weight.dtype))).flatten(1)

    def _through(self, x: Tensor, blocks: range) -> Tensor:
        for number in blocks:
            x = self.blocks[number](x)
            x = F.relu(F.max_pool3d(x, 2) if number < self.options.pooled else x)
        return x

    def tail(self, stages: int) -> SFCN:
        """Return a copy of what stands behind so many blocks, for `beyond` and `answer` alone."""
        copy = deepcopy(self)
        for number in range(stages):
            copy.blocks[number] = nn.Identity()
        return copy

    def token_mask(self, image: Tensor) -> Tensor:
        """Tell which cells of the routed layer hold enough of the head to be routed, [B, T] bool."""
        share = F.avg_pool3d((image != 0).float(), self.cell(self.moe_after or 0))
        return share.flatten(1) >= self.MIN_BRAIN_SHARE

    @staticmethod
    def route(moe: MoELayer, x: Tensor, mask: Tensor) -> tuple[Tensor, Routing]:
        """Run the routed layer on a map [B, C, X, Y, Z]; returns its map and the routing of the cells in `mask`."""
        grid = x.shape[2:]
        context = _tokens(_local_mean(x, mask)) if moe.router.needs_context else None
        tokens, routed = moe(_tokens(x), mask, context)
        return tokens.unflatten(1, grid).permute(0, 4, 1, 2, 3), routed


def _tokens(x: Tensor) -> Tensor:
    """Turn a map [B, C, X, Y, Z] into tokens [B, XYZ, C]; a free view in channels_last_3d memory."""
    return x.permute(0, 2, 3, 4, 1).flatten(1, 3)


def _local_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Average a map [B, C, X, Y, Z] over the brain cells (mask [B, XYZ]) among the 3^3 around each cell."""
    inside = mask.unflatten(1, x.shape[2:]).unsqueeze(1).to(x.dtype)
    total, share = (F.avg_pool3d(part, 3, stride=1, padding=1) for part in (x * inside, inside))
    return total / share.clamp_min(1 / 27)


def fold_space(x: Tensor, edge: int) -> Tensor:
    """Fold cubes of edge^3 voxels into channels: [B, C, X, Y, Z] -> [B, C*edge^3, X/edge, Y/edge, Z/edge]."""
    batch, channels, *shape = x.shape
    if any(size % edge for size in shape):
        raise ValueError(f"volume {tuple(shape)} does not divide into cubes of {edge} voxels")
    a, b, c = (size // edge for size in shape)
    x = x.reshape(batch, channels, a, edge, b, edge, c, edge)
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(batch, channels * edge**3, a, b, c)
