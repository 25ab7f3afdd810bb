"""Single-gated mixture of experts: a frozen network, and beside it one expert for each cluster of its features.

The gate chooses once an image, and where the network is sure it may answer alone.
Source: Royer et al., BMVC 2022, arXiv 2304.05497. Letters: B images, K experts, F features, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from emoe_med.models.output import ModelOutput
from emoe_med.moe import MoELayer, Routing

STARTS = 4  # of k-means; the best of them counts
CLUSTERED = 100_000  # samples at most, drawn at random: all of ImageNet's would take tens of GiB, in every rank


class Staged(Protocol):
    """A network that can be cut behind a stage: `answer(beyond(until(image, s), s))` is the same for every s."""

    @property
    def num_features(self) -> int:
        """F."""
        ...

    def until(self, image: Tensor, stages: int) -> Tensor:
        """Return the feature map behind the first so many stages."""
        ...

    def beyond(self, x: Tensor, stages: int) -> Tensor:
        """Return the pooled features [B, F, ...] of such a map."""
        ...

    def answer(self, features: Tensor) -> Tensor:
        """Map pooled features to outputs [B, O]."""
        ...

    def tail(self, stages: int) -> Any:
        """Return a copy of what stands behind so many stages, as a module with `beyond` and `answer`."""
        ...


class Ensembler(Protocol):
    """How answers are joined, and how sure one is."""

    @property
    def has_confidence(self) -> bool:
        """Whether an answer tells how sure it is."""
        ...

    def confidence(self, output: Tensor) -> Tensor:
        """Return how sure outputs [B, O] are, [B] in 0 to 1; zeros where they cannot tell."""
        ...

    def join(self, outputs: Tensor, weights: Tensor) -> Tensor:
        """Average outputs [B, J, O] by weights [B, J], whose rows sum to 1; returns [B, O]."""
        ...


class ClassEnsembler:
    """Logits are averaged, and one is as sure as the likeliest class is likely.

    The paper adds the logits: the same class, at half the temperature.
    """

    has_confidence = True

    def confidence(self, output: Tensor) -> Tensor:
        """Return the largest class probability [B]."""
        return output.float().softmax(1).amax(1)

    def join(self, outputs: Tensor, weights: Tensor) -> Tensor:
        """Average logits."""
        return (weights.unsqueeze(-1) * outputs).sum(1)


class ClusterGate(nn.Linear):
    """A linear gate on pooled features, and the k-means centroids [K, F] that it learns to tell apart."""

    centroids: Tensor

    def __init__(self, num_features: int, num_experts: int) -> None:
        super().__init__(num_features, num_experts)
        self.register_buffer("centroids", torch.zeros(num_experts, num_features))

    @classmethod
    def fit(cls, features: np.ndarray, num_experts: int, seed: int) -> Self:
        """Cluster features [n, F] of the training images, and start from the gate that this amounts to.

        The nearest of several centroids is linear in the features. With a spread s^2 of one feature within a cluster,
        softmax(features . c / s^2 - |c|^2 / 2 s^2) is the posterior of the equal Gaussians that k-means stands for.
        """
        if len(features) > CLUSTERED:
            features = features[np.random.default_rng(seed).choice(len(features), CLUSTERED, replace=False)]
        with threadpool_limits(1):  # sums in another order would be other centroids
            found = KMeans(num_experts, n_init=STARTS, random_state=seed).fit(features.astype(np.float64))
        gate = cls(features.shape[1], num_experts)
        spread = max(found.inertia_ / features.size, 1e-12)
        centres = torch.from_numpy(found.cluster_centers_)
        with torch.no_grad():
            gate.centroids.copy_(centres)
            gate.weight.copy_(centres / spread)
            gate.bias.copy_(-centres.square().sum(1) / (2 * spread))
        return gate

    def nearest(self, features: Tensor) -> Tensor:
        """Return the nearest centroid [B] of pooled features [B, F, ...]: what the gate is trained on."""
        return torch.cdist(features.float().flatten(1), self.centroids).argmin(1)

    def forward(self, input: Tensor) -> Tensor:
        """Map pooled features [B, F, ...] to logits [B, K]."""
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.float().flatten(1))


def weigh(probs: Tensor, confidence: Tensor, tau: float | None) -> Tensor:
    """Say how much each expert counts, [B, K]; rows sum to 1, or to 0 where the base answers alone.

    Without `tau` the likeliest expert counts, always. With it an expert runs where
    gate * (1 - confidence of the base) exceeds 1 - tau, and those that run count by their gate: where the gate is sure,
    the base answers alone once its confidence reaches tau. (The paper's table has the cost rise with tau, so that its
    threshold must be this one.)

    Args:
        probs: [B, K] of the gate.
        confidence: [B] of the base's answer.
        tau: 0 (never an expert) to 1, or None.
    """
    if tau is None:
        return F.one_hot(probs.argmax(1), probs.shape[1]).to(probs.dtype)
    chosen = probs * (probs * (1 - confidence.unsqueeze(1)) > 1 - tau)
    return chosen / chosen.sum(1, keepdim=True).clamp_min(torch.finfo(probs.dtype).tiny)


@dataclass(frozen=True)
class Answers:
    """What base, gate and all experts say of a batch, for any choice among them.

    Attributes:
        outputs: [B, 1 + K, O], the base first.
        probs: [B, K] of the gate.
        confidence: [B] of the base.
    """

    outputs: Tensor
    probs: Tensor
    confidence: Tensor


class SingleGated(nn.Module):
    """A base network, a gate on its features, and experts: copies of its last stages, each for one cluster.

    An image's answer is the base's alone, or the average of the base's and of its experts' answers; an expert runs on
    the images that are sent to it, on the base's map behind `stages` stages.

    Args:
        base: The network, of which the parameters are `base.*`.
        num_experts: K.
        stages: Stages that are common to all.
        ensembler: Joins answers; no part of this module's state.
        tau: See `weigh`.
    """

    def __init__(
        self, base: Any, num_experts: int, stages: int, ensembler: Ensembler, tau: float | None = None
    ) -> None:
        super().__init__()
        self.base = base
        self.stages = stages
        self.tau = tau
        self.gate = ClusterGate(base.num_features, num_experts)
        self.experts = nn.ModuleList(base.tail(stages) for _ in range(num_experts))
        self._ensembler = (ensembler,)  # in a tuple, so that a head which joins is registered once, by its owner

    @property
    def ensembler(self) -> Ensembler:
        """How answers are joined."""
        return self._ensembler[0]

    @property
    def num_features(self) -> int:
        """Pooled features of the base."""
        return self.base.num_features

    def features(self, image: Tensor) -> Tensor:
        """Return the base's pooled features [B, F, ...]: what the gate sees."""
        return self.base.beyond(self.base.until(image, self.stages), self.stages)

    def probed(self, image: Tensor) -> dict[str, Tensor]:
        """Return what the heads could see of images [B, 2 F]: the base's features, then the likeliest expert's."""
        shared = self.base.until(image, self.stages)
        features = self.base.beyond(shared, self.stages)
        chosen, expert_features = self.gate(features).argmax(1), torch.empty_like(features)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero().squeeze(1)
            if len(rows):
                expert_features[rows] = self._beyond(expert, shared[rows]).to(features.dtype)
        return {"mean": torch.cat([features, expert_features], 1)}

    def forward(self, image: Tensor) -> ModelOutput:
        """Map images to outputs [B, O]; `routing["gate"]` has one slot for each expert that an image got."""
        shared = self.base.until(image, self.stages)
        features = self.base.beyond(shared, self.stages)
        answer = self.base.answer(features)
        probs = self.gate(features).softmax(1)
        weights = weigh(probs, self.ensembler.confidence(answer), self.tau)
        outputs = answer.unsqueeze(1).repeat(1, 1 + len(self.experts), 1)
        for number, expert in enumerate(self.experts):
            rows = weights[:, number].nonzero().squeeze(1)
            if len(rows):
                outputs[rows, 1 + number] = self._expert(expert, shared[rows]).to(outputs.dtype)
        served, order = weights.sort(dim=1, descending=True, stable=True)
        slots = max(1, int((weights > 0).sum(1).max()))
        routing = Routing(order[:, :slots], served[:, :slots], probs, probs.new_zeros(()))
        mask = torch.ones(len(probs), 1, dtype=torch.bool, device=probs.device)
        return ModelOutput(self.joined(outputs, weights), routing.aux_loss, {"gate": routing}, {"gate": mask})

    def answers(self, image: Tensor) -> Answers:
        """Let everybody answer, whatever the gate says."""
        shared = self.base.until(image, self.stages)
        features = self.base.beyond(shared, self.stages)
        answer = self.base.answer(features)
        outputs = [answer, *(self._expert(expert, shared) for expert in self.experts)]
        probs = self.gate(features).softmax(1)
        return Answers(torch.stack(outputs, 1), probs, self.ensembler.confidence(answer))

    def joined(self, outputs: Tensor, weights: Tensor) -> Tensor:
        """Average answers [B, 1 + K, O]: one half is the base's, the other its experts' by weights [B, K], if any."""
        with torch.autocast(outputs.device.type, enabled=False):
            half = weights.float() / 2
            return self.ensembler.join(outputs.float(), torch.cat([1 - half.sum(1, keepdim=True), half], 1))

    def _expert(self, expert: Any, shared: Tensor) -> Tensor:
        return expert.answer(self._beyond(expert, shared))

    def _beyond(self, expert: Any, shared: Tensor) -> Tensor:
        return expert.beyond(shared, self.stages)

    @torch.no_grad()
    def cost(self, image: Tensor) -> dict[str, int]:
        """Count the multiply-accumulates of one image [1, ...]: base and gate, which always run, and one expert."""
        shared = self.base.until(image, self.stages)
        features = self.base.beyond(shared, self.stages)
        parts = {
            "base": lambda: self.base.answer(self.features(image)),
            "gate": lambda: self.gate(features),
            "expert": lambda: self._expert(self.experts[0], shared),
        }
        return {name: macs(run) for name, run in parts.items()}

    def routed_layers(self) -> dict[str, MoELayer]:
        """Return none: the gate sends whole images."""
        return {}


def macs(run: Any) -> int:
    """Count the multiply-accumulates of convolutions and products in a call."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2
