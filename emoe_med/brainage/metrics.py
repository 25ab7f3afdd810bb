"""Accuracy of raw predicted ages on held-out persons, each figure with an interval over persons.

The interval is a percentile bootstrap that draws persons, so that all scans of a person move together.
A draw is a row of counts: how often each scan is in it. Weighted moments of all draws at once then give
every metric without a loop. Letters: S scans, W draws; ``brain_pad`` is predicted minus chronological age.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

from emoe_med.brainage.bias import NOTES, AgeBias
from emoe_med.brainage.strata import decades, first_sessions, named, scored_rows

MIN_PERSONS = 5  # a percentile interval of fewer persons is narrower than the truth, and looks precise
MIN_DEFINED = 0.95  # share of draws in which a metric must exist for its interval to be given
CONSTANT_YEARS = 1e-4  # values closer together than this are one value
CHUNK = 4_000_000  # counts held in memory at once

Estimate = dict[str, float | int | str | None]  # value, low, high, n (persons), and reason where one is None


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made; stored beside them."""

    draws: int = 2000
    seed: int = 0
    level: float = 0.95

    def counts(self, persons: np.ndarray) -> Iterator[np.ndarray]:
        """Yield how often each scan is in each draw, [W_chunk, S]; the chunks add up to ``draws`` rows."""
        ids, person_index = np.unique(np.asarray(persons, dtype=str), return_inverse=True)
        rng = np.random.default_rng(self.seed)
        step = max(1, CHUNK // len(person_index))
        for start in range(0, self.draws, step):
            size = min(step, self.draws - start)
            drawn = rng.multinomial(len(ids), np.full(len(ids), 1 / len(ids)), size=size)
            yield drawn[:, person_index].astype(float)

    def estimate(self, value: float | None, drawn: np.ndarray, n: int, reason: str = "") -> Estimate:
        """Join a value with the interval of its draws [W]; None with a reason, never NaN, where undefined."""
        if value is None or not np.isfinite(value):
            return {"value": None, "low": None, "high": None, "n": n, "reason": reason or "undefined"}
        defined = drawn[np.isfinite(drawn)]
        if n < MIN_PERSONS:
            reason = f"no interval from fewer than {MIN_PERSONS} persons"
        elif len(defined) < MIN_DEFINED * len(drawn):
            reason = "no interval: undefined in more than one of twenty draws"
        else:
            low, high = np.quantile(defined, [(1 - self.level) / 2, (1 + self.level) / 2])
            return {"value": float(value), "low": float(low), "high": float(high), "n": n}
        return {"value": float(value), "low": None, "high": None, "n": n, "reason": reason}


DEFAULT_BOOTSTRAP = Bootstrap()


def in_words(found: Estimate) -> str:
    """Return an estimate with its interval as a person reads it, or why there is none."""
    if found["value"] is None:
        return f"undefined: {found['reason']}"
    if found["low"] is None:
        return f"{found['value']:.2f} ({found['reason']})"
    return f"{found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}], n = {found['n']}"


def accuracy(
    age: np.ndarray,
    predicted_age: np.ndarray,
    persons: np.ndarray,
    training_median: float,
    bootstrap: Bootstrap,
) -> dict[str, Estimate]:
    """Measure raw predictions of held-out persons.

    Args:
        age: [S] ages in years, finite.
        predicted_age: [S] predictions in years, finite.
        persons: [S] id of the person of each scan; used for drawing, never written.
        training_median: Median age over the training scans, years: the predictor that ``skill`` is against.
        bootstrap: Draws, seed and level of the intervals.

    Returns:
        ``{metric: {value, low, high, n}}``, n in persons. Years: ``mae rmse mean_error mae_training_median``;
        without unit: ``pearson_r spearman_r r2 slope r_pad_age spearman_pad_age mae_over_range skill``.
        ``r2`` is 1 - SS_res / SS_tot and may be negative; ``skill`` is 1 - MAE / MAE(training median).
    """
    age, predicted_age = np.asarray(age, float), np.asarray(predicted_age, float)
    values, reasons = _values(age, predicted_age, training_median)
    chunks = [_drawn_values(age, predicted_age, training_median, w) for w in bootstrap.counts(persons)]
    n = len(np.unique(np.asarray(persons, dtype=str)))
    return {
        name: bootstrap.estimate(value, np.concatenate([chunk[name] for chunk in chunks]), n, reasons.get(name, ""))
        for name, value in values.items()
    }


def _values(
    age: np.ndarray, predicted: np.ndarray, training_median: float
) -> tuple[dict[str, float | None], dict[str, str]]:
    """Compute each metric by the reference libraries; None with a reason where it does not exist."""
    pad = predicted - age
    mae = mean_absolute_error(age, predicted)
    null = mean_absolute_error(age, np.full_like(age, training_median))
    values: dict[str, float | None] = {
        "mae": mae,
        "rmse": root_mean_squared_error(age, predicted),
        "mean_error": pad.mean(),
        "mae_training_median": null,
        "skill": 1 - mae / null if null > 0 else None,
    }
    reasons = {"skill": "every age equals the training median"}
    age_reason = _constant_reason(age, "ages")
    for name, other, what in (("", predicted, "predictions"), ("pad_age", pad, "brain_pad values")):
        pearson, spearman = (f"r_{name}", f"spearman_{name}") if name else ("pearson_r", "spearman_r")
        reason = age_reason or _constant_reason(other, what)
        reasons |= {pearson: reason, spearman: reason}
        values[pearson] = None if reason else stats.pearsonr(age, other).statistic
        values[spearman] = None if reason else stats.spearmanr(age, other).statistic
    reasons |= dict.fromkeys(("r2", "slope", "mae_over_range"), age_reason)
    values["r2"] = None if age_reason else r2_score(age, predicted)
    values["slope"] = None if age_reason else stats.linregress(age, predicted).slope
    values["mae_over_range"] = None if age_reason else mae / np.ptp(age)
    return values, reasons


def _constant_reason(values: np.ndarray, what: str) -> str:
    if len(values) < 3:
        return "fewer than three scans"
    return f"{what} are all equal" if np.ptp(values) < CONSTANT_YEARS else ""


def _drawn_values(
    age: np.ndarray, predicted: np.ndarray, training_median: float, counts: np.ndarray
) -> dict[str, np.ndarray]:
    """Compute each metric in each draw, counts [W, S] -> {metric: [W]}; NaN where undefined."""
    total, pad = counts.sum(1), predicted - age
    a, p = age - age.mean(), predicted - predicted.mean()  # centred, or the second moments would cancel
    columns = [np.abs(pad), np.abs(age - training_median), pad, pad**2, a, p, a * a, p * p, a * p]
    mae, null, mean_error, mean_square, a, p, aa, pp, ap = (counts @ np.stack(columns, 1) / total[:, None]).T
    age_variance = _positive(aa - a**2)
    predicted_variance, covariance = _positive(pp - p**2), ap - a * p
    pad_variance = _positive(aa - a**2 + pp - p**2 - 2 * covariance)
    age_ranks = _ranks(counts, age)
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "mae": mae,
            "rmse": np.sqrt(mean_square),
            "mean_error": mean_error,
            "mae_training_median": null,
            "skill": 1 - mae / null,
            "pearson_r": covariance / np.sqrt(age_variance * predicted_variance),
            "spearman_r": _rank_correlation(counts, age_ranks, _ranks(counts, predicted)),
            "r_pad_age": (covariance - age_variance) / np.sqrt(age_variance * pad_variance),
            "spearman_pad_age": _rank_correlation(counts, age_ranks, _ranks(counts, pad)),
            "r2": 1 - mean_square / age_variance,
            "slope": covariance / age_variance,
            "mae_over_range": mae / _positive(_span(counts, age)),
        }


def _positive(spread: np.ndarray) -> np.ndarray:
    """Variances or spans [W], NaN where they are 0 up to rounding."""
    return np.where(spread > CONSTANT_YEARS**2, spread, np.nan)


def _span(counts: np.ndarray, values: np.ndarray) -> np.ndarray:
    order = np.argsort(values)
    is_drawn = counts[:, order] > 0
    highest = values[order][::-1][is_drawn[:, ::-1].argmax(1)]
    return highest - values[order][is_drawn.argmax(1)]


def _rank_correlation(counts: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Correlation per draw [W] of mid-ranks [W, S], whose mean is known: half their number, and a half."""
    total = counts.sum(1)

    def covariance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.einsum("ws,ws,ws->w", counts, x, y) / total - ((total + 1) / 2) ** 2

    return covariance(a, b) / np.sqrt(_positive(covariance(a, a)) * _positive(covariance(b, b)))


def _ranks(counts: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Mid-ranks [W, S] of values [S] in samples that hold value s ``counts[w, s]`` times."""
    _, level = np.unique(values, return_inverse=True)
    order = np.argsort(level, kind="stable")
    starts = np.flatnonzero(np.diff(level[order], prepend=-1))
    at_level = np.add.reduceat(counts[:, order], starts, axis=1)
    return (at_level.cumsum(1) - (at_level - 1) / 2)[:, level]


def by_stratum(scans: pd.DataFrame, strata: pd.Series, bootstrap: Bootstrap) -> dict[str, dict[str, Estimate]]:
    """Measure ``mae`` and ``mean_error`` in each stratum, and the plain mean of ``mae`` over strata.

    Args:
        scans: Columns age, predicted_age, participant_id.
        strata: [S] stratum of each scan; missing values make the stratum ``unknown``.
        bootstrap: Persons are drawn from the whole sample, so that the size of a stratum varies as it would.

    Returns:
        ``{stratum: {mae, mean_error}}`` and, under ``macro_mean``, ``{mae}``.
    """
    pad = (scans["predicted_age"] - scans["age"]).to_numpy(float)
    strata = named(strata)
    names = sorted(strata.unique())
    member = np.stack([(strata == name).to_numpy() for name in names], axis=1).astype(float)  # [S, strata]
    chunks = []
    with np.errstate(invalid="ignore"):
        for counts in bootstrap.counts(scans["participant_id"].to_numpy()):
            size = counts @ member
            chunks.append((counts @ (np.abs(pad)[:, None] * member) / size, counts @ (pad[:, None] * member) / size))
    mae, mean_error = (np.concatenate(parts) for parts in zip(*chunks, strict=True))
    found: dict[str, dict[str, Estimate]] = {}
    values = []
    for index, name in enumerate(names):
        inside = member[:, index] > 0
        n = scans.loc[inside, "participant_id"].nunique()
        values.append(np.abs(pad[inside]).mean())
        found[name] = {
            "mae": bootstrap.estimate(values[-1], mae[:, index], n),
            "mean_error": bootstrap.estimate(pad[inside].mean(), mean_error[:, index], n),
        }
    defined = np.isfinite(mae)
    macro = np.where(defined, mae, 0).sum(1) / defined.sum(1)
    n = scans["participant_id"].nunique()
    return found | {"macro_mean": {"mae": bootstrap.estimate(np.mean(values), macro, n)}}


def evaluate(
    test: pd.DataFrame,
    training_median: float,
    *,
    val: pd.DataFrame | None = None,
    bias: AgeBias | None = None,
    bootstrap: Bootstrap = DEFAULT_BOOTSTRAP,
) -> dict[str, Any]:
    """Make the content of ``metrics.json`` from prediction tables.

    Args:
        test: Columns participant_id, age, predicted_age; sex and site if known; predicted_age_corrected with
            ``bias``. Rows without age or prediction are counted and not scored.
        training_median: Median age over the training scans, years.
        val: The same for the validation persons.
        bias: The correction that made predicted_age_corrected.
        bootstrap: Draws, seed and level of the intervals.

    Returns:
        ``test`` and ``val`` (``accuracy`` of the first session of each person: the primary figures),
        ``all_sessions`` (the same, secondary), ``by_age`` (decades of test), ``by_sex``, ``by_site``,
        ``corrected`` (kept apart), ``counts``, ``training_median_age`` and ``bootstrap``.

    Raises:
        DataError: No row of a table has both age and prediction (MET-EMPTY).
    """
    tables = {"test": test} if val is None else {"test": test, "val": val}
    scored = {name: scored_rows(name, table) for name, table in tables.items()}
    first = {name: first_sessions(table) for name, table in scored.items()}

    def measure(scans: pd.DataFrame, column: str = "predicted_age") -> dict[str, Estimate]:
        arrays = (scans[name].to_numpy() for name in ("age", column, "participant_id"))
        return accuracy(*arrays, training_median=training_median, bootstrap=bootstrap)

    found: dict[str, Any] = {name: measure(table) for name, table in first.items()}
    found["all_sessions"] = {
        name: measure(table) if len(table) > len(first[name]) else found[name] for name, table in scored.items()
    }
    found["by_age"] = by_stratum(first["test"], decades(first["test"]["age"]), bootstrap)
    for key in ("sex", "site"):
        if key in first["test"]:
            found[f"by_{key}"] = by_stratum(first["test"], first["test"][key], bootstrap)
    if bias is not None:
        corrected = measure(first["test"], "predicted_age_corrected")
        found["corrected"] = {"bias": asdict(bias), "note": NOTES[bias.method], "test": corrected}
    found["counts"] = {name: _counts(tables[name], scored[name]) for name in tables}
    return found | {"training_median_age": float(training_median), "bootstrap": asdict(bootstrap)}


def _counts(table: pd.DataFrame, scored: pd.DataFrame) -> dict[str, float]:
    return {
        "scans": len(scored),
        "persons": int(scored["participant_id"].nunique()),
        "not_scored": len(table) - len(scored),
        "age_low": float(scored["age"].min()),
        "age_high": float(scored["age"].max()),
    }
