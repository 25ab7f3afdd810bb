"""What of a run's figures may leave the machine: no group of a few persons, no exact age."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emoe_med.brainage.metrics import MIN_PERSONS
from emoe_med.training.run_folder import replace_file


def without_small_groups(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out strata whose error is that of a handful of persons."""
    return {
        key: {name: found for name, found in value.items() if found["mae"]["n"] >= MIN_PERSONS}
        if key.startswith("by_")
        else value
        for key, value in metrics.items()
    }


def shared_metrics(run_dir: Path) -> dict[str, Any]:
    """Return what metrics.json of an evaluated run holds, without small groups and exact ages."""
    metrics = without_small_groups(json.loads((run_dir / "metrics.json").read_text("utf-8")))
    for found in (metrics.get("counts") or {}).values():
        found.pop("age_low", None)
        found.pop("age_high", None)
    return metrics


def write_shared_metrics(run_dir: Path) -> Path:
    """Write ``report/shared/metrics.json``: see `shared_metrics`."""
    metrics = shared_metrics(run_dir)
    path = run_dir / "report" / "shared" / "metrics.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (json.dumps(metrics, indent=1) + "\n").encode())
    return path
