"""How a network's output becomes an age: soft labels over bins, or one standardised number."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class TrainingAges:
    """Ages of the training scans in years: what heads are built from, and where a model has been."""

    low: float
    high: float
    mean: float
    std: float
    median: float
    n: int

    @classmethod
    def of(cls, ages: list[float]) -> TrainingAges:
        """Summarise the ages of the training scans."""
        values = torch.tensor(ages, dtype=torch.float64)
        return cls(
            low=float(values.min()),
            high=float(values.max()),
            mean=float(values.mean()),
            std=float(values.std()),
            median=float(values.quantile(0.5)),
            n=len(ages),
        )


class SoftLabelHead(nn.Module):
    """Age as a distribution over bins; the prediction is its mean.

    Target: mass of Normal(age, sigma) in each bin, renormalised; SFCN's fixed bins 42-82 keep half of the
    mass at 82 and none at 90, so bins span the training ages plus 3 sigma. Loss: KL(target || output).
    Source: Peng et al. 2021; renormalisation and span are ours.
    """

    has_confidence = True
    edges: Tensor

    def __init__(self, ages: TrainingAges, bin_years: float = 1.0, sigma_years: float = 1.0) -> None:
        super().__init__()
        low = math.floor((ages.low - 3 * sigma_years) / bin_years) * bin_years
        high = ages.high + 3 * sigma_years
        edges = torch.arange(low, high + bin_years, bin_years)
        self.sigma_years = sigma_years
        self.register_buffer("edges", edges)
        self.outputs = len(edges) - 1

    def target(self, age: Tensor) -> Tensor:
        """Return the soft label [B, bins] of ages [B] in years; rows sum to 1."""
        edges = self.edges.double()
        cdf = torch.special.ndtr((edges - age.double().unsqueeze(1)) / self.sigma_years)
        mass = cdf.diff(dim=1)
        return (mass / mass.sum(1, keepdim=True)).to(torch.float32)

    def loss(self, output: Tensor, age: Tensor) -> Tensor:
        """Return the KL divergence [B] of outputs [B, bins] from the soft labels of ages [B]."""
        return F.kl_div(output.float().log_softmax(1), self.target(age), reduction="none").sum(1)

    def predict(self, output: Tensor) -> Tensor:
        """Return predicted ages [B] in years."""
        return self._mean(output.float().softmax(1))

    def confidence(self, output: Tensor) -> Tensor:
        """Return how sure outputs [B, bins] are, [B]: 1 for a single age, 0 where they spread like all bins alike."""
        p = output.float().softmax(1)
        variance = (p * (self._centres() - self._mean(p).unsqueeze(1)).square()).sum(1)
        return (1 - (variance / self._centres().var(correction=0)).sqrt()).clamp_min(0)

    def _centres(self) -> Tensor:
        return (self.edges[:-1] + self.edges[1:]) / 2

    def _mean(self, p: Tensor) -> Tensor:
        # no matrix product: autocast would round the ages to a quarter or half of a year
        return (p * self._centres()).sum(1)

    def join(self, outputs: Tensor, weights: Tensor) -> Tensor:
        """Average the distributions of outputs [B, J, bins] by weights [B, J]; returns their logarithm [B, bins]."""
        return (outputs.log_softmax(-1) + weights.log().unsqueeze(-1)).logsumexp(1)


class L1Head(nn.Module):
    """Age as one number, standardised by the training ages; loss is the absolute error in those units."""

    outputs = 1
    has_confidence = False
    mean: Tensor
    std: Tensor

    def __init__(self, ages: TrainingAges) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(ages.mean))
        self.register_buffer("std", torch.tensor(max(ages.std, 1e-3)))

    def loss(self, output: Tensor, age: Tensor) -> Tensor:
        """Return the absolute error [B] of outputs [B, 1] in standard deviations of the training ages."""
        return (output.float().squeeze(1) - (age.float() - self.mean) / self.std).abs()

    def predict(self, output: Tensor) -> Tensor:
        """Return predicted ages [B] in years."""
        return output.float().squeeze(1) * self.std + self.mean

    def confidence(self, output: Tensor) -> Tensor:
        """Return zeros [B]: one number does not tell how sure it is."""
        return output.new_zeros(len(output), dtype=torch.float32)

    def join(self, outputs: Tensor, weights: Tensor) -> Tensor:
        """Average outputs [B, J, 1] by weights [B, J]."""
        return (weights.unsqueeze(-1) * outputs).sum(1)


HEADS = {"soft_label": SoftLabelHead, "l1": L1Head}
