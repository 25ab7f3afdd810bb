"""How well repeated sessions of a person agree: intraclass correlation, limits of agreement, detectable change.

Letters: n persons, k sessions each, values [n, k]. Two-way analysis of variance: MS_R between persons, MS_C
between sessions, MS_E what is left. Predicted age is flattered by the age range of the persons; brain_pad,
predicted minus chronological age, is not, and it takes out that a person is older at the later session.

Source: McGraw and Wong 1996 (ICC); Bland and Altman 1986 (limits); Weir 2005 (SEM, smallest detectable change).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from emoe_med.brainage.age_table import session_key
from emoe_med.brainage.metrics import Bootstrap, Estimate
from emoe_med.data.scan import person_key
from emoe_med.errors import DataError, Fault

Z95 = 1.96
MEASURES = {  # name: what is printed beside it
    "icc_a1": "ICC(A,1), absolute agreement",
    "icc_c1": "ICC(C,1), consistency",
    "bias": "mean difference of last and first session, years",
    "limit_low": "lower 95 % limit of agreement, years",
    "limit_high": "upper 95 % limit of agreement, years",
    "sem": "standard error of measurement, years",
    "sdc": "smallest detectable change of one person, years",
}


def agreement(values: np.ndarray) -> dict[str, np.ndarray]:
    """Measure the agreement of repeated sessions.

    Args:
        values: [..., n, k] years, k sessions of n persons; leading axes are samples of their own.

    Returns:
        `MEASURES`, each [...]: ``icc_a1 = (MS_R - MS_E) / (MS_R + (k - 1) MS_E + k (MS_C - MS_E) / n)``,
        ``icc_c1 = (MS_R - MS_E) / (MS_R + (k - 1) MS_E)``, ``sem = sqrt(MS_E)``, ``sdc = 1.96 sqrt(2) sem``;
        bias and limits are of the difference of the last and the first session. NaN where undefined.
    """
    n, k = values.shape[-2:]
    grand = values.mean((-2, -1), keepdims=True)
    person, session = values.mean(-1, keepdims=True), values.mean(-2, keepdims=True)
    ms_r = k * np.square(person - grand).sum((-2, -1)) / (n - 1)
    ms_c = n * np.square(session - grand).sum((-2, -1)) / (k - 1)
    ms_e = np.square(values - person - session + grand).sum((-2, -1)) / ((n - 1) * (k - 1))
    difference = values[..., -1] - values[..., 0]
    bias, spread = difference.mean(-1), difference.std(-1, ddof=1)
    sem = np.sqrt(ms_e)
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "icc_a1": (ms_r - ms_e) / (ms_r + (k - 1) * ms_e + k * (ms_c - ms_e) / n),
            "icc_c1": (ms_r - ms_e) / (ms_r + (k - 1) * ms_e),
            "bias": bias,
            "limit_low": bias - Z95 * spread,
            "limit_high": bias + Z95 * spread,
            "sem": sem,
            "sdc": Z95 * np.sqrt(2) * sem,
        }


def reliability(predictions: Path, sessions: int = 2, bootstrap: Bootstrap | None = None) -> dict[str, Any]:
    """Measure the agreement of the first sessions of each person in a table of predictions.

    Args:
        predictions: CSV of `predict` (participant_id, session_id, predicted_age, age), or test.csv of a run
            (person for participant_id). Rows without a prediction are left out; so are persons with fewer sessions,
            and all runs of a session but the first: two runs of one visit agree better than two visits.
        sessions: How many sessions of a person are used: the first ones by age, else by session_id.
        bootstrap: Draws of persons for the intervals.

    Returns:
        ``predicted_age`` and, where every used row has an age, ``brain_pad``: `MEASURES` as estimates; ``persons``,
        ``sessions``, ``left_out`` (persons with fewer), ``repeats`` (rows of a session beyond its first), ``ageless``
        (used rows without an age), ``flagged`` (used rows that `predict` wants looked at), ``years_between`` (median
        of last minus first age).

    Raises:
        DataError: No such table (REL-TABLE), or fewer than three persons with that many sessions (REL-FEW).
    """
    bootstrap = bootstrap or Bootstrap()
    given = _read(predictions)
    scans = _one_a_session(given)
    count = scans.groupby("participant_id").cumcount()
    size = scans.groupby("participant_id")["predicted_age"].transform("size")
    used = scans[(size >= sessions) & (count < sessions)].assign(session=count)
    persons = used["participant_id"].nunique()
    if persons < 3:
        reason = f"{persons} persons have {sessions} sessions with a prediction; three are needed"
        raise DataError(Fault("REL-FEW", reason, str(predictions)))
    columns = {"predicted_age": used["predicted_age"]}
    found: dict[str, Any] = {"persons": persons, "sessions": sessions}
    found["left_out"] = int(scans["participant_id"].nunique() - persons)
    found["repeats"] = len(given) - len(scans)
    found["ageless"] = int(used["age"].isna().sum()) if "age" in used else len(used)
    found["flagged"] = int((used["status"] == "check").sum()) if "status" in used else 0
    if not found["ageless"]:
        columns["brain_pad"] = used["predicted_age"] - used["age"]
        ages = _wide(used, used["age"])
        found["years_between"] = float(np.median(ages[:, -1] - ages[:, 0]))
    return found | {name: _estimates(_wide(used, values), bootstrap) for name, values in columns.items()}


def _one_a_session(scans: pd.DataFrame) -> pd.DataFrame:
    """Keep the first run of each session of a person, in the order of age, else of the numbers in the labels.

    Rows without a session are told apart by age.
    """
    label = scans.get("session_id", pd.Series("", scans.index)).fillna("")
    age = scans.get("age", pd.Series(np.nan, scans.index))
    session = label.map(session_key)
    scans = scans.assign(
        participant_id=scans["participant_id"].map(person_key),
        session=session.where(session != "", age.astype(str)),
        label=label.str.replace(r"\d+", lambda digits: digits[0].zfill(12), regex=True),
    )
    scans = scans.sort_values("label", kind="stable").drop_duplicates(["participant_id", "session"])
    return scans.sort_values("age", kind="stable") if age.notna().all() else scans


def _wide(used: pd.DataFrame, values: pd.Series) -> np.ndarray:
    """Values [n, k] of scans in long form."""
    return used.assign(value=values).pivot(index="participant_id", columns="session", values="value").to_numpy(float)


def _estimates(values: np.ndarray, bootstrap: Bootstrap) -> dict[str, Estimate]:
    n = len(values)
    drawn = np.random.default_rng(bootstrap.seed).integers(n, size=(bootstrap.draws, n))
    draws = agreement(values[drawn])
    return {name: bootstrap.estimate(float(value), draws[name], n) for name, value in agreement(values).items()}


def _read(path: Path) -> pd.DataFrame:
    try:
        scans = pd.read_csv(path, dtype=dict.fromkeys(("participant_id", "person", "session_id"), "str"))
    except (OSError, ValueError) as error:  # pandas raises kinds of ValueError for what is no table
        reason = getattr(error, "strerror", None) or "is no table of predictions"
        raise DataError(Fault("REL-TABLE", reason, str(path))) from error
    scans = scans.rename(columns={"person": "participant_id"})
    missing = {"participant_id", "predicted_age"} - set(scans.columns)
    if missing:
        reason = f"has no column {', '.join(sorted(missing))}"
        raise DataError(Fault("REL-TABLE", reason, str(path), hint="give the CSV that `predict` wrote"))
    for name in ("predicted_age", "age"):
        if name in scans and not pd.api.types.is_numeric_dtype(scans[name]) and scans[name].notna().any():
            hint = "give the CSV that `predict` wrote"
            raise DataError(Fault("REL-TABLE", f"column {name} holds what is no number", str(path), hint=hint))
    return scans[scans["predicted_age"].notna() & scans["participant_id"].notna()]
