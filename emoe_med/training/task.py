"""What the loop asks of a task and of the options; brain age and vision each bring their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from emoe_med.training.pictures import Picture

Batch = dict[str, Any]


class MapDataset(Protocol):
    """A map-style data set: sample i is a dict of tensors and numbers that includes an int `row`."""

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def __getitem__(self, index: int, /) -> Batch:
        """Return one sample; nothing random happens here."""
        ...


class Record(Protocol):
    """What the loop tells of a run; see `tracking.Tracker`."""

    @property
    def begun(self) -> bool:
        """Whether a metric was ever written."""
        ...

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record metrics of an optimiser step."""
        ...

    def picture(self, step: int, picture: Picture) -> None:
        """Keep and record a picture of an optimiser step."""
        ...

    def note(self, kind: str, **fields: Any) -> None:
        """Record an event."""
        ...

    def sync_to_disk(self) -> None:
        """Wait until the disk has every event."""
        ...

    def flush(self) -> None:
        """Send on what is new, without waiting."""
        ...


class Task(Protocol):
    """Data, model, loss and validation of one task.

    Metric names are those of the record (`val/mae`, `expert/E03/load`); see `allow_list.METRIC`. A task may
    also have `meta`, a JSON-able dict that every checkpoint carries (the preprocessing contract), and
    `begin_epoch(model, epoch)`, called before the steps of each epoch, from 0, and again when one is gone on with:
    what a model is to do otherwise from some epoch on is a function of the epoch alone. Where it has
    `pictures(model)`, the pictures that this returns after each validation are recorded; called on every rank,
    without gradients.

    Attributes:
        train_data: Samples to learn from.
        val_data: Samples to select on.
        selection: Name of the validation metric to select by, and which end of it is better.
        digests: What must be equal for a resume, such as `config_sha256` and `manifest_sha256`.
    """

    train_data: MapDataset
    val_data: MapDataset
    selection: tuple[str, Literal["min", "max"]]
    digests: Mapping[str, str]

    def build_model(self) -> nn.Module:
        """Build the model on the CPU; random weights come from torch's global generator."""
        ...

    def prepare(self, batch: Batch, train: bool, keys: Tensor) -> Batch:
        """Finish a collated batch on the device: augmentation (in training), casts.

        Args:
            batch: Collated samples, [B, ...] each, on the device.
            train: Whether to augment.
            keys: [B] int64 on the CPU, the augmentation seed of each sample from (seed, epoch, row).
        """
        ...

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss [] to descend, auxiliary losses of routers included, and its parts [] by bare name.

        `model` may be wrapped for several ranks: call it, and touch nothing else of it. The names of the
        parts are the same in every batch; the record has them as `train/<name>`.
        """
        ...

    def validate(self, model: Any, batches: Iterator[Batch]) -> dict[str, float]:
        """Measure the model on prepared batches, without gradients; every rank sees the whole set."""
        ...

    def end_of_epoch(self, model: Any) -> dict[str, float]:
        """Return further metrics after validation, such as expert loads; called on every rank."""
        ...
