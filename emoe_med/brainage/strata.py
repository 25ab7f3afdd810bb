"""Which rows of a table of predictions are scored, and in which group."""

from __future__ import annotations

import numpy as np
import pandas as pd

from emoe_med.errors import DataError, Fault


def scored_rows(name: str, table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that have both an age and a prediction, or refuse the table (MET-EMPTY)."""
    scored = table[np.isfinite(table["age"].astype(float)) & np.isfinite(table["predicted_age"].astype(float))]
    if scored.empty:
        raise DataError(Fault("MET-EMPTY", f"none of {len(table)} {name} rows has both an age and a prediction"))
    return scored


def first_sessions(scans: pd.DataFrame) -> pd.DataFrame:
    """Keep the scan at the lowest age of each person; of equal ages the first in the table."""
    return scans.sort_values("age", kind="stable").drop_duplicates("participant_id").sort_index()


def named(strata: pd.Series) -> pd.Series:
    """Return strata as text, with ``unknown`` for missing ones."""
    return strata.astype(object).where(strata.notna(), "unknown").astype(str)


def deciles(age: pd.Series) -> pd.Series:
    """Return the tenth of the persons that each age falls in, by its youngest and oldest, such as ``41.2-45.0``."""
    tenth = pd.qcut(age.rank(method="first"), min(10, len(age)), labels=False)
    ends = age.groupby(tenth).agg(["min", "max"])
    return tenth.map({number: f"{row['min']:.1f}-{row['max']:.1f}" for number, row in ends.iterrows()})


def decades(age: pd.Series) -> pd.Series:
    """Return the decade of each age, such as ``40-49``."""
    return (age // 10 * 10).astype(int).map(lambda low: f"{low:02d}-{low + 9:02d}")
