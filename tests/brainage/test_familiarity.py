"""How far a scan is, against scikit-learn; how far is too far, against fresh draws."""

import json

import numpy as np
import pytest
from sklearn.covariance import LedoitWolf

from emoe_med.brainage.familiarity import Familiarity


def draws(n, seed, width=6):
    """Correlated features."""
    mixing = np.random.default_rng(99).normal(size=(width, width))
    return np.random.default_rng(seed).normal(size=(n, width)) @ mixing + 3


def test_the_distance_is_that_of_scikit_learn_and_survives_json():
    train, new = draws(80, 0), draws(20, 1)
    found = Familiarity.from_json(json.loads(json.dumps(Familiarity.of(train, draws(15, 2)).to_json())))
    np.testing.assert_allclose(found.score(new) ** 2, LedoitWolf().fit(train).mahalanobis(new), rtol=1e-9)


def test_a_standard_normal_cloud_has_the_plain_norm():
    found = Familiarity([0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]], 0.0, 1.0, 10)
    np.testing.assert_allclose(found.score(np.array([[3.0, 4.0], [0.0, 1.0]])), [5, 1])
    assert found.percentile(np.array([1.0]))[0] == pytest.approx(50)


@pytest.mark.parametrize("held_out", [15, 60])
def test_one_of_a_hundred_new_scans_is_beyond_the_99th_percentile(held_out):
    beyond = []
    for seed in range(40):
        found = Familiarity.of(draws(130, 3 * seed), draws(held_out, 3 * seed + 1))
        beyond.append((found.percentile(found.score(draws(500, 3 * seed + 2))) > 99).mean())
    assert 0.0005 < np.mean(beyond) < 0.02


def test_what_is_far_is_told():
    found = Familiarity.of(draws(130, 0), draws(15, 1))
    away = draws(5, 2) + 8 * draws(130, 0).std(0)
    assert (found.percentile(found.score(away)) > 99).all()


def test_too_few_persons_or_features_that_never_vary_tell_nothing():
    assert Familiarity.of(draws(30, 0), draws(4, 1)) is None
    assert Familiarity.of(np.ones((30, 3)), np.ones((9, 3))) is None
    assert Familiarity.from_json(None) is None
