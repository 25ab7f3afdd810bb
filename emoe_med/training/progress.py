"""What a person sees while a run trains: a bar on a terminal, one plain line an epoch everywhere else."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, track

from emoe_med.training.cli import first_rank


class EpochProgress:
    """Show the steps of the running epoch and a line for each finished one, on stderr.

    Args:
        active: False on ranks that stay silent.
    """

    def __init__(self, active: bool = True) -> None:
        console = Console(stderr=True, quiet=not active, soft_wrap=True, highlight=False)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def step(self, done: int, total: int, text: str) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=done, total=total, description=text)

    def line(self, text: str) -> None:
        """Write a line that stays."""
        self._bar.console.print(text, markup=False)


def counted(text: str) -> Callable[[Collection], Iterator]:
    """Return what wraps a collection of known length and shows how far it is, on stderr.

    A bar on a terminal; elsewhere one line at the start.
    """

    def wrap(items: Collection) -> Iterator:
        console = Console(stderr=True, quiet=not first_rank())
        if not console.is_terminal:
            console.print(f"{text}: {len(items)}")
        yield from track(
            items, text, total=len(items), console=console, transient=True, disable=not console.is_terminal
        )

    return wrap
