"""Controls that learn nothing: routing by chance, and routing by place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from emoe_med.moe.experts.base import Experts
from emoe_med.moe.router import Place, Router, Routing


@dataclass(frozen=True)
class RandomOptions:
    """Options of `RandomRouter`: none."""


@dataclass(frozen=True)
class HashOptions:
    """Options of `HashRouter`: none."""


class RandomRouter(Router):
    """Send every token to K experts drawn by a hash of its bits, with gate 1/K.

    The same token always gets the same experts, neighbouring tokens get unrelated ones, and the load is
    equal in expectation. With one expert it makes the layer a dense adapter.
    """

    factors: Tensor

    def __init__(self, width: int, num_experts: int, top_k: int, options: RandomOptions) -> None:
        super().__init__(num_experts, top_k)
        generator = torch.Generator().manual_seed(0)
        factors = torch.randint(1, 2**31, (width,), generator=generator) * 2 + 1
        self.register_buffer("factors", factors)

    def forward(
        self, tokens: Tensor, experts: Experts, context: Tensor | None = None, place: Place | None = None
    ) -> Routing:
        """Route tokens [N, D] by their bits alone."""
        bits = tokens.detach().float().contiguous().view(torch.int32).to(torch.int64)
        mixed = (bits * self.factors).sum(-1)  # wraps around, which is what a hash wants
        return _from(self, mixed ^ (mixed >> 29))


class HashRouter(Router):
    """Send the tokens of one place in the grid to K experts that belong to the place, with gate 1/K.

    What a map of experts would look like if it followed position and no anatomy.

    Source: Roller et al. 2021, arXiv 2106.04426, with positions for words.
    """

    needs_place = True

    def __init__(self, width: int, num_experts: int, top_k: int, options: HashOptions) -> None:
        super().__init__(num_experts, top_k)

    def forward(
        self, tokens: Tensor, experts: Experts, context: Tensor | None = None, place: Place | None = None
    ) -> Routing:
        """Route tokens [N, D] by `place.position` alone."""
        position = (place or Place.alone(tokens)).position + 1
        # the finaliser of MurmurHash3, so that neighbours get unrelated experts
        mixed = ((position ^ (position >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
        mixed = ((mixed ^ (mixed >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
        return _from(self, mixed ^ (mixed >> 16))


def _from(router: Router, key: Tensor) -> Routing:
    """Make a routing of K neighbouring experts out of integer keys [N]."""
    slots = torch.arange(router.top_k, device=key.device)
    index = (key.remainder(router.num_experts).unsqueeze(1) + slots) % router.num_experts
    probs = torch.full((len(key), router.num_experts), 1 / router.num_experts, device=key.device)
    gate = torch.full(index.shape, 1 / router.top_k, device=key.device)
    return Routing(index, gate, probs, probs.new_zeros(()))
