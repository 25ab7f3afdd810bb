"""The checks know maps of anatomy from maps of places, and say so in figures worked by hand."""

import numpy as np
import pytest
import torch

from emoe_med.brainage.maps.cells import CellGrid
from emoe_med.brainage.maps.routes import Routes, joined, route, tokens_of
from emoe_med.brainage.maps.sanity import (
    follows_mirror,
    follows_shift,
    occlusion_agreement,
    over_heads,
    position_share,
    random_router_r,
)
from emoe_med.brainage.maps.verdicts import sanity
from emoe_med.brainage.net import BrainAgeNet
from emoe_med.config import BrainAgeConfig, ModelConfig, MoEConfig
from emoe_med.models.heads import TrainingAges

GRID = CellGrid(8.0, 1, 2, 4)


def net_of(router):
    moe = MoEConfig(after_block=1, num_experts=4, router=router)
    model = ModelConfig(channels=(8, 8), pooled=1, neck=8, dropout=0.0, head="l1", moe=moe)
    config = BrainAgeConfig(name="x", data={"spacing_mm": 8}, model=model, training={"epochs": 1, "lr": 1e-3})
    torch.manual_seed(0)
    return BrainAgeNet(model, TrainingAges.of([20.0, 80.0])).eval(), config


def head():
    image = torch.zeros(1, 1, 20, 24, 20)
    image[..., 4:16, 4:20, 4:16] = torch.nn.functional.interpolate(torch.randn(1, 1, 6, 8, 6), (12, 16, 12)) + 0.01
    return image


def test_content_moves_with_the_head_and_places_stay():
    net, _ = net_of({"kind": "eigen", "rank": 4})
    image = head()
    moved, stayed = follows_shift(net, image, GRID, route(net, image)[0])
    assert moved == 1
    assert stayed < 0.9
    net, _ = net_of({"kind": "hash"})  # routes by place alone
    moved, stayed = follows_shift(net, image, GRID, route(net, image)[0])
    assert stayed == 1
    assert moved < 0.5
    assert follows_mirror(net, image, GRID, route(net, image)[0]) < 0.5


def test_symmetric_heads_are_their_own_mirror_images():
    net, _ = net_of({"kind": "eigen", "rank": 4})
    for block in net.net.blocks:  # kernels that treat both sides alike
        for parameter in block.parameters():
            if parameter.dim() == 5:
                parameter.data = (parameter + parameter.flip(2)) / 2
    image = head()
    assert follows_mirror(net, image, GRID, route(net, image)[0]) == 1


def test_share_of_place_by_hand():
    # two cells; in cell 0 always expert 0, in cell 1 each expert half the time: load 3/4, 1/4
    expert = np.array([[0, 0], [0, 1], [0, 0], [0, 1]], np.int16)[..., None]
    found = position_share(Routes.of(expert, np.ones(expert.shape), 2))
    # by place alone: cell 0 always right; cell 1, of whose other heads two went the other way, never
    assert found["guessed"] == pytest.approx(1 / 2)
    # between: 4 * 2 * (1/4)^2 + 4 * 2 * (1/4)^2 = 1; total: 8 * (1 - 10/16) = 3
    assert found["value"] == pytest.approx(1 / 3)
    same = np.tile(np.array([0, 1, 1, 0], np.int16)[None, :, None], (6, 1, 1))
    assert position_share(Routes.of(same, np.ones(same.shape), 2))["value"] == pytest.approx(1)


def test_two_experts_by_place_alone_are_no_less_a_map_of_places():
    expert = np.tile(np.array([[0, 1], [1, 2], [2, 0], [3, 1]], np.int16), (6, 1, 1))
    assert position_share(Routes.of(expert, np.full(expert.shape, 0.5), 4))["value"] == pytest.approx(1)


def test_a_random_router_is_within_its_own_interval():
    rng = np.random.default_rng(0)
    expert = rng.integers(4, size=(40, 300, 1)).astype(np.int16)
    found = position_share(Routes.of(expert, np.ones(expert.shape), 4))
    assert found["value"] == pytest.approx(1 / 40, rel=0.3)
    assert found["value"] < 1.2 * found["chance_high"]


def test_agreement_is_spearmans_and_has_a_null():
    rng = np.random.default_rng(0)
    change = rng.random((6, 1200)).astype(np.float32) * np.linspace(0.1, 3, 1200)
    expert = np.zeros((6, 1200, 1), np.int16)
    routes = Routes.of(
        expert,
        np.ones(expert.shape),
        2,
        contribution=np.stack([change, 0 * change], -1),
        contribution_of=np.arange(6),
        occlusion=1 - 2 * change,
        occlusion_of=np.arange(6),
    )
    found = occlusion_agreement(routes, GRID)
    assert found["value"] > 0.9
    assert 0 < found["low"] <= found["value"] <= found["high"] <= 1
    assert found["null_high"] < found["value"]


def test_an_untrained_router_is_put_in_and_taken_out():
    net, config = net_of({"kind": "eigen", "rank": 4})
    trained = net.net.moe.router
    found = random_router_r(net, config, [tokens_of(net, head()) for _ in range(3)], seeds=2)
    assert len(found) == 2
    assert net.net.moe.router is trained
    assert all(-1 <= r <= 1 for r in found)
    # the router of a place is no other when made anew: the check would see it
    net, config = net_of({"kind": "hash"})
    assert random_router_r(net, config, [tokens_of(net, head())], seeds=1) == pytest.approx([1])


def test_interval_over_heads_is_students():
    found = over_heads([1.0, 2, 3, 4, 5, float("nan")])
    half = 2.7764451 * np.sqrt(2.5) / np.sqrt(5)
    assert (found["value"], found["low"], found["high"]) == pytest.approx((3, 3 - half, 3 + half))
    assert over_heads([1.0, 2])["low"] is None


def test_dead_experts_and_a_map_of_places_do_not_pass():
    expert = np.tile((np.arange(1200) % 7 > 0).astype(np.int16)[None, :, None], (20, 1, 1))
    routes = Routes.of(expert, np.ones(expert.shape), 3)
    checks = {c["name"]: c for c in sanity(routes, [routes], GRID, [(0.3, 0.9)] * 5, [0.5] * 5, [0.8])["checks"]}
    assert [name for name, check in checks.items() if check["passed"] is False] == [
        *("shift", "position_only", "random_router", "experts_alive")
    ]
    assert checks["experts_alive"]["value"] == 1
    assert checks["outside_brain"]["passed"] is True
    assert "occlusion" not in checks


def test_a_collapsed_run_is_not_hidden_by_others():
    """In each of two runs one expert serves all: together they look as even as can be."""
    runs = [Routes.of(np.full((20, 1200, 1), e, np.int16), np.ones((20, 1200, 1)), 2) for e in (0, 1)]
    checks = sanity(joined(runs), runs, GRID, [(1.0, 0.1)] * 5, [0.5] * 5, [0.1])["checks"]
    (alive,) = (check for check in checks if check["name"] == "experts_alive")
    assert (alive["value"], alive["passed"], alive["details"]["largest_share"]) == (1, False, 1)
    assert alive["text"].startswith("In the worst run 1 of 2 experts")
