"""The routed layer: normalise, route, run the chosen experts, add to the stream."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emoe_med.moe.experts.base import Experts
from emoe_med.moe.router import Place, Router, Routing, StepSums


class MoELayer(nn.Module):
    """h <- h + alpha * sum_k gate_k * Expert_k(LN(h)), alpha a learned scalar (arXiv 2601.12137, section 2).

    Router and experts see the same normalised tokens (layer norm without affine, so that energies do not
    depend on the scale of the stream). `normalise=False` serves callers that hand in normalised tokens; one that
    has them beside the stream hands them in as `seen`.
    """

    def __init__(self, router: Router, experts: Experts, normalise: bool = True) -> None:
        super().__init__()
        if router.needs_basis and not experts.has_basis:
            raise ValueError(f"{type(router).__name__} needs experts with a basis, such as EigenExperts")
        self.router: Router = router
        self.experts: Experts = experts
        self.normalise = normalise
        self.alpha = nn.Parameter(torch.ones(()))
        self.load = StepSums((router.num_experts,))

    def forward(
        self, x: Tensor, mask: Tensor | None = None, context: Tensor | None = None, seen: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """Route and transform the tokens of a batch.

        Args:
            x: [B, T, D].
            mask: [B, T] bool; False tokens (air around the head, prefix tokens) pass through unchanged and
                are seen by no router, expert or statistic. A GPU has to tell the host how many tokens are left.
            context: [B, T, D] for routers that compare a token with its surroundings.
            seen: [B, T, D], what router and experts see, as it is, in place of the normalised x: the input of a
                feed-forward that they stand beside or instead of.

        Returns:
            x [B, T, D] and the `Routing` of the N tokens where mask is True, in the order of `x[mask]`.
        """
        flat = stream = x.reshape(-1, x.shape[-1])
        given, surroundings = (None if t is None else t.reshape(flat.shape) for t in (seen, context))
        place = _place(x) if self.router.needs_place else None
        kept = None if mask is None else mask.flatten().nonzero().squeeze(1)
        if kept is not None:
            stream = flat.index_select(0, kept)
            given, surroundings = (None if t is None else t.index_select(0, kept) for t in (given, surroundings))
            place = None if place is None else Place(place.sample[kept], place.position[kept], place.samples)
        tokens = self._normal(stream) if given is None else given
        surroundings = None if surroundings is None else self._normal(surroundings)
        routing = self.router(tokens, self.experts, surroundings, place)
        if self.training:
            self.load.add(routing.load())
        out = self.experts(tokens, routing, self.alpha, stream).to(x.dtype)
        if kept is not None:
            out = flat.index_copy(0, kept, out)
        return out.view_as(x), routing

    def _normal(self, tokens: Tensor) -> Tensor:
        return F.layer_norm(tokens, tokens.shape[-1:]) if self.normalise else tokens

    def expert_parameters(self) -> list[nn.Parameter]:
        """Parameters whose first axis is the expert axis."""
        return [p for p in self.experts.parameters() if p.shape[:1] == (self.router.num_experts,)]

    def take_idle(self) -> Tensor:
        """Return [E] bool, True where no token came since the last call on any rank; starts counting anew.

        The optimiser keeps the weights and moments of idle experts as they were: a zero gradient alone would
        still let weight decay and momentum move them.
        """
        (load,) = self.load.take()
        return load == 0

    def after_step(self) -> None:
        """Move the state of router and experts once per optimiser step."""
        self.router.after_step()
        self.experts.after_step()


def _place(x: Tensor) -> Place:
    samples, length, _ = x.shape
    index = torch.arange(samples * length, device=x.device)
    return Place(index // length, index % length, samples)
