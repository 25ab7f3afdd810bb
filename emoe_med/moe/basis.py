"""Orthonormal bases: how they start, stay orthonormal, and follow the data.

`TrackedBasis` makes the paper's claim true: its columns span the top-R principal subspace of the tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from emoe_med.moe.router import StepSums

GOLDEN_RATIO = 0.5 * (5**0.5 - 1)


def retract(matrix: Tensor) -> Tensor:
    """Return the orthonormal factor of a [..., D, R] matrix nearest in the QR sense.

    QR with a positive diagonal is the usual retraction on the Stiefel manifold; without the sign rule LAPACK
    flips columns. Runs in float32: there is no bfloat16 QR.
    """
    q, r = torch.linalg.qr(matrix.float())
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    return (q * signs.unsqueeze(-2)).to(matrix.dtype)


def retract_(frames: Tensor) -> None:
    """Retract [..., D, R] frames in place, those alone that have left the manifold.

    A frame that no step has moved keeps its bits: experts without a token stay as they are, and so does a model
    that is saved and loaded.
    """
    moved = orthonormality_error(frames) > 1e-6 * frames.shape[-1] ** 0.5
    frames.copy_(torch.where(moved[..., None, None], retract(frames), frames))


def random_orthonormal(width: int, rank: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw a [D, R] matrix with orthonormal columns, uniformly."""
    if rank > width:
        raise ValueError(f"rank {rank} is larger than the token width {width}")
    return retract(torch.randn(width, rank, generator=generator))


def orthonormality_error(basis: Tensor) -> Tensor:
    """Return ||U^T U - I||_F of [..., D, R] bases; its square is Eq. 3 of the EMoE paper without the weight."""
    gram = basis.double().mT @ basis.double()  # a GPU may round float32 products to ten bits
    unit = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.matrix_norm(gram - unit).float()


class TokenMoments(nn.Module):
    """Running mean and covariance of the tokens, against which any basis can be judged.

    Per optimiser step: covariance C <- (1-w) C + w C_batch with w = max(1 - decay, 1/step), so that the
    first steps are a plain average; the mean likewise, or 0 where tokens are not centred.

    D x D statistics of more than `max_tokens` a call cost time and no longer change them. Of more, so many are taken
    at golden-ratio steps: evenly, and without a period that could fall in with the rows of a token grid. What is not
    finite is left out, batch and all: it would stay in the averages for ever.

    Buffers: `covariance` [D, D], `mean` [D], `step` [].
    Source: H^T H / N of arXiv 2601.12137, section 2.
    """

    MAX_TOKENS = 4096

    covariance: Tensor
    mean: Tensor
    step: Tensor

    def __init__(self, width: int, centre: bool = True, decay: float = 0.99, max_tokens: int = MAX_TOKENS) -> None:
        super().__init__()
        self.centre = centre
        self.decay = decay
        self.max_tokens = max_tokens
        self.register_buffer("covariance", torch.zeros(width, width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.sums = StepSums((), (width,), (width, width))  # number, tokens, outer products

    @torch.no_grad()
    def observe(self, tokens: Tensor) -> None:
        """Add the first and second moments of tokens [N, D] to the accumulators."""
        sample = tokens.detach()
        if len(tokens) > self.max_tokens:
            steps = torch.arange(self.max_tokens, dtype=torch.float64, device=tokens.device)
            sample = sample.index_select(0, (steps * GOLDEN_RATIO % 1 * len(tokens)).long())
        sample = sample.float()
        self.sums.add(len(sample), sample.sum(0), sample.T @ sample)

    @torch.no_grad()
    def after_step(self) -> bool:
        """Average in what was observed since the last step over all ranks; False where that was nothing."""
        count, total, outer = self.sums.take()
        seen = bool((count > 0) & outer.isfinite().all())
        if seen:
            self.step += 1
            weight = max(1 - self.decay, 1 / int(self.step))
            batch_mean = total / count
            if self.centre:
                self.mean.lerp_(batch_mean, weight)
            cross = torch.outer(batch_mean, self.mean)
            second_moment = outer / count
            batch_covariance = second_moment - cross - cross.T + torch.outer(self.mean, self.mean)
            self.covariance.lerp_(batch_covariance, weight)
        return seen

    def exact(self, rank: int) -> Tensor:
        """Return the top eigenvectors [D, rank] of the covariance, largest first."""
        return torch.linalg.eigh(self.covariance).eigenvectors.flip(-1)[:, :rank]

    def judge(self, directions: Tensor) -> dict[str, float]:
        """Compare orthonormal directions [D, R] with the exact eigenvectors of the covariance.

        Returns:
            captured_variance: tr(V^T C V) over the most that any R directions can capture; 1 is exact.
            subspace_overlap: ||V^T E||_F^2 / R, 1 for the same subspace, R/D by chance.
            alignment: mean over eigenvectors of the largest squared cosine with a direction.
            orthonormality_error: ||V^T V - I||_F.
        """
        directions, exact = directions.float(), self.exact(directions.shape[1])
        held = torch.trace(directions.T @ self.covariance @ directions)
        best = torch.trace(exact.T @ self.covariance @ exact).clamp_min(1e-12)
        cosines = (directions.T @ exact).square()
        return {
            "captured_variance": float(held / best),
            "subspace_overlap": float(cosines.sum() / directions.shape[1]),
            "alignment": float(cosines.max(0).values.mean()),
            "orthonormality_error": float(orthonormality_error(directions)),
        }


class TrackedBasis(TokenMoments):
    """Follow the top-R eigenvectors of the token covariance by averaged orthogonal iteration.

    After each step U <- qr(C U); at the first, U is taken from an eigendecomposition. The span is right within
    tens of steps, the single vectors within hundreds, and both move smoothly, which the rows of the expert mix
    rely on.

    Buffers: `basis` [D, R], and those of `TokenMoments`.
    Source: orthogonal iteration, Golub & Van Loan 8.2.
    """

    basis: Tensor

    def __init__(self, width: int, rank: int, centre: bool = True, decay: float = 0.99) -> None:
        super().__init__(width, centre, decay)
        self.register_buffer("basis", random_orthonormal(width, rank))

    @torch.no_grad()
    def after_step(self) -> bool:
        """Average in what was observed, and move the basis once."""
        seen = super().after_step()
        if seen:
            rank = self.basis.shape[1]
            self.basis.copy_(self.exact(rank) if self.step == 1 else retract(self.covariance @ self.basis))
        return seen
