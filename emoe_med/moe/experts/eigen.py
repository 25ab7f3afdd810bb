"""Experts whose weights are eigen-factorised: orthonormal frames in and out, one scale per direction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from emoe_med.moe.basis import random_orthonormal, retract_
from emoe_med.moe.engines import Weights
from emoe_med.moe.experts.base import Experts


@dataclass(frozen=True)
class EigenExpertOptions:
    """Options of `EigenExperts`.

    Attributes:
        rank: d, directions of an expert; None takes a quarter of the token width, as many active weights as the
            MLP experts have.
    """

    rank: int | None = None


class EigenExperts(Experts):
    """E experts h -> U diag(s) GELU(V^T h), U and V [E, D, d] with orthonormal columns, s [E, d].

    s starts at zero, so that a network with the layer starts as the network without it.

    Source: arXiv 2511.10971: W = U diag(s) V^T.
    """

    has_basis = True

    def __init__(self, width: int, num_experts: int, options: EigenExpertOptions) -> None:
        super().__init__(num_experts)
        rank = options.rank or max(1, width // 4)
        self.U = nn.Parameter(torch.stack([random_orthonormal(width, rank) for _ in range(num_experts)]))
        self.V = nn.Parameter(torch.stack([random_orthonormal(width, rank) for _ in range(num_experts)]))
        self.s = nn.Parameter(torch.zeros(num_experts, rank))

    def weights(self) -> Weights:
        """Return V as the map into the hidden space and U diag(s) as the map out of it."""
        return Weights(self.V, (self.s.unsqueeze(-1) * self.U.mT).contiguous())

    def basis(self) -> Tensor:
        """Return the frames U that tokens and context are projected on."""
        return self.U

    def no_weight_decay(self) -> list[nn.Parameter]:
        """Orthonormal frames are no magnitudes."""
        return [self.U, self.V]

    @torch.no_grad()
    def after_step(self) -> None:
        """Retract the frames that a step has moved."""
        retract_(self.U)
        retract_(self.V)
