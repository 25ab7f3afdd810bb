"""Matching experts, and when a map may be believed."""

from itertools import permutations

import numpy as np
import pytest

from emoe_med.brainage.maps.place import by_place, share_of_same
from emoe_med.brainage.maps.stability import UNSTABLE, RunMap, match_experts, reference_run, reliability, stability

CENTRES = np.stack(np.meshgrid(*[np.arange(7.0) * 16] * 3, indexing="ij")).reshape(3, -1).T


def smooth_map(seed, experts=4):
    """Winner of smooth random fields, as a one-hot map [C, E]."""
    rng = np.random.default_rng(seed)
    seeds = rng.uniform(0, 96, (experts, 3))
    nearest = ((CENTRES[:, None] - seeds) ** 2).sum(-1).argmin(1)
    return np.eye(experts)[nearest]


def run_map(seed, fold, occupancy):
    cells = len(occupancy)
    return RunMap(f"seed{seed}-fold{fold}", seed, fold, occupancy, np.full(cells, 20), np.ones(cells, bool))


def test_matching_is_the_best_of_all_permutations():
    rng = np.random.default_rng(1)
    a, b = rng.random((30, 5)), rng.random((30, 5))
    r = np.corrcoef(a.T, b.T)[:5, 5:]
    best = max(permutations(range(5)), key=lambda order: sum(r[i, j] for i, j in enumerate(order)))
    match = match_experts(a, b)
    assert match.expert.tolist() == list(best)
    np.testing.assert_allclose(match.r, [r[i, j] for i, j in enumerate(best)])


def test_dice_by_hand():
    a = np.eye(2)[[0, 0, 0, 1, 1]]
    b = np.eye(2)[[1, 1, 0, 0, 0]]  # renamed: expert 1 of b is expert 0 of a, and one cell differs
    match = match_experts(a, b)
    assert match.expert.tolist() == [1, 0]
    # expert 0: 3 and 2 cells, 2 shared; expert 1: 2 and 3, 2 shared
    assert match.dice == pytest.approx((4 / 5 + 4 / 5) / 2)


def test_a_dead_expert_has_no_correlation():
    a = np.eye(3)[[0, 0, 1, 1]]
    assert sorted(match_experts(a, a).r.tolist()) == pytest.approx([0, 1, 1])


def test_one_map_under_other_names_is_stable():
    base, rng = smooth_map(0), np.random.default_rng(3)
    runs = []
    for seed in range(3):
        for fold in range(2):
            noise = rng.multinomial(5, np.full(4, 0.25), size=len(base)) / 5
            runs.append(run_map(seed, fold, (0.8 * base + 0.2 * noise)[:, rng.permutation(4)]))
    found = stability(runs, CENTRES)
    assert found["stable"] is True
    assert found["matched_r"]["value"] > 0.9
    assert found["position_only"] is None  # no head was looked at twice
    assert found["turned_patches"]["matched_r"]["high"] < found["matched_r"]["low"]
    assert found["random_router"]["matched_r"]["value"] < 0.2
    assert {kind: some["pairs"] for kind, some in found["by_kind"].items()} == {
        "same seed, other fold": 3,
        "other seed, same fold": 6,
        "other seed, other fold": 6,
    }


def test_unrelated_maps_are_not_to_be_interpreted():
    runs = [run_map(seed, fold, smooth_map(10 * seed + fold)) for seed in range(3) for fold in range(2)]
    found = stability(runs, CENTRES)
    assert found["verdict"] == UNSTABLE
    assert found["stable"] is False


def test_agreement_that_patches_at_random_places_reach_as_well_is_not_enough():
    """Two halves agree well wherever they lie: r is above 0.5 and means nothing."""
    half = np.eye(2)[(CENTRES[:, 0] > 40).astype(int)]
    other = np.eye(2)[(CENTRES[:, 0] + 0.9 * CENTRES[:, 1] > 80).astype(int)]
    runs = [run_map(0, 0, half), run_map(1, 0, other), run_map(2, 0, half)]
    found = stability(runs, CENTRES)
    assert found["matched_r"]["value"] > 0.5
    assert found["stable"] is False
    assert "patches at random places" in found["reason"]


def looked(seed, expert, rename=(0, 1, 2, 3)):
    """A run of one fold and the heads that it routed, [N, C]."""
    expert = np.asarray(rename)[expert].astype(np.int16)
    run = run_map(seed, 0, np.eye(4)[expert].mean(0))
    run.head, run.person, run.expert = 10 + np.arange(len(expert)), np.arange(len(expert)), expert
    return run


def test_maps_of_mere_places_are_not_to_be_interpreted():
    """Two runs have one map. Where heads differ, one pair of runs sees it alike and the other goes by place."""
    rng = np.random.default_rng(0)
    base = np.tile(smooth_map(0).argmax(1), (12, 1))
    own = np.where(rng.random(base.shape) < 0.3, rng.integers(4, size=base.shape), base)  # of each head
    other = np.where(rng.random(base.shape) < 0.3, rng.integers(4, size=base.shape), base)
    two = [looked(0, own), looked(1, own, (2, 0, 3, 1))]
    alike = stability([*two, looked(2, own)], CENTRES)
    assert alike["stable"] is True
    assert stability(two, CENTRES)["verdict"] == "not tested: needs more seeds"
    assert alike["position_only"]["same_expert"]["value"] == 1
    # of the cells 0.7 + 0.3 / 4 have the expert of their place
    assert alike["position_only"]["by_place"]["value"] == pytest.approx(0.775, abs=0.02)
    apart = stability([looked(0, own), looked(1, other, (2, 0, 3, 1))], CENTRES)
    assert apart["matched_r"]["value"] > 0.9
    assert apart["position_only"]["difference"]["value"] < 0
    assert apart["verdict"] == UNSTABLE
    assert "knows the place alone" in apart["reason"]


def test_the_expert_of_a_place_is_that_of_other_persons():
    expert = np.array([[0, 1, -1], [0, 1, -1], [1, 1, 2], [1, 0, -1]])
    found = by_place(expert, np.array([7, 7, 8, 9]), 3)
    # cell 0: of person 7 the others went to 1, 1; of 8 to 0, 0, 1; of 9 to 0, 0, 1; cell 2 was routed in person 8 alone
    assert found.tolist() == [[1, 0, 2], [1, 0, 2], [0, 1, -1], [0, 1, 2]]
    assert share_of_same(expert, found).tolist() == pytest.approx([0, 0, 1 / 2, 0])


def test_folds_that_are_copies_tell_no_more_than_one():
    base = smooth_map(0)
    some = np.random.default_rng(1)
    maps = [np.where(some.random(len(base))[:, None] < share, smooth_map(9), base) for share in (0, 0.1, 0.3, 0.6)]
    one, five = (
        stability([run_map(seed, fold, maps[seed]) for seed in range(4) for fold in range(folds)], CENTRES)["matched_r"]
        for folds in (1, 5)
    )
    assert one["value"] == pytest.approx(five["value"])
    width = one["high"] - one["low"]
    assert width > 0.2
    assert five["high"] - five["low"] == pytest.approx(width, rel=0.05)


def test_one_seed_tests_nothing():
    found = stability([run_map(0, fold, smooth_map(0)) for fold in range(3)], CENTRES)
    assert found["stable"] is None
    assert found["matched_r"] is None
    assert "another seed" in found["verdict"]


def test_two_seeds_are_one_pair_however_many_folds():
    base = smooth_map(0)
    found = stability([run_map(seed, fold, base) for seed in range(2) for fold in range(5)], CENTRES)
    assert found["stable"] is None
    assert found["verdict"] == "not tested: needs more seeds"


def test_the_reference_is_the_run_that_most_others_look_like():
    runs = [run_map(0, 0, smooth_map(5)), run_map(1, 0, smooth_map(0)), run_map(2, 0, smooth_map(0)[:, ::-1])]
    assert reference_run(runs) in (1, 2)


def test_reliability_is_spearman_and_browns():
    """Halves of many heads: what is stepped up from them is the correlation of two full sets."""
    rng = np.random.default_rng(0)
    truth = smooth_map(0)
    halves = [truth + rng.normal(0, 0.6, truth.shape) for _ in range(4)]
    full = [(halves[0] + halves[1]) / 2, (halves[2] + halves[3]) / 2]
    expected = np.mean([np.corrcoef(full[0][:, e], full[1][:, e])[0, 1] for e in range(4)])
    assert reliability(halves[0], halves[1]) == pytest.approx(expected, abs=0.06)
    assert reliability(truth, -truth) == 0
