"""Random changes of training volumes that interpolate nothing.

A volume that is resampled once more is smoother than one that is not, and a network trained on the former
errs on the latter by years. So volumes are cached on a grid `oversample` times finer than the model's, moved by
whole voxels there, mirrored, and then averaged: every view is an exact area average of the same voxels.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class AugmentOptions:
    """Ranges of the random changes.

    Attributes:
        flip: probability of a left-right mirror image.
        shift_voxels: largest shift along each axis, in whole voxels of the cached grid (SFCN: 2 at 1 mm).
        gain: half-width of a uniform factor around 1 on the intensity.
    """

    flip: float = 0.5
    shift_voxels: int = 0
    gain: float = 0.0


def to_model_grid(image: Tensor, oversample: int) -> Tensor:
    """Average cubes of k^3 voxels, k = oversample: [..., kX, kY, kZ] -> [..., X, Y, Z]."""
    return image if oversample == 1 else F.avg_pool3d(image, oversample)


def augment(images: Tensor, keys: Tensor, options: AugmentOptions, oversample: int = 1) -> Tensor:
    """Change each volume of a batch at random and bring it to the model's grid.

    Args:
        images: [B, 1, kX, kY, kZ], 0 outside the head.
        keys: [B] int64 seeds, one a sample: the change of a sample depends on nothing else, so that neither
            batch order nor the number of workers alters a run.
        options: Ranges.
        oversample: k.

    Returns:
        [B, 1, X, Y, Z] float32; 0 wherever there is no voxel of the head.
    """
    changed = [_augment_one(image, int(key), options) for image, key in zip(images, keys, strict=True)]
    return to_model_grid(torch.stack(changed).float(), oversample)


def phases(image: Tensor, oversample: int) -> Tensor:
    """Return all k^3 positions of the model's grid on the cached one: [1, kX, kY, kZ] -> [k^3, 1, X, Y, Z]."""
    steps = product(range(oversample), repeat=3)
    return to_model_grid(torch.stack([shift(image, step) for step in steps]).float(), oversample)


def _augment_one(image: Tensor, key: int, options: AugmentOptions) -> Tensor:
    flip, gain, *places = torch.rand(5, generator=torch.Generator().manual_seed(key)).tolist()
    if flip < options.flip:
        image = image.flip(1)
    if options.shift_voxels:
        reach = options.shift_voxels
        image = shift(image, [int(place * (2 * reach + 1)) - reach for place in places])
    return image * (1 + options.gain * (2 * gain - 1)) if options.gain else image


def shift(image: Tensor, voxels: list[int] | tuple[int, ...]) -> Tensor:
    """Move a volume [1, X, Y, Z] by whole voxels; what leaves the box is lost, what enters is background."""
    return F.pad(image, [amount for v in reversed(voxels) for amount in (v, -v)])
