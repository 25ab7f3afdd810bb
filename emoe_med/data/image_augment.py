"""Random changes of training images, a whole batch at once, on the device that the batch is on.

Every draw of a sample comes from its own key, so that neither batch order nor workers change a run. Draws are made
on the CPU, where which samples an operation concerns is known without waiting for a GPU.

Sources: crops and flips, He et al. 2016; RandAugment, Cubuk et al. 2020, arXiv 1909.13719 (without equalise and
invert; the sign of each change at random); mixup, arXiv 1710.09412; CutMix, arXiv 1905.04899; random erasing, arXiv
1708.04896.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

COLOUR = ("autocontrast", "brightness", "contrast", "colour", "posterize", "solarize", "sharpness")
AFFINE = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
OPERATIONS = ("identity", *COLOUR, *AFFINE)
DRAWS = 14  # uniform numbers of a sample beside two for each operation


@dataclass(frozen=True)
class ImageAugmentOptions:
    """Ranges of the random changes; the defaults change nothing.

    Attributes:
        crop: `pad` shifts by whole pixels, up to `pad` of them beyond the border; `resized` cuts a box of random
            area and shape and resizes it; `none` cuts the middle.
        pad: pixels of background around the image for `pad`.
        smallest: least share of the area for `resized`; its edges are 3 : 4 to 4 : 3.
        flip: probability of a mirror image.
        operations: RandAugment operations in a row.
        magnitude: of these, 0 to 10.
        mixup: alpha of mixup's Beta distribution; 0 is off.
        cutmix: alpha of CutMix; where both are on, each sample gets one of them.
        erase: probability of an erased box of 2 to 33 % of the area.
    """

    crop: Literal["none", "pad", "resized"] = "none"
    pad: int = 4
    smallest: float = 0.08
    flip: float = 0.0
    operations: int = 0
    magnitude: float = 9.0
    mixup: float = 0.0
    cutmix: float = 0.0
    erase: float = 0.0


@dataclass(frozen=True)
class Augmented:
    """Images [B, C, H, W] with the targets they have: `share` [B] of the own label, the rest of that of `partner`."""

    image: Tensor
    partner: Tensor
    share: Tensor


def normalised(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Subtract the mean [C] and divide by std [C]: [B, C, H, W] in 0 to 1 -> float32."""
    return (images - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)


def middle(images: Tensor, size: int) -> Tensor:
    """Cut the middle square of edge `size` from images [..., S, S], S >= size."""
    start = (images.shape[-1] - size) // 2
    return images[..., start : start + size, start : start + size]


def augment(
    images: Tensor, keys: Tensor, options: ImageAugmentOptions, size: int, mean: Tensor, std: Tensor
) -> Augmented:
    """Change each image of a batch at random.

    Args:
        images: [B, C, S, S] uint8.
        keys: [B] int64 on the CPU, one seed a sample.
        options: Ranges.
        size: Edge of the result.
        mean: [C] in 0 to 1; what is outside the image gets it.
        std: [C].
    """
    draws = iter(_draws(keys, DRAWS + 2 * options.operations).T)
    chosen = [(next(draws), torch.where(next(draws) < 0.5, -1.0, 1.0)) for _ in range(options.operations)]
    x = images.float() / 255
    for which, strength in chosen:
        x = _recoloured(x, which, strength * options.magnitude / 10)
    x = normalised(x, mean, std)
    x = _moved(x, draws, options, chosen, size)
    x = _erased(x, draws, options.erase)
    return _mixed(x, draws, options)


def _draws(keys: Tensor, count: int) -> Tensor:
    return torch.stack([torch.rand(count, generator=torch.Generator().manual_seed(int(key))) for key in keys])


def _concerned(which: Tensor, operation: str) -> Tensor:
    """Indices of the samples whose draw [B] chose an operation."""
    return ((which * len(OPERATIONS)).long() == OPERATIONS.index(operation)).nonzero().squeeze(1)


def _recoloured(x: Tensor, which: Tensor, strength: Tensor) -> Tensor:
    for operation in COLOUR:
        concerned = _concerned(which, operation)
        if len(concerned):
            rows = concerned.to(x.device)
            amount = strength[concerned].to(x.device).view(-1, 1, 1, 1)
            x = x.index_copy(0, rows, recolour(x[rows], operation, amount).clamp(0, 1))
    return x


def recolour(x: Tensor, operation: str, strength: Tensor) -> Tensor:
    """Apply a colour operation to images [B, C, H, W] in 0 to 1 with strength [B, 1, 1, 1] in -1 to 1."""
    factor = 1 + 0.9 * strength
    grey = x.mean(1, keepdim=True)
    if operation == "brightness":
        return x * factor
    if operation == "contrast":
        centre = grey.mean((2, 3), keepdim=True)
        return centre + (x - centre) * factor
    if operation == "colour":
        return grey + (x - grey) * factor
    if operation == "sharpness":
        kernel = x.new_tensor([[1, 1, 1], [1, 5, 1], [1, 1, 1]]).expand(x.shape[1], 1, 3, 3) / 13
        smooth = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, groups=x.shape[1])
        return smooth + (x - smooth) * factor
    if operation == "posterize":
        step = 2 ** (4 * strength.abs()).round()
        return ((x * 255 / step).floor() * step) / 255
    if operation == "solarize":
        return torch.where(x >= 1 - strength.abs(), 1 - x, x)
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return (x - low) / (high - low).clamp_min(1e-3)


def _moved(
    x: Tensor, draws: Iterator[Tensor], options: ImageAugmentOptions, chosen: list[tuple[Tensor, Tensor]], size: int
) -> Tensor:
    """Crop, mirror and warp in one sampling: maps [B, 3, 3] from the result's coordinates to the image's."""
    area, shape, across, down, mirror = (next(draws) for _ in range(5))
    edge = x.shape[-1]
    window = torch.eye(3).repeat(len(x), 1, 1)
    if options.crop == "resized":
        share = options.smallest + (1 - options.smallest) * area
        ratio = ((2 * shape - 1) * math.log(4 / 3)).exp()
        spans = [(share * ratio).sqrt().clamp_max(1), (share / ratio).sqrt().clamp_max(1)]
        places = [(1 - span) * (2 * place - 1) for span, place in zip(spans, (across, down), strict=True)]
    else:
        spans = [torch.full_like(area, size / edge)] * 2
        places = [torch.full_like(area, ((edge - size) // 2 - (edge - size) / 2) * 2 / edge)] * 2
        if options.crop == "pad":
            starts = [_whole(place, -options.pad, edge - size + options.pad) for place in (across, down)]
            places = [(start + (size - edge) / 2) * 2 / edge for start in starts]
    for axis in (0, 1):
        window[:, axis, axis], window[:, axis, 2] = spans[axis], places[axis]
    for which, strength in chosen:
        window = window @ _warps(which, strength * options.magnitude / 10)
    window[:, :, 0] *= torch.where(mirror < options.flip, -1.0, 1.0).unsqueeze(1)
    if options.crop == "none" and not options.operations and not options.flip:
        return middle(x, size)
    grid = F.affine_grid(window[:, :2].to(x.device), [len(x), x.shape[1], size, size], align_corners=False)
    return F.grid_sample(x, grid, padding_mode="zeros", align_corners=False)


def _whole(place: Tensor, low: int, high: int) -> Tensor:
    return (place * (high - low + 1)).floor().clamp_max(high - low) + low


def _warps(which: Tensor, strength: Tensor) -> Tensor:
    """Return the maps [B, 3, 3] of an operation that turns, shears or shifts; the identity for others."""
    maps = torch.eye(3).repeat(len(which), 1, 1)
    for operation in AFFINE:
        rows = _concerned(which, operation)
        amount = strength[rows]
        if operation == "rotate":
            cosine, sine = (amount * math.radians(30)).cos(), (amount * math.radians(30)).sin()
            maps[rows, 0, 0], maps[rows, 1, 1] = cosine, cosine
            maps[rows, 0, 1], maps[rows, 1, 0] = -sine, sine
        else:
            kind, axis = operation.split("_")
            row = 0 if axis == "x" else 1
            maps[rows, row, 1 - row if kind == "shear" else 2] = amount * (0.3 if kind == "shear" else 0.9)
    return maps


def _erased(x: Tensor, draws: Iterator[Tensor], probability: float) -> Tensor:
    """Put the mean into a box."""
    happens, area, shape, across, down = (next(draws) for _ in range(5))
    if not probability:
        return x
    ratio = ((2 * shape - 1) * math.log(1 / 0.3)).exp()
    share = (0.02 + 0.31 * area) * (happens < probability)
    box = _box((share * ratio).sqrt(), (share / ratio).sqrt(), across, down, x)
    return x.masked_fill(box.to(x.device), 0.0)


def _box(wide: Tensor, high: Tensor, across: Tensor, down: Tensor, x: Tensor) -> Tensor:
    """Return boxes [B, 1, H, W] bool on the CPU, of edges [B] as shares of the image's, cut at its border."""
    inside = []
    for span, centre, length in ((high, down, x.shape[2]), (wide, across, x.shape[3])):
        place = (torch.arange(length) + 0.5) / length
        inside.append((place - centre.unsqueeze(1)).abs() < span.unsqueeze(1) / 2)
    return inside[0][:, None, :, None] & inside[1][:, None, None, :]


def _mixed(x: Tensor, draws: Iterator[Tensor], options: ImageAugmentOptions) -> Augmented:
    """Blend each image with that of the opposite place in the batch, or put a box of it in."""
    which, level, across, down = (next(draws) for _ in range(4))
    partner = torch.arange(len(x) - 1, -1, -1, device=x.device)
    if not options.mixup and not options.cutmix:
        return Augmented(x, partner, torch.ones(len(x), device=x.device))
    cut = which < (0.5 if options.mixup and options.cutmix else float(options.cutmix > 0))
    alpha = torch.where(cut, options.cutmix, options.mixup).clamp_min(1e-3).double().numpy()
    level = torch.from_numpy(stats.beta.ppf(level.double().numpy(), alpha, alpha)).float()
    edge = (1 - level).sqrt()
    box = _box(edge, edge, across, down, x).float()
    share = torch.where(cut, 1 - box.mean((1, 2, 3)), level)
    weight = torch.where(cut.view(-1, 1, 1, 1), 1 - box, share.view(-1, 1, 1, 1)).to(x.device)
    return Augmented(weight * x + (1 - weight) * x[partner], partner, share.to(x.device))
