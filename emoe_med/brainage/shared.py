"""What of a run's figures may leave the machine: no group of a few persons, no exact age."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emoe_med.brainage.metrics import MIN_PERSONS
from emoe_med.storage import replace_file

_ENDS = {"age_low": 1, "age_high": -1}


def shareable(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of metrics.json may leave.

    Left out: strata whose error is that of a handful of persons, and what would give it back by subtraction. Ages that
    are those of single persons are made round: ends of ranges to five years, outwards, the median to whole years.
    """
    found: dict[str, Any] = {key: _large(value) if key.startswith("by_") else value for key, value in metrics.items()}
    if found.get("training_median_age") is not None:
        found["training_median_age"] = float(round(found["training_median_age"]))
    if counts := found.get("counts"):
        found["counts"] = {split: _round_ends(part) for split, part in counts.items()}
    if corrected := found.get("corrected"):
        found["corrected"] = {**corrected, "bias": _round_ends(corrected["bias"])}
    return found


def _large(strata: Mapping[str, Any]) -> dict[str, Any]:
    groups = {name: found for name, found in strata.items() if name != "macro_mean"}
    large = {name: found for name, found in groups.items() if found["mae"]["n"] >= MIN_PERSONS}
    if len(large) == len(groups):
        return dict(strata)
    # the others and the whole tell the error of all that is left out together; the mean of rows, that of a single one
    lost = sum(found["mae"]["n"] for name, found in groups.items() if name not in large)
    return large if lost >= MIN_PERSONS else {}


def _round_ends(found: Mapping[str, Any]) -> dict[str, Any]:
    ends = {name: sign * 5.0 * (sign * found[name] // 5) for name, sign in _ENDS.items() if found.get(name) is not None}
    return {**found, **ends}


def write_shared_metrics(run_dir: Path) -> Path:
    """Write ``report/shared/metrics.json``: see `shareable`."""
    metrics = shareable(json.loads((run_dir / "metrics.json").read_text("utf-8")))
    path = run_dir / "report" / "shared" / "metrics.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (json.dumps(metrics, indent=1) + "\n").encode())
    return path
