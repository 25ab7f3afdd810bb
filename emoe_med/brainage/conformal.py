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
from emoe_med.brainage.strata import decades, first_sessions, named, scored_rows

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
    inside = int(((test["predicted_age"] - test["age"]).abs() <= interval.half_width).sum())
    low, high = stats.binomtest(inside, len(test)).proportion_ci(0.95, method="exact")
    return {"value": inside / len(test), "low": float(low), "high": float(high), "n": len(test)}


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
