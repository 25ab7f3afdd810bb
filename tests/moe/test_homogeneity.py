import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import subspace_angles
from torch import distributed as dist
from torch import nn

from emoe_med.moe import MLPExperts, MLPOptions, MoELayer, RandomOptions, RandomRouter
from emoe_med.moe.experts.base import Experts
from emoe_med.moe.homogeneity import TokenSample, collected_tokens, homogeneity

OUTPUT = ("output_cosine", "output_cosine_centred", "output_cka")


class Linear(Experts):
    """Experts h -> h A_e, which are no two-layer networks."""

    def __init__(self, matrices):
        super().__init__(len(matrices))
        self.matrices = matrices

    def run(self, tokens, expert):
        return tokens @ self.matrices[expert]


def mlp(width=12, experts=4, hidden=3):
    made = MLPExperts(width, experts, MLPOptions(hidden=hidden))
    nn.init.normal_(made.w2)
    return made


def test_equals_the_formulas_in_numpy():
    experts, tokens = mlp().double(), torch.randn(200, 12, dtype=torch.float64) + 0.5
    found = homogeneity(experts, tokens)
    y = np.stack([experts.run(tokens, e).detach().numpy() for e in range(4)])

    def cosine(a, b):
        return np.mean((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1))

    def cka(a, b):
        a, b = a - a.mean(0), b - b.mean(0)
        return np.linalg.norm(a.T @ b) ** 2 / (np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b))

    def overlap(a, b):
        return np.mean(np.cos(subspace_angles(a, b)) ** 2)

    def mean(measure, arrays):
        return np.mean([measure(a, b) for a, b in combinations(arrays, 2)])

    want = {
        "output_cosine": mean(cosine, y),
        "output_cosine_centred": mean(cosine, y - y.mean(0)),
        "output_cka": mean(cka, y),
        "overlap_w1": mean(overlap, experts.w1.detach().numpy()),
        "overlap_w2": mean(overlap, experts.w2.detach().numpy().swapaxes(1, 2)),
    }
    assert found == pytest.approx(want, abs=1e-9)
    assert homogeneity(experts.float(), tokens.float()) == pytest.approx(want, abs=1e-5)


def test_equal_experts_are_alike_in_all_but_what_is_left_without_their_mean():
    experts = mlp(experts=7)  # the mean of 7 equal outputs is not quite the output
    with torch.no_grad():
        experts.w1[:], experts.w2[:] = experts.w1[:1].clone(), experts.w2[:1].clone()
    found = homogeneity(experts, torch.randn(64, 12))
    want = dict.fromkeys(found, 1.0) | {"output_cosine_centred": 0.0}
    assert found == pytest.approx(want, abs=1e-5)


def test_cases_by_hand():
    tokens = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    # a turn of the outputs by 90 degrees: cosine 0, and CKA does not see it; less their mean they are opposite
    found = homogeneity(Linear([torch.eye(2), turn]), tokens)
    assert found == pytest.approx({"output_cosine": 0, "output_cosine_centred": -1, "output_cka": 1}, abs=1e-6)
    # outputs along x and along y alone: each is 0 where the other is not
    found = homogeneity(Linear([torch.diag(torch.tensor([1.0, 0])), torch.diag(torch.tensor([0, 1.0]))]), tokens)
    assert found == pytest.approx({"output_cosine": 0, "output_cosine_centred": -1, "output_cka": 0}, abs=1e-6)
    # identity against x alone: cosines 1, 0, 1, 0; CKA of diag(2, 2) and diag(2, 0): 4 / (sqrt(8) * 2)
    found = homogeneity(Linear([torch.eye(2), torch.diag(torch.tensor([1.0, 0]))]), tokens)
    assert found["output_cosine"] == pytest.approx(0.5)
    assert found["output_cka"] == pytest.approx(math.sqrt(0.5))


def test_unrelated_experts_meet_their_expectation():
    experts = mlp(width=64, experts=5, hidden=16)
    found = homogeneity(experts, torch.randn(2000, 64))
    assert found["overlap_w1"] == pytest.approx(16 / 64, abs=0.02)
    assert found["overlap_w2"] == pytest.approx(16 / 64, abs=0.02)
    assert found["output_cosine_centred"] == pytest.approx(-1 / 4, abs=0.02)
    assert homogeneity(mlp(width=8, hidden=8), torch.randn(9, 8))["overlap_w1"] == pytest.approx(1)


@pytest.mark.parametrize("scale", [1e-12, 1e6])
def test_scale_does_not_matter(scale):
    experts, tokens = mlp(), torch.randn(50, 12)
    want = homogeneity(experts, tokens)
    with torch.no_grad():
        experts.w2 *= scale
    assert homogeneity(experts, tokens) == pytest.approx(want, abs=1e-4)


def test_zero_outputs_are_like_no_other():
    fresh = MLPExperts(12, 4, MLPOptions(hidden=3))
    found = homogeneity(fresh, torch.randn(20, 12))
    assert [found[key] for key in OUTPUT] == [0, 0, 0]
    assert found["overlap_w2"] == 0
    assert 0 < found["overlap_w1"] < 1
    # two of three pairs have a zero expert in them; the equal two make up the third
    pair = Linear([torch.eye(3), torch.eye(3), torch.zeros(3, 3)])
    found = homogeneity(pair, torch.randn(20, 3))
    assert (found["output_cosine"], found["output_cka"]) == pytest.approx((1 / 3, 1 / 3))


def test_an_expert_that_says_the_same_to_all_has_no_cka():
    class Constant(Linear):
        def run(self, tokens, expert):
            return super().run(tokens, expert) if expert else torch.full_like(tokens, 0.1)

    assert homogeneity(Constant([torch.eye(3)] * 2), torch.randn(1000, 3))["output_cka"] == 0


def test_a_lower_rank_is_seen_as_such():
    experts = mlp()
    with torch.no_grad():
        experts.w1[:2, :, 2] = experts.w1[:2, :, 0] + experts.w1[:2, :, 1]
    found = homogeneity(experts, torch.randn(9, 12))["overlap_w1"]
    frames = [w[:, : 2 if e < 2 else 3].numpy() for e, w in enumerate(experts.w1.detach())]
    want = [np.mean(np.cos(subspace_angles(a, b)) ** 2) for a, b in combinations(frames, 2)]
    assert found == pytest.approx(np.mean(want), abs=1e-5)


def test_one_expert_has_no_pair_and_no_token_is_refused():
    assert homogeneity(mlp(experts=1), torch.randn(9, 12)) == {}
    with pytest.raises(ValueError, match="there are none"):
        homogeneity(mlp(), torch.zeros(0, 12))


def stream(lengths, first=0):
    """Batches of tokens [N, 2] that carry their number in the stream."""
    numbers = torch.arange(first, first + sum(lengths), dtype=torch.float32)
    return torch.stack([numbers, -numbers], dim=1).split(lengths)


def sampled(batches, size, seed=0):
    sample = TokenSample(size, seed)
    for batch in batches:
        sample.update(batch)
    return sample


@settings(deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=8), st.integers(1, 30), st.integers(0, 99))
def test_a_sample_has_different_tokens_of_the_stream_in_its_order(lengths, size, seed):
    batches = stream(lengths)
    tokens = sampled(batches, size, seed).tokens
    assert len(tokens) == min(size, sum(lengths))
    assert torch.equal(tokens, sampled(batches, size, seed).tokens)
    if len(tokens):
        assert (tokens[:, 0].diff() > 0).all()
        assert torch.equal(tokens[:, 0], -tokens[:, 1])
        assert tokens[-1, 0] < sum(lengths)


def test_every_token_is_as_likely_wherever_it_stands():
    chosen = torch.cat([sampled(stream([1, 9, 30, 20]), 15, seed).tokens[:, 0] for seed in range(2000)])
    share = torch.bincount(chosen.long(), minlength=60) / 2000
    # a quarter, standard error 0.0097
    assert (share - 0.25).abs().max() < 0.045


def test_the_sample_does_not_grow_and_owns_its_memory():
    sample = sampled(stream([1000] * 20), 64)
    assert sample.tokens.shape == (64, 2)
    assert sample.tokens.untyped_storage().nbytes() == 64 * 2 * 4
    assert not torch.equal(sample.tokens, sampled(stream([1000] * 20), 64, seed=1).tokens)


def test_collected_tokens_are_those_that_router_and_experts_see():
    layer = MoELayer(RandomRouter(12, 4, 1, RandomOptions()), mlp()).eval()
    x, sample = torch.randn(2, 10, 12), TokenSample(100)
    mask = torch.rand(2, 10) > 0.4
    with collected_tokens(layer, sample):
        layer(x, mask)
    layer(x)
    torch.testing.assert_close(sample.tokens, nn.functional.layer_norm(x[mask], (12,)))
    sample.update(torch.ones(3, 12, dtype=torch.float64, requires_grad=True))
    assert not sample.tokens.requires_grad
    assert sample.tokens.dtype == torch.float32


# a rank with many tokens, one with few, one without
RANKS = [[40, 50], [10], []]


def _samples_of_a_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3)
    mine = stream(RANKS[rank], first=sum(map(sum, RANKS[:rank]))) if RANKS[rank] else []
    found = []
    for size, seed in [(200, 0), *((25, seed) for seed in range(100))]:
        sample = sampled(mine, size, seed)
        sample.gather()
        found.append(sample.tokens)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_ranks_share_one_uniform_sample_of_all_their_tokens(tmp_path):
    torch.multiprocessing.spawn(_samples_of_a_rank, (tmp_path,), nprocs=3)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    for other in ranks[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ranks[0], other, strict=True))
    everything, *samples = ranks[0]
    assert torch.equal(everything, torch.cat(stream([100])))
    assert all(len(tokens) == len(tokens[:, 0].unique()) == 25 for tokens in samples)
    # a tenth of the tokens is on the second rank: 2.5 of 25, standard error 0.13
    of_second = np.mean([(tokens[:, 0] >= 90).sum().item() for tokens in samples])
    assert of_second == pytest.approx(2.5, abs=0.5)
    # ranks draw apart: of two tokens in the same place, one alone is in with probability 2 * 0.25 * 0.75
    places = [torch.isin(torch.arange(100), tokens[:, 0]) for tokens in samples]
    alone = np.mean([(found[:10] ^ found[90:]).float().mean() for found in places])
    assert alone == pytest.approx(0.375, abs=0.1)
