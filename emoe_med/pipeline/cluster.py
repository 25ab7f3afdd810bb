"""Work handed to a cluster by submitit: a job each, waited for; what is still queued is never sent twice."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import yaml

from emoe_med.errors import EXIT_SIGINT, ConfigError, Fault, Interrupted
from emoe_med.pipeline.pool import OnEnd
from emoe_med.pipeline.work import Work, told
from emoe_med.storage import replace_file

POLL_S = 5.0
FAILED = 1  # exit code of a job that the cluster ended
LOCAL_MIN = 7 * 24 * 60  # nothing limits a process on this machine
REQUEUES = 1000  # a run goes on from its checkpoint however often its time is up; submitit would give up after 3


@dataclass
class Submitted:
    """What a job of the cluster does; when it is preempted or its time is up, the cluster queues it once more."""

    call: Callable[[], int]

    def __call__(self) -> int:
        """Do the work; it resumes by itself."""
        return told(self.call)

    def checkpoint(self) -> Any:
        """Return what to queue again: the same, for a run goes on from its last checkpoint."""
        return import_module("submitit").helpers.DelayedSubmission(self)


class Cluster:
    """Run work as jobs of a cluster.

    Args:
        kind: `slurm`, or `local`: processes on this machine, to try it out; they are known to this object alone.
        folder: For submitit's files and the numbers of the jobs; seen by all nodes.
        options: `key=value` for submitit, as `timeout_min=600`, `gpus_per_node=1`, `slurm_partition=gpu`.

    Attributes:
        processes: That a job may start: its CPUs.

    Raises:
        ConfigError: submitit is not installed, an option is not of the form key=value, unknown or of another type, or
            there is no SLURM, or it is not told how long a run may take.
    """

    def __init__(self, kind: Literal["slurm", "local"], folder: Path, options: Sequence[str] = ()) -> None:
        try:
            submitit = import_module("submitit")  # an extra
        except ModuleNotFoundError as error:
            hint = 'pip install "emoe-med[cluster]"'
            raise ConfigError(Fault("PIPE-SUBMITIT", "submitit is not installed", hint=hint)) from error
        self._folder = folder.resolve()
        self._numbers = self._folder / "jobs.json"
        self._sent: dict[str, Any] = {}
        self._job = {"slurm": submitit.SlurmJob, "local": submitit.LocalJob}[kind]
        asked = {**({"timeout_min": LOCAL_MIN} if kind == "local" else {}), **_options(options)}
        if not {"timeout_min", "slurm_time"} & asked.keys():
            hint = "--cluster timeout_min=1440; submitit would give 5"
            raise ConfigError(Fault("CLI-CLUSTER", "say how long a run may take, in minutes", hint=hint))
        again = {"slurm_max_num_timeout": REQUEUES} if kind == "slurm" else {}
        with _refused():
            self._executor = submitit.AutoExecutor(folder=self._folder, cluster=kind, **again)
            self._executor.update_parameters(**asked)
            self.processes = int(asked.get("cpus_per_task", 1))

    def run(self, works: Sequence[Work], on_end: OnEnd) -> None:
        """Submit all of it, unless it is queued or running already, and wait.

        Raises:
            ConfigError: The cluster refuses a job; those before it go on.
            Interrupted: Ctrl-C; the jobs go on, and starting again waits for them.
        """
        start = time.monotonic()
        jobs = self._sent = {**self._remembered(), **self._sent}
        for work in works:
            if work.key not in jobs or jobs[work.key].done():
                with _refused():
                    jobs[work.key] = self._executor.submit(Submitted(work.call))
                self._remember(jobs)
        waiting = {work.key: work for work in works}
        try:
            while waiting:
                for key in [key for key in waiting if jobs[key].done()]:
                    work = waiting.pop(key)
                    on_end(work, _exit_code(jobs[key], work.log), time.monotonic() - start)
                time.sleep(min(POLL_S, 0.2) if self._executor.cluster == "local" else POLL_S)
        except KeyboardInterrupt:
            reason = f"{len(waiting)} jobs go on without this command"
            raise Interrupted(EXIT_SIGINT, Fault("PIPE-LEFT", reason, hint="start it again to wait for them")) from None

    def _remembered(self) -> dict[str, Any]:
        if not self._numbers.is_file():
            return {}
        numbers = json.loads(self._numbers.read_text())
        return {key: self._job(self._folder, number) for key, number in numbers.items()}

    def _remember(self, jobs: Mapping[str, Any]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        numbers = {key: job.job_id for key, job in jobs.items()}
        replace_file(self._numbers, (json.dumps(numbers, indent=1) + "\n").encode())


def _exit_code(job: Any, log: Path) -> int:
    """Return what the job's work returned, and leave what it printed where the work's log belongs."""
    log.parent.mkdir(parents=True, exist_ok=True)
    printed = [text for text in (job.stdout(), job.stderr()) if text]
    log.write_text("\n".join(printed))
    return FAILED if job.exception() is not None else job.result()


def _options(texts: Sequence[str]) -> dict[str, Any]:
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise ConfigError(Fault("CLI-CLUSTER", f"--cluster {text}: expected key=value, as timeout_min=600"))
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(Fault("CLI-CLUSTER", f"--cluster {text}: no value of YAML")) from error
    return found


@contextmanager
def _refused() -> Generator[None]:
    """Tell in one line what submitit or the cluster refuses."""
    try:
        yield
    except (RuntimeError, NameError, AssertionError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(Fault("PIPE-SUBMIT", reason, hint="see --cluster in docs/clusters.md")) from error
