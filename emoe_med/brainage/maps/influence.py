"""How many years of a prediction hang on one cell: on what its expert says, and on what the input shows there.

Both are measured on the head as it is, in float32: what one cell does to an age is smaller than a step of bfloat16.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from emoe_med.brainage.maps.cells import CellGrid, routed_part
from emoe_med.brainage.net import BrainAgeNet
from emoe_med.moe import TokenSample, collected_tokens

GREY = 2.0**-10  # the mean of the head inside its mask; exactly 0 would mean air, which is not routed
BATCH = 64  # variants of one head in one pass
VOXELS = 2**20  # painted in one pass


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
    mask = sfcn.token_mask(image)
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
def occlusions(net: BrainAgeNet, image: Tensor, grid: CellGrid) -> np.ndarray:
    """Measure how the age changes when the head is painted grey in one cell, in years.

    Only what can see the cell is run again up to the routed layer: the tokens within its reach, from a window of
    twice that reach, at whose inner cells the convolutions see what they see in the whole head. Other tokens keep
    their experts, unless the router lets tokens compete or compares them with their surroundings.

    Args:
        net: Network with a routed layer.
        image: One head [1, 1, X, Y, Z] on the model's grid.
        grid: Its cells.

    Returns:
        [C]: predicted age minus that of the painted head; 0 where no head is in the cell.
    """
    sfcn, layer, after = routed_part(net)
    edge, shape = grid.edge, np.array(image.shape[2:]) // grid.edge
    reach = -(-(grid.field - edge) // (2 * edge))
    width = np.minimum(4 * reach + 1, shape)
    before = sfcn.until(image, after)
    mask = sfcn.token_mask(image)
    intact, _ = sfcn.route(layer, before, mask)
    age = net.head.predict(sfcn.answer(sfcn.beyond(intact, after)))
    found = np.zeros(shape, np.float32)
    held = F.max_pool3d((image != 0).float(), edge)[0, 0].nonzero().cpu().numpy()
    step = max(1, min(BATCH, VOXELS // int(np.prod(width * edge))))
    for part in (held[start : start + step] for start in range(0, len(held), step)):
        start = np.clip(part - 2 * reach, 0, shape - width)  # of the window of each cell
        crops = torch.cat([_painted(image, cell, low, width, edge) for cell, low in zip(part, start, strict=True)])
        inner = sfcn.until(crops, after)
        maps = before.expand(len(part), *before.shape[1:]).clone()
        seen = torch.zeros(len(part), *shape, dtype=torch.bool, device=image.device)
        for row, (cell, low) in enumerate(zip(part, start, strict=True)):
            first, end = np.maximum(cell - reach, 0), np.minimum(cell + reach + 1, shape)
            near = tuple(map(slice, first, end))
            maps[(row, slice(None), *near)] = inner[(row, slice(None), *map(slice, first - low, end - low))]
            seen[(row, *near)] = True
        if layer.router.independent:
            changed, _ = sfcn.route(layer, maps, mask & seen.flatten(1))
            stream = torch.where(seen.unsqueeze(1), changed, intact)
        else:  # a change anywhere may move any token, within its head alone
            stream = torch.cat([sfcn.route(layer, one, mask)[0] for one in maps.split(1)])
        ages = net.head.predict(sfcn.answer(sfcn.beyond(stream, after)))
        found[tuple(part.T)] = (age - ages).cpu().numpy()
    return found.ravel()


def _painted(image: Tensor, cell: np.ndarray, start: np.ndarray, width: np.ndarray, edge: int) -> Tensor:
    """Return the window of ``width`` cells from ``start`` on, one cell grey."""
    crop = image[(..., *map(slice, start * edge, (start + width) * edge))].clone()
    block = crop[(..., *map(slice, (cell - start) * edge, (cell - start + 1) * edge))]
    block[block != 0] = GREY
    return crop
