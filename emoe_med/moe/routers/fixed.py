"""Controls that learn nothing: routing that carries no information about content."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from emoe_med.moe.router import Router, Routing


@dataclass(frozen=True)
class RandomOptions:
    """Options of `RandomRouter`: none."""


class RandomRouter(Router):
    """Send every token to K experts drawn by a hash of its bits, with gate 1.

    The same token always gets the same experts, neighbouring tokens get unrelated ones, and the load is
    equal in expectation. With one expert it makes the layer a dense adapter.
    """

    factors: Tensor

    def __init__(self, width: int, num_experts: int, top_k: int, options: RandomOptions) -> None:
        super().__init__(num_experts, top_k)
        generator = torch.Generator().manual_seed(0)
        factors = torch.randint(1, 2**31, (width,), generator=generator) * 2 + 1
        self.register_buffer("factors", factors)

    def forward(self, tokens: Tensor, experts: nn.Module, context: Tensor | None = None) -> Routing:
        """Route tokens [N, D] by their bits alone."""
        bits = tokens.detach().float().contiguous().view(torch.int32).to(torch.int64)
        mixed = (bits * self.factors).sum(-1)  # wraps around, which is what a hash wants
        first = (mixed ^ (mixed >> 29)).remainder(self.num_experts)
        slots = torch.arange(self.top_k, device=tokens.device)
        index = (first.unsqueeze(1) + slots) % self.num_experts
        probs = torch.full((tokens.shape[0], self.num_experts), 1 / self.num_experts, device=tokens.device)
        gate = torch.full(index.shape, 1 / self.top_k, device=tokens.device)
        return Routing(index, gate, probs, probs.new_zeros(()))
