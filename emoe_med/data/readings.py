"""What a scan was found to be as it was read, and the memory of it, so that a start does not read every volume."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from emoe_med.data.fingerprint import FINGERPRINT_VERSION
from emoe_med.errors import Fault


@dataclass(frozen=True)
class Reading:
    """One scan as it was read: why it cannot be used, or its digests and what was measured of it."""

    fault: Fault | None
    content: str = ""  # of the volume in the model's space: equal for one image under two names
    voxels: str = ""  # of the image as read, whatever the mask
    similarity: float = math.nan
    fingerprint: tuple[float, ...] = ()  # in the order of `MEASURES`

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Reading:
        """Take back what `asdict` and JSON made of a reading."""
        told = dict(stored)
        told["fault"] = told["fault"] and Fault(**told["fault"])
        told["fingerprint"] = tuple(told["fingerprint"])
        return cls(**told)


class KnownReadings:
    """The readings of one cache folder by the key of their entry; no path and no person is named there."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / f"readings-v{FINGERPRINT_VERSION}.jsonl"
        self.known: dict[str, str] = {}
        if self.file.is_file():
            for line in self.file.read_text().splitlines():
                key, _, text = line.partition(" ")
                if len(key) == 64 and text.endswith("}"):  # a half-written line is left out
                    self.known[key] = text

    def get(self, key: str | None) -> Reading | None:
        """Return the reading of an entry, if it is known; a damaged line is as good as none."""
        try:
            return Reading.of(json.loads(self.known[key or ""]))
        except (KeyError, TypeError, ValueError):
            return None

    def add(self, readings: Iterable[tuple[str | None, Reading]]) -> None:
        """Remember the readings that have an entry and no fault."""
        lines = [f"{key} {json.dumps(asdict(reading))}\n" for key, reading in readings if key and not reading.fault]
        if lines:
            with self.file.open("a+") as memory:
                memory.seek(max(0, self.file.stat().st_size - 1))
                if memory.read(1) not in ("", "\n"):
                    lines.insert(0, "\n")  # the last one was cut short: it shall not swallow the next
                memory.writelines(lines)
