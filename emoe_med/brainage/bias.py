"""Age-bias correction of brain age, fitted out of fold and never the headline.

Regression to the mean makes every model guess the young too old and the old too young. A linear fit
removes that trend. Letters: y age, p raw prediction, d = p - y (``brain_pad``); d = alpha y + beta.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from scipy import stats

from emoe_med.errors import DataError, Fault

Method = Literal["beheshti", "cole"]
MIN_COLE_SLOPE = 0.3  # below it the division by the slope multiplies the noise more than threefold

_COVARIATES = (
    "For group studies, correct, or leave brain_pad raw and put age (with age squared, sex and site) into the "
    "analysis as covariates."
)
NOTES: dict[Method, str] = {
    "beheshti": "The corrected age contains the chronological age itself, so its accuracy is circular: a model "
    "without any signal scores an excellent error after correction. Judge a model by its raw predictions. "
    f"{_COVARIATES}",
    "cole": "The correction divides by the slope of prediction on age, so it removes the trend and inflates the "
    f"noise. Judge a model by its raw predictions. {_COVARIATES}",
}


@dataclass(frozen=True)
class AgeBias:
    """A fitted linear age bias; ``apply`` takes it off.

    ``beheshti`` is p - (alpha y + beta). It equals de Lange's p + y - (A y + B) exactly, with A = alpha + 1
    and B = beta, and needs the age of the person at prediction. So the corrected age of a model that knows
    nothing is the true age plus a little noise: its accuracy is circular and must never be reported as the
    accuracy of the model. ``cole`` is (p - B) / A; it needs no age and inflates the noise by 1 / A.

    All fields are plain numbers and text: ``AgeBias(**json)`` undoes ``dataclasses.asdict``.

    Source: Beheshti et al. 2019, NeuroImage Clin. 24:102063; de Lange and Cole 2020, NeuroImage Clin.
    26:102229; Cole et al. 2018, Mol. Psychiatry 23:1385; on the circularity Butler et al. 2021, Hum. Brain
    Mapp. 42:4092.
    """

    method: Method
    alpha: float  # years of brain_pad per year of age
    beta: float  # years
    slope_low: float  # 95 % interval of A = alpha + 1, the slope of prediction on age
    slope_high: float
    n: int  # persons
    age_low: float  # fitted age range, years
    age_high: float

    def apply(self, predicted_age: np.ndarray, age: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Correct predicted ages, and tell which of them lie where the fit holds.

        Args:
            predicted_age: [S] raw predictions in years.
            age: [S] ages in years, NaN where unknown. ``cole`` does not look at them.

        Returns:
            Corrected ages [S] in years (NaN where ``beheshti`` lacks the age); in range [S], bool: age, for
            ``cole`` corrected age, within the fitted range. Outside it the correction is an extrapolation.
        """
        predicted_age, age = np.asarray(predicted_age, float), np.asarray(age, float)
        if self.method == "cole":
            corrected = (predicted_age - self.beta) / (self.alpha + 1)
            checked = corrected
        else:
            corrected = predicted_age - (self.alpha * age + self.beta)
            checked = age
        return corrected, (checked >= self.age_low) & (checked <= self.age_high) & np.isfinite(corrected)


def fit_age_bias(
    age: np.ndarray, predicted_age: np.ndarray, persons: np.ndarray, method: Method = "beheshti"
) -> AgeBias:
    """Fit the age bias on predictions of persons whom the model was not trained on.

    Give validation (out-of-fold) predictions of healthy persons. In-sample predictions of a network that
    has learned its training set by heart show almost no bias, so a fit on them leaves the bias in; the test
    set must not be used because its accuracy is reported, and patients because their deviation is the result.

    Args:
        age: [S] ages in years.
        predicted_age: [S] raw predictions in years; rows that are not finite are left out.
        persons: [S] any id. Several scans of one person count as one point, their mean.
        method: ``beheshti`` (identical to de Lange) or ``cole``.

    Returns:
        The fit, with the number of persons and their age range.

    Raises:
        DataError: Fewer than three persons or one age only (BIAS-FIT); ``cole`` with a slope below 0.3 or
            with an interval that includes 0 (BIAS-SLOPE).
    """
    scans = pd.DataFrame({"person": np.asarray(persons), "age": age, "predicted": predicted_age}, dtype=object)
    scans = scans.astype({"age": float, "predicted": float})
    scans = scans[np.isfinite(scans["age"]) & np.isfinite(scans["predicted"])]
    points = scans.groupby("person")[["age", "predicted"]].mean()
    if len(points) < 3 or np.ptp(points["age"]) == 0:
        ages = points["age"].nunique()
        reason = f"age bias needs three persons of different age, got {len(points)} persons of {ages} ages"
        raise DataError(Fault("BIAS-FIT", reason))
    line = stats.linregress(points["age"], points["predicted"])
    half_width = stats.t.ppf(0.975, len(points) - 2) * line.stderr
    low, high = line.slope - half_width, line.slope + half_width
    if method == "cole" and (line.slope < MIN_COLE_SLOPE or low <= 0):
        slope = f"slope of prediction on age is {line.slope:.2f} [{low:.2f}, {high:.2f}]"
        reason = f"{slope}; cole divides by it and needs at least {MIN_COLE_SLOPE} and an interval above 0"
        raise DataError(Fault("BIAS-SLOPE", reason, hint="report raw predictions, or use method beheshti"))
    return AgeBias(
        method=method,
        alpha=float(line.slope - 1),
        beta=float(line.intercept),
        slope_low=float(low),
        slope_high=float(high),
        n=len(points),
        age_low=float(scans["age"].min()),
        age_high=float(scans["age"].max()),
    )
