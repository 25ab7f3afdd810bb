"""Tokens whose right expert is known: each comes from one of eight clusters, which has a linear map of its own.

Three kinds of tokens, all with a mean that the clusters share:

- means: clusters differ in mean and covariance, in directions of high variance; planes tell them apart.
- covariance: clusters differ in covariance alone, in directions of high variance; these are the eigenvectors of the
  covariance of all tokens. No plane tells them apart, the energies along the principal directions do: nothing could
  suit the claim of EMoE (arXiv 2601.12137) better.
- minor: the same, but other directions, the same in all clusters, vary more; the principal subspace tells nothing.

In all of them the maps read the directions that tell the clusters apart, and no others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from emoe_med.moe import random_orthonormal

WIDTH, CLUSTERS, MAP_RANK = 64, 8, 8
INFORMATIVE = 24  # directions that tell clusters apart and that the maps read
VARIANTS = {  # distance of the cluster means, variance of the other directions
    "means": (1.0, 0.1),
    "covariance": (0.0, 0.1),
    "minor": (0.0, 4.0),
}

Batch = tuple[Tensor, Tensor, Tensor]  # tokens [N, D], targets [N, D], clusters [N]


@dataclass(frozen=True)
class Problem:
    """Token of cluster k: x = mean + offset_k + V diag(std_k) z, z normal; its target: x + A_k x.

    Attributes:
        mean: [D], shared.
        offset: [K, D], sums to 0.
        std: [K, D], standard deviation along each column of V.
        directions: [D, D], V.
        maps: [K, D, D], A_k^T of rank 8, which an expert of width 16 can be, since GELU(x) - GELU(-x) = x.
    """

    mean: Tensor
    offset: Tensor
    std: Tensor
    directions: Tensor
    maps: Tensor

    @classmethod
    def draw(cls, variant: str, seed: int) -> Problem:
        apart, nuisance = VARIANTS[variant]
        generator = torch.Generator().manual_seed(seed)
        directions = random_orthonormal(WIDTH, WIDTH, generator)
        # each direction is loud in two clusters, and each cluster along six directions, with distinct eigenvalues
        k, j = torch.arange(CLUSTERS).unsqueeze(1), torch.arange(INFORMATIVE)
        loud = ((k - j) % CLUSTERS == 0) | ((k - j) % CLUSTERS == 1 + j // CLUSTERS)
        profile = torch.where(loud, 16.0, 1.0)
        spectrum = torch.logspace(math.log10(2), math.log10(0.5), INFORMATIVE)
        scale = spectrum.sqrt()
        variance = torch.full((CLUSTERS, WIDTH), nuisance)
        variance[:, :INFORMATIVE] = spectrum * profile / profile.mean(0)
        # cluster means lie among the informative directions, the shared mean among the others, where no target reads
        offset = torch.randn(CLUSTERS, INFORMATIVE, generator=generator) * scale * apart
        offset = (offset - offset.mean(0)) @ directions[:, :INFORMATIVE].T
        total = variance.sum(1).mean() + offset.square().sum(1).mean()
        shared = torch.randn(WIDTH - INFORMATIVE, generator=generator)
        mean = directions[:, INFORMATIVE:] @ shared / shared.norm() * total.sqrt()
        size = (2 * total / WIDTH).sqrt()  # then the mean square of a feature is 1
        read = torch.stack([random_orthonormal(INFORMATIVE, MAP_RANK, generator) for _ in range(CLUSTERS)])
        write = torch.stack([random_orthonormal(WIDTH, MAP_RANK, generator) for _ in range(CLUSTERS)])
        maps = size * (directions[:, :INFORMATIVE] / scale) @ read @ write.mT
        return cls(mean / size, offset / size, variance.sqrt() / size, directions, maps)

    def tokens(self, count: int, generator: torch.Generator) -> Batch:
        """Draw tokens [N, D], their targets [N, D] and their clusters [N]."""
        cluster = torch.randint(CLUSTERS, (count,), generator=generator)
        z = torch.randn(count, WIDTH, generator=generator) * self.std[cluster]
        x = self.mean + self.offset[cluster] + z @ self.directions.T
        target = x.clone()
        for k, map_k in enumerate(self.maps):
            target[cluster == k] += x[cluster == k] @ map_k
        return x, target, cluster
