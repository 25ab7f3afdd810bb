"""The contract of a model: what its training scans looked like, and which step a scan that looks otherwise broke.

Every measure of a scan's fingerprint is compared with its spread over the training scans, in one unit, the width:
the distance from their median to their 5th or 95th percentile. How many widths a new head of the same kind may be
away was counted on held-out heads; see docs/reliability.md.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from emoe_med.data.fingerprint import FINGERPRINT_VERSION, MEASURES

LEVELS = (1, 5, 25, 50, 75, 95, 99)  # percentiles that are kept
FLAG = 2.5  # widths from the median: a person should look
REFUSE = 10.0  # widths, of a measure that says that there is no such head at all
FEW = 8.0  # both grow by 1 + FEW / scans: the percentiles of few scans lie too close together
MIN_SCANS = 8  # fewer do not tell a spread

_MASK, _STRIP, _FIELD = "brain mask", "skull strip or voxel size", "field of view"
_SCALE, _TEMPLATE, _SHARP = "intensity scale or contrast", "registration or template", "resolution"
_STEPS: dict[str, tuple[str | None, str | None]] = {  # measure: step when too low, when too high; None is not judged
    "spacing_mm": (None, _SHARP),
    "volume_ml": (_STRIP, _STRIP),
    "size_x_mm": (_FIELD, _STRIP),
    "size_y_mm": (_FIELD, _STRIP),
    "size_z_mm": (_FIELD, _STRIP),
    "cut_cm2": (None, _FIELD),
    "pieces": (None, _MASK),
    "cv": (_SCALE, _SCALE),
    **{name: (_SCALE, _SCALE) for name in MEASURES if name[0] == "p" and name[1:].isdigit()},
    "negative": (None, _SCALE),
    "dark": (None, _MASK),
    "mode": (None, _SCALE),
    "anisotropy": (None, _SHARP),
    "shell": (None, _MASK),
    "scale": (_TEMPLATE, _TEMPLATE),
    "stretch": (_TEMPLATE, _TEMPLATE),
    "tilt_deg": (None, _TEMPLATE),
    "similarity": (_TEMPLATE, _TEMPLATE),
    "overlap": (_TEMPLATE, _TEMPLATE),
    "rim": (_MASK, _MASK),
    "rim_spread": (None, _MASK),
    "rough_x": (_SHARP, "noise"),
    "rough_y": (_SHARP, "noise"),
    "rough_z": (_SHARP, "noise"),
}
# the least width: what does not matter, however alike the training scans were
_LEAST = {
    "spacing_mm": 0.3,
    "cut_cm2": 3.0,
    "pieces": 0.01,
    "negative": 0.002,
    "dark": 0.004,
    "mode": 0.01,
    "anisotropy": 0.02,
    "shell": 0.02,
    "scale": 0.01,
    "stretch": 0.02,
    "tilt_deg": 5.0,
}
_RELATIVE = 0.01  # of the median, for all others; of 0.1 where it is smaller
# beyond `REFUSE` these leave no head to speak of; the others may be a worse scan of one
_DECISIVE = {"volume_ml", "negative", "stretch", "similarity", "overlap", "p01", "p50", "p99"}


@dataclass(frozen=True)
class Breach:
    """One measure of a scan that lies outside what the training scans allow."""

    measure: str
    step: str
    value: float
    low: float  # 5th and 95th percentile of the training scans
    high: float
    distance: float  # in units of what is allowed: over 1 it is too far

    @property
    def refuses(self) -> bool:
        """Whether nothing sensible can be predicted."""
        return self.measure in _DECISIVE and self.distance > REFUSE / FLAG

    def __str__(self) -> str:
        span = f"{self.low:.3g} to {self.high:.3g}"
        return f"{self.step}: {MEASURES[self.measure]} is {self.value:.3g}, in training {span}"


@dataclass(frozen=True)
class Spread:
    """How the fingerprints of the training scans spread.

    Attributes:
        scans: Number of scans.
        percentiles: Values at `LEVELS`, by measure; a measure that the chain does not give is left out.
    """

    scans: int
    percentiles: Mapping[str, Sequence[float]]

    @classmethod
    def of(cls, fingerprints: np.ndarray) -> Spread:
        """Summarise fingerprints [S, M] in the order of `MEASURES`."""
        values = np.percentile(fingerprints, LEVELS, axis=0).T
        return cls(
            len(fingerprints),
            {name: row.tolist() for name, row in zip(MEASURES, values, strict=True) if np.isfinite(row).all()},
        )

    def to_json(self) -> dict:
        """Return what a checkpoint keeps."""
        rounded = {name: [float(f"{value:.5g}") for value in row] for name, row in self.percentiles.items()}
        return {"version": FINGERPRINT_VERSION, "scans": self.scans, "levels": list(LEVELS), "percentiles": rounded}

    @classmethod
    def from_json(cls, stored: Mapping | None) -> Spread | None:
        """Take back what a checkpoint keeps; None where it was measured otherwise, on too few scans, or not at all."""
        if not stored or stored["version"] != FINGERPRINT_VERSION or stored["scans"] < MIN_SCANS:
            return None
        return cls(stored["scans"], stored["percentiles"])

    def breaches(self, fingerprint: Sequence[float]) -> list[Breach]:
        """Compare one fingerprint [M]; the worst comes first.

        A figure that does not exist, though it did for every training scan, is the worst of all.
        """
        found = []
        for name, value in zip(MEASURES, fingerprint, strict=True):
            if name in self.percentiles:
                breach = self._breach(name, value)
                if breach.distance > 1:
                    found.append(breach)
        return sorted(found, key=lambda breach: -breach.distance)

    def _breach(self, name: str, value: float) -> Breach:
        at = dict(zip(LEVELS, self.percentiles[name], strict=True))
        below, above = _STEPS[name]
        step = below if value < at[50] else above
        if step is None:
            return Breach(name, "", value, at[5], at[95], 0.0)
        least = _LEAST.get(name, _RELATIVE * max(abs(at[50]), 0.1))
        width = max(at[50] - at[5] if value < at[50] else at[95] - at[50], least)
        allowed = FLAG * (1 + FEW / self.scans) * width
        distance = abs(value - at[50]) / allowed if math.isfinite(value) else math.inf
        return Breach(name, step, value, at[5], at[95], distance)


def told(breaches: Sequence[Breach], most: int = 3) -> str:
    """Name every step that a scan broke, once: the worst ones with their worst measure, the others by name alone."""
    worst: dict[str, Breach] = {}
    for breach in breaches:
        worst.setdefault(breach.step, breach)
    parts = [str(breach) for breach in list(worst.values())[:most]]
    return "; ".join([*parts, f"also {', '.join(list(worst)[most:])}"] if len(worst) > most else parts)


def contract_digest(meta: Mapping[str, Any]) -> str:
    """Return what names the contract in the `meta` of a checkpoint: chain, brain mask and spread of its scans."""
    parts = {name: meta.get(name) for name in ("chain", "strip", "fingerprint")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
