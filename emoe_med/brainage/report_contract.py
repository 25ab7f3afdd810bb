"""The parts of the report on what may be relied on: the prediction interval, and scans that broke the contract."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape
from typing import Any

import pandas as pd

from emoe_med.brainage.report_page import interval, note, number, safe_reason, section, table


def interval_section(metrics: Mapping[str, Any]) -> str:
    """Tell how wide the prediction interval is and what it covered; strata have theirs in their own table."""
    if "interval" not in metrics:
        return ""
    found = metrics["interval"]
    if found is None:
        return section("Prediction interval", note("None: too few validation persons."))
    covered = found["coverage"]
    text = (
        f"<p><b>± {number(found['half_width'])} years</b> hold the age with a probability of {found['level']:.0%}, as "
        f"the errors of {found['n']} validation persons say. Of the test persons they hold {covered['value']:.0%} "
        f"{interval(covered, percent=True)}, n = {covered['n']}.</p>"
    )
    return section("Prediction interval", text + note(escape(found["note"])))


def refused_section(predictions: Mapping[str, pd.DataFrame]) -> str:
    """List why scans were refused or flagged; of flagged scans the steps alone, their figures are in the tables."""
    rows = []
    for split, scans in predictions.items():
        refused = scans[scans["status"] != "ok"]
        reasons = (
            refused["reason"].fillna("").where(refused["status"] != "check", refused["reason"].fillna("").map(_steps))
        )
        why = refused["status"] + ": " + reasons.map(safe_reason)
        for reason, group in refused.groupby(why):
            lines = ", ".join(str(row) for row in group["row"].head(8)) + (", …" if len(group) > 8 else "")
            rows.append([split, escape(str(reason)), str(len(group)), lines])
    if not rows:
        return section("Refused or flagged scans", note("None."))
    return section("Refused or flagged scans", table(["Split", "Why", "scans", "manifest rows"], rows))


def _steps(reason: str) -> str:
    """Cut the figures of one scan off each step of a reason."""
    return re.sub(r": [^;]*", "", reason)
