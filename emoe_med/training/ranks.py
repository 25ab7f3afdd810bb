"""The ranks of a run, as `torchrun` starts them: sums over all, and one end for all.

Rank 0 writes. What one rank cannot get over ends every rank with the same error, so that none waits for another.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from emoe_med import errors
from emoe_med.errors import EmoeError, Fault, Interrupted

# rank 0 evaluates a large cohort while the others wait; a rank that died ends the job by other ways
_PATIENCE = datetime.timedelta(days=7)


@dataclass(frozen=True)
class Machine:
    """Device and place among the ranks; its sums are over all ranks, and free in a single process.

    Attributes:
        device: Device of this rank.
        rank: Its number.
        world_size: How many there are.
        waiting: Group of all ranks that speaks between CPUs and waits as long as it takes.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    waiting: Any = None

    @property
    def first(self) -> bool:
        """Whether this rank writes files."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """Sum values [...] over the ranks."""
        values = values.detach().double()
        if self.world_size > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values.cpu()

    def any(self, *flags: bool | int) -> list[bool]:
        """Tell for each flag whether it is set on any rank, so that all ranks do the same."""
        return [count > 0 for count in self.total(torch.tensor([float(flag) for flag in flags])).tolist()]

    def gather(self, value: Any) -> list[Any]:
        """Collect one JSON-able value of each rank, in the order of ranks."""
        if self.world_size == 1:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([data.numel()]), group=self.waiting)
        longest = max(int(size) for size in sizes)
        padded = torch.nn.functional.pad(data, (0, longest - data.numel()))
        parts = [torch.zeros_like(padded) for _ in range(self.world_size)]
        dist.all_gather(parts, padded, group=self.waiting)
        return [json.loads(part[: int(size)].numpy().tobytes()) for part, size in zip(parts, sizes, strict=True)]

    def from_first(self, values: Tensor) -> Tensor:
        """Return on every rank what the first has: values [...] of one shape on all, on the CPU."""
        if self.world_size > 1:
            values = values.clone()
            dist.broadcast(values, 0, group=self.waiting)
        return values

    def wait(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier(group=self.waiting)

    def agree(self, error: EmoeError | None) -> None:
        """Raise on every rank what the first rank that met an error met; return where none did.

        Every rank calls it at the same place.
        """
        if self.world_size > 1:
            met = torch.tensor([float(error is not None)])
            dist.all_reduce(met, group=self.waiting)
            if not met.item():
                return
            found = self.gather(_told(error))
            speaker = next(rank for rank, told in enumerate(found) if told)
            error = error if speaker == self.rank else _heard(found[speaker])
        if error is not None:
            raise error

    @contextmanager
    def together(self) -> Generator[None]:
        """Do a block that asks nothing of the other ranks; all leave it with the error that any of them met."""
        met = None
        try:
            yield
        except EmoeError as error:
            met = error
        self.agree(met)


ALONE = Machine(torch.device("cpu"))


def _told(error: EmoeError | None) -> dict[str, Any] | None:
    if error is None:
        return None
    return {"kind": type(error).__name__, "code": error.exit_code, "faults": [asdict(fault) for fault in error.faults]}


def _heard(told: dict[str, Any]) -> EmoeError:
    """Make the error of another rank, which prints it."""
    faults = [Fault(**fault) for fault in told["faults"]]
    kind = getattr(errors, told["kind"])
    error = Interrupted(told["code"], *faults) if kind is Interrupted else kind(*faults)
    error.told = True
    return error


@contextmanager
def joined() -> Generator[Machine]:
    """Choose the device and join the ranks that `torchrun` started; inside such a block, the same ranks again."""
    if dist.is_initialized():
        assert _JOINED, "the ranks were joined by others"
        yield _JOINED[-1]
        return
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        torch.cuda.reset_peak_memory_stats(device)
    if world_size == 1:
        yield Machine(device)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        waiting = dist.new_group(backend="gloo", timeout=_PATIENCE)
        _JOINED.append(Machine(device, dist.get_rank(), world_size, waiting))
        yield _JOINED[-1]
        dist.barrier(group=waiting)  # a rank that leaves first makes the others abort; after an error nobody may wait
    except EmoeError as error:
        error.own = not error.told
        raise
    finally:
        _JOINED.clear()
        dist.destroy_process_group()


_JOINED: list[Machine] = []  # of this process, while it is in the block
