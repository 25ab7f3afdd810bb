"""How many years of a prediction hang on one cell: on what its expert says, and on what the input shows there.

Both are measured on the head as it is, in float32: what one cell does to an age is smaller than a step of bfloat16.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from emoe_med.brainage.maps.cells import routed_part
from emoe_med.brainage.net import BrainAgeNet
from emoe_med.moe import TokenSample, collected_tokens

GREY = 2.0**-10  # the mean of the head inside its mask; exactly 0 would mean air, which is not routed
BATCH = 64  # variants of one head in one pass


@torch.no_grad()
def contributions(net: BrainAgeNet, image: Tensor) -> np.ndarray:
    """Measure what the choice of expert adds to the age at each cell, in years.

    The output of the expert that serves a cell is replaced by the mean of all experts' outputs on the same token,
    with the same gate; everything else stays. Only the blocks after the layer run again.

    Args:
        net: Network with a routed layer.
        image: One head [1, 1, X, Y, Z] on the model's grid.

    Returns:
        [C, E]: predicted age minus that after the replacement; 0 where the expert does not serve the cell.
    """
    sfcn, layer, after = routed_part(net)
    before = sfcn.until(image, after)
    mask = sfcn.token_mask(image, before.shape[2:])
    sample = TokenSample(size=mask.numel())
    with collected_tokens(layer, sample):
        stream, routing = sfcn.route(layer, before, mask)
    tokens = sample.tokens.to(image.device)
    outputs = torch.stack([layer.experts.run(tokens, e) for e in range(layer.router.num_experts)])
    difference = outputs.mean(0) - outputs  # [E, N, D]

    def ages_of(maps: Tensor) -> Tensor:
        return net.head.predict(sfcn.answer(sfcn.beyond(maps, after)))

    age = ages_of(stream)
    cells = mask[0].nonzero().squeeze(1)
    order = torch.arange(len(cells), device=image.device)
    found = np.zeros((mask.shape[1], layer.router.num_experts), np.float32)
    for expert, gate in zip(routing.expert_index.T, routing.gate.T, strict=True):
        change = layer.alpha * gate.unsqueeze(1) * difference[expert, order]
        ages = []
        for part in order.split(BATCH):
            variants = stream.expand(len(part), *stream.shape[1:]).flatten(2).clone()
            variants[torch.arange(len(part)), :, cells[part]] += change[part].to(variants.dtype)
            ages.append(ages_of(variants.unflatten(2, stream.shape[2:])))
        found[cells.cpu(), expert.cpu()] += (age - torch.cat(ages)).cpu().numpy()
    return found


@torch.no_grad()
def occlusions(net: BrainAgeNet, image: Tensor, edge: int) -> np.ndarray:
    """Measure how the age changes when the head is painted grey in one cell, in years.

    Args:
        net: Any network.
        image: One head [1, 1, X, Y, Z] on the model's grid.
        edge: Voxels along a cell.

    Returns:
        [C]: predicted age minus that of the painted head; 0 where no head is in the cell.
    """
    cells = [size // edge for size in image.shape[2:]]
    index = torch.arange(math.prod(cells), device=image.device).view(cells)
    for axis in range(3):
        index = index.repeat_interleave(edge, axis)
    grid = torch.full(image.shape[2:], -1, device=image.device)
    grid[tuple(map(slice, index.shape))] = index
    head = image[0, 0] != 0
    held = grid[head].unique()
    held = held[held >= 0]
    age, _ = net.ages(image)
    ages = []
    for part in held.split(max(1, BATCH // 4)):
        painted = (grid == part.view(-1, 1, 1, 1)) & head
        ages.append(net.ages(torch.where(painted.unsqueeze(1), GREY, image))[0])
    found = np.zeros(math.prod(cells), np.float32)
    found[held.cpu()] = (age - torch.cat(ages)).cpu().numpy()
    return found
