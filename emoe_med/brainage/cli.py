"""What all verbs share: how they end, and how they speak."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import typer

from emoe_med.errors import EmoeError


def verb(command: Callable[..., None]) -> Callable[..., None]:
    """End a command with one line for each fault and the documented exit code."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
        logging.getLogger("emoe_med").setLevel(logging.INFO)
        try:
            command(*args, **kwargs)
        except EmoeError as error:
            for fault in error.faults:
                typer.echo(str(fault), err=True)
            raise typer.Exit(error.exit_code) from None

    return run


def say(text: str) -> None:
    """Print a line of the result to stdout."""
    typer.echo(text)
