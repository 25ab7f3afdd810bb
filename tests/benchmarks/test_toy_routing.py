"""The toy study: are its tokens what it says of them, and does it run and go on where it stopped."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis, QuadraticDiscriminantAnalysis

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import toy_routing
from toy_tokens import CLUSTERS, INFORMATIVE, MAP_RANK, VARIANTS, Problem


def draw(problem, count, seed):
    return problem.tokens(count, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_tells_clusters_apart(variant):
    """Fisher's discriminants of scikit-learn as judges: planes serve where means differ, quadrics everywhere."""
    problem = Problem.draw(variant, 7)
    (x, _, cluster), (other, _, truth) = (draw(problem, 8000, seed) for seed in (1, 2))
    linear = LinearDiscriminantAnalysis().fit(x, cluster).score(other, truth)
    quadratic = QuadraticDiscriminantAnalysis().fit(x, cluster).score(other, truth)
    assert quadratic > 0.85
    if variant == "means":
        assert linear > 0.95
    else:
        assert problem.offset.eq(0).all()
        assert linear < 0.2  # 1/8 by chance


@pytest.mark.parametrize(("variant", "share"), [("means", 1), ("covariance", 1), ("minor", 0)])
def test_whether_the_principal_subspace_holds_what_the_maps_read(variant, share):
    problem = Problem.draw(variant, 7)
    x, _, _ = draw(problem, 50_000, 1)
    principal = np.linalg.eigh(np.cov(x.double().numpy().T)).eigenvectors[:, ::-1][:, :INFORMATIVE]
    read = torch.linalg.svd(problem.maps).U[..., :MAP_RANK].numpy()  # [K, D, 8], orthonormal
    assert np.square(principal.T @ read).sum((1, 2)) / MAP_RANK == pytest.approx(share, abs=0.05)


def test_principal_directions_are_those_that_differ_between_clusters():
    problem = Problem.draw("covariance", 7)
    x, _, _ = draw(problem, 200_000, 1)
    principal = np.linalg.eigh(np.cov(x.double().numpy().T)).eigenvectors[:, ::-1][:, :INFORMATIVE]
    cosines = np.square(principal.T @ problem.directions[:, :INFORMATIVE].numpy())
    assert np.diag(cosines).min() > 0.8


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_have_unit_mean_square_and_a_mean_that_no_map_reads(variant):
    problem = Problem.draw(variant, 7)
    x, _, cluster = draw(problem, 20_000, 1)
    assert x.square().mean().item() == pytest.approx(1, abs=0.02)
    assert (problem.mean @ problem.maps).abs().max() < 1e-5
    assert problem.offset.mean(0).abs().max() < 1e-6
    assert torch.bincount(cluster, minlength=CLUSTERS).min() > 2000


def test_a_fresh_layer_has_error_one_and_experts_that_are_the_maps_have_none():
    problem = Problem.draw("covariance", 7)
    batches = [draw(problem, 512, seed) for seed in range(3)]
    layer = toy_routing.build("oracle", 1.0)
    assert toy_routing.evaluate(layer, "oracle", batches)["relMSE"] == 1
    u, s, vt = torch.linalg.svd(problem.maps)
    read, write = u[..., :MAP_RANK] * s[:, None, :MAP_RANK], vt[:, :MAP_RANK]
    with torch.no_grad():  # GELU(a) - GELU(-a) = a
        layer.experts.w1.copy_(torch.cat([read, -read], -1))
        layer.experts.w2.copy_(torch.cat([write, -write], -2))
    found = toy_routing.evaluate(layer, "oracle", batches)
    assert found["relMSE"] < 1e-9
    assert found["NMI"] == pytest.approx(1)
    assert found["routing value"] > 1  # the map of another cluster is worse than none
    assert toy_routing.evaluate(layer, "random", batches)["relMSE"] > 1


def test_tokens_without_an_expert_are_a_class_of_their_own():
    routing = toy_routing.Routing(
        torch.tensor([[0, 1, 2], [0, 1, 2]]), torch.tensor([[0.0, 0.2, 0.5], [0, 0, 0]]), torch.ones(2, 3) / 3, None
    )
    assert toy_routing.first_expert(routing).tolist() == [2, 3]


@pytest.fixture
def short(monkeypatch):
    for name, value in {"STEPS": 2, "HELD_OUT": 1, "BATCH": 64, "SEEDS": range(2)}.items():
        monkeypatch.setattr(toy_routing, name, value)
    yield
    toy_routing.batches_of.cache_clear()


@pytest.mark.parametrize("arm", toy_routing.ARMS)
def test_every_router_trains(arm, short):
    found = toy_routing.train("covariance", 3, arm, 4.0)
    assert found["relMSE"] != 1  # the layer has left the identity
    assert found["relMSE"] == pytest.approx(1, abs=0.3)
    if strength := toy_routing.default_strength(arm):
        assert toy_routing.build(arm, 4.0).router.balance.strength == 4 * strength


def test_the_study_tunes_and_goes_on(tmp_path, short, monkeypatch, capsys):
    arms = ["oracle", "dense", "linear, bias", "tracked, rotation", "learned"]
    monkeypatch.setattr(toy_routing, "ARMS", {arm: toy_routing.ARMS[arm] for arm in arms})
    monkeypatch.setattr(toy_routing, "PAIRS", {"default or learned": ("tracked, rotation", "learned")})
    monkeypatch.setattr(sys, "argv", ["toy_routing.py", "--out", str(tmp_path)])
    toy_routing.main()
    runs = pd.read_csv(tmp_path / "runs.csv")
    trials = runs[runs["seed"] >= 100].groupby(["arm", "multiple"])["relMSE"].mean()
    reported = runs[runs["seed"] < 2]
    assert len(reported) == len(arms) * 2 * len(VARIANTS)
    for arm, own in reported.groupby("arm"):
        assert set(own["multiple"]) == {trials[arm].idxmin() if arm in trials else 1.0}, arm
    printed = capsys.readouterr().out
    assert printed.count("| oracle |") == 3
    assert (tmp_path / "tables.md").read_text().strip() == printed.strip()
    figure = (tmp_path / "toy_routing.png").read_bytes()
    monkeypatch.setattr(toy_routing, "train", None)  # nothing is left to train
    toy_routing.main()
    assert (tmp_path / "toy_routing.png").read_bytes() == figure


def test_interval_of_a_mean_by_hand():
    """1, 2, 3: standard error 1 / sqrt(3), t of 2 degrees of freedom 4.3027."""
    mean, half = toy_routing.mean_interval(pd.Series([1.0, 2.0, 3.0]))
    assert (mean, half) == pytest.approx((2, 4.3027 / 3**0.5), rel=1e-4)
