"""Compare arms over their folds and seeds, on identical test scans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from emoe_med.brainage.comparison import compare
from emoe_med.brainage.evaluate import read_predictions
from emoe_med.brainage.metrics import DEFAULT_BOOTSTRAP
from emoe_med.errors import DataError, Fault


def compare_groups(folders: list[Path]) -> tuple[dict[str, Any], str]:
    """Pool the test predictions of each arm over folds and seeds and compare them with the first arm.

    Args:
        folders: Folders of arms, each with run folders of any folds and seeds.

    Returns:
        Figures by arm, and the same as a Markdown table. `mae` is the mean over seeds of the error on pooled
        folds, `mae_ensemble` that of the mean prediction over seeds; intervals are over persons, the
        difference is paired and Holm-corrected.

    Raises:
        DataError: An arm has no evaluated run, or arms were scored on different scans.
    """
    groups = {folder.name: _predictions(folder) for folder in folders}
    if len(groups) < len(folders):
        raise DataError(Fault("CMP-NAMES", "two arms have the same name"))
    result = compare(groups, reference=folders[0].name)
    for name, table in groups.items():
        result[name]["seeds"] = sorted(table["seed"].unique().tolist())
        result[name]["mae_by_seed"] = {
            str(seed): float(part.groupby("row")["error"].mean().mean()) for seed, part in table.groupby("seed")
        }
        result[name]["mae_ensemble"] = _ensemble(table)
        result[name]["routing"] = _routing(folders[list(groups).index(name)])
    return result, _markdown(result)


def _predictions(folder: Path) -> pd.DataFrame:
    runs = sorted(path.parent for path in folder.glob("seed*-fold*/metrics.json"))
    if not runs:
        raise DataError(Fault("CMP-NONE", "no evaluated run in this folder", str(folder)))
    tables = []
    for run in runs:
        seed = int(run.name.split("-")[0].removeprefix("seed"))
        tables.append(read_predictions(run, "test").assign(run=run.name, seed=seed))
    table = pd.concat(tables, ignore_index=True)
    return table.assign(error=(table["predicted_age"] - table["age"]).abs())


def _ensemble(table: pd.DataFrame) -> dict[str, Any]:
    """Error of the mean prediction over seeds, with its interval over persons."""
    means = table.groupby("row").agg({"age": "first", "predicted_age": "mean", "participant_id": "first"})
    error = (means["predicted_age"] - means["age"]).abs().to_numpy()
    persons = means["participant_id"].to_numpy()
    drawn = [counts @ error / counts.sum(1) for counts in DEFAULT_BOOTSTRAP.counts(persons)]
    return DEFAULT_BOOTSTRAP.estimate(float(error.mean()), np.concatenate(drawn), len(np.unique(persons)))


def _routing(folder: Path) -> dict[str, dict[str, float]] | None:
    """Mean and worst figure of the routed layers over the runs of an arm."""
    rows = []
    for path in folder.glob("seed*-fold*/metrics.json"):
        for layer in json.loads(path.read_text()).get("routing", {}).values():
            figures = {key: value for key, value in layer.items() if isinstance(value, int | float)}
            for key in ("mae_without_branch", "mae_permuted_routing"):
                if key in layer:
                    figures[key] = layer[key]["value"]
            rows.append(figures)
    if not rows:
        return None
    table = pd.DataFrame(rows)
    return {key: {"mean": table[key].mean(), "min": table[key].min(), "max": table[key].max()} for key in table}


def _markdown(result: dict[str, Any]) -> str:
    lines = [
        "| arm | seeds | MAE, years | MAE of the seed ensemble | difference to the first arm | p, Holm |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in result.items():
        difference = found.get("difference")
        cells = [name, str(len(found["seeds"])), _interval(found["mae"]), _interval(found["mae_ensemble"])]
        cells += ["", ""] if difference is None else [_interval(difference), f"{difference['p_holm']:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    first = next(iter(result.values()))
    lines.append("")
    lines.append(f"{first['mae']['n']} persons; 95 % bootstrap intervals over persons; difference below 0: better.")
    return "\n".join(lines)


def _interval(found: dict[str, Any]) -> str:
    if found["low"] is None:
        return f"{found['value']:.2f}"
    return f"{found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"
