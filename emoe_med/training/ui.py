"""The tracked runs of a folder: served on loopback with where to look, and sent to MLflow where it lacks them."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from emoe_med.errors import ConfigError, Fault
from emoe_med.training.outbox import read_record
from emoe_med.training.store import deep_link, serve
from emoe_med.training.tracking import sync

MAPS_PAGE = "expert_maps/viewer.html"
PAGES = {MAPS_PAGE: "expert maps", "report/report.html": "report"}  # artifact: title
ADDRESS = "http://127.0.0.1:{port}"
PORT = 5000


def serve_runs(out: Path, port: int, say: Callable[[str], None]) -> None:
    """Start MLflow over `out`, print the links of its runs, and stay until interrupted.

    Raises:
        ConfigError: No tracked run there, or the server did not start.
    """
    links = run_links(out, ADDRESS.format(port=port))
    if not links:
        raise ConfigError(Fault("UI-NONE", "no tracked run in this folder", str(out), hint="train one first"))
    with serve(out, port) as address:
        say(f"MLflow on this machine alone: {address}/?workflowType=machine_learning")
        for name, link in links.items():
            say(f"{name}: {link}")
        say("Ctrl-C ends it")
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        stop.wait()


def run_links(out: Path, address: str) -> dict[str, str]:
    """Return the pages of the runs below `out`, by the run's folder and what the page shows.

    An arm, the parent of its runs, has a page where maps of all its runs were made.
    """
    links = {}
    for path in sorted(out.glob("**/tracking.json")):
        run_dir = path.parent
        try:
            record = read_record(run_dir)
        except (OSError, json.JSONDecodeError):
            continue
        shown = {artifact: title for artifact, title in PAGES.items() if (run_dir / artifact).is_file()}
        if "report/report.html" not in shown and (run_dir / "metrics.json").is_file():
            shown["metrics/metrics.json"] = "figures"
        for artifact, title in shown.items() if record.get("run_id") else ():
            name = f"{run_dir.relative_to(out).as_posix()} {title}"
            links[name] = deep_link(address, record["experiment_id"], record["run_id"], artifact)
    return links


def map_links(out: Path, run_dirs: Iterable[Path]) -> Iterator[str]:
    """Yield a line with the address of the expert maps of each run, and of their arm, that has a page."""
    owners = {path.relative_to(out).as_posix() for run_dir in run_dirs for path in (run_dir.parent, run_dir)}
    for name, link in run_links(out, ADDRESS.format(port=PORT)).items():
        owner, _, title = name.partition(" ")
        if owner in owners and title == PAGES[MAPS_PAGE]:
            yield f"{name}, while `ui` runs: {link}"


def sync_runs(out: Path, uri: str | None, allow_remote: bool) -> Iterator[str]:
    """Send MLflow what it lacks of every run below `out`, parents first, and yield a line for each run.

    Raises:
        ConfigError: No run there, or MLflow did not take a record; runs before it are sent.
    """
    records = sorted(out.glob("**/tracking.json"), key=lambda path: (len(path.parts), path))
    if not records:
        raise ConfigError(Fault("UI-NONE", "no run in this folder", str(out), hint="give the folder of the runs"))
    for record in records:
        yield f"{record.parent}: {sync(record.parent, uri, allow_remote)} events sent"
