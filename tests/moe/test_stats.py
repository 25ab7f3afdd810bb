import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed as dist

from emoe_med.moe.router import Routing
from emoe_med.moe.stats import RoutingStats, changed_share, load_statistics


def routing(index, gate=None, probs=None, experts=4):
    index = torch.tensor(index, dtype=torch.int64).view(len(index), -1 if index else 1)
    gate = torch.ones(index.shape) if gate is None else torch.as_tensor(gate).view(index.shape)
    probs = torch.full((len(index), experts), 1 / experts) if probs is None else torch.as_tensor(probs)
    return Routing(index, gate, probs, torch.zeros(()))


def drawn(tokens, seed, experts=4, top_k=2):
    generator = torch.Generator().manual_seed(seed)
    probs = (2 * torch.randn(tokens, experts, generator=generator)).softmax(-1)
    index = probs.topk(top_k).indices
    kept = torch.rand(index.shape, generator=generator) > 0.3
    return Routing(index, probs.gather(-1, index) * kept, probs, torch.zeros(()))


def summed(routings, experts=4):
    stats = RoutingStats(experts)
    for found in routings:
        stats.update(found)
    return stats


def test_uniform_and_collapsed_loads():
    even = load_statistics(torch.full((8,), 100))
    assert even["cv"] == pytest.approx(0)
    assert even["entropy"] == pytest.approx(1)
    assert even["gini"] == pytest.approx(0)
    assert even["max_vio"] == pytest.approx(0)
    assert even["dead"] == 0
    collapsed = load_statistics(torch.tensor([800, 0, 0, 0, 0, 0, 0, 0]))
    assert collapsed["cv"] == pytest.approx(math.sqrt(7))
    assert collapsed["entropy"] == pytest.approx(0)
    assert collapsed["gini"] == pytest.approx(0.875)
    assert collapsed["effective_experts"] == pytest.approx(1)
    assert collapsed["max_over_mean"] == pytest.approx(8)
    assert collapsed["max_vio"] == pytest.approx(7)
    assert collapsed["min_over_mean"] == 0
    assert collapsed["dead"] == 7


@settings(deadline=None)
@given(st.lists(st.integers(0, 10_000), min_size=2, max_size=16).filter(any))
def test_load_statistics_equal_their_formulas_in_numpy(counts):
    n, found = np.array(counts, dtype=float), load_statistics(torch.tensor(counts))
    f = n / n.sum()
    h = -(f[f > 0] * np.log(f[f > 0])).sum()
    want = {
        "cv": f.std() / f.mean(),
        "entropy": h / np.log(len(f)),
        "effective_experts": np.exp(h),
        "max_over_mean": n.max() / n.mean(),
        "max_vio": (n.max() - n.mean()) / n.mean(),
        "min_over_mean": n.min() / n.mean(),
        "gini": np.abs(f[:, None] - f).sum() / (2 * len(f)),
        "dead": (f < 0.1 / len(f)).sum(),
    }
    assert found == pytest.approx(want, abs=1e-12)


def test_streaming_equals_one_batch_and_dropped_slots_are_no_load():
    whole = drawn(50, seed=0)
    whole.gate[:] = whole.probs.gather(-1, whole.expert_index)
    whole.gate[:5, 1] = 0
    pieces = [
        Routing(whole.expert_index[at], whole.gate[at], whole.probs[at], whole.aux_loss)
        for at in torch.arange(50).split(7)
    ]
    summary, parts = summed([whole]).summary(), summed(pieces).summary()
    for key in summary.keys() - {"cv_batch", "cv_batch_max", "max_vio_batch", "max_vio_batch_max"}:
        assert parts[key] == pytest.approx(summary[key]), key
    assert summary["tokens"] == 50
    assert summary["dropped"] == pytest.approx(0.05)
    assert sum(summary[f"load/E{e:02d}"] for e in range(4)) == pytest.approx(1)
    top = whole.probs.topk(2).values
    assert summary["margin"] == pytest.approx((top[:, 0] - top[:, 1]).mean().item())
    entropy = torch.distributions.Categorical(whole.probs).entropy().mean().item()
    assert summary["token_entropy"] == pytest.approx(entropy, abs=1e-6)


def test_balance_of_batches_is_hidden_in_the_balance_of_the_set():
    # each batch goes to two experts of four, CV 1 and MaxVio 1; the set is even
    summary = summed([routing([0, 1, 0, 1]), routing([2, 3, 2, 3])]).summary()
    assert summary["cv"] == pytest.approx(0)
    assert summary["max_vio"] == pytest.approx(0)
    assert summary["cv_batch"] == summary["cv_batch_max"] == pytest.approx(1)
    assert summary["max_vio_batch"] == summary["max_vio_batch_max"] == pytest.approx(1)
    # a collapsed batch weighs as much as a large one: CV (1 + sqrt(3)) / 2, MaxVio (1 + 3) / 2; an empty one nothing
    summary = summed([routing([0, 1] * 50), routing([2]), routing([]), routing([3], gate=[0.0])]).summary()
    assert summary["cv_batch"] == pytest.approx((1 + math.sqrt(3)) / 2)
    assert summary["cv_batch_max"] == pytest.approx(math.sqrt(3))
    assert summary["max_vio_batch"] == pytest.approx(2)
    assert summary["max_vio_batch_max"] == pytest.approx(3)


def test_a_token_is_dropped_when_all_its_slots_are():
    summary = summed([routing([[0, 1], [1, 2], [2, 3], [3, 0]], [[1, 0.5], [0, 0.5], [0, 0], [1, 0]])]).summary()
    assert summary["dropped"] == pytest.approx(4 / 8)
    assert summary["dropped_tokens"] == pytest.approx(1 / 4)
    assert summary["gate"] == pytest.approx(3 / 4)
    assert [summary[f"load/E{e:02d}"] for e in range(4)] == pytest.approx([1 / 4, 1 / 4, 1 / 4, 1 / 4])


def test_importance_tells_what_the_load_of_soft_routing_cannot():
    gate = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.5, 0.3, 0.1, 0.1]])
    probs = torch.tensor([[0.4, 0.2, 0.2, 0.2], [0.6, 0.2, 0.1, 0.1]])
    summary = summed([routing([[0, 1, 2, 3]] * 2, gate, probs)]).summary()
    assert summary["cv"] == pytest.approx(0)
    assert [summary[f"importance/E{e:02d}"] for e in range(4)] == pytest.approx([0.6, 0.2, 0.1, 0.1])
    assert summary["importance_cv"] == pytest.approx(np.std([0.6, 0.2, 0.1, 0.1]) / 0.25)
    assert [summary[f"prob/E{e:02d}"] for e in range(4)] == pytest.approx([0.5, 0.2, 0.15, 0.15])


def test_nothing_seen_and_one_expert_are_finite():
    for stats in (RoutingStats(4), summed([routing([])]), summed([routing([0, 0], experts=1)], experts=1)):
        assert all(math.isfinite(value) for value in stats.summary().values())


def test_changed_share_compares_sets_of_served_experts():
    before = routing([[0, 1], [0, 1], [0, 1], [2, 3]], [[1, 1], [1, 1], [1, 1], [1, 0]])
    after = routing([[1, 0], [0, 2], [0, 1], [2, 0]], [[0.1, 9], [1, 1], [1, 0], [1, 0]])
    # the first only swapped its slots; the last changed an expert that it does not use
    assert changed_share(before, after) == pytest.approx(2 / 4)
    assert changed_share(before, before) == 0
    assert changed_share(routing([0, 1]), routing([1, 0])) == 1
    for other in (routing([0, 1]), routing([0] * 4, experts=5)):
        with pytest.raises(ValueError, match="cannot compare"):
            changed_share(before, other)
    with pytest.raises(ValueError, match="cannot compare"):
        changed_share(routing([]), routing([]))


# unlike in number and size, and the worst balance is on one rank alone
STREAMS = [[(30, 0), (40, 1)], [(5, 2), (200, 3), (1, 4)], []]


def _summary_of_a_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3)
    stats = summed(drawn(*batch) for batch in STREAMS[rank])
    stats.reduce()
    (folder / f"{rank}.json").write_text(json.dumps(stats.summary()))
    dist.destroy_process_group()


def test_ranks_together_know_what_one_process_knows(tmp_path):
    torch.multiprocessing.spawn(_summary_of_a_rank, (tmp_path,), nprocs=3)
    want = summed(drawn(*batch) for batches in STREAMS for batch in batches).summary()
    for rank in range(3):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == pytest.approx(want, abs=1e-12)
