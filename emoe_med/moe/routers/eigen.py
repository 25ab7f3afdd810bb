"""EMoE: route tokens by the share of their energy along the directions of one orthonormal basis.

Source: arXiv 2601.12137, Eqs. 1-3. What the paper leaves open, and what its published code does otherwise, is
an option here; see docs/method.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from emoe_med.moe.balance import BALANCES
from emoe_med.moe.basis import TokenMoments, TrackedBasis, orthonormality_error, random_orthonormal, retract_
from emoe_med.moe.experts.base import Experts
from emoe_med.moe.router import GateScale, Place, Router, Routing, gate_values, select


@dataclass(frozen=True)
class EigenOptions:
    """Options of `EigenRouter`.

    Attributes:
        rank: R; the basis is as wide as the tokens at most.
        basis: `tracked` follows the principal subspace of the tokens (no task gradient); `learned` is a
            parameter with task gradient, retracted after each step; `fixed` stays as drawn (control);
            `paper_code` is the published layer, see `EigenOptions.paper_code`.
        rotation: `learned` lets the task choose the directions inside the tracked or fixed subspace; with it,
            speak of the principal subspace, never of principal directions. A learned basis needs none.
        centre: subtract the running mean of the tokens; needed after a ReLU, where all features share a mean.
        gate: scale of the combine weight, see `gate_values`.
        balance: see `balance.BALANCES`; `bias` is the gradient-free selection bias, `none` the paper read
            literally. `importance_load` needs router noise, which this router has not.
        balance_strength: step of the bias or weight of the loss; None is the published one.
        temperature: of the softmax over experts (tau).
        ortho_loss: weight of Eq. 3; a no-op next to retraction, which keeps the basis orthonormal anyway.
    """

    rank: int = 32
    basis: Literal["tracked", "learned", "fixed", "paper_code"] = "tracked"
    rotation: Literal["learned", "none"] = "learned"
    centre: bool = True
    gate: GateScale = "prob_times_E"
    balance: Literal["none", "bias", "bias_sign", "switch"] = "bias"
    balance_strength: float | None = None
    temperature: float = 1.0
    ortho_loss: float = 0.0

    def __post_init__(self) -> None:
        if self.basis == "paper_code" and (self.centre or self.rotation != "none"):
            raise ValueError("the published layer neither centres nor rotates: set centre: false, rotation: none")

    @classmethod
    def paper_code(cls, **changes: Any) -> EigenOptions:
        """Give the settings of the authors' published layer; `changes` go on top.

        It stands after a whole block on the stream as it is: `MoELayer(..., normalise=False)`.
        """
        published = cls(128, "paper_code", "none", centre=False, gate="prob", balance="none", ortho_loss=5e-4)
        return replace(published, **changes)


class EigenRouter(Router):
    """Eigenbasis-guided router.

    z = (h - mean) U R;  e_j = z_j^2 / (sum_k z_k^2 + eps)  (Eq. 1);
    s_k = sum_j gamma_j pi_jk e_j + b_k  (Eq. 2);  p = softmax(s / tau);
    the K experts with the largest p + balance bias are chosen, the gate is p without the bias.
    Each row of pi is a softmax over experts, as published: every direction shares out one unit, so that the
    scores stay within the range of gamma.
    """

    EPS = 1e-6

    fixed: Tensor
    P: Tensor
    log_lambda: Tensor

    def __init__(self, width: int, num_experts: int, top_k: int, options: EigenOptions) -> None:
        super().__init__(num_experts, top_k)
        self.options = options
        rank = min(options.rank, width)
        # the moments centre the tokens, and a basis that does not follow them is judged by them: few tokens do
        if options.basis == "tracked":
            self.moments: TokenMoments = TrackedBasis(width, rank, options.centre)
        else:
            self.moments = TokenMoments(width, options.centre, max_tokens=64)
        self.rotation: nn.Parameter | None = None
        self.learned: nn.Parameter | None = None
        if options.basis in ("learned", "paper_code"):
            self.learned = nn.Parameter(random_orthonormal(width, rank))
        elif options.basis == "fixed":
            self.register_buffer("fixed", random_orthonormal(width, rank))
        if options.basis == "paper_code":
            # the other factor of an eigen-factorised weight that the published forward pass never uses: buffers,
            # since a parameter without a gradient stops distributed training
            self.register_buffer("P", random_orthonormal(width, rank))
            self.register_buffer("log_lambda", torch.zeros(rank))
        if options.basis in ("tracked", "fixed") and options.rotation == "learned":
            self.rotation = nn.Parameter(random_orthonormal(rank, rank))
        self.gamma = nn.Parameter(torch.ones(rank))
        self.mix_logits = nn.Parameter(torch.randn(rank, num_experts))
        self.expert_bias = nn.Parameter(torch.zeros(num_experts))
        self.balance = BALANCES[options.balance](num_experts, options.balance_strength)

    def no_weight_decay(self) -> list[nn.Parameter]:
        """Parameters that are not magnitudes to be shrunk: orthonormal frames and the softmaxed mix."""
        return [p for p in (self.learned, self.rotation, self.mix_logits) if p is not None]

    def basis(self) -> Tensor:
        """Return the directions [D, R] that energies are measured along."""
        if self.learned is not None:
            return self.learned
        subspace = self.moments.basis if isinstance(self.moments, TrackedBasis) else self.fixed
        return subspace if self.rotation is None else subspace @ self.rotation

    def squares(self, tokens: Tensor) -> Tensor:
        """Return z^2 [N, R], z = (h - mean) U, of tokens [N, D], in float32.

        On a GPU the product runs in the precision of autocast: in float32 it would cost more than the experts,
        and up to 0.6 % of the tokens go elsewhere. On a CPU it stays in float32, which is as fast.
        """
        dtype = torch.float32
        if tokens.is_cuda and torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")
        with torch.autocast(tokens.device.type, enabled=False):
            directions = self.basis().float()
            # the mean is taken off after the product, where it is R wide and not D
            z = (tokens.to(dtype) @ directions.to(dtype)).float() - self.moments.mean.float() @ directions
            return z.square()

    def energies(self, tokens: Tensor) -> Tensor:
        """Return the energies e [N, R] of tokens [N, D] (Eq. 1)."""
        squares = self.squares(tokens)
        return squares / (squares.sum(-1, keepdim=True) + self.EPS)

    def forward(
        self, tokens: Tensor, experts: Experts, context: Tensor | None = None, place: Place | None = None
    ) -> Routing:
        """Route tokens [N, D]; squares, scores and probabilities are float32, since margins are about 1e-3."""
        squares = self.squares(tokens)
        with torch.autocast(tokens.device.type, enabled=False):
            mix = self.gamma.float().unsqueeze(1) * self.mix_logits.float().softmax(dim=-1)
            # Eqs. 1 and 2 with the division after the mix: e @ mix = (z^2 @ mix) / (sum z^2 + eps)
            scores = squares @ mix / (squares.sum(-1, keepdim=True) + self.EPS) + self.expert_bias.float()
            probs = (scores / self.options.temperature).softmax(dim=-1)
            index = select(self.balance.preference(probs), self.top_k)
            if self.training:
                self.moments.observe(tokens)
                self.balance.observe(probs.detach(), index)
            aux_loss = self.balance.loss(probs, index)
            if self.options.ortho_loss:
                aux_loss = aux_loss + self.options.ortho_loss * self._ortho_penalty()
        return Routing(index, gate_values(probs, index, self.options.gate), probs, aux_loss)

    def _ortho_penalty(self) -> Tensor:
        frames = {"paper_code": [self.learned, getattr(self, "P", None)], "learned": [self.learned]}
        found = [orthonormality_error(f).square() for f in frames.get(self.options.basis, []) if f is not None]
        return torch.stack(found).sum() if found else self.gamma.new_zeros(())

    @torch.no_grad()
    def after_step(self) -> None:
        """Track the covariance, retract learned frames, move the balance bias."""
        self.moments.after_step()
        self.retract()
        self.balance.after_step()

    @torch.no_grad()
    def retract(self) -> None:
        """Make learned frames orthonormal again."""
        for frame in (self.learned, self.rotation, self._buffers.get("P")):
            if frame is not None:
                retract_(frame)

    @torch.no_grad()
    def health(self) -> dict[str, float]:
        """Tell whether the basis is what its name says: captured variance, alignment, orthonormality."""
        return self.moments.judge(self.basis())
