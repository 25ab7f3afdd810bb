"""Models compared on the same scans: paired differences in error, with a correction for their number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from emoe_med.brainage.metrics import DEFAULT_BOOTSTRAP, Bootstrap, Estimate
from emoe_med.errors import DataError, Fault
from emoe_med.training.paired import holm


def paired_difference(
    errors_a: np.ndarray, errors_b: np.ndarray, persons: np.ndarray, bootstrap: Bootstrap = DEFAULT_BOOTSTRAP
) -> Estimate:
    """Compare two models on the same scans: MAE of a minus MAE of b.

    Args:
        errors_a: [S] errors of model a in years, signed or absolute.
        errors_b: [S] errors of model b on the same scans.
        persons: [S] id of the person of each scan.
        bootstrap: Draws, seed and level of the interval.

    Returns:
        ``{value, low, high, n}`` in years, negative where a is better, and ``p``: two-sided, by exchanging
        the two models within persons at random (all exchanges where there are fewer of them than draws).
    """
    difference = np.abs(np.asarray(errors_a, float)) - np.abs(np.asarray(errors_b, float))
    drawn = np.concatenate([counts @ difference / counts.sum(1) for counts in bootstrap.counts(persons)])
    per_person = pd.Series(difference).groupby(np.asarray(persons, dtype=str)).sum().to_numpy()
    found = bootstrap.estimate(difference.mean(), drawn, len(per_person))
    if len(per_person) < 2:
        return found | {"p": None, "reason": "one person"}
    test = stats.permutation_test(
        (per_person, np.zeros_like(per_person)),
        lambda a, b, axis: (a - b).sum(axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=bootstrap.draws,
        rng=np.random.default_rng(bootstrap.seed),
    )
    return found | {"p": float(test.pvalue)}


def compare(
    groups: Mapping[str, pd.DataFrame], reference: str, bootstrap: Bootstrap = DEFAULT_BOOTSTRAP
) -> dict[str, dict[str, Any]]:
    """Compare groups of runs with a reference group, on identical scans.

    Args:
        groups: Runs of one configuration under one name, as one table: columns run (its fold and seed), row
            (of the scan in the manifest that all share), participant_id, age, predicted_age. The absolute
            error of a scan is averaged over the runs of the group that tested it.
        reference: Name of the group to compare with.
        bootstrap: Draws, seed and level. Intervals are over persons; ``mae_by_run`` has the spread over runs.

    Returns:
        ``{group: {mae, mae_by_run, difference}}``; ``difference`` is to the reference, with ``p`` and
        ``p_holm``, and missing for the reference itself.

    Raises:
        DataError: Groups were not scored on the same scans (CMP-SCANS).
    """
    errors, by_run = {}, {}
    for name, table in groups.items():
        table = table.assign(error=(table["predicted_age"] - table["age"]).abs()).dropna(subset=["error"])
        errors[name] = table.groupby("row")["error"].mean()
        by_run[name] = {str(run): float(error) for run, error in table.groupby("run")["error"].mean().items()}
    rows = errors[reference].index
    faults = [
        Fault(
            "CMP-SCANS",
            f"{name} and {reference} differ in {len(rows.symmetric_difference(found.index))} scans",
        )
        for name, found in errors.items()
        if not rows.equals(found.index)
    ]
    if faults:
        raise DataError(*faults)
    persons = groups[reference].drop_duplicates("row").set_index("row")["participant_id"].loc[rows].to_numpy()
    out: dict[str, dict[str, Any]] = {}
    for name, error in errors.items():
        drawn = np.concatenate([counts @ error.to_numpy() / counts.sum(1) for counts in bootstrap.counts(persons)])
        out[name] = {
            "mae": bootstrap.estimate(error.mean(), drawn, len(np.unique(persons.astype(str)))),
            "mae_by_run": by_run[name],
        }
    others = [name for name in groups if name != reference]
    found = [paired_difference(errors[name], errors[reference], persons, bootstrap) for name in others]
    tested = [index for index, difference in enumerate(found) if difference["p"] is not None]
    for index, p in zip(tested, holm(np.array([found[i]["p"] for i in tested])), strict=True):
        found[index]["p_holm"] = float(p)
    for name, difference in zip(others, found, strict=True):
        out[name]["difference"] = difference
    return out
