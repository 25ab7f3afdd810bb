"""What the training loop needs to know about brain age: data, network, loss, validation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import asdict
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from emoe_med.brainage.first_choices import FirstChoices, missing_heads
from emoe_med.brainage.net import BrainAgeNet
from emoe_med.config import BrainAgeConfig
from emoe_med.data.augment import AugmentOptions, augment, to_model_grid
from emoe_med.data.cache import HeadDataset
from emoe_med.data.memory import Held
from emoe_med.model_config import GatingConfig
from emoe_med.models.deep_moe import DeepMoE
from emoe_med.models.heads import TrainingAges
from emoe_med.models.output import ModelOutput
from emoe_med.moe import RoutingStats
from emoe_med.training.channel_report import ChannelUse
from emoe_med.training.pictures import Picture
from emoe_med.training.task import MapDataset


class BrainAgeTask:
    """Brain age from T1 volumes, for `training.loop.fit`.

    Args:
        config: The run.
        heads: All scans of the manifest, in the model's space.
        train: Indices into `heads` to learn from.
        val: Indices to validate on; other persons.
        digests: Digests of configuration and manifest, compared on resume.
        meta: What every checkpoint carries beside the weights: the preprocessing contract.
    """

    selection: tuple[str, Literal["min", "max"]] = ("val/mae", "min")

    def __init__(
        self,
        config: BrainAgeConfig,
        heads: HeadDataset,
        train: Sequence[int],
        val: Sequence[int],
        digests: Mapping[str, str],
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = config
        self.ages = TrainingAges.of([age for i in train if (age := heads.scans[i].age) is not None])
        self._mean_weight = fmean(heads.scans[i].weight for i in train)
        held = heads if config.training.workers else Held(heads)  # each worker would hold its own
        self.train_data: MapDataset = Subset(held, train)
        self.val_data: MapDataset = Subset(held, val)
        self.digests: Mapping[str, str] = dict(digests)
        self.meta = {**(meta or {}), "training_ages": asdict(self.ages)}
        self.gating: GatingConfig | None = getattr(config.model, "gating", None)
        self.augment = AugmentOptions(**config.augment.model_dump())
        missing, self._persons = missing_heads(heads.scans, val, train)
        if self.meta.get("synthetic"):
            self._persons = math.inf
        self._missing: MapDataset = Subset(held, missing)
        self._choices: dict[str, FirstChoices] = {}

    def build_model(self) -> BrainAgeNet:
        """Build the network; weights follow from torch's seed."""
        return BrainAgeNet(self.config.model, self.ages)

    def plain(self) -> BrainAgeTask:
        """Return the same task for the base of a single-gated mixture alone."""
        task, model = copy(self), self.config.model.model_copy(update={"single_gated": None})
        task.config = self.config.model_copy(update={"model": model})
        return task

    def inside(self, model: BrainAgeNet) -> nn.Module:
        """Return the network in a model, without its head."""
        return model.net

    def around(self, network: nn.Module) -> BrainAgeNet:
        """Return a model with this network in it."""
        return BrainAgeNet(self.config.model, self.ages, network)

    def prepare(self, batch: dict[str, Any], train: bool, keys: Tensor) -> dict[str, Any]:
        """Bring images [B, 1, kX, kY, kZ] to the model's grid, changed at random in training only."""
        image, oversample = batch["image"], self.config.data.oversample
        if train:
            image = augment(image, keys, self.augment, oversample)
        else:
            image = to_model_grid(image.float(), oversample)
        return {**batch, "image": image}

    def begin_epoch(self, model: BrainAgeNet, epoch: int) -> None:
        """Hold the gating of a DeepMoE still in its second stage."""
        if isinstance(model.net, DeepMoE) and self.gating is not None:
            model.net.hold_gating(self.gating.holds(epoch, self.config.training.epochs))

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss to minimise, weighted as the manifest says, and its parts.

        Weights are shares of their mean over all training scans, not over the batch: they count in batches of one, too.
        """
        network: Any = getattr(model, "module", model)  # under several ranks the model is wrapped
        out = model(batch["image"])
        task = self._weighted(network.head.loss(out.output, batch["age"]), batch)
        loss, parts = task + out.aux_loss, {"task": task.detach(), "aux": out.aux_loss.detach()}
        if self.gating is None:
            return loss, parts
        side = task.new_zeros(())
        if out.side_output is not None:
            side = self._weighted(network.head.loss(out.side_output, batch["age"]), batch)
        return loss + self.gating.embedding_loss * side, {**parts, "embedding": side.detach()}

    def _weighted(self, errors: Tensor, batch: Mapping[str, Any]) -> Tensor:
        return (batch["weight"] * errors).mean() / self._mean_weight

    def validate(self, model: BrainAgeNet, batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """Return error and routing statistics over the validation scans."""
        errors, stats = [], {}
        self._choices = {}
        use = ChannelUse(model.net) if isinstance(model.net, DeepMoE) else None
        for batch in batches:
            age, out = model.ages(batch["image"], self.config.evaluation.flip_average)
            errors.append(age.cpu() - batch["age"].cpu())
            self._count(out)
            for name, routing in out.routing.items():
                stats.setdefault(name, RoutingStats(routing.probs.shape[1])).update(routing)
            if use is not None:
                use.update(batch["image"], out.gates)
        error = torch.cat(errors)
        metrics = {"val/mae": float(error.abs().mean()), "val/mean_error": float(error.mean())}
        for name, layer in stats.items():
            summary, place = layer.summary(), _place(name, stats)
            metrics |= {f"expert/{place}{key[5:]}/load": v for key, v in summary.items() if key.startswith("load/")}
            metrics |= {f"router/{place}{key}": summary[key] for key in ("cv", "entropy", "margin", "dead")}
        return metrics if use is None else metrics | use.metrics()

    def end_of_epoch(self, model: BrainAgeNet) -> dict[str, float]:
        """Return what the routed layers tell of themselves: scale of the branch, health of the basis."""
        metrics, layers = {}, model.routed_layers()
        for name, layer in layers.items():
            place = _place(name, layers)
            metrics[f"router/{place}alpha"] = float(layer.alpha.detach())
            metrics |= {f"router/{place}{key}": value for key, value in layer.router.health().items()}
        return metrics

    def pictures(self, model: BrainAgeNet) -> list[Picture]:
        """Return where each expert is the first choice, over the validation heads and, where these are few, others."""
        if not self._persons:
            return []
        for index in range(len(self._missing)):
            image = self._missing[index]["image"][None].to(next(model.parameters()).device)
            self._count(model(to_model_grid(image.float(), self.config.data.oversample)))
        drawn = {name: found.draw() for name, found in self._choices.items() if found.shape is not None}
        return [Picture(f"map/{_place(name, drawn)}top_expert", png, self._persons) for name, png in drawn.items()]

    def _count(self, out: ModelOutput) -> None:
        for name, mask in out.token_mask.items():
            routing = out.routing[name]
            found = self._choices.setdefault(name, FirstChoices(mask.shape[1], routing.probs.shape[1]))
            gate, slot = routing.gate.max(1, keepdim=True)
            found.add(routing.expert_index.gather(1, slot).where(gate > 0, -1).squeeze(1), mask)


def _place(name: str, layers: Mapping[str, Any]) -> str:
    """Name the layer of a metric where there are several."""
    return f"{name}/" if len(layers) > 1 else ""
