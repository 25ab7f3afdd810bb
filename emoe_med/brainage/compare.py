"""Compare arms over their folds and seeds, on identical test scans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from emoe_med.brainage.comparison import compare
from emoe_med.brainage.conformal import pooled_coverage
from emoe_med.brainage.evaluate import read_predictions
from emoe_med.brainage.metrics import DEFAULT_BOOTSTRAP
from emoe_med.brainage.strata import first_sessions
from emoe_med.errors import DataError, Fault
from emoe_med.training.arm import check_alike


def compare_groups(folders: list[Path]) -> tuple[dict[str, Any], str]:
    """Pool the test predictions of each arm over folds and seeds and compare them with the first arm.

    Only the folds and seeds that all arms have are used, one scan a person (the first session).

    Args:
        folders: Folders of arms, each with run folders of any folds and seeds.

    Returns:
        Figures by arm, and the same as Markdown tables. `mae` is the mean over seeds of the error on pooled
        folds, `mae_ensemble` that of the mean prediction over seeds; intervals are over persons, the
        difference is paired and Holm-corrected; it holds for the seeds at hand. `interval` is `pooled_coverage`.

    Raises:
        DataError: An arm has no evaluated run, arms have no run in common, or runs differ in manifest, chain,
            or who is in which fold.
    """
    if len({folder.name for folder in folders}) < len(folders):
        hint = "`python -m emoe_med.pipeline compare` takes any runs"
        raise DataError(Fault("CMP-NAMES", "two arms have the same name", hint=hint))
    runs = {folder: _runs(folder) for folder in folders}
    common = set.intersection(*(set(found) for found in runs.values()))
    if not common:
        raise DataError(Fault("CMP-RUNS", "the arms have no fold and seed in common"))
    check_alike((key[1], found[key]) for key in sorted(common) for found in runs.values())
    groups = {folder.name: _predictions({key: runs[folder][key] for key in common}) for folder in folders}
    result = compare(groups, reference=folders[0].name)
    for folder in folders:
        table, found = groups[folder.name], result[folder.name]
        found["seeds"] = sorted({seed for seed, _ in common})
        found["folds"] = sorted({fold for _, fold in common})
        found["left_out"] = sorted(run.name for key, run in runs[folder].items() if key not in common)
        by_seed = table.groupby("seed")["error"].mean()
        found["mae_by_seed"] = {str(seed): float(error) for seed, error in by_seed.items()}
        found["mae_ensemble"] = _ensemble(table)
        found["routing"] = _routing([runs[folder][key] for key in sorted(common)])
        found["interval"] = pooled_coverage(table)
    return result, _markdown(result)


def _runs(folder: Path) -> dict[tuple[int, int], Path]:
    """Return the evaluated runs of an arm by (seed, fold)."""
    runs = {}
    for path in folder.glob("seed*-fold*/metrics.json"):
        seed, fold = path.parent.name.removeprefix("seed").split("-fold")
        runs[int(seed), int(fold)] = path.parent
    if not runs:
        raise DataError(Fault("CMP-NONE", "no evaluated run in this folder", str(folder)))
    return runs


def _predictions(runs: dict[tuple[int, int], Path]) -> pd.DataFrame:
    tables = []
    for (seed, _), run in sorted(runs.items()):
        table = read_predictions(run, "test").dropna(subset=["age", "predicted_age"])
        tables.append(first_sessions(table).assign(run=run.name, seed=seed))
    table = pd.concat(tables, ignore_index=True)
    return table.assign(error=(table["predicted_age"] - table["age"]).abs())


def _ensemble(table: pd.DataFrame) -> dict[str, Any]:
    """Error of the mean prediction over seeds, with its interval over persons."""
    means = table.groupby("row").agg({"age": "first", "predicted_age": "mean", "participant_id": "first"})
    error = (means["predicted_age"] - means["age"]).abs().to_numpy()
    persons = means["participant_id"].to_numpy()
    drawn = [counts @ error / counts.sum(1) for counts in DEFAULT_BOOTSTRAP.counts(persons)]
    return DEFAULT_BOOTSTRAP.estimate(float(error.mean()), np.concatenate(drawn), len(np.unique(persons)))


def _routing(runs: list[Path]) -> dict[str, dict[str, float]] | None:
    """Mean, least and largest figure of the routed layers over the runs of an arm."""
    rows = []
    for run in runs:
        for layer in json.loads((run / "metrics.json").read_text()).get("routing", {}).values():
            figures = {key: value for key, value in layer.items() if isinstance(value, int | float)}
            for key in ("mae_without_branch", "mae_permuted_routing"):
                if key in layer:
                    figures[key] = layer[key]["value"]
            rows.append(figures)
    if not rows:
        return None
    table = pd.DataFrame(rows)
    return {key: {"mean": table[key].mean(), "min": table[key].min(), "max": table[key].max()} for key in table}


MIN_SEEDS = 3  # a p value over persons says nothing about another seed of the same arm


def _markdown(result: dict[str, Any]) -> str:
    lines = [
        "| arm | MAE, years | by seed | MAE of the seed ensemble | difference to the first arm | p, Holm |",
        "|---|---|---|---|---|---|",
    ]
    first = next(iter(result.values()))
    for name, found in result.items():
        by_seed = ", ".join(f"{error:.2f}" for error in found["mae_by_seed"].values())
        cells = [name, _interval(found["mae"]), by_seed, _interval(found["mae_ensemble"]), "", ""]
        if "difference" in found:
            p = f"{found['difference']['p_holm']:.3f}" if len(first["seeds"]) >= MIN_SEEDS else "needs 3 seeds"
            cells[4:] = [_interval(found["difference"]), p]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    counts = f"{first['mae']['n']} persons, {len(first['folds'])} folds, {len(first['seeds'])} seeds"
    lines.append(f"{counts}; 95 % bootstrap intervals over persons; a difference below 0 is better than the first arm.")
    left_out = [f"{name}/{run}" for name, found in result.items() for run in found["left_out"]]
    if left_out:
        lines.append(f"Left out, because not every arm has them: {', '.join(left_out)}.")
    return "\n".join([*lines, *_coverage_table(result)])


def _coverage_table(result: dict[str, Any]) -> list[str]:
    """Lay out what the prediction intervals cover and how wide they are, by arm, age and site."""
    arms = {name: found["interval"] for name, found in result.items() if found["interval"]}
    if not arms:
        return []
    lines = [
        "",
        f"| prediction intervals: coverage, width in years | {' | '.join(arms)} |",
        "|---" * (len(arms) + 1) + "|",
    ]
    groups = [("all persons", list(arms.values()))]
    for key, label in (("by_age", "aged"), ("by_site", "site")):
        names = sorted({name for found in arms.values() for name in found.get(key, ())})
        groups += [(f"{label} {name}", [found[key][name] for found in arms.values()]) for name in names]
    for label, found in groups:
        cells = (f"{_percent(part['coverage'])}, n = {part['coverage']['n']}; {part['width']:.1f}" for part in found)
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def _percent(found: dict[str, Any]) -> str:
    return f"{found['value']:.0%} [{100 * found['low']:.0f}, {100 * found['high']:.0f}]"


def _interval(found: dict[str, Any]) -> str:
    if found["low"] is None:
        return f"{found['value']:.2f}"
    return f"{found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"
