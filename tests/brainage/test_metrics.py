"""Metrics against scikit-learn, scipy and hand; intervals against a plain loop and by their coverage."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

from emoe_med.brainage.bias import fit_age_bias
from emoe_med.brainage.comparison import compare, holm, paired_difference
from emoe_med.brainage.metrics import Bootstrap, _drawn_values, accuracy, evaluate
from emoe_med.errors import DataError

QUICK = Bootstrap(draws=200)


def cohort(persons: int = 40, sessions: int = 1, seed: int = 0, noise: float = 5.0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    first = rng.uniform(20, 80, persons)
    person = np.repeat(np.arange(persons), sessions)
    age = first[person] + np.tile(np.arange(sessions) * 2.0, persons)
    own = rng.normal(0, noise, persons)[person]  # what is peculiar to a person is in all of his scans
    return pd.DataFrame(
        {
            "participant_id": [f"p{index:03d}" for index in person],
            "age": age,
            "predicted_age": 50 + 0.8 * (age - 50) + own + rng.normal(0, 0.5, len(age)),
            "sex": np.where(person % 2 == 0, "F", "M"),
            "site": np.where(person % 4 == 0, "north", "south"),
        }
    )


def measure(table: pd.DataFrame, training_median: float = 48.0, bootstrap: Bootstrap = QUICK) -> dict:
    arrays = (table[name].to_numpy() for name in ("age", "predicted_age", "participant_id"))
    return accuracy(*arrays, training_median=training_median, bootstrap=bootstrap)


def test_values_by_hand():
    table = pd.DataFrame({"participant_id": list("abc"), "age": [20.0, 40, 60], "predicted_age": [30.0, 40, 44]})
    found = {name: estimate["value"] for name, estimate in measure(table, training_median=30).items()}
    assert found["mae"] == pytest.approx(26 / 3)
    assert found["rmse"] == pytest.approx(np.sqrt(356 / 3))
    assert found["mean_error"] == pytest.approx(-2)
    assert found["r2"] == pytest.approx(1 - 356 / 800)
    assert found["slope"] == pytest.approx(14 / 40)
    assert found["mae_over_range"] == pytest.approx(26 / 3 / 40)
    assert found["mae_training_median"] == pytest.approx(50 / 3)
    assert found["skill"] == pytest.approx(1 - 26 / 50)
    assert found["spearman_r"] == pytest.approx(1)
    assert found["spearman_pad_age"] == pytest.approx(-1)


def reference(age: np.ndarray, predicted: np.ndarray, training_median: float) -> dict[str, float]:
    pad = predicted - age
    null = mean_absolute_error(age, np.full(len(age), training_median))
    return {
        "mae": mean_absolute_error(age, predicted),
        "rmse": root_mean_squared_error(age, predicted),
        "mean_error": pad.mean(),
        "mae_training_median": null,
        "skill": 1 - mean_absolute_error(age, predicted) / null,
        "pearson_r": stats.pearsonr(age, predicted).statistic,
        "spearman_r": stats.spearmanr(age, predicted).statistic,
        "r_pad_age": stats.pearsonr(age, pad).statistic,
        "spearman_pad_age": stats.spearmanr(age, pad).statistic,
        "r2": r2_score(age, predicted),
        "slope": stats.linregress(age, predicted).slope,
        "mae_over_range": mean_absolute_error(age, predicted) / np.ptp(age),
    }


@given(st.integers(0, 10_000), st.integers(4, 25))
@settings(max_examples=40, deadline=None)
def test_a_draw_equals_the_library_on_the_drawn_scans(seed, scans):
    """Counts stand for repeated scans: the same as repeating the rows, ties included."""
    rng = np.random.default_rng(seed)
    age = rng.integers(20, 80, scans).astype(float)
    predicted = rng.integers(20, 80, scans).astype(float)
    counts = rng.integers(0, 4, (3, scans))
    drawn = _drawn_values(age, predicted, 45.5, counts.astype(float) + (counts.sum(1, keepdims=True) == 0))
    for draw, weights in enumerate(counts):
        rows = np.repeat(np.arange(scans), weights)
        if np.unique(age[rows]).size < 3 or np.unique(predicted[rows]).size < 3:
            continue
        for name, value in reference(age[rows], predicted[rows], 45.5).items():
            assert drawn[name][draw] == pytest.approx(value, abs=1e-9), name


def test_intervals_equal_a_loop_over_persons():
    table = cohort(persons=15, sessions=3)
    bootstrap = Bootstrap(draws=300, seed=4)
    rng = np.random.default_rng(4)
    scans = {person: rows for person, rows in table.groupby("participant_id").indices.items()}
    drawn = []
    for counts in rng.multinomial(15, np.full(15, 1 / 15), size=300):
        rows = np.concatenate(
            [np.repeat(scans[person], times) for person, times in zip(sorted(scans), counts, strict=True)]
        )
        drawn.append(reference(table.age.to_numpy()[rows], table.predicted_age.to_numpy()[rows], 48.0))
    for name, estimate in measure(table, bootstrap=bootstrap).items():
        low, high = np.quantile([draw[name] for draw in drawn], [0.025, 0.975])
        assert (estimate["low"], estimate["high"]) == (pytest.approx(low), pytest.approx(high)), name
        assert estimate["low"] <= estimate["value"] <= estimate["high"]
        assert estimate["n"] == 15


def test_repeated_scans_do_not_narrow_the_interval():
    """Ten copies of each scan add no person: the interval stays, to the last digit."""
    table = cohort(persons=20)
    copies = pd.concat([table] * 10)
    once, often = measure(table)["mae"], measure(copies)["mae"]
    assert (once["low"], once["high"]) == (pytest.approx(often["low"]), pytest.approx(often["high"]))


def test_the_interval_covers_the_truth():
    truth = 5 * np.sqrt(2 / np.pi)  # mean absolute value of N(0, 5)
    hits = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        age = rng.uniform(20, 80, 60)
        found = accuracy(age, age + rng.normal(0, 5, 60), np.arange(60), 50.0, Bootstrap(draws=300, seed=seed))
        hits += found["mae"]["low"] <= truth <= found["mae"]["high"]
    assert 0.89 <= hits / 200 <= 0.99


def test_chunks_do_not_change_the_draws(monkeypatch):
    table = cohort(persons=30)
    whole = measure(table)
    monkeypatch.setattr("emoe_med.brainage.metrics.CHUNK", 30 * 7)
    for name, estimate in measure(table).items():
        assert estimate == pytest.approx(whole[name]), name


def test_a_useless_model_has_no_skill_and_the_seed_decides_alone():
    table = cohort(persons=80)
    table["predicted_age"] = 48.0 + np.random.default_rng(1).normal(0, 0.5, 80)
    found = measure(table)
    assert found["skill"]["low"] < 0 < found["skill"]["high"]
    assert found["r_pad_age"]["value"] < -0.99
    assert measure(table) == found
    assert measure(table, bootstrap=Bootstrap(draws=200, seed=1)) != found


def test_narrow_ages_flatter_mae_and_not_skill():
    """The survey's warning: the same model scored on 62 to 66 years."""
    rng = np.random.default_rng(0)
    age = rng.uniform(45, 82, 6000)
    table = pd.DataFrame({"participant_id": np.arange(6000), "age": age})
    table["predicted_age"] = 63.5 + 0.8 * (age - 63.5) + rng.normal(0, 3.8, 6000)
    narrow = table[table.age.between(62, 66)]
    wide_found, narrow_found = (measure(part, 63.5, Bootstrap(draws=50)) for part in (table, narrow))
    assert narrow_found["mae"]["value"] < wide_found["mae"]["value"]
    assert narrow_found["r2"]["value"] < -5
    assert narrow_found["skill"]["value"] < -1 < 0.5 < wide_found["skill"]["value"]


@pytest.mark.parametrize(
    ("ages", "predictions", "undefined"),
    [
        (
            [50.0],
            [52.0],
            {"pearson_r", "spearman_r", "r2", "slope", "r_pad_age", "spearman_pad_age", "mae_over_range"},
        ),
        (
            [50.0] * 8,
            range(8),
            {"pearson_r", "spearman_r", "r2", "slope", "r_pad_age", "spearman_pad_age", "mae_over_range"},
        ),
        (range(40, 48), [44.0] * 8, {"pearson_r", "spearman_r"}),
        (range(40, 48), range(42, 50), {"r_pad_age", "spearman_pad_age"}),
    ],
)
def test_what_is_undefined_is_none_with_a_reason(ages, predictions, undefined):
    table = pd.DataFrame({"age": list(ages), "predicted_age": list(predictions)}, dtype=float)
    table["participant_id"] = range(len(table))
    found = measure(table)
    assert {name for name, estimate in found.items() if estimate["value"] is None} == undefined
    assert all(estimate["reason"] for estimate in found.values() if estimate["low"] is None)
    json.dumps(found, allow_nan=False)


def test_all_ages_at_the_training_median_leave_no_skill():
    table = pd.DataFrame({"participant_id": range(6), "age": 48.0, "predicted_age": np.arange(45.0, 51)})
    assert measure(table)["skill"] == {
        "value": None,
        "low": None,
        "high": None,
        "n": 6,
        "reason": "every age equals the training median",
    }


def test_few_persons_get_no_interval():
    found = measure(cohort(persons=4, sessions=5))["mae"]
    assert found["value"] > 0
    assert (found["low"], found["n"], "fewer than 5 persons" in found["reason"]) == (None, 4, True)


def test_evaluate_scores_first_sessions_and_keeps_the_rest_apart():
    table = cohort(persons=30, sessions=2).sample(frac=1, random_state=0)
    table.loc[table.index[:3], "predicted_age"] = np.nan
    val = cohort(persons=30, seed=1)
    bias = fit_age_bias(val.age.to_numpy(), val.predicted_age.to_numpy(), val.participant_id.to_numpy())
    table["predicted_age_corrected"], _ = bias.apply(table.predicted_age.to_numpy(), table.age.to_numpy())
    found = evaluate(table, 48.0, val=val, bias=bias, bootstrap=QUICK)
    scored = table.dropna(subset="predicted_age")
    first = scored.loc[scored.groupby("participant_id").age.idxmin()]
    assert found["test"]["mae"]["value"] == pytest.approx((first.predicted_age - first.age).abs().mean())
    assert found["all_sessions"]["test"]["mae"]["value"] == pytest.approx(
        (scored.predicted_age - scored.age).abs().mean()
    )
    assert found["counts"]["test"] | {"age_low": 0, "age_high": 0} == {
        "scans": 57,
        "persons": 30,
        "not_scored": 3,
        "age_low": 0,
        "age_high": 0,
    }
    assert found["corrected"]["bias"]["n"] == 30
    assert "circular" in found["corrected"]["note"]
    assert found["corrected"]["test"]["mae"]["value"] < found["test"]["mae"]["value"]
    assert found["bootstrap"] == {"draws": 200, "seed": 0, "level": 0.95}
    assert found["val"]["mae"]["n"] == 30
    text = json.dumps(found, allow_nan=False)
    assert not any(person in text for person in table.participant_id)


def test_strata_by_hand():
    table = pd.DataFrame({"age": [25.0, 29.9, 30, 61, 62, 100], "predicted_age": [26.0, 32.9, 30, 71, 72, 90]})
    table["participant_id"], table["site"] = range(6), ["x", "x", "x", "y", "y", None]
    found = evaluate(table, 48.0, bootstrap=QUICK)
    assert {name: part["mae"]["value"] for name, part in found["by_age"].items()} == pytest.approx(
        {"20-29": 2, "30-39": 0, "60-69": 10, "100-109": 10, "macro_mean": 5.5}
    )
    assert found["by_site"]["unknown"]["mean_error"]["value"] == pytest.approx(-10)
    assert {name: part["mae"]["n"] for name, part in found["by_site"].items()} == {
        "x": 3,
        "y": 2,
        "unknown": 1,
        "macro_mean": 6,
    }
    assert "by_sex" not in found


def test_nothing_scored_is_refused():
    with pytest.raises(DataError, match="none of 40 test rows"):
        evaluate(cohort().assign(predicted_age=np.nan), 48.0)


def test_paired_difference_sees_what_single_intervals_hide():
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 5, 60)  # persons that both models find hard
    a, b = hard + rng.normal(0, 0.3, 60), 1.1 * hard + rng.normal(0, 0.3, 60)
    found = paired_difference(a, b, np.arange(60), QUICK)
    assert found["value"] == pytest.approx(np.abs(a).mean() - np.abs(b).mean())
    assert found["high"] < 0
    assert found["p"] < 0.02
    turned = paired_difference(b, a, np.arange(60), QUICK)
    assert (turned["low"], turned["high"]) == (pytest.approx(-found["high"]), pytest.approx(-found["low"]))


def test_equal_models_differ_as_often_as_chance_allows():
    rejected = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        found = paired_difference(
            rng.normal(0, 5, 30), rng.normal(0, 5, 30), np.arange(30), Bootstrap(draws=199, seed=seed)
        )
        rejected += found["p"] <= 0.05
    assert rejected / 200 < 0.10


def test_sign_flips_are_exact_for_few_persons():
    found = paired_difference(np.array([1.0, 2, 3]), np.zeros(3), np.arange(3), QUICK)
    assert found["p"] == pytest.approx(2 / 2**3)  # one of eight exchanges is as extreme, on either side


def test_copies_of_scans_add_no_evidence():
    rng = np.random.default_rng(0)
    a, b, persons = rng.normal(0, 5, 20), rng.normal(0, 6, 20), np.arange(20)
    once = paired_difference(a, b, persons, QUICK)
    often = paired_difference(np.tile(a, 5), np.tile(b, 5), np.tile(persons, 5), QUICK)
    assert often["low"] == pytest.approx(once["low"])
    assert often["p"] == pytest.approx(once["p"])


def test_holm_by_hand():
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm(np.array([0.9, 0.8])), [1, 1])
    assert holm(np.array([])).size == 0


def group(table: pd.DataFrame, noise: float, runs: int, seed: int) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    copies = [
        table.assign(
            run=f"seed{run}",
            row=np.arange(len(table)),
            predicted_age=table.age + rng.normal(0, noise, len(table)),
        )
        for run in range(runs)
    ]
    return pd.concat(copies)


def test_compare_ranks_groups_of_runs():
    table = cohort(persons=50)
    groups = {"plain": group(table, 6, 3, 0), "better": group(table, 3, 3, 1), "same": group(table, 6, 2, 2)}
    found = compare(groups, "plain", QUICK)
    assert "difference" not in found["plain"]
    assert found["better"]["difference"]["high"] < 0
    assert found["better"]["difference"]["p_holm"] < 0.05 < found["same"]["difference"]["p_holm"]
    assert list(found["same"]["mae_by_run"]) == ["seed0", "seed1"]
    mean_of_runs = np.mean(list(found["better"]["mae_by_run"].values()))
    assert found["better"]["mae"]["value"] == pytest.approx(mean_of_runs)
    json.dumps(found, allow_nan=False)


def test_compare_demands_the_same_scans():
    table = cohort(persons=20)
    groups = {"plain": group(table, 6, 1, 0), "other": group(table.head(18), 6, 1, 0)}
    with pytest.raises(DataError, match="other and plain differ in 2 scans"):
        compare(groups, "plain", QUICK)
