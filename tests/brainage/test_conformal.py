"""Prediction intervals: the rank by hand, the promise by simulation, the counts by another formula."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from emoe_med.brainage.conformal import Interval, coverage, fit_interval, pooled_coverage, with_coverage
from emoe_med.brainage.metrics import Bootstrap, evaluate
from emoe_med.brainage.strata import deciles
from emoe_med.errors import DataError


def table(errors, age=50.0, **columns):
    errors = np.asarray(errors, float)
    return pd.DataFrame(
        {"participant_id": np.arange(len(errors)), "age": age, "predicted_age": age + errors, **columns}
    )


@pytest.mark.parametrize(
    ("n", "level", "half_width"),
    [(9, 0.9, 9), (10, 0.9, 10), (19, 0.9, 18), (29, 0.9, 27), (8, 0.8, 8), (4, 0.8, 4), (3, 0.5, 2), (1, 0.5, 1)],
)
def test_the_rank_worked_by_hand(n, level, half_width):
    errors = np.random.default_rng(0).permutation(np.arange(1, n + 1)) * (-1.0) ** np.arange(n)
    found = fit_interval(table(errors))
    assert found == Interval(level, half_width, n)


def test_no_person_no_interval():
    with pytest.raises(DataError, match="MET-EMPTY"):
        fit_interval(table([np.nan]))
    assert fit_interval(table([1.0]), levels=(0.9,)) is None


@given(st.lists(st.floats(-40, 40), min_size=9, max_size=60))
def test_it_is_the_quantile_that_numpy_gives(errors):
    n = len(errors)
    rank = -(-(n + 1) * 9 // 10)
    want = np.quantile(np.abs(table(errors)["predicted_age"] - 50), rank / n, method="inverted_cdf")
    assert fit_interval(table(errors)).half_width == want


def test_new_persons_are_covered_as_promised_whatever_the_distribution():
    rng = np.random.default_rng(1)
    errors = rng.exponential(5, (4000, 20)) * rng.choice([-1, 1], (4000, 20)) + 2
    covered = [abs(row[-1]) <= fit_interval(table(row[:-1])).half_width for row in errors]
    assert 0.9 - 0.015 < np.mean(covered) < 0.9 + 1 / 20 + 0.015


def test_a_person_counts_once_by_the_first_session():
    scans = pd.concat([table(np.arange(1.0, 10)), table(np.full(9, 90.0), age=55.0)])
    assert fit_interval(scans) == Interval(0.9, 9.0, 9)


def test_coverage_is_counted_with_clopper_and_pearson():
    found = coverage(table([0, 4, -5, 5.5, 9]), Interval(0.9, 5.0, 9))
    assert (found["value"], found["n"]) == (0.6, 5)
    assert found["low"] == pytest.approx(stats.beta.ppf(0.025, 3, 3))
    assert found["high"] == pytest.approx(stats.beta.ppf(0.975, 4, 2))


def test_each_stratum_has_its_coverage():
    scans = table(
        [0, 9, 1, 9, 9, 1],
        age=np.array([25.0, 28, 34, 35, 61, 62]),
        site=["a", "a", "b", "b", None, "a"],
    )
    interval = Interval(0.9, 5.0, 9)
    metrics = with_coverage(evaluate(scans, 40.0, bootstrap=Bootstrap(draws=50)), scans, interval)
    assert {name: found["coverage"]["value"] for name, found in metrics["by_age"].items() if "coverage" in found} == {
        "20-29": 0.5,
        "30-39": 0.5,
        "60-69": 0.5,
    }
    by_site = {name: found["coverage"]["value"] for name, found in metrics["by_site"].items() if "coverage" in found}
    assert by_site == {"a": pytest.approx(2 / 3), "b": 0.5, "unknown": 0.0}
    assert metrics["interval"]["coverage"]["value"] == 0.5
    assert (metrics["interval"]["width"], metrics["interval"]["n"]) == (10.0, 9)
    assert with_coverage({}, scans, None) == {"interval": None}


def test_coverage_is_pooled_over_folds_and_seeds_by_person():
    """Two folds of other widths, and a second seed for the first person, whom one of the two seeds covers."""
    scans = pd.DataFrame(
        {
            "participant_id": [1, 2, 3, 4, 1],
            "age": [25.0, 28.0, 35.0, 61.0, 25.0],
            "lower": [20.0, 10.0, 35.0, 50.0, 26.0],
            "upper": [30.0, 20.0, 41.0, 56.0, 36.0],
            "site": ["a", "a", "b", None, "a"],
        }
    )
    found = pooled_coverage(scans)
    assert found["coverage"]["value"] == (0.5 + 0 + 1 + 0) / 4
    assert found["coverage"]["low"] == pytest.approx(stats.beta.ppf(0.025, 1.5, 3.5))
    assert found["width"] == (10 + 10 + 6 + 6) / 4
    by_age = {name: (part["coverage"]["value"], part["width"]) for name, part in found["by_age"].items()}
    assert by_age == {"20-29": (0.25, 10.0), "30-39": (1.0, 6.0), "60-69": (0.0, 6.0)}
    assert {name: part["coverage"]["n"] for name, part in found["by_site"].items()} == {"a": 2, "b": 1, "unknown": 1}
    assert len(found["by_age_decile"]) == len(set(found["by_age_decile"])) > 1
    assert (found["by_age"]["60-69"]["coverage"]["low"], found["by_age"]["30-39"]["coverage"]["high"]) == (0.0, 1.0)
    assert pooled_coverage(scans.drop(columns=["lower", "upper"])) is None


def test_deciles_of_age_hold_as_many_persons_each_and_are_named_by_their_ends():
    ages = pd.Series(np.random.default_rng(0).permutation(np.arange(20.0, 70.0)))
    names = deciles(ages)
    assert (names.value_counts() == 5).all()
    assert set(names[ages < 25]) == {"20.0-24.0"}
    assert set(names[ages >= 65]) == {"65.0-69.0"}
    assert deciles(pd.Series([30.0, 30.0, 41.0])).tolist() == ["30.0-30.0", "30.0-30.0", "41.0-41.0"]
