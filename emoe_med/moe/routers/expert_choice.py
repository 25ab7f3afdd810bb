"""Expert Choice: experts choose tokens, so that every expert is exactly as busy as the others.

Source: Zhou et al. 2022, arXiv 2202.09368.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from emoe_med.moe.experts.base import Experts
from emoe_med.moe.router import Place, Router, Routing


@dataclass(frozen=True)
class ExpertChoiceOptions:
    """Options of `ExpertChoiceRouter`: none."""


class ExpertChoiceRouter(Router):
    """Each expert takes its best ceil(T * K / E) tokens of every sample, by p = softmax over experts.

    K is the mean number of experts of a token; a token may get none, or all. An expert chooses within a sample,
    so that a prediction does not depend on what else is in the batch. The load is even by construction: look at
    the share of tokens without an expert instead.
    """

    needs_place = True

    def __init__(self, width: int, num_experts: int, top_k: int, options: ExpertChoiceOptions) -> None:
        super().__init__(num_experts, top_k)
        self.weight = nn.Parameter(torch.randn(width, num_experts) * width**-0.5)

    @property
    def independent(self) -> bool:
        """Tokens of a sample compete for the experts."""
        return False

    def forward(
        self, tokens: Tensor, experts: Experts, context: Tensor | None = None, place: Place | None = None
    ) -> Routing:
        """Route tokens [N, D]; the routing has E slots per token, those not chosen are dropped."""
        place = place or Place.alone(tokens)
        with torch.autocast(tokens.device.type, enabled=False):
            probs = (tokens.float() @ self.weight.float()).softmax(-1)
        chosen = self._choose(probs.detach(), place)
        index = torch.arange(self.num_experts, device=probs.device).expand_as(probs)
        return Routing(index, probs * chosen, probs, probs.new_zeros(()))

    def _choose(self, probs: Tensor, place: Place) -> Tensor:
        """Tell [N, E] which tokens each expert takes."""
        tokens_of = torch.zeros(place.samples, dtype=torch.int64, device=probs.device)
        tokens_of.index_add_(0, place.sample, torch.ones_like(place.sample))
        slots = -(-tokens_of * self.top_k // self.num_experts)
        # per expert: by score, then stably by sample, so that each sample's tokens stand together, best first
        order = probs.argsort(dim=0, descending=True, stable=True)
        order = order.gather(0, place.sample[order].argsort(dim=0, stable=True))
        sample = place.sample[order]
        rank = torch.arange(len(probs), device=probs.device).unsqueeze(1) - (tokens_of.cumsum(0) - tokens_of)[sample]
        return torch.empty_like(order, dtype=torch.bool).scatter_(0, order, rank < slots[sample])
