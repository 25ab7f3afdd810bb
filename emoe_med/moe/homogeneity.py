"""How alike the experts are: in what they say about the same tokens, and in the subspaces of their weights.

Read it together with the value of routing (see `interventions`): experts that learned nothing are unlike, too.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from emoe_med.moe.experts.base import Experts
from emoe_med.moe.layer import MoELayer

EPS = torch.finfo(torch.float32).eps


class TokenSample:
    """A uniform sample without replacement of the tokens of a stream; memory does not grow with the stream.

    Each token draws a random key and the `size` smallest keys stay, so that samples of ranks join into a sample
    of all their tokens. The same seed, ranks and stream give the same sample.

    Attributes:
        tokens: [M, D] float32 on the CPU, in the order of the stream; M is `size`, or the whole stream.
    """

    def __init__(self, size: int = 4096, seed: int = 0) -> None:
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        self.size = size
        self.tokens = torch.empty(0)
        self._keys = torch.empty(0, dtype=torch.float64)
        self._generator = torch.Generator().manual_seed(seed + 2**20 * rank)

    @torch.no_grad()
    def update(self, tokens: Tensor) -> None:
        """Add tokens [N, D] of the stream; only those that enter the sample leave their device."""
        self._keep(torch.rand(len(tokens), dtype=torch.float64, generator=self._generator), tokens)

    def gather(self) -> None:
        """Join the ranks' samples into one of their union, once: the same on each rank."""
        if not (dist.is_available() and dist.is_initialized()):
            return
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, (self._keys, self.tokens))
        self._keys, self.tokens = self._keys[:0], self.tokens[:0]
        for keys, tokens in parts:
            self._keep(keys, tokens)

    def _keep(self, keys: Tensor, tokens: Tensor) -> None:
        held = len(self._keys)
        keys = torch.cat([self._keys, keys])
        order = keys.topk(min(self.size, len(keys)), largest=False).indices.sort().values
        new = order[order >= held] - held
        rows = tokens.index_select(0, new.to(tokens.device)).float().cpu()
        self._keys, self.tokens = keys[order], torch.cat([self.tokens[order[order < held]], rows])


@contextmanager
def collected_tokens(layer: MoELayer, sample: TokenSample):
    """Add to the sample what router and experts see in every forward pass."""
    handle = layer.router.register_forward_pre_hook(lambda module, args: sample.update(args[0]))
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def homogeneity(experts: Experts, tokens: Tensor) -> dict[str, float]:
    """Compare all pairs of experts on the same tokens.

    An output of zero is like no other: its cosine and CKA are 0, as all are in a fresh layer.

    Args:
        experts: Two or more; a single one has nothing to be compared with, and the result is empty.
        tokens: [M, D] on the experts' device, M >= 1; outputs are computed in their dtype and take [E, M, D].

    Returns:
        Means over pairs of experts, each 1 where all are equal:
        `output_cosine`, the mean over tokens; `output_cosine_centred`, after removing the experts' mean output
        (-1 / (E - 1) where they are unrelated, 0 where nothing is left); `output_cka`, linear CKA (Kornblith et
        al. 2019, arXiv 1905.00414). Of experts with stacked weights also `overlap_w1` and `overlap_w2`, mean
        cos^2 of the principal angles between the subspaces of the tokens that experts read from and write to
        (b / D where they are unrelated, 1 where b >= D).

    Raises:
        ValueError: There is no token.
    """
    if not len(tokens):
        raise ValueError("experts can be compared on tokens alone, and there are none")
    if experts.num_experts == 1:
        return {}
    found = output_homogeneity(torch.stack([experts.run(tokens, e) for e in range(experts.num_experts)]))
    with suppress(NotImplementedError):
        w1, w2, *_ = experts.weights()
        found |= {"overlap_w1": _mean_overlap(w1), "overlap_w2": _mean_overlap(w2.mT)}
    return found


def output_homogeneity(outputs: Tensor) -> dict[str, float]:
    """Compare what experts of any kind say, outputs [E, M, D], by the first figures of `homogeneity`."""
    # what is left of an output after subtracting its equal is rounding, and has a cosine with anything
    rounding = 8 * EPS * outputs.norm(dim=-1, keepdim=True).amax(0)
    return {
        "output_cosine": _mean_cosine(outputs, rounding),
        "output_cosine_centred": _mean_cosine(outputs - outputs.mean(0), rounding),
        "output_cka": _mean_cka(outputs),
    }


def _mean_cosine(outputs: Tensor, rounding: Tensor) -> float:
    """Mean over tokens and pairs: 2 sum_{k<l} u_k u_l = |sum_k u_k|^2 - sum_k |u_k|^2 of the unit outputs."""
    count = len(outputs)
    unit = _over(outputs, outputs.norm(dim=-1, keepdim=True), rounding)
    pairs = unit.sum(0).square().sum(-1) - unit.square().sum(dim=(0, -1))
    return float(pairs.mean() / (count * (count - 1)))


def _mean_cka(outputs: Tensor) -> float:
    """Mean over pairs of ||Y_k^T Y_l||^2 / (||Y_k^T Y_k|| ||Y_l^T Y_l||), Frobenius, Y centred by column."""
    centred = outputs - outputs.mean(1, keepdim=True)
    rounding = 8 * EPS * outputs.norm(dim=(1, 2), keepdim=True)
    # first to unit norm: fourth powers of small outputs would vanish
    unit = _over(centred, centred.norm(dim=(1, 2), keepdim=True), rounding)
    own = torch.stack([(y.T @ y).norm() for y in unit])
    return float(_cross(_over(unit, own.sqrt().view(-1, 1, 1), own.new_zeros(()))).mean())


def _mean_overlap(weight: Tensor) -> float:
    """Mean over pairs of cos^2 of the principal angles between the column spaces of weight [E, D, b].

    The cosines are the singular values of Q_k^T Q_l for orthonormal bases Q (Bjoerck and Golub 1973), as many as
    the smaller of the two subspaces has dimensions.
    """
    basis, size, _ = torch.linalg.svd(weight.double(), full_matrices=False)
    real = size > EPS * max(weight.shape[1:]) * size.amax(-1, keepdim=True)
    angles = torch.stack([torch.minimum(*ranks) for ranks in combinations(real.sum(-1), 2)])
    return float((_cross(basis * real.unsqueeze(1)) / angles.clamp_min(1)).mean())


def _cross(matrices: Tensor) -> Tensor:
    """Return ||A_k^T A_l||^2, Frobenius, for all pairs k < l of matrices [E, M, D]."""
    return torch.stack([(a.T @ b).square().sum() for a, b in combinations(matrices, 2)])


def _over(values: Tensor, norm: Tensor, rounding: Tensor) -> Tensor:
    """Divide by the norm; what is no larger than rounding becomes 0."""
    return torch.where(norm > rounding, values / norm, 0)
