"""What all verbs share: how they end, and how they speak."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

import typer

from emoe_med.errors import EXIT_SIGINT, ConfigError, EmoeError, Fault, OutOfMemoryError, StorageError


def verb(command: Callable[..., None]) -> Callable[..., None]:
    """End a command with one line for each fault and the documented exit code."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
        logging.getLogger("emoe_med").setLevel(logging.INFO if first_rank() else logging.ERROR)
        try:
            command(*args, **kwargs)
        except EmoeError as error:
            _end(error)
        except BrokenPipeError:
            raise  # whoever reads the output has enough of it
        except OSError as error:
            _end(StorageError(Fault("STORE-OS", error.strerror or str(error), error.filename)))
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
                raise
            what = " ".join(str(error).split())[:200] or "memory is exhausted"  # torch's, by name: it may not be loaded
            _end(OutOfMemoryError(Fault("MEM-VERB", what)))
        except KeyboardInterrupt:
            raise typer.Exit(EXIT_SIGINT) from None

    return run


def holds_run(like: str) -> Callable[[Path | None], Path | None]:
    """Return a check of `--run` that ends the command, as `verb` does, where no run is; `like` tells where one is."""

    def check(path: Path | None) -> Path | None:
        if path is not None and not (path / "config.yaml").is_file():
            _end(ConfigError(Fault("RUN-NONE", "holds no run", str(path), hint=f"name {like}")))
        return path

    return check


def _end(error: EmoeError) -> NoReturn:
    if not error.told and (error.own or first_rank()):
        for fault in error.faults:
            typer.echo(str(fault), err=True)
    raise typer.Exit(error.exit_code) from None


def say(text: str) -> None:
    """Print a line of the result to stdout; under `torchrun`, one rank speaks."""
    if first_rank():
        typer.echo(text)


def first_rank() -> bool:
    """Whether this process speaks: it is alone, or the first of those that `torchrun` started."""
    return os.environ.get("RANK", "0") == "0"
