import math

import pytest
import torch

from emoe_med.moe.router import Routing
from emoe_med.moe.stats import RoutingStats, load_statistics


def test_uniform_and_collapsed_loads():
    even = load_statistics(torch.full((8,), 100))
    assert even["cv"] == pytest.approx(0)
    assert even["entropy"] == pytest.approx(1)
    assert even["gini"] == pytest.approx(0)
    assert even["dead"] == 0
    collapsed = load_statistics(torch.tensor([800, 0, 0, 0, 0, 0, 0, 0]))
    assert collapsed["cv"] == pytest.approx(math.sqrt(7))
    assert collapsed["entropy"] == pytest.approx(0)
    assert collapsed["gini"] == pytest.approx(0.875)
    assert collapsed["effective_experts"] == pytest.approx(1)
    assert collapsed["max_over_mean"] == pytest.approx(8)
    assert collapsed["dead"] == 7


def test_streaming_equals_one_batch_and_dropped_slots_are_no_load():
    probs = torch.rand(50, 4).softmax(-1)
    index = probs.topk(2).indices
    gate = probs.gather(-1, index)
    gate[:5, 1] = 0
    whole, parts = RoutingStats(4), RoutingStats(4)
    whole.update(Routing(index, gate, probs, torch.zeros(())))
    for piece in torch.arange(50).split(7):
        parts.update(Routing(index[piece], gate[piece], probs[piece], torch.zeros(())))
    assert whole.summary() == pytest.approx(parts.summary())
    summary = whole.summary()
    assert summary["tokens"] == 50
    assert summary["dropped"] == pytest.approx(0.05)
    assert sum(summary[f"load/E{e:02d}"] for e in range(4)) == pytest.approx(1)
    assert summary["margin"] == pytest.approx((probs.topk(2).values[:, 0] - probs.topk(2).values[:, 1]).mean().item())
