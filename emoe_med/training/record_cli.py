"""The verbs `ui` and `sync`: the tracked runs of a folder, whoever made them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from emoe_med.training.cli import say, verb

OutOption = Annotated[Path, typer.Option("--out", help="folder of the runs and of the tracking store")]


@verb
def ui(
    out: OutOption = Path("runs"),
    port: Annotated[int, typer.Option("--port", min=1024, max=65535)] = 5000,
) -> None:
    """Serve the tracked runs on this machine alone and print where to look.

    Example: python -m emoe_med.brainage ui --out runs
    """
    from emoe_med.training.ui import serve_runs

    serve_runs(out, port, say)


@verb
def sync(
    out: OutOption = Path("runs"),
    uri: Annotated[str | None, typer.Option("--uri", help="another tracking address; it gets all of it")] = None,
    allow_remote: Annotated[bool, typer.Option("--allow-remote", help="permit another machine, by https")] = False,
) -> None:
    """Send MLflow what it lacks of the runs, after a server was down or not there; each event once.

    Example: python -m emoe_med.pipeline sync --out runs
    """
    from emoe_med.training.ui import sync_runs

    for line in sync_runs(out, uri, allow_remote):
        say(line)
