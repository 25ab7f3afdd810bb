"""One piece of work in a process of its own: verbs in a row, with a log, ended with the pipeline that started it."""

from __future__ import annotations

import hashlib
import importlib
import logging
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from emoe_med.errors import EXIT_DONE, EXIT_PARTIAL, EXIT_USAGE
from emoe_med.pipeline.plan import Command
from emoe_med.training.parent import end_with_parent
from emoe_med.training.run_folder import is_claimed, wait_until_free


@dataclass(frozen=True)
class Work:
    """What a process is given.

    Attributes:
        label: What it is called in messages.
        log: File that gets all it prints; it may name files, and stays on this machine.
        call: Does the work and returns an exit code.
    """

    label: str
    log: Path
    call: partial[int]

    @property
    def key(self) -> str:
        """What a cluster knows queued work by: the label, and a digest of what is done under it."""
        return f"{self.label} {hashlib.sha256(repr(self.call.args).encode()).hexdigest()[:12]}"


def run_verbs(commands: Sequence[Command], run_dir: Path) -> int:
    """Run verbs one after the other, in this process; returns the exit code of the first that fails, or 0.

    A run that another pipeline has at work is waited for, whatever it takes; the verbs then find it done.
    """
    for module, *arguments in commands:
        print(f"$ python -m {module} {' '.join(arguments)}", flush=True)  # noqa: T201
        app = importlib.import_module(f"{module}.__main__").app
        # not standalone: a SystemExit then is never the verb's, but that of a cluster which queues the job again
        while True:
            wait_until_free(run_dir)
            code = app(arguments, prog_name=f"python -m {module}", standalone_mode=False) or EXIT_DONE
            if code != EXIT_USAGE or not is_claimed(run_dir):  # else another pipeline took the folder before the verb
                break
        if code not in (EXIT_DONE, EXIT_PARTIAL):
            return code
    return EXIT_DONE


def fill_cache(
    config: Path, assignments: Sequence[str], manifest: Path, root: Path | None, cache: Path, jobs: int
) -> int:
    """Read all scans once into the cache, so that runs that start together do not each do it.

    Returns:
        The exit code; faults are printed.
    """
    from emoe_med.brainage.cohort import chain_options, prepare_cohort
    from emoe_med.config import load_run
    from emoe_med.data.manifest import read_manifest
    from emoe_med.training.progress import counted

    table = read_manifest(manifest, root)
    prepare_cohort(
        table, chain_options(load_run(config, list(assignments)), table), cache, jobs, counted("reading scans")
    )
    return EXIT_DONE


def in_child(work: Work, environment: Mapping[str, str]) -> None:
    """Do a piece of work in a new process: print into its log, and stop when the parent is gone."""
    os.environ.update(environment)
    # loader workers start as under a verb run by hand; those of a fork server would outlive a work that is killed
    multiprocessing.set_start_method(None, force=True)
    work.log.parent.mkdir(parents=True, exist_ok=True)
    with work.log.open("wb", buffering=0) as log:  # of this start alone: an old error is none of this one
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    end_with_parent()
    sys.exit(told(work.call))


def told(call: Callable[[], int]) -> int:
    """Do the work; an error is printed as the verbs print it and becomes its exit code."""
    from emoe_med.errors import EmoeError

    try:
        return call()
    except EmoeError as error:
        for fault in error.faults:
            print(fault, file=sys.stderr, flush=True)  # noqa: T201
        return error.exit_code
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        logging.shutdown()
