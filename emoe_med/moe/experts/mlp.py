"""Experts as two-layer bottleneck MLPs, all weights stacked along the expert axis."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from emoe_med.moe.engines import Weights
from emoe_med.moe.experts.base import Experts


@dataclass(frozen=True)
class MLPOptions:
    """Options of `MLPExperts`.

    Attributes:
        hidden: bottleneck width b; None takes a quarter of the token width, the ratio of the paper's ViT-B.
        bias: with biases, as experts have that were copied from the MLP of a transformer.
        zero_init: w2 starts at zero, so that a network with the layer starts as the network without it; the
            published code starts at random weights and disturbs a pre-trained backbone at its first step.
    """

    hidden: int | None = None
    bias: bool = False
    zero_init: bool = True


class MLPExperts(Experts):
    """E experts h -> GELU(h w1 + b1) w2 + b2, w1 [E, D, b] and w2 [E, b, D], b1 [E, b] and b2 [E, D] on request."""

    def __init__(self, width: int, num_experts: int, options: MLPOptions) -> None:
        super().__init__(num_experts)
        hidden = options.hidden or max(1, width // 4)
        self.w1 = nn.Parameter(torch.randn(num_experts, width, hidden) * width**-0.5)
        start = torch.zeros if options.zero_init else torch.randn
        self.w2 = nn.Parameter(start(num_experts, hidden, width) * hidden**-0.5)
        self.b1 = nn.Parameter(torch.zeros(num_experts, hidden)) if options.bias else None
        self.b2 = nn.Parameter(torch.zeros(num_experts, width)) if options.bias else None

    def weights(self) -> Weights:
        """Return the parameters as they are."""
        return Weights(self.w1, self.w2, self.b1, self.b2)

    def no_weight_decay(self) -> list[nn.Parameter]:
        """Biases."""
        return [b for b in (self.b1, self.b2) if b is not None]
