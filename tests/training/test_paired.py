"""Intervals over seeds and samples against the exact variance, scipy and simulation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from emoe_med.training.paired import (
    crossed_draws,
    difference,
    difference_of_draws,
    estimate,
    estimate_of_draws,
)


def exact_variance(values):
    """Var of the mean under multinomial weights of seeds and samples, term by term: E[w_i w_j] = [i = j] + 1 - 1/S."""
    x = values - values.mean()
    seeds, samples = x.shape
    by_seed = np.eye(seeds) + 1 - 1 / seeds
    by_sample = np.eye(samples) + 1 - 1 / samples
    return np.einsum("su,tv,st,uv->", x, x, by_seed, by_sample) / (seeds * samples) ** 2


@pytest.mark.parametrize("seeds", [1, 2, 4])
def test_draws_have_the_exact_variance(seeds):
    rng = np.random.default_rng(seeds)
    values = rng.normal(size=(seeds, 1)) + rng.normal(size=(1, 30)) + rng.normal(size=(seeds, 30))
    drawn = crossed_draws(values, draws=20_000)
    assert drawn.var() == pytest.approx(exact_variance(values), rel=0.05)
    assert drawn.mean() == pytest.approx(values.mean(), abs=4 * drawn.std() / np.sqrt(20_000))


def test_equal_columns_are_drawn_with_their_number():
    values = 100.0 * (np.random.default_rng(0).random((3, 400)) < 0.7)  # 8 different columns at most
    drawn = crossed_draws(values, draws=20_000)
    assert drawn.var() == pytest.approx(exact_variance(values), rel=0.05)


def test_one_seed_is_the_bootstrap_over_samples():
    values = np.random.default_rng(0).gamma(2.0, size=200)
    found = estimate(values[None])
    low, high = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=1).confidence_interval
    width = high - low
    assert found["low"] == pytest.approx(low, abs=0.06 * width)
    assert found["high"] == pytest.approx(high, abs=0.06 * width)
    assert (found["n"], found["seeds"]) == (200, 1)


def test_the_interval_holds_for_other_seeds_as_an_interval_over_samples_does_not():
    rng = np.random.default_rng(0)
    both = alone = 0
    for _ in range(100):
        values = rng.normal(size=(6, 1)) + 0.3 * rng.normal(size=(6, 40))  # truth: 0
        found = estimate(values)
        both += found["low"] <= 0 <= found["high"]
        found = estimate(values.mean(0)[None])
        alone += found["low"] <= 0 <= found["high"]
    assert both >= 80  # six seeds: a percentile interval is somewhat narrow
    assert alone <= 40


def test_what_a_seed_lacks_is_left_out():
    values = np.array([[1.0, 3.0, np.nan, np.nan], [5.0, np.nan, 7.0, np.nan]])
    found = estimate(np.pad(values, ((0, 1), (0, 4)), constant_values=np.nan))
    assert found["value"] == 4.0
    assert (found["n"], found["seeds"]) == (3, 2)
    assert found["low"] is None  # three samples are too few for an interval
    assert np.isfinite(crossed_draws(values[:, :3])).all()
    with pytest.raises(ValueError, match="in common"):
        difference(values, np.full_like(values, np.nan))


def test_differences_are_paired():
    rng = np.random.default_rng(0)
    persons = 10 * rng.normal(size=(1, 60))  # far more between persons than between arms
    control = persons + 0.1 * rng.normal(size=(2, 60))
    found = difference(control - 0.5, control)
    assert found["value"] == found["low"] == found["high"] == pytest.approx(-0.5)
    assert found["p"] == pytest.approx(2 / 2001)
    assert difference(control, control)["p"] == 1.0
    none = difference(persons + 0.1 * rng.normal(size=(2, 60)), control)
    assert none["low"] < 0 < none["high"]
    assert none["p"] > 0.05


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(-5, 5), st.integers(1, 3))
def test_a_shift_of_all_values_shifts_the_interval(seed, shift, seeds):
    values = np.random.default_rng(seed).normal(size=(seeds, 12))
    first, second = estimate(values), estimate(values + shift)
    for name in ("value", "low", "high"):
        assert second[name] == pytest.approx(first[name] + shift, abs=1e-9)


def test_draws_of_one_seed_get_a_t_interval_and_no_p():
    a, b = np.random.default_rng(0).normal(size=(2, 1, 7))
    reference = stats.ttest_1samp(a[0], 0.0).confidence_interval(0.95)
    found = estimate_of_draws(a)
    assert (found["low"], found["high"]) == pytest.approx((reference.low, reference.high))
    assert difference_of_draws(a, b)["p"] is None
    assert estimate_of_draws(a[:, :4])["low"] is None


def test_draws_of_seeds_by_hand():
    # means of draws 1, 3, 2, 2, 2 and of seeds 1, 3: variances 0.5 / 5 and 2 / 2
    values = np.array([[0.0, 2, 1, 1, 1], [2, 4, 3, 3, 3]])
    freedom, error = 1, np.sqrt(1.1)
    found = difference_of_draws(values, np.zeros((2, 5)))
    assert found["high"] == pytest.approx(2 + stats.t.ppf(0.975, freedom) * error)
    assert found["p"] == pytest.approx(2 * stats.t.sf(2 / error, freedom))
    assert difference_of_draws(values, values)["p"] == 1.0


@pytest.mark.parametrize("draws", [5, 100])
def test_many_draws_do_not_stand_for_other_seeds(draws):
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(400):
        a, b = (rng.normal(size=(3, 1)) + rng.normal(size=(3, draws)) for _ in range(2))  # no difference
        found += difference_of_draws(a, b)["p"] < 0.05
    assert found / 400 < 0.06
