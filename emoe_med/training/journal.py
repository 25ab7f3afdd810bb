"""The journal: every event of a run as one JSON line, on disk before anything else hears of it."""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Self

from emoe_med.storage import storage_error

LOG = logging.getLogger("emoe_med")


class Journal:
    """Append events to `journal.jsonl`; a resumed run does not write a metric or parameter of a step again.

    Every line has `kind` and `time` (UTC, milliseconds). A line that a kill cut short is removed when the
    journal is opened. Metrics are `{"kind": "metrics", "step": ..., "values": {name: number or null}}`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: set[tuple[int, str]] = set()
        self._latest: dict[str, float | None] = {}
        self._last_step = 0
        self._params: set[str] = set()
        try:
            cut = _remove_cut_line(path)
            for _, event in read_journal(path):
                self._remember(event)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise storage_error(error, path, "journal cannot be opened") from error
        if cut:
            LOG.warning("journal: a last line of %d bytes was cut short and is removed", cut)
            self.write("repaired", bytes_removed=cut)

    @property
    def begun(self) -> bool:
        """Whether a metric was ever written."""
        return bool(self._seen)

    def metrics(self, step: int, values: Mapping[str, float | None]) -> None:
        """Write the metrics of one step that are not yet known for it."""
        new = {name: value for name, value in values.items() if (step, name) not in self._seen}
        if new:
            self.write("metrics", step=step, values=new)

    def results(self, values: Mapping[str, float | None]) -> None:
        """Write figures of the whole, at a step after all others, where they are not the latest of their name already.

        What MLflow shows of a metric is its last step: a run's figures are those of the selected checkpoint, not of
        the last epoch, and those of an arm, made again from as many runs, replace the older ones. `whole` marks the
        event: it is no point of a curve.
        """
        new = {name: value for name, value in values.items() if self._latest.get(name, ...) != value}
        if new:
            self.write("metrics", step=self._last_step + 1, values=new, whole=True)

    def params(self, values: Mapping[str, str]) -> None:
        """Write the parameters that are not yet known."""
        new = {name: value for name, value in values.items() if name not in self._params}
        if new:
            self.write("params", values=new)

    def write(self, kind: str, **fields: Any) -> None:
        """Append one event.

        Raises:
            StorageError: Disk full or gone.
        """
        event = {"kind": kind, "time": time.time_ns() // 1_000_000, **fields}
        line = json.dumps(event, allow_nan=False).encode() + b"\n"
        start = self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(start)  # no piece of a line, which the next one would be glued to
            raise storage_error(error, self.path, "journal cannot be written") from error
        self._remember(event)

    def sync(self) -> None:
        """Wait until the disk has every line."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise storage_error(error, self.path, "journal cannot be written") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def _remember(self, event: Mapping[str, Any]) -> None:
        if event["kind"] == "metrics":
            self._seen.update((event["step"], name) for name in event["values"])
            self._latest.update(event["values"])
            self._last_step = max(self._last_step, event["step"])
        elif event["kind"] == "params":
            self._params.update(event["values"])


def read_journal(path: Path, offset: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read the whole lines from a byte offset on; each event comes with the offset after it.

    A line that is no event (damaged on disk) is told and passed over.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            event = _parse(line)
            if event is None:
                LOG.warning("journal: the line that ends at byte %d cannot be read and is passed over", offset)
            else:
                yield offset, event


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
        if event["kind"] == "metrics":
            int(event["step"]), dict(event["values"])
        return event if isinstance(event["kind"], str) and isinstance(event["time"], int) else None
    except (ValueError, KeyError, TypeError):
        return None


def _remove_cut_line(path: Path) -> int:
    """Cut the file after its last whole line; returns the number of bytes removed."""
    if not path.exists():
        return 0
    with path.open("r+b") as file:
        whole = _end_of_last_line(file)
        size = file.seek(0, os.SEEK_END)
        file.truncate(whole)
    return size - whole


def _end_of_last_line(file: BinaryIO, block: int = 65536) -> int:
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - block)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
