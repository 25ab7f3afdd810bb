"""Experts as two-layer bottleneck MLPs, all weights stacked along the expert axis."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emoe_med.moe.dispatch import grouped_mlp
from emoe_med.moe.router import Routing


@dataclass(frozen=True)
class MLPOptions:
    """Options of `MLPExperts`.

    Attributes:
        hidden: bottleneck width b; None takes a quarter of the token width, the ratio of the paper's ViT-B.
    """

    hidden: int | None = None


class MLPExperts(nn.Module):
    """E experts h -> GELU(h w1) w2 without biases, w1 [E, D, b] and w2 [E, b, D].

    w2 starts at zero, so that a network with the layer starts as the network without it (the published code
    starts at random weights and disturbs a pre-trained backbone at its first step).
    """

    def __init__(self, width: int, num_experts: int, options: MLPOptions) -> None:
        super().__init__()
        hidden = options.hidden or max(1, width // 4)
        self.num_experts = num_experts
        self.w1 = nn.Parameter(torch.randn(num_experts, width, hidden) * width**-0.5)
        self.w2 = nn.Parameter(torch.zeros(num_experts, hidden, width))

    def forward(self, tokens: Tensor, routing: Routing) -> Tensor:
        """Return the gate-weighted sum of the chosen experts' outputs, [N, D]."""
        return grouped_mlp(tokens, routing.expert_index, routing.gate, self.w1, self.w2)

    def run(self, tokens: Tensor, expert: int) -> Tensor:
        """Return one expert's output on tokens [M, D], ungated: for statistics and interventions."""
        return F.gelu(tokens @ self.w1[expert].to(tokens.dtype)) @ self.w2[expert].to(tokens.dtype)
