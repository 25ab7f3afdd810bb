"""ERMoE: a token goes to the experts in whose basis it agrees with its surroundings.

Source: arXiv 2511.10971, from its abstract and what its public code shows; the formulas as read here are in
docs/method.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from emoe_med.moe.experts.base import Experts
from emoe_med.moe.router import Place, Router, Routing


@dataclass(frozen=True)
class ERMoEOptions:
    """Options of `ERMoERouter`.

    Attributes:
        threshold: a score above it qualifies an expert; 0 <= threshold < 1.
    """

    threshold: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold {self.threshold} must lie in [0, 1)")


class ERMoERouter(Router):
    """Eigenbasis Score: score_e = cos(U_e^T h, U_e^T c), c the context of token h, U_e the expert's own basis.

    The K best experts with a score above the threshold share the token in proportion to their scores; where
    none qualifies, the best one takes it. No balancing loss and no parameters of its own.
    """

    needs_context = True
    needs_basis = True

    def __init__(self, width: int, num_experts: int, top_k: int, options: ERMoEOptions) -> None:
        super().__init__(num_experts, top_k)
        if top_k == 1:
            raise ValueError("ERMoE needs top_k above 1: a single share is 1 and teaches the bases no routing")
        self.threshold = options.threshold

    def forward(
        self, tokens: Tensor, experts: Experts, context: Tensor | None = None, place: Place | None = None
    ) -> Routing:
        """Route tokens [N, D] against their context [N, D] in float32."""
        if context is None:
            raise ValueError("ERMoE compares a token with its context: hand in `context`")
        basis = experts.basis()
        with torch.autocast(tokens.device.type, enabled=False):
            one, other = (torch.einsum("nd,edr->ner", x.float(), basis.float()) for x in (tokens, context))
            scores = F.cosine_similarity(one, other, dim=-1)
            best, index = scores.topk(self.top_k, dim=-1)
            weight = best * (best > self.threshold)
            total = weight.sum(-1, keepdim=True)
            fallback = F.one_hot(torch.zeros_like(index[:, 0]), self.top_k).to(weight.dtype)
            gate = torch.where(total > 0, weight / total.clamp_min(1e-12), fallback)
        return Routing(index, gate, scores.softmax(-1), scores.new_zeros(()))
