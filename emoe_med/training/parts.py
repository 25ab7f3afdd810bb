"""A part of a network as a run of its own: it learns in front of a frozen base, which is no part of its model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Subset

from emoe_med.models.output import ModelOutput
from emoe_med.models.single_gated import ClusterGate
from emoe_med.moe import MoELayer, load_statistics
from emoe_med.training.pictures import Picture
from emoe_med.training.task import Batch, MapDataset, Record, Task


class GateOnBase(nn.Module):
    """The gate behind a frozen base, which stays in evaluation mode and is neither trained nor kept."""

    def __init__(self, base: Any, gate: ClusterGate) -> None:
        super().__init__()
        self.gate = gate
        self._base = (base,)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Map images to the logits [B, K] of the gate and the nearest centroid [B]."""
        (base,) = self._base
        with torch.no_grad():
            features = base.beyond(base.until(image, 0), 0)
        return self.gate(features), self.gate.nearest(features)


class ExpertOnBase(nn.Module):
    """One expert behind the first stages of a frozen base, which is neither trained nor kept."""

    def __init__(self, base: Any, stages: int) -> None:
        super().__init__()
        self.expert = base.tail(stages).requires_grad_(True)
        self.stages = stages
        self._base = (base,)

    def forward(self, image: Tensor) -> ModelOutput:
        """Map images to the outputs [B, O] of the expert alone."""
        (base,) = self._base
        with torch.no_grad():
            shared = base.until(image, self.stages)
        output = self.expert.answer(self.expert.beyond(shared, self.stages))
        return ModelOutput(output, output.new_zeros(()), {}, {})

    def routed_layers(self) -> dict[str, MoELayer]:
        """Return none."""
        return {}


class PartTask:
    """A task with another model, on some of its samples.

    Args:
        task: Prepares batches, and has loss and validation.
        build: Builds the model on the device of the base.
        train: Indices into the task's training samples; all of them if not given.
        val: The same for validation; all of them if not given or empty.
        digests: As of the task, and of what the model stands on.
    """

    def __init__(
        self,
        task: Task,
        build: Callable[[], nn.Module],
        digests: Mapping[str, str],
        train: Sequence[int] | None = None,
        val: Sequence[int] | None = None,
    ) -> None:
        self.task, self.build, self.digests = task, build, digests
        self.train_data: MapDataset = task.train_data if train is None else Subset(task.train_data, train)  # ty: ignore[invalid-argument-type]
        self.val_data: MapDataset = Subset(task.val_data, val) if val else task.val_data  # ty: ignore[invalid-argument-type]
        self.selection: tuple[str, Literal["min", "max"]] = task.selection

    def build_model(self) -> nn.Module:
        """Build the part."""
        return self.build()

    def prepare(self, batch: Batch, train: bool, keys: Tensor) -> Batch:
        """Prepare as the task does."""
        return self.task.prepare(batch, train, keys)

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of the task."""
        return self.task.loss(model, batch)

    def validate(self, model: Any, batches: Iterator[Batch]) -> dict[str, float]:
        """Measure as the task does."""
        return self.task.validate(model, batches)

    def end_of_epoch(self, model: Any) -> dict[str, float]:
        """Return what the task tells of the model."""
        return self.task.end_of_epoch(model)


class GateTask(PartTask):
    """To tell the clusters apart: cross-entropy to the nearest centroid of the features that the gate sees."""

    def __init__(self, task: Task, build: Callable[[], nn.Module], digests: Mapping[str, str]) -> None:
        super().__init__(task, build, digests)
        self.selection = ("val/agreement", "max")

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the cross-entropy."""
        return F.cross_entropy(*model(batch["image"])), {}

    def validate(self, model: Any, batches: Iterator[Batch]) -> dict[str, float]:
        """Return how often gate and nearest centroid agree, in percent, and how evenly the gate loads the experts."""
        pairs = [model(batch["image"]) for batch in batches]
        logits, nearest = (torch.cat(part).cpu() for part in zip(*pairs, strict=True))
        chosen = logits.argmax(1)
        counts = torch.bincount(chosen, minlength=logits.shape[1])
        found = {"val/agreement": 100 * float((chosen == nearest).float().mean())}
        found |= {f"router/{name}": value for name, value in load_statistics(counts).items() if name in ("cv", "dead")}
        return found | {f"expert/E{k:02d}/load": float(n) / len(chosen) for k, n in enumerate(counts)}

    def end_of_epoch(self, model: Any) -> dict[str, float]:
        """Return nothing more."""
        return {}


class PhaseRecord:
    """The record of a run as one of its phases sees it: `val/top1` of phase `E03` is recorded as `val/E03/top1`."""

    begun = False  # its own checkpoints tell

    def __init__(self, record: Record, phase: str) -> None:
        self.record, self.phase = record, phase

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record metrics of an optimiser step of the phase."""
        parts = {name: name.partition("/") for name in values}
        self.record.metrics(step, {f"{parts[n][0]}/{self.phase}/{parts[n][2]}": value for n, value in values.items()})

    def picture(self, step: int, picture: Picture) -> None:
        """Record nothing: phases draw no pictures."""

    def note(self, kind: str, **fields: Any) -> None:
        """Record an event of the phase."""
        self.record.note(kind, phase=self.phase, **fields)

    def sync_to_disk(self) -> None:
        """Wait until the disk has every event."""
        self.record.sync_to_disk()

    def flush(self) -> None:
        """Send on what is new."""
        self.record.flush()
