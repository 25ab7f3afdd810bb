"""Vision transformer for images and volumes, with routed layers in chosen blocks.

Parameters have timm's names, so that published weights load by name. Source: Dosovitskiy et al. 2021, arXiv
2010.11929. Letters: P prefix tokens (class token, registers), T patches, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emoe_med.models.output import ModelOutput
from emoe_med.moe import MLPExperts, MoELayer, Routing

Placement = Literal["after_block", "parallel_ffn", "replace_ffn"]

# width, depth, heads
SIZES = {"Ti": (192, 12, 3), "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "H": (1280, 32, 16)}


@dataclass(frozen=True)
class ViTOptions:
    """Options of `ViT`; the defaults are ViT-B/16 at 224 pixels.

    Attributes:
        image_size: edges of the input the position embedding is made for, two or three of them.
        patch_size: edge of a patch.
        in_channels: C.
        width: D.
        depth: number of blocks.
        heads: attention heads.
        class_token: whether there is one.
        registers: prefix tokens beside it (arXiv 2309.16588).
        pool: the class token, or the mean over patches.
    """

    image_size: tuple[int, ...] = (224, 224)
    patch_size: int = 16
    in_channels: int = 3
    width: int = 768
    depth: int = 12
    heads: int = 12
    class_token: bool = True
    registers: int = 0
    pool: Literal["token", "mean"] = "token"

    def __post_init__(self) -> None:
        if any(edge % self.patch_size for edge in self.image_size):
            raise ValueError(f"image {self.image_size} does not divide into patches of {self.patch_size}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide into {self.heads} heads")
        if self.pool == "token" and not self.class_token:
            raise ValueError("pool: token needs a class token")

    @property
    def grid(self) -> tuple[int, ...]:
        """Patches along each axis."""
        return tuple(edge // self.patch_size for edge in self.image_size)

    @property
    def prefix(self) -> int:
        """P."""
        return int(self.class_token) + self.registers


class ViT(nn.Module):
    """Patches -> blocks -> norm -> class token or mean of the patches -> linear head."""

    def __init__(self, outputs: int, options: ViTOptions) -> None:
        super().__init__()
        self.options = options
        width = options.width
        self.patch_embed = PatchEmbed(options)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 1e-6) if options.class_token else None
        self.reg_token = nn.Parameter(torch.randn(1, options.registers, width) * 1e-6) if options.registers else None
        places = sinusoids(options.grid, width)
        self.pos_embed = nn.Parameter(F.pad(places, (0, 0, options.prefix, 0)).unsqueeze(0))
        self.blocks = nn.ModuleList(Block(width, options.heads) for _ in range(options.depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, outputs)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.head.weight)

    def insert(self, layers: Mapping[int, MoELayer], placement: Placement, route_prefix: bool = False) -> None:
        """Put routed layers into blocks.

        Where they replace the feed-forward, MLP experts of its shape start as copies of it (V-MoE, upcycling).

        Args:
            layers: By number of the block, from 0.
            placement: `parallel_ffn`: x + FFN(LN x) + MoE(LN x); `after_block`: on the block's output, under the
                layer's own norm; `replace_ffn`: x + MoE(LN x).
            route_prefix: Whether the prefix tokens go through the layer too; else they pass it by.
        """
        for number, layer in layers.items():
            block = self.blocks[number]
            assert isinstance(block, Block)
            block.moe, block.placement = layer, placement
            block.first = 0 if route_prefix else self.options.prefix
            if placement == "replace_ffn" and block.mlp is not None:
                copy_mlp(block.mlp, layer)
                block.mlp = None

    def forward(self, image: Tensor) -> ModelOutput:
        """Map images [B, C, H, W] or volumes [B, C, X, Y, Z] to logits [B, O]."""
        tokens, routing = self.features(image)
        losses = [found.aux_loss for found in routing.values()]
        aux_loss = torch.stack(losses).sum() if losses else tokens.new_zeros(())
        samples, length = tokens.shape[:2]
        place = torch.arange(length, device=tokens.device)
        masks = {
            name: (place >= length - len(found.gate) // samples).expand(samples, -1) for name, found in routing.items()
        }
        with torch.autocast(image.device.type, enabled=False):  # bfloat16 rounds an age to an eighth of a year
            output = self.head(self.pooled(tokens).to(self.head.weight.dtype))
        return ModelOutput(output, aux_loss, routing, masks)

    def features(self, image: Tensor) -> tuple[Tensor, dict[str, Routing]]:
        """Return the normalised tokens [B, P + T, D] after the last block, and the routing by layer."""
        patches = self.patch_embed(image)
        grid = patches.shape[2:]
        tokens = patches.flatten(2).mT
        prefix = [p.expand(len(tokens), -1, -1) for p in (self.cls_token, self.reg_token) if p is not None]
        x = torch.cat([*prefix, tokens], dim=1) + self._positions(grid)
        routing = {}
        for number, block in enumerate(self.blocks):
            x, found = block(x)
            if found is not None:
                routing[f"block{number}"] = found
        return self.norm(x), routing

    def pooled(self, tokens: Tensor) -> Tensor:
        """Return what the head sees, [B, D], of tokens [B, P + T, D]."""
        return tokens[:, 0] if self.options.pool == "token" else tokens[:, self.options.prefix :].mean(1)

    def probed(self, image: Tensor) -> dict[str, Tensor]:
        """Return what a head could see of images [B, D]: the mean over patches, and the class token if there is one."""
        tokens, _ = self.features(image)
        found = {"mean": tokens[:, self.options.prefix :].mean(1)}
        return {**found, "token": tokens[:, 0]} if self.options.class_token else found

    def routed_layers(self) -> dict[str, MoELayer]:
        """Return the routed layers by the names that `ModelOutput.routing` uses."""
        return {f"block{n}": block.moe for n, block in enumerate(self.blocks) if block.moe is not None}  # ty: ignore

    def _positions(self, grid: Sequence[int]) -> Tensor:
        if tuple(grid) == self.options.grid:
            return self.pos_embed
        return resized_positions(self.pos_embed, self.options.grid, grid, self.options.prefix)

    def no_weight_decay(self) -> list[nn.Parameter]:
        """Embeddings, which are no maps."""
        return [p for p in (self.cls_token, self.reg_token, self.pos_embed) if p is not None]


class PatchEmbed(nn.Module):
    """Cut into patches and map each to a token: [B, C, H, W] -> [B, D, H/p, W/p], or with three axes."""

    def __init__(self, options: ViTOptions) -> None:
        super().__init__()
        kind = {2: nn.Conv2d, 3: nn.Conv3d}[len(options.image_size)]
        self.proj = kind(options.in_channels, options.width, options.patch_size, stride=options.patch_size)

    def forward(self, image: Tensor) -> Tensor:
        """Map an image to a grid of tokens."""
        return self.proj(image)


class Block(nn.Module):
    """x + attention(LN x), then x + FFN(LN x), with an optional routed layer; see `ViT.insert`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp: Mlp | None = Mlp(width)
        self.moe: MoELayer | None = None
        self.placement: Placement = "parallel_ffn"
        self.first = 0  # of the tokens that are routed

    def forward(self, x: Tensor) -> tuple[Tensor, Routing | None]:
        """Map tokens [B, P + T, D]; also returns the routing of the tokens from `first` on."""
        attended = self.attn(self.norm1(x))
        x = x + attended
        normal = self.norm2(x)
        if self.mlp is not None:
            x = x + self.mlp(normal)
        if self.moe is None:
            return x, None
        # sliced, not masked: a mask would make a GPU wait
        rest = slice(self.first, None)
        seen = None if self.placement == "after_block" else normal[:, rest]
        context = attended[:, rest] if self.moe.router.needs_context else None
        routed, routing = self.moe(x[:, rest], None, context, seen)
        return torch.cat([x[:, : self.first], routed], dim=1) if self.first else routed, routing


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [B, N, D]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """The feed-forward: four times as wide inside, GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [..., D]."""
        return self.fc2(F.gelu(self.fc1(x)))


@torch.no_grad()
def copy_mlp(mlp: Mlp, layer: MoELayer) -> bool:
    """Let every expert start as a copy of a feed-forward (arXiv 2212.05055); False where it cannot be one."""
    experts = layer.experts
    if not isinstance(experts, MLPExperts) or experts.b1 is None or experts.b2 is None:
        return False
    if experts.w1.shape[1:] != mlp.fc1.weight.T.shape:
        return False
    experts.w1.copy_(mlp.fc1.weight.T)
    experts.w2.copy_(mlp.fc2.weight.T)
    experts.b1.copy_(mlp.fc1.bias)
    experts.b2.copy_(mlp.fc2.bias)
    return True


def sinusoids(grid: Sequence[int], width: int) -> Tensor:
    """Return sines and cosines of each patch's place [T, D], what a position embedding starts from.

    A random start of 0.02 hides the place behind the patch for many epochs. Source: arXiv 2205.01580.
    """
    count = width // (2 * len(grid))
    frequency = 10_000 ** -(torch.arange(count) / count)
    angles = torch.cartesian_prod(*(torch.arange(edge) for edge in grid)).unsqueeze(-1) * frequency
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)
    return F.pad(waves, (0, width - waves.shape[1]))


def resized_positions(positions: Tensor, old: Sequence[int], new: Sequence[int], prefix: int) -> Tensor:
    """Interpolate a position embedding [1, P + T, D] to another grid; that of prefix tokens stays."""
    kept, grid = positions[:, :prefix], positions[:, prefix:]
    grid = grid.mT.unflatten(2, tuple(old)).float()
    if len(old) == 2:
        grid = F.interpolate(grid, tuple(new), mode="bicubic", antialias=True)
    else:
        grid = F.interpolate(grid, tuple(new), mode="trilinear")
    return torch.cat([kept, grid.flatten(2).mT.to(kept.dtype)], dim=1)
