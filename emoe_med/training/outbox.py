"""What MLflow still lacks of a run's journal, sent in order and once; `tracking.json` remembers how far."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emoe_med.storage import replace_file
from emoe_med.training import pictures, store
from emoe_med.training.journal import read_journal

if TYPE_CHECKING:
    from emoe_med.training.mlflow_store import MlflowStore

LOG = logging.getLogger("emoe_med")
KEY_TAG = "emoe_med.key"  # our own name of a run, known before MLflow gave it a number
METRICS_TOGETHER = 1000


FAILURES_TO_REST, REST_S = 3, 60.0  # after 3 failures in a row MLflow is asked again once a minute


class Sender:
    """Send in the background: no failure of MLflow stops or slows the run.

    Args:
        run_dir: Folder of the run.
        connect: Makes the store to send to; may fail at every call.
        last_wait_s: How long `finish` waits for what is still to send.
    """

    def __init__(self, run_dir: Path, connect: Callable[[], MlflowStore], last_wait_s: float) -> None:
        self.run_dir = run_dir
        self.connect = connect
        self.last_wait_s = last_wait_s
        self._thread: threading.Thread | None = None
        self._failures = 0
        self._rest_until = 0.0

    def wake(self) -> None:
        """Start sending unless it is under way, or MLflow has failed and rests; returns at once."""
        busy = self._thread is not None and self._thread.is_alive()
        if not busy and time.monotonic() >= self._rest_until:
            self._thread = threading.Thread(target=self._send_quietly, name="tracking", daemon=True)
            self._thread.start()

    def finish(self) -> None:
        """Send what is left, within the last wait."""
        deadline = time.monotonic() + self.last_wait_s
        for _ in range(2):  # what is under way, then what came after it
            self._wait(deadline)
            if rest(self.run_dir):
                self.wake()
        self._wait(deadline)
        if rest(self.run_dir):
            LOG.warning("MLflow lacks the end of this run; `sync` sends it from the journal")

    def _wait(self, deadline: float) -> None:
        if self._thread is not None:
            self._thread.join(max(0.0, deadline - time.monotonic()))

    def _send_quietly(self) -> None:
        try:
            send(self.connect(), self.run_dir)
            self._failures = 0
        except ModuleNotFoundError:
            self._rest_until = float("inf")
            LOG.warning("mlflow is not installed: this run keeps its journal, and `sync` can send it later")
        except Exception as error:  # whatever a server or a store does, the run goes on
            self._failures += 1
            if self._failures >= FAILURES_TO_REST:
                self._rest_until = time.monotonic() + REST_S
            LOG.warning("MLflow did not take the record (%s); the journal has it", type(error).__name__)
            LOG.debug("MLflow: %s", error)


def settle_record(run_dir: Path, uri: str, labels: Mapping[str, str], parent: Path | None = None) -> None:
    """Write who the run is; a new address means a new run there, with the whole journal still to send.

    Args:
        run_dir: Folder of the run.
        uri: Tracking address.
        labels: `experiment` and `run_name`; an existing record keeps its own.
        parent: Folder of the parent run.
    """
    nowhere = {"uri": uri, "experiment_id": None, "run_id": None, "artifact_uri": None, "sent": 0}
    if (run_dir / "tracking.json").is_file():
        record = read_record(run_dir)
        if record["uri"] != uri:
            _write_record(run_dir, {**record, **nowhere})
        return
    parent_dir = os.path.relpath(parent.resolve(), run_dir.resolve()) if parent else None
    created = time.time_ns() // 1_000_000
    key = uuid.uuid4().hex
    _write_record(run_dir, {**labels, "key": key, "created": created, "parent": parent_dir, **nowhere})


def read_record(run_dir: Path) -> dict[str, Any]:
    """Read `tracking.json`: the run's labels, key and parent, its ids at MLflow, journal bytes sent."""
    record = json.loads((run_dir / "tracking.json").read_text(encoding="utf-8"))
    if record["uri"].startswith("sqlite:"):  # kept relative, so that a folder of runs can be moved as a whole
        record["uri"] = f"sqlite:///{(run_dir / record['uri'].removeprefix('sqlite:')).resolve()}"
    return record


def _write_record(run_dir: Path, record: Mapping[str, Any]) -> None:
    uri = record["uri"]
    if uri.startswith("sqlite:"):
        uri = f"sqlite:{os.path.relpath(store.database(uri), run_dir.resolve())}"
    replace_file(run_dir / "tracking.json", (json.dumps({**record, "uri": uri}, indent=1) + "\n").encode())


def rest(run_dir: Path) -> int:
    """Return the number of bytes of the journal that MLflow lacks."""
    return (run_dir / "journal.jsonl").stat().st_size - read_record(run_dir)["sent"]


def send(target: MlflowStore, run_dir: Path) -> int:
    """Send the journal from where MLflow's knowledge of it ends; returns the number of events.

    A call that failed is sent again as it was, with the journal's times: MLflow drops a metric that it has
    with equal time, step and value, and everything else is set, not added.
    """
    events_sent = 0
    with only_one(run_dir):
        record = _ensure_run(target, run_dir)
        for offset, events in _calls(run_dir / "journal.jsonl", record["sent"]):
            try:
                _send_events(target, run_dir, record, events)
            except Exception as error:
                if not target.refused_for_good(error):
                    raise
                # everything after it would wait behind it for ever
                LOG.warning("MLflow refuses a %s event; the journal has it", events[0]["kind"])
            record["sent"] = offset
            _write_record(run_dir, record)
            events_sent += len(events)
    return events_sent


@contextmanager
def only_one(folder: Path) -> Generator[None]:
    """Hold a folder's advisory lock; unlocked by name, since loader workers inherit the descriptor."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _ensure_run(target: MlflowStore, run_dir: Path) -> dict[str, Any]:
    """Return the record with a run at MLflow, the parent's run being made first."""
    record = read_record(run_dir)
    if record["run_id"] is not None:
        return record
    tags = {KEY_TAG: record["key"]}
    if record["parent"] is not None:
        parent_dir = (run_dir / record["parent"]).resolve()
        with only_one(parent_dir):
            tags["mlflow.parentRunId"] = _ensure_run(target, parent_dir)["run_id"]
    record["experiment_id"] = target.experiment(record["experiment"])
    record["run_id"], record["artifact_uri"] = target.run(
        record["experiment_id"], record["run_name"], record["created"], tags
    )
    _write_record(run_dir, record)
    return record


def _calls(journal: Path, offset: int) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Group the events into calls: metrics together up to a limit, everything else in a call of its own."""
    group: list[dict[str, Any]] = []
    size = 0
    for end, event in read_journal(journal, offset):
        metrics = len(event["values"]) if event["kind"] == "metrics" else 0
        if group and (not metrics or size + metrics > METRICS_TOGETHER):
            yield offset, group
            group, size = [], 0
        offset = end
        group.append(event)
        size += metrics
        if not metrics:
            yield offset, group
            group, size = [], 0
    if group:
        yield offset, group


def _send_events(target: MlflowStore, run_dir: Path, record: Mapping[str, Any], events: list[dict[str, Any]]) -> None:
    event, run_id = events[0], record["run_id"]
    match event["kind"]:
        case "metrics":
            rows = [
                (name, value, event["time"], event["step"])
                for event in events
                for name, value in event["values"].items()
                if value is not None
            ]
            target.metrics(run_id, rows)
        case "params":
            target.params(run_id, event["values"])
        case "tags":
            target.tags(run_id, event["values"])
        case "status":
            target.status(run_id, event["status"], event["time"])
        case "artifact" | "image" if not (run_dir / event["file"]).is_file():
            LOG.warning("%s %s is gone and was not sent", event["kind"], event["file"])
        case "artifact":
            target.artifact(run_id, record["artifact_uri"], run_dir / event["file"], event["folder"])
        case "image":
            _send_picture(target, run_dir, record, event)


def _send_picture(target: MlflowStore, run_dir: Path, record: Mapping[str, Any], event: Mapping[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        known = (event["key"], event["step"], record["key"], record["created"])
        for path in pictures.picture_files(run_dir / event["file"], *known, Path(folder)):
            target.artifact(record["run_id"], record["artifact_uri"], path, pictures.FOLDER)
    target.tags(record["run_id"], pictures.TAG)
