"""What a run needs of its process: flags, seeds, random state, signals, and what to say when memory ends."""

from __future__ import annotations

import os
import random
import resource
import signal
import threading
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Self

import numpy as np
import torch

from emoe_med.errors import EXIT_SIGINT, EXIT_SIGTERM, Fault, OutOfMemoryError
from emoe_med.training.loader import derived_seed
from emoe_med.training.ranks import Machine, joined


@contextmanager
def prepared(*, seed: int, deterministic: bool, threads: int | None) -> Generator[Machine]:
    """Choose the device, join the ranks that `torchrun` started, and seed everything.

    Args:
        seed: Seed of all random generators, the same on every rank until `seed_rank`.
        deterministic: Algorithms that give the same bits twice; where there are none, an error on a CPU and a
            warning on a GPU.
        threads: Threads of torch's CPU operators; None leaves torch's choice.

    Yields:
        The machine. Flags and threads are put back at the end.
    """
    before = (torch.are_deterministic_algorithms_enabled(), torch.get_num_threads())
    cudnn = (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    # a GPU counts max-pooling as not deterministic; with windows that do not overlap, as all here, it is
    warnings.filterwarnings("ignore", message="max_pool3d_with_indices_backward_cuda does not have")
    torch.use_deterministic_algorithms(deterministic, warn_only=torch.cuda.is_available())
    # a debugging aid that costs a fifth of a step
    torch.utils.deterministic.fill_uninitialized_memory = False  # ty: ignore[missing-attribute]
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic  # volumes of one shape: the search pays once
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with joined() as machine:
            seed_everything(seed)
            yield machine
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.set_num_threads(before[1])
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn


def seed_everything(seed: int) -> None:
    """Seed torch on every device, numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def seed_rank(seed: int, rank: int) -> None:
    """Seed what differs between ranks, such as dropout, after the model was made alike on all."""
    seed_everything(derived_seed(seed, rank))


def random_state(device: torch.device) -> dict[str, Any]:
    """Take the state of every random generator, as numbers that JSON holds."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, words, next_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state().tolist(),
        "cuda": torch.cuda.get_rng_state(device).tolist() if device.type == "cuda" else None,
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "python": [version, list(words), next_gauss],
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put back what `random_state` took."""
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8), device)
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    version, words, next_gauss = state["python"]
    random.setstate((version, tuple(words), next_gauss))


class StopSignal:
    """Remember that SIGTERM or SIGINT came; the loop asks between steps. A second SIGINT ends at once.

    The handler does no work: saving inside one hangs now and then, whatever lock it interrupted.
    """

    def __init__(self) -> None:
        self.code = 0  # exit code to end with; 0 while no signal came

    def __enter__(self) -> Self:
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere Python permits no handler
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: object) -> None:
        if number == signal.SIGINT:
            self.code = self.code or EXIT_SIGINT
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        else:
            self.code = EXIT_SIGTERM


@contextmanager
def memory_told(device: torch.device, describe: Callable[[], str]) -> Generator[None]:
    """Turn the end of memory into one line with the numbers; nothing is tried again smaller.

    Args:
        device: Device of the run.
        describe: Tells batch size and shapes at the time of the error.

    Raises:
        OutOfMemoryError: Device memory, host memory, or a loader worker that the system killed.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, torch.OutOfMemoryError):
            code, what = "MEM-DEVICE", "device memory exhausted"
        elif isinstance(error, MemoryError) or "can't allocate memory" in text:
            code, what = "MEM-HOST", "host memory exhausted"
        elif "DataLoader worker" in text and ("killed by signal" in text or "exited unexpectedly" in text):
            code, what = "MEM-WORKER", "a loader worker was killed, mostly for host or shared memory"
        else:
            raise
        hint = "lower batch_size and raise accumulate by as much"
        raise OutOfMemoryError(Fault(code, f"{what}: {describe()}; {_peak(device)}", hint=hint)) from error


def _peak(device: torch.device) -> str:
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
    if device.type != "cuda":
        return f"peak {host:.1f} GiB of host memory"
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    whole = torch.cuda.get_device_properties(device).total_memory / 2**30
    return f"peak {peak:.1f} of {whole:.1f} GiB on the device, {host:.1f} GiB of host memory"
