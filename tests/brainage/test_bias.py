"""Every pitfall of age-bias correction on simulated cohorts: what corrected figures hide, what is refused."""

from dataclasses import asdict

import numpy as np
import pytest
from sklearn.ensemble import RandomForestRegressor
from sklearn.model_selection import cross_val_predict

from emoe_med.brainage.bias import AgeBias, fit_age_bias
from emoe_med.errors import DataError


def simulate(slope: float, noise: float, persons: int = 4000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Ages of 45 to 82 years, and predictions drawn towards their mean."""
    rng = np.random.default_rng(seed)
    age = rng.uniform(45, 82, persons)
    return age, 63.5 + slope * (age - 63.5) + rng.normal(0, noise, persons)


def mae(age: np.ndarray, predicted: np.ndarray) -> float:
    return float(np.abs(predicted - age).mean())


def corrected_on_new_persons(slope: float, noise: float, method: str = "beheshti") -> tuple[np.ndarray, ...]:
    val_age, val_predicted = simulate(slope, noise, seed=1)
    age, predicted = simulate(slope, noise, seed=2)
    bias = fit_age_bias(val_age, val_predicted, np.arange(len(val_age)), method)
    return age, predicted, bias.apply(predicted, age)[0]


# The three models of the survey's table: (slope, noise), raw MAE, r; corrected MAE, r; Cole's MAE.
NOTHING, WEAK, DECENT = (0.0, 1.0), (0.152, 3.85), (0.70, 3.63)


def test_a_model_without_signal_looks_excellent_after_correction():
    age, predicted, corrected = corrected_on_new_persons(*NOTHING)
    assert mae(age, predicted) == pytest.approx(9.3, abs=0.2)
    assert abs(np.corrcoef(age, predicted)[0, 1]) < 0.05
    assert mae(age, corrected) == pytest.approx(0.80, abs=0.03)
    assert np.corrcoef(age, corrected)[0, 1] > 0.99


@pytest.mark.parametrize(
    ("model", "raw", "after"), [(WEAK, (8.4, 0.39), (3.07, 0.94)), (DECENT, (3.96, 0.90), (2.90, 0.95))]
)
def test_corrected_figures_of_models_with_signal(model, raw, after):
    age, predicted, corrected = corrected_on_new_persons(*model)
    assert mae(age, predicted) == pytest.approx(raw[0], abs=0.2)
    assert np.corrcoef(age, predicted)[0, 1] == pytest.approx(raw[1], abs=0.03)
    assert mae(age, corrected) == pytest.approx(after[0], abs=0.1)
    assert np.corrcoef(age, corrected)[0, 1] == pytest.approx(after[1], abs=0.02)


def test_cole_inflates_the_noise_of_a_decent_model():
    age, _, corrected = corrected_on_new_persons(*DECENT, method="cole")
    assert mae(age, corrected) == pytest.approx(4.14, abs=0.1)


@pytest.mark.parametrize("model", [NOTHING, WEAK])
def test_cole_is_refused_where_the_slope_is_small(model):
    age, predicted = simulate(*model)
    with pytest.raises(DataError, match=r"BIAS-SLOPE.*slope of prediction on age"):
        fit_age_bias(age, predicted, np.arange(len(age)), "cole")


def test_cole_is_refused_where_the_slope_may_be_zero():
    age, predicted = simulate(0.6, 30, persons=12, seed=0)
    fitted = fit_age_bias(age, predicted, np.arange(12))
    assert fitted.alpha + 1 > 0.3
    assert fitted.slope_low < 0
    with pytest.raises(DataError, match="BIAS-SLOPE"):
        fit_age_bias(age, predicted, np.arange(12), "cole")


def test_beheshti_is_de_lange():
    age, predicted = simulate(*DECENT)
    bias = fit_age_bias(age, predicted, np.arange(len(age)))
    slope, intercept = np.polyfit(age, predicted, 1)  # de Lange: prediction = A age + B
    de_lange = predicted + age - (slope * age + intercept)
    np.testing.assert_allclose(bias.apply(predicted, age)[0], de_lange, rtol=0, atol=1e-9)


def test_only_out_of_fold_predictions_take_the_bias_away():
    rng = np.random.default_rng(0)
    age = rng.uniform(45, 82, 900)
    features = (age[:, None] - 63.5) / 10.7 + rng.normal(0, 4, (900, 12))
    train, test = np.arange(600), np.arange(600, 900)
    forest = RandomForestRegressor(60, random_state=0).fit(features[train], age[train])
    predicted = forest.predict(features[test])

    def remaining(fitted_on: np.ndarray) -> float:
        bias = fit_age_bias(age[train], fitted_on, train)
        corrected, _ = bias.apply(predicted, age[test])
        return float(np.corrcoef(corrected - age[test], age[test])[0, 1])

    in_sample = forest.predict(features[train])
    out_of_fold = cross_val_predict(RandomForestRegressor(60, random_state=0), features[train], age[train], cv=5)
    assert remaining(in_sample) < -0.4
    assert abs(remaining(out_of_fold)) < 0.1


def test_extrapolation_and_missing_age_are_flagged():
    bias = fit_age_bias(np.array([50.0, 60, 70, 80]), np.array([55.0, 60, 65, 70]), np.arange(4))
    assert (bias.alpha, bias.beta) == (pytest.approx(-0.5), pytest.approx(30.0))
    corrected, in_range = bias.apply(np.array([55.0, 60, 70, 40]), np.array([50.0, np.nan, 80, 20]))
    np.testing.assert_allclose(corrected, [50, np.nan, 80, 20])
    assert in_range.tolist() == [True, False, True, False]
    cole = fit_age_bias(np.array([50.0, 60, 70, 80]), np.array([55.0, 60, 65, 70]), np.arange(4), "cole")
    corrected, in_range = cole.apply(np.array([55.0, 60, 40]), np.full(3, np.nan))
    np.testing.assert_allclose(corrected, [50, 60, 20])
    assert in_range.tolist() == [True, True, False]


def test_scans_of_one_person_are_one_point():
    age = np.array([50.0, 60, 70, 70, 72])
    predicted = np.array([52.0, 60, 66, 70, 71])
    bias = fit_age_bias(age, predicted, np.array(["a", "b", "c", "d", "d"]))
    slope, intercept = np.polyfit([50, 60, 70, 71], [52, 60, 66, 70.5], 1)
    assert (bias.n, bias.alpha, bias.beta) == (4, pytest.approx(slope - 1), pytest.approx(intercept))
    assert (bias.age_low, bias.age_high) == (50, 72)


@pytest.mark.parametrize("age", [[50.0, 60.0], [50.0, 50.0, 50.0], [50.0, 60.0, np.nan]])
def test_too_little_to_fit_is_refused(age):
    with pytest.raises(DataError, match="BIAS-FIT"):
        fit_age_bias(np.array(age), np.arange(len(age), dtype=float), np.arange(len(age)))


def test_the_fit_survives_json():
    age, predicted = simulate(*DECENT, persons=50)
    bias = fit_age_bias(age, predicted, np.arange(50))
    assert AgeBias(**asdict(bias)) == bias
