"""What experts are: E two-layer networks with stacked weights, of which each token runs the chosen ones."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from emoe_med.moe.dispatch import grouped_mlp
from emoe_med.moe.engines import Weights
from emoe_med.moe.router import Routing


class Experts(nn.Module):
    """Base of all experts: h -> GELU(h w1 + b1) w2 + b2, one of each per expert.

    A kind of expert says in `weights` how these come about. One that is no two-layer network overrides `forward`
    and `run`.

    Attributes:
        has_basis: `basis()` returns a frame per expert.
    """

    has_basis = False

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts

    def weights(self) -> Weights:
        """Return the stacked weights."""
        raise NotImplementedError

    def forward(
        self, tokens: Tensor, routing: Routing, scale: Tensor | None = None, stream: Tensor | None = None
    ) -> Tensor:
        """Return `stream` [N, D] plus the gate-weighted sum of the chosen experts' outputs times a scalar `scale`."""
        return grouped_mlp(tokens, routing.expert_index, routing.gate, self.weights(), scale, stream)

    def run(self, tokens: Tensor, expert: int) -> Tensor:
        """Return one expert's output on tokens [M, D], ungated: for statistics and interventions."""
        w1, w2, b1, b2 = self.weights().each(lambda stack: stack[expert].to(tokens.dtype))
        return F.linear(F.gelu(F.linear(tokens, w1.T, b1)), w2.T, b2)

    def basis(self) -> Tensor:
        """Return the orthonormal frame of each expert, [E, D, d]."""
        raise TypeError(f"{type(self).__name__} have no basis")

    def after_step(self) -> None:
        """Move the experts' state once, after an optimiser step."""
