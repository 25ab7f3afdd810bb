"""Work side by side on one machine: a process each, shared threads, GPUs in turn, one stop for all."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from typing import Any

from emoe_med.errors import EXIT_SIGINT, EXIT_SIGTERM, Fault, Interrupted
from emoe_med.pipeline.work import Work, in_child

# loaded once by the process that all others are forked from; a run then starts in no time
PRELOAD = ["emoe_med.brainage.train", "emoe_med.vision.train", "emoe_med.vision.fewshot", "emoe_med.vision.heatmap"]
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
GRACE_S = 300  # what a run has to save after SIGTERM, before it is killed

OnEnd = Callable[[Work, int, float], None]  # the work, its exit code, seconds


class Pool:
    """Run work in `jobs` processes at a time.

    A process sees one GPU where there are any, the next in turn; several may share one. Killed at any moment, it
    leaves processes that stop by themselves.

    Args:
        jobs: Processes at a time.
        gpus: Devices to share out, as CUDA_VISIBLE_DEVICES names them; none on a machine without.

    Attributes:
        processes: That one piece of work may start when it runs alone: as many as `jobs`.
    """

    def __init__(self, jobs: int, gpus: Sequence[str]) -> None:
        self.jobs = self.processes = jobs
        self.gpus = list(gpus)
        threads = max(1, _cpus() // jobs)
        for name in THREAD_VARIABLES:
            os.environ.setdefault(name, str(threads))  # read when the libraries load: before the first process
        # whoever asks whether there is a GPU must not start CUDA in the process that others are forked from
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)
        self._stop = 0

    def run(self, works: Sequence[Work], on_end: OnEnd) -> None:
        """Do all of it, and call `on_end` for each as it ends.

        Raises:
            Interrupted: SIGTERM or SIGINT; what ran was told to save, and waited for.
        """
        waiting, running = deque(works), {}
        slots = list(range(self.jobs))
        before = self._listen()
        try:
            while (waiting and not self._stop) or running:
                while waiting and slots and not self._stop:
                    work, slot = waiting.popleft(), slots.pop(0)
                    process = self._context.Process(target=in_child, args=(work, self._environment(slot)))
                    process.start()
                    running[process.sentinel] = (process, work, slot, time.monotonic())
                for sentinel in wait(list(running), timeout=0.5):
                    process, work, slot, start = running.pop(sentinel)
                    process.join()
                    slots.append(slot)
                    slots.sort()
                    on_end(work, _exit_code(process.exitcode), time.monotonic() - start)
                if self._stop:
                    self._end(running)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            for process, *_ in running.values():  # an error of ours: leave nothing behind
                process.terminate()
        if self._stop:
            reason = f"stopped before {len(waiting)} more were started; what ran was told to save"
            raise Interrupted(self._stop, Fault("PIPE-STOPPED", reason, hint="start it again to go on"))

    def _environment(self, slot: int) -> dict[str, str]:
        return {"CUDA_VISIBLE_DEVICES": self.gpus[slot % len(self.gpus)]} if self.gpus else {}

    def _listen(self) -> dict[int, Any]:
        """Remember SIGTERM and SIGINT instead of dying of them, so that what runs can be waited for."""
        if threading.current_thread() is not threading.main_thread():
            return {}
        codes = {signal.SIGTERM: EXIT_SIGTERM, signal.SIGINT: EXIT_SIGINT}

        def remember(number: int, frame: object) -> None:
            self._stop = codes[signal.Signals(number)]

        return {number: signal.signal(number, remember) for number in codes}

    def _end(self, running: dict[int, Any]) -> None:
        for process, *_ in running.values():
            process.terminate()
        deadline = time.monotonic() + GRACE_S
        for process, *_ in running.values():
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:
                process.kill()
                process.join()
        running.clear()


def _exit_code(code: int | None) -> int:
    """Return an exit code as a shell has it: 128 + N after signal N."""
    return 1 if code is None else 128 - code if code < 0 else code


def _cpus() -> int:
    """Return how many CPUs this process may use: a container or a batch job may have fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """Return the devices that processes may share out, without starting CUDA here."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [part for part in named.split(",") if part.strip()]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]
