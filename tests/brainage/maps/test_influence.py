"""Contribution and occlusion against the whole network run again with the one thing changed."""

import numpy as np
import pytest
import torch

from emoe_med.brainage.maps.cells import CellGrid
from emoe_med.brainage.maps.influence import GREY, contributions, occlusions
from emoe_med.brainage.maps.routes import route
from emoe_med.brainage.net import BrainAgeNet
from emoe_med.config import ModelConfig, MoEConfig
from emoe_med.models.heads import TrainingAges

EIGEN = {"kind": "eigen", "rank": 4}
DEPENDENT = {
    "ermoe": {"kind": "ermoe"},
    "expert choice": {"kind": "expert_choice"},
    "capacity": {"kind": "linear", "noise": 0.0, "balance": "none", "eval_capacity": 0.6},
}


def routed_net(top_k=1, head="l1", after=1, router=EIGEN):
    torch.manual_seed(0)
    experts = {"kind": "eigen", "rank": 3} if router["kind"] == "ermoe" else {"kind": "mlp"}
    moe = MoEConfig(after_block=after, num_experts=4, top_k=top_k, router=router, experts=experts)
    model = ModelConfig(channels=(8, 8, 8), pooled=after, neck=8, dropout=0.0, head=head, moe=moe)
    net = BrainAgeNet(model, TrainingAges.of([20.0, 80.0])).eval()
    for parameter in net.net.moe.experts.parameters():
        if not parameter.any():  # starts at zero so that the layer starts as the identity
            torch.nn.init.normal_(parameter)
    for parameter in net.net.head.parameters():
        torch.nn.init.normal_(parameter)
    return net


def head_image():
    image = torch.randn(1, 1, 8, 8, 8)
    image[..., :3, :, :] = 0  # air on one side: those cells are not routed
    return image


@pytest.mark.parametrize(("top_k", "head"), [(1, "l1"), (2, "l1"), (1, "soft_label")])
def test_contribution_is_the_full_forward_with_the_output_replaced(top_k, head):
    net, image = routed_net(top_k, head), head_image()
    layer = net.net.moe
    found = contributions(net, image)
    expert, _ = route(net, image)
    assert found.shape == (64, 4)
    assert (expert[:, 0] < 0).sum() == 16
    assert (found[expert[:, 0] < 0] == 0).all()
    with torch.no_grad():
        intact = float(net.ages(image)[0])
        for cell in np.flatnonzero(expert[:, 0] >= 0)[::7]:
            token = int((expert[:cell, 0] >= 0).sum())
            for slot, chosen in enumerate(expert[cell]):
                replaced = float(net_with_mean_output(net, layer, image, token, slot))
                assert found[cell, chosen] == pytest.approx(intact - replaced, abs=2e-4)
    assert np.abs(found).max() > 0.01


def net_with_mean_output(net, layer, image, token, slot):
    """Run all of the network; one slot of one token gets the mean of all experts' outputs."""
    experts = layer.experts

    def replaced(tokens, routing, scale, stream):
        outputs = torch.stack([experts.run(tokens, e) for e in range(experts.num_experts)])
        out = stream.clone()
        for k in range(routing.gate.shape[1]):
            chosen = outputs[routing.expert_index[:, k], torch.arange(len(tokens))]
            if k == slot:
                chosen = chosen.clone()
                chosen[token] = outputs[:, token].mean(0)
            out = out + scale * routing.gate[:, k : k + 1] * chosen
        return out

    experts.forward, before = replaced, experts.forward
    try:
        return net.ages(image)[0]
    finally:
        experts.forward = before


@pytest.mark.parametrize(("blocks", "size"), [(1, (16, 14, 18)), (2, (28, 24, 20)), (2, (8, 8, 8))])
def test_occlusion_is_the_head_painted_grey(blocks, size):
    """Also where a cell is only run again with what surrounds it, and at the ends of the box."""
    net, image = routed_net(after=blocks), torch.randn(1, 1, *size)
    image[..., :3, :, :] = 0
    edge = net.net.cell(blocks)
    grid = CellGrid(8.0, 1, edge, net.net.receptive_field(blocks))
    cells = [n // edge for n in size]
    found = occlusions(net, image, grid).reshape(cells)
    air = 3 // edge
    assert (found[:air] == 0).all()  # air alone
    with torch.no_grad():
        intact = float(net.ages(image)[0])
        for cell in [(air, 1, 1), (cells[0] - 1, 0, cells[2] - 1), tuple(c // 2 for c in cells)]:
            painted = image.clone()
            block = painted[(0, 0, *(slice(edge * c, edge * (c + 1)) for c in cell))]
            block[block != 0] = GREY  # the air in the cell stays air
            assert found[cell] == pytest.approx(intact - float(net.ages(painted)[0]), abs=1e-4)
    assert np.abs(found).max() > 0.01


@pytest.mark.parametrize("router", DEPENDENT.values(), ids=DEPENDENT.keys())
def test_occlusion_where_tokens_compete_is_that_of_the_whole_head(router):
    net, image = routed_net(top_k=2, router=router), head_image()
    assert not net.net.moe.router.independent
    found = occlusions(net, image, CellGrid(8.0, 1, 2, net.net.receptive_field(1))).reshape(4, 4, 4)
    with torch.no_grad():
        intact = float(net.ages(image)[0])
        for cell in [(1, 1, 1), (3, 0, 3), (2, 2, 2), (3, 3, 1)]:
            painted = image.clone()
            block = painted[(0, 0, *(slice(2 * c, 2 * c + 2) for c in cell))]
            block[block != 0] = GREY
            assert found[cell] == pytest.approx(intact - float(net.ages(painted)[0]), abs=1e-4)
    assert np.abs(found).max() > 0.01


def test_slots_of_a_token_come_by_falling_gate():
    """Expert Choice has one for each expert: the first is the first choice all the same."""
    net = routed_net(router={"kind": "expert_choice"})
    expert, gate = route(net, head_image())
    assert expert.shape == gate.shape == (64, 4)
    assert (np.diff(gate, axis=1) <= 0).all()
    assert len(set(expert[:, 0].tolist())) == 5  # all four experts, and nobody where it is not routed
