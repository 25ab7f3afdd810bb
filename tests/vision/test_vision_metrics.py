import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import top_k_accuracy_score

from emoe_med.vision.metrics import accuracy, mean_estimate
from emoe_med.vision.task import rank_of_label


def test_accuracy_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    logits, label = rng.normal(size=(400, 8)), rng.integers(0, 8, 400)
    rank = rank_of_label(torch.from_numpy(logits), torch.from_numpy(label)).numpy()
    found = accuracy(rank, 1000)
    for k in (1, 5):
        assert found[f"top{k}"]["value"] == pytest.approx(100 * top_k_accuracy_score(label, logits, k=k))
        assert found[f"top{k}"]["n"] == 400


def test_equal_outputs_do_not_count_as_right():
    assert rank_of_label(torch.zeros(4, 4), torch.arange(4)).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("broken", [float("nan"), [0.0, 1.0, float("nan"), 2.0]])
def test_outputs_that_are_no_numbers_are_not_right(broken):
    logits = torch.zeros(1, 4) + torch.tensor(broken)
    assert rank_of_label(logits, torch.tensor([2])).tolist() == [3]


def test_the_interval_is_the_bootstrap_of_the_mean():
    values = np.array([0.0] * 30 + [100.0] * 70)
    found = mean_estimate(values, 20_000)
    options = {"n_resamples": 20_000, "method": "percentile", "rng": np.random.default_rng(1)}
    reference = stats.bootstrap((values,), np.mean, **options)
    assert found["value"] == 70
    assert found["low"] == pytest.approx(reference.confidence_interval.low, abs=1.01)
    assert found["high"] == pytest.approx(reference.confidence_interval.high, abs=1.01)
    assert found["low"] == pytest.approx(stats.binom.ppf(0.025, 100, 0.7), abs=1.01)


def test_differences_keep_their_sign():
    found = mean_estimate(np.array([-100.0, 0, 0, 20, 100, 100]), 1000)
    assert found["value"] == pytest.approx(20)
    assert found["low"] < 0 < found["high"]
