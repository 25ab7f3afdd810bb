"""Figures over seeds and samples: intervals that draw both, paired differences, correction for their number.

Values are [S, U]: seeds (runs of one configuration) by samples (persons, images), NaN where a seed has no value yet.
A draw takes S seeds and U samples with replacement and averages the cells where they cross, so that an interval holds
for other seeds and other samples. Source: Owen 2007, The pigeonhole bootstrap, Ann. Appl. Stat. 1:386 (mildly
conservative for many of both). With two or three seeds it is too narrow where seeds scatter more than samples do
(docs/pipelines.md). With one it is the bootstrap over samples and says nothing about another seed.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

DRAWS = 2000
LEVEL = 0.95
MIN_SAMPLES = 5  # a percentile interval of fewer is narrower than the truth, and looks precise
CHUNK = 4_000_000  # counts held in memory at once

Estimate = dict[str, float | int | None]  # value, low, high, n (samples), seeds; a difference has p too


def estimate(values: np.ndarray) -> Estimate:
    """Return the mean of values [S, U] with its interval over seeds and samples."""
    values = _with_values(values)
    drawn = crossed_draws(values)
    return {"value": float(np.nanmean(values)), **_ends(drawn, values.shape[1]), **_counts(values)}


def difference(values: np.ndarray, control: np.ndarray) -> Estimate:
    """Return the mean of `values` minus `control` over the cells [S, U] that both have, with interval and p.

    The p value is two-sided: twice the share of draws on the lesser side of 0, at least 2 / (draws + 1); from two
    seeds on no less than that of a t test over the seeds' means, which few seeds do not make too small.

    Raises:
        ValueError: No cell in common.
    """
    paired = _with_values(np.asarray(values, float) - np.asarray(control, float))
    drawn = crossed_draws(paired)
    found = {"value": float(np.nanmean(paired)), **_ends(drawn, paired.shape[1]), **_counts(paired)}
    if found["low"] is None:
        return {**found, "p": None}
    lesser = min((drawn <= 0).sum(), (drawn >= 0).sum())
    p = min(1.0, 2 * (1 + int(lesser)) / (1 + len(drawn)))
    means = np.nanmean(paired, axis=1)
    if len(means) > 1 and np.ptp(means) > 0:
        p = max(p, float(stats.ttest_1samp(means, 0).pvalue))
    return {**found, "p": p}


def estimate_of_draws(values: np.ndarray) -> Estimate:
    """Return the mean of values [S, W], S seeds by W random draws, with a t interval for other seeds and draws.

    A hundred draws tell nothing of another training: the variance is that of the means of draws and that of the
    means of seeds together, with the degrees of freedom of the latter. With one seed the interval is over draws alone.
    """
    values = _with_values(values)
    value, error, freedom = _crossed_t(values)
    if error is None or values.shape[1] < MIN_SAMPLES:
        return {"value": value, "low": None, "high": None, **_counts(values)}
    half = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * error
    return {"value": value, "low": value - half, "high": value + half, **_counts(values)}


def difference_of_draws(values: np.ndarray, control: np.ndarray) -> Estimate:
    """Return the mean paired difference over [S, W] with its interval, and p from two seeds on."""
    paired = _with_values(np.asarray(values, float) - np.asarray(control, float))
    value, error, freedom = _crossed_t(paired)
    found = estimate_of_draws(paired)
    if found["low"] is None or error is None or len(paired) < 2:
        return {**found, "p": None}
    if error == 0:
        return {**found, "p": float(value == 0)}
    return {**found, "p": float(2 * stats.t.sf(abs(value) / error, freedom))}


def _crossed_t(values: np.ndarray) -> tuple[float, float | None, int]:
    """Mean of values [S, W], its standard error over both (None where there is one of each), degrees of freedom."""
    means = [part for part in (np.nanmean(values, axis=axis) for axis in (0, 1)) if len(part) > 1]
    if not means:
        return float(np.nanmean(values)), None, 0
    variance = sum(part.var(ddof=1) / len(part) for part in means)
    return float(np.nanmean(values)), math.sqrt(variance), len(means[-1]) - 1


def crossed_draws(values: np.ndarray, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Return the mean of values [S, U] in each draw, [W]; a draw without any value is left out.

    Samples whose column is the same are drawn as one with their number (images are right or wrong: few columns
    occur), so that fifty thousand images cost what a few do.
    """
    known = ~np.isnan(values)
    stacked = np.concatenate([np.where(known, values, 0.0), known])
    columns, counts = np.unique(stacked, axis=1, return_counts=True)
    sums, known = np.split(columns, 2)
    seeds, samples = len(values), counts.sum()
    rng = np.random.default_rng(seed)
    found = []
    step = max(1, CHUNK // len(counts))
    for start in range(0, draws, step):
        size = min(step, draws - start)
        by_sample = rng.multinomial(samples, counts / samples, size=size)
        by_seed = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=size)
        total, cells = (((by_seed @ part) * by_sample).sum(1) for part in (sums, known))
        found.append(total[cells > 0] / cells[cells > 0])
    return np.concatenate(found)


def holm(p_values: np.ndarray) -> np.ndarray:
    """Correct p values [M] for their number. Source: Holm 1979, Scand. J. Stat. 6:65."""
    p_values = np.asarray(p_values, float)
    order = np.argsort(p_values)
    stepped = p_values[order] * np.arange(len(p_values), 0, -1)
    corrected = np.empty_like(p_values)
    corrected[order] = np.minimum(np.maximum.accumulate(stepped), 1)
    return corrected


def _with_values(values: np.ndarray) -> np.ndarray:
    """Drop seeds and samples that have no value at all."""
    values = np.asarray(values, float)
    known = ~np.isnan(values)
    if not known.any():
        raise ValueError("no value in common")
    return values[known.any(1)][:, known.any(0)]


def _ends(drawn: np.ndarray, samples: int) -> Estimate:
    if samples < MIN_SAMPLES:
        return {"low": None, "high": None}
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"low": float(low), "high": float(high)}


def _counts(values: np.ndarray) -> Estimate:
    values = _with_values(values)
    return {"n": values.shape[1], "seeds": values.shape[0]}
