"""Prediction intervals by split conformal: how wide the errors of held-out persons say that they must be.

For n persons whom the model was not trained on, the ceil((n + 1) L)-th smallest absolute error, added to both
sides of a prediction, covers the age of a new person with probability at least L, whatever the model and the
distribution, if that person is exchangeable with them (Vovk et al. 2005; Lei et al. 2018). The promise is over
all persons, not at each age, and does not extend to other scanners: hence the coverage by age and site.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from emoe_med.brainage.metrics import Estimate
from emoe_med.brainage.strata import decades, deciles, first_sessions, named, scored_rows

LEVELS = (0.9, 0.8, 0.5)  # the first that the persons support is given

NOTE = (
    "Split conformal on the first session of each validation person. The same persons fit the age-bias correction, "
    "and with training.select = best they also chose the epoch, which makes the interval a little too narrow. "
    "It is that of the raw prediction. Coverage is promised over all persons like them, not at each age or site."
)


@dataclass(frozen=True)
class Interval:
    """A symmetric prediction interval: prediction plus and minus ``half_width`` years."""

    level: float
    half_width: float  # years
    n: int  # calibration persons

    def ends(self, scans: pd.DataFrame) -> dict[str, pd.Series]:
        """Return the ends around ``predicted_age`` as columns; they are not cut at 0."""
        ages = scans["predicted_age"]
        return {"lower": ages - self.half_width, "upper": ages + self.half_width}


def fit_interval(val: pd.DataFrame, levels: tuple[float, ...] = LEVELS) -> Interval | None:
    """Fit an interval on predictions of held-out persons, one score a person: that of the first session.

    Args:
        val: Columns participant_id, age, predicted_age; rows without both are left out.
        levels: Coverage asked for, the first that n persons support is taken: ceil((n + 1) level) <= n.

    Returns:
        None where the persons support no level.

    Raises:
        DataError: No row has both (MET-EMPTY).
    """
    scored = first_sessions(scored_rows("val", val))
    errors = np.sort(np.abs(scored["predicted_age"] - scored["age"]))
    for level in levels:
        rank = math.ceil(round((len(errors) + 1) * level, 9))
        if rank <= len(errors):
            return Interval(level, float(errors[rank - 1]), len(errors))
    return None


def coverage(test: pd.DataFrame, interval: Interval) -> Estimate:
    """Return the share of persons whose age lies in their interval, with its exact 95 % binomial interval.

    Args:
        test: One row a person: age, predicted_age.
        interval: Fitted on other persons.
    """
    return _share((test["predicted_age"] - test["age"]).abs() <= interval.half_width)


def _share(inside: pd.Series) -> Estimate:
    """Return the mean of [P] shares in 0 to 1, one a person, with the interval of Clopper and Pearson 1934."""
    n, k = len(inside), float(inside.sum())
    low = stats.beta.ppf(0.025, k, n - k + 1) if k else 0.0
    high = stats.beta.ppf(0.975, k + 1, n - k) if k < n else 1.0
    return {"value": k / n, "low": float(low), "high": float(high), "n": n}


def pooled_coverage(scans: pd.DataFrame) -> dict[str, Any] | None:
    """Tell what the intervals of many runs cover of their test persons, and how wide they are, by age and site too.

    Args:
        scans: Tests of all folds and seeds: participant_id, age, lower, upper, site if known. Of a person whom several
            seeds tested the share of them counts.

    Returns:
        ``coverage`` (over persons) and ``width`` (mean, years); the same in ``by_age`` (decades), ``by_age_decile`` and
        ``by_site``. None where runs have no intervals.
    """
    if "lower" not in scans or scans["lower"].isna().all():
        return None
    scans = scans.dropna(subset=["lower", "upper"])
    scans = scans.assign(
        inside=scans["age"].between(scans["lower"], scans["upper"]), width=scans["upper"] - scans["lower"]
    )
    told_once = {name: "first" for name in ("age", "site") if name in scans}
    persons = scans.groupby("participant_id").agg({"inside": "mean", "width": "mean", **told_once})
    strata = {"by_age": decades(persons["age"]), "by_age_decile": deciles(persons["age"])}
    if "site" in persons:
        strata["by_site"] = named(persons["site"])

    def told(group: pd.DataFrame) -> dict[str, Any]:
        return {"coverage": _share(group["inside"]), "width": float(group["width"].mean())}

    by = {key: {str(name): told(group) for name, group in persons.groupby(names)} for key, names in strata.items()}
    return told(persons) | by


def with_coverage(metrics: dict[str, Any], test: pd.DataFrame, interval: Interval | None) -> dict[str, Any]:
    """Add to metrics.json how an interval was made and what it covers of the test persons.

    Args:
        metrics: From `metrics.evaluate` of the same table.
        test: Columns participant_id, age, predicted_age; sex and site if known.
        interval: Fitted on other persons.

    Returns:
        The metrics with ``interval`` (level, half_width and width in years, n calibration persons, coverage,
        note), and with ``coverage`` in each stratum.
    """
    if interval is None:
        return metrics | {"interval": None}
    scans = first_sessions(scored_rows("test", test))
    width = {"width": 2 * interval.half_width, "coverage": coverage(scans, interval), "note": NOTE}
    strata = {"by_age": decades(scans["age"])}
    strata |= {f"by_{key}": named(scans[key]) for key in ("sex", "site") if key in scans}
    by_stratum = {}
    for key, names in strata.items():
        covered = {str(name): coverage(group, interval) for name, group in scans.groupby(names)}
        by_stratum[key] = {
            name: found | {"coverage": covered[name]} if name in covered else found
            for name, found in metrics[key].items()
        }
    return metrics | by_stratum | {"interval": asdict(interval) | width}
