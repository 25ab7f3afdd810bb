"""What the training loop needs to know about image classification: data, network, loss, validation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Subset

from emoe_med.data.image_augment import ImageAugmentOptions, augment, middle, normalised
from emoe_med.data.images import ImageDataset
from emoe_med.data.memory import Held
from emoe_med.model_config import GatingConfig
from emoe_med.models.deep_moe import DeepMoE
from emoe_med.models.weights import ViTWeights
from emoe_med.moe import RoutingStats
from emoe_med.training.channel_report import ChannelUse
from emoe_med.training.task import MapDataset
from emoe_med.vision.config import VisionConfig
from emoe_med.vision.net import Net, build_net

ROUTER_FIGURES = ("cv", "entropy", "margin", "dead", "dropped")


class VisionTask:
    """Classification of images, for `training.loop.fit`.

    Args:
        config: The run.
        data: The training part of a data set.
        train: Indices into it to learn from.
        val: Indices to select on.
        digests: Digests of configuration and data, compared on resume.
        meta: What every checkpoint carries: `classes`, `channels`, `mean` and `std`.
        start: Weights to start from.
    """

    selection: tuple[str, Literal["min", "max"]] = ("val/top1", "max")

    def __init__(
        self,
        config: VisionConfig,
        data: ImageDataset,
        train: Sequence[int],
        val: Sequence[int],
        digests: Mapping[str, str],
        meta: Mapping[str, Any],
        start: ViTWeights | None = None,
    ) -> None:
        self.config, self.data, self.start = config, data, start
        held = data if config.training.workers else Held(data)  # each worker would hold its own
        self.train_data: MapDataset = Subset(held, train)
        self.val_data: MapDataset = Subset(held, val)
        self.digests: Mapping[str, str] = dict(digests)
        self.meta = dict(meta)
        self.gating: GatingConfig | None = getattr(config.model, "gating", None)
        self.augment = ImageAugmentOptions(**config.augment.model_dump())

    def build_model(self) -> Net:
        """Build the network; weights follow from torch's seed."""
        return build_net(self.config.model, self.meta["channels"], len(self.meta["classes"]), self.start)

    def plain(self) -> VisionTask:
        """Return the same task for the base of a single-gated mixture alone."""
        task, model = copy(self), self.config.model.model_copy(update={"single_gated": None})
        task.config = self.config.model_copy(update={"model": model})
        return task

    def inside(self, model: nn.Module) -> nn.Module:
        """Return the network in a model: all of it."""
        return model

    def around(self, network: nn.Module) -> nn.Module:
        """Return a model with this network in it: itself."""
        return network

    def prepare(self, batch: dict[str, Any], train: bool, keys: Tensor) -> dict[str, Any]:
        """Turn pixels [B, C, S, S] into the network's input, changed at random in training only.

        Training batches also get `other` [B], the label of the image that each was mixed with, and `share` [B] of
        its own label.
        """
        if not train:
            return {**batch, "image": seen_image(batch["image"], self.config.model.image_size, self.meta)}
        mean, std = statistics(self.meta, batch["image"].device)
        found = augment(batch["image"], keys, self.augment, self.config.model.image_size, mean, std)
        return {**batch, "image": found.image, "other": batch["label"][found.partner], "share": found.share}

    def begin_epoch(self, model: Net, epoch: int) -> None:
        """Hold the gating of a DeepMoE still in its second stage."""
        if isinstance(model, DeepMoE) and self.gating is not None:
            model.hold_gating(self.gating.holds(epoch, self.config.training.epochs))

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss to minimise, label smoothing and mixed labels included, and its parts."""
        out = model(batch["image"])
        task = self._error(out.output, batch)
        loss, parts = task + out.aux_loss, {"task": task.detach(), "aux": out.aux_loss.detach()}
        if self.gating is None:
            return loss, parts
        side = task.new_zeros(()) if out.side_output is None else self._error(out.side_output, batch)
        return loss + self.gating.embedding_loss * side, {**parts, "embedding": side.detach()}

    def _error(self, logits: Tensor, batch: Mapping[str, Any]) -> Tensor:
        own, other = (
            F.cross_entropy(
                logits.float(), batch[name], reduction="none", label_smoothing=self.config.loss.label_smoothing
            )
            for name in ("label", "other")
        )
        return (batch["share"] * own + (1 - batch["share"]) * other).mean()

    def validate(self, model: Net, batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """Return accuracy in percent, loss, and routing statistics by layer, over the validation images."""
        ranks, losses, stats = [], [], {}
        use = ChannelUse(model) if isinstance(model, DeepMoE) else None
        for batch in batches:
            out = model(batch["image"])
            ranks.append(rank_of_label(out.output, batch["label"]).cpu())
            losses.append(F.cross_entropy(out.output.float(), batch["label"], reduction="none").cpu())
            for name, routing in out.routing.items():
                stats.setdefault(name, RoutingStats(routing.probs.shape[1])).update(routing)
            if use is not None:
                use.update(batch["image"], out.gates)
        rank = torch.cat(ranks)
        metrics = {f"val/top{k}": 100 * float((rank < k).float().mean()) for k in (1, 5)}
        metrics["val/loss"] = float(torch.cat(losses).mean())
        for name, layer in stats.items():
            summary = layer.summary()
            metrics |= {f"expert/{name}/{key[5:]}/load": v for key, v in summary.items() if key.startswith("load/")}
            metrics |= {f"router/{name}/{key}": summary[key] for key in ROUTER_FIGURES}
        return metrics if use is None else metrics | use.metrics()

    def end_of_epoch(self, model: Net) -> dict[str, float]:
        """Return what the routed layers tell of themselves: scale of the branch, health of the basis."""
        metrics = {}
        for name, layer in model.routed_layers().items():
            metrics[f"router/{name}/alpha"] = float(layer.alpha.detach())
            metrics |= {f"router/{name}/{key}": value for key, value in layer.router.health().items()}
        return metrics


def statistics(meta: Mapping[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation [C] that pixels are normalised by."""
    mean, std = (torch.tensor(meta[name], device=device) for name in ("mean", "std"))
    return mean, std


def seen_image(pixels: Tensor, size: int, meta: Mapping[str, Any]) -> Tensor:
    """Return what a network sees of pixels [B, C, S, S] uint8 outside training: the normalised middle."""
    return normalised(middle(pixels, size).float() / 255, *statistics(meta, pixels.device))


def rank_of_label(logits: Tensor, label: Tensor) -> Tensor:
    """Return the place of the label among the logits [B, O], 0 where it is the first; of equal ones the lower first.

    Among logits that are no numbers it is the last.
    """
    own = logits.gather(1, label.unsqueeze(1))
    place = torch.arange(logits.shape[1], device=logits.device)
    behind = (logits < own) | ((logits == own) & (place > label.unsqueeze(1)))
    return (~behind & (place != label.unsqueeze(1))).sum(1)
