"""Batches in an order that depends on seed and epoch alone, and that a resumed run can enter anywhere."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, default_collate

from emoe_med.errors import ConfigError, EmoeError, Fault
from emoe_med.training.task import MapDataset


def derived_seed(*parts: int) -> int:
    """Return a seed in [0, 2^63) that depends on all parts and on nothing else."""
    digest = hashlib.blake2b(":".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def augmentation_keys(seed: int, epoch: int, rows: Tensor) -> Tensor:
    """Give each sample its augmentation seed [B] from (seed, epoch, row), whatever workers and batches."""
    return torch.tensor([derived_seed(seed, epoch, row) for row in rows.tolist()], dtype=torch.int64)


class ResumableSampler(Sampler[list[int]]):
    """Yield batches of indices from the cursor on; the order of an epoch follows from (seed, epoch).

    One batch of all ranks together is a contiguous piece of the epoch's order, so that a step of several ranks is
    that of one process that accumulates their batches. Samples that do not fill a last whole step are left out of the
    epoch. The caller moves `cursor` when a batch was trained on; batches that workers fetched ahead do not
    count.
    """

    def __init__(
        self, length: int, batch_size: int, seed: int, accumulate: int = 1, rank: int = 0, world_size: int = 1
    ) -> None:
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.accumulate, self.rank, self.world_size = accumulate, rank, world_size
        self.epoch = 0
        self.cursor = 0
        if not self.steps:
            raise ConfigError(
                Fault(
                    "CFG-BATCH",
                    f"{length} training samples do not fill one step of batch_size {batch_size} x "
                    f"accumulate {accumulate} x {world_size} ranks",
                    hint="lower batch_size or accumulate",
                )
            )

    @property
    def steps(self) -> int:
        """Optimiser steps in an epoch."""
        return self.length // (self.batch_size * self.accumulate * self.world_size)

    def __len__(self) -> int:
        return self.steps * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(derived_seed(self.seed, self.epoch))
        order = torch.randperm(self.length, generator=generator).tolist()
        joint = self.batch_size * self.world_size
        for batch in range(self.cursor, len(self)):
            piece = order[batch * joint : (batch + 1) * joint]
            yield piece[self.rank * self.batch_size :][: self.batch_size]


def mixed(data: MapDataset) -> Subset[Any]:
    """Return the samples in an order drawn at random, the same for every set of this length.

    For evaluation in batches: a listing is sorted by class, and in a batch of one class an expert's capacity, or the
    experts of another sample of the batch, would follow the label.
    """
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    return Subset(data, order.tolist())  # ty: ignore[invalid-argument-type]


def make_loader(
    data: MapDataset, batches: Sampler[list[int]] | int, workers: int, pin_memory: bool = False
) -> DataLoader[Any]:
    """Build the loader of a sampler's batches, or of consecutive batches of a given size."""
    chosen: dict[str, Any] = {"batch_sampler": batches}
    if isinstance(batches, int):
        chosen = {"batch_size": batches, "shuffle": False}
    return DataLoader(
        _Reported(data),
        **chosen,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        worker_init_fn=_outlive_signals,
        # its own generator: an iterator draws a seed, which must not disturb the run's random state
        generator=torch.Generator().manual_seed(0),
    )


def read_batches(loader: DataLoader[Any]) -> Iterator[dict[str, Any]]:
    """Iterate over collated batches; a fault met in a worker is raised here as it was.

    Raises:
        EmoeError: As the data set raised it, such as `VolumeError` with the file's fault.
    """
    for batch in loader:
        if isinstance(batch, _Refusal):
            raise batch.kind(*batch.faults)
        yield batch


@dataclass(frozen=True)
class _Refusal:
    kind: type[EmoeError]
    faults: tuple[Fault, ...]


class _Reported(Dataset[Any]):
    """Carry a fault out of a worker whole; torch would rebuild the error from its printed text."""

    def __init__(self, data: MapDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.data[index]
        except EmoeError as error:
            return _Refusal(type(error), tuple(error.faults))


def _collate(samples: Sequence[Any]) -> Any:
    refused = [sample for sample in samples if isinstance(sample, _Refusal)]
    if refused:
        return _Refusal(refused[0].kind, tuple(fault for refusal in refused for fault in refusal.faults))
    return default_collate(list(samples))


def _outlive_signals(worker: int) -> None:
    """Let a worker outlive signals sent to all processes of a job; the main process decides when to stop.

    A worker that dies of the same signal would look like a crash. The SIGTERM that Python sends to its own
    children when it ends is obeyed: it waits for them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey_parent, args=(os.getppid(),), daemon=True).start()


def _obey_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
