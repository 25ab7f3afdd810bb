import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from emoe_med.training import optim

E, D = 4, 3


class FakeRouted(nn.Module):
    """E linear experts; the caller says which are idle."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, D, D))
        self.bias = nn.Parameter(torch.randn(E, D))
        self.shared = nn.Parameter(torch.randn(D, D))
        self.idle = torch.zeros(E, dtype=torch.bool)
        self.steps = 0

    def expert_parameters(self):
        return [self.weight, self.bias]

    def take_idle(self):
        return self.idle

    def after_step(self):
        self.steps += 1


def gradients(layer, scale=1.0):
    for parameter in layer.parameters():
        parameter.grad = torch.randn_like(parameter) * scale
    layer.weight.grad[layer.idle] = 0
    layer.bias.grad[layer.idle] = 0


def snapshot(optimizer, layer, expert):
    tensors = [p for p in layer.expert_parameters()]
    tensors += [optimizer.state[p][slot] for p in layer.expert_parameters() for slot in ("exp_avg", "exp_avg_sq")]
    return [tensor[expert].detach().clone() for tensor in tensors]


@pytest.mark.parametrize("penalised", [False, True], ids=["zero gradient", "gradient of a penalty"])
def test_idle_expert_keeps_weights_and_moments_bit_for_bit(penalised):
    torch.manual_seed(0)
    layer = FakeRouted()
    optimizer = optim.build_optimizer(layer, lr=0.1, weight_decay=0.5)
    for _ in range(3):  # builds up momentum, which would move the expert on
        gradients(layer)
        optim.update(optimizer, layer)
    layer.idle[2] = True
    before = snapshot(optimizer, layer, 2)
    other = layer.weight[1].detach().clone()
    for _ in range(10):
        gradients(layer)
        if penalised:
            layer.weight.grad[2] = 1.0
        optim.update(optimizer, layer)
    assert all(map(torch.equal, before, snapshot(optimizer, layer, 2)))
    assert not torch.equal(other, layer.weight[1])
    assert layer.steps == 13


def test_expert_idle_from_the_first_step_has_zero_moments():
    layer = FakeRouted()
    optimizer = optim.build_optimizer(layer, lr=0.1, weight_decay=0.5)
    layer.idle[0] = True
    before = layer.weight[0].detach().clone()
    gradients(layer)
    layer.weight.grad[0] = 1.0
    optim.update(optimizer, layer)
    assert torch.equal(before, layer.weight[0])
    assert not optimizer.state[layer.weight]["exp_avg"][0].any()
    assert optimizer.state[layer.weight]["exp_avg"][1].any()


def test_busy_experts_move_as_plain_adamw_moves_them():
    torch.manual_seed(1)
    layer, plain = FakeRouted(), FakeRouted()
    plain.load_state_dict(layer.state_dict())
    ours = optim.build_optimizer(layer, lr=0.1, weight_decay=0.5)
    theirs = torch.optim.AdamW(plain.parameters(), lr=0.1, weight_decay=0.5)
    layer.idle[3] = True
    for _ in range(4):
        gradients(layer)
        for mine, other in zip(layer.parameters(), plain.parameters(), strict=True):
            other.grad = mine.grad.clone()
        optim.update(ours, layer)
        theirs.step()
    assert torch.equal(layer.weight[:3], plain.weight[:3])
    assert torch.equal(layer.shared, plain.shared)
    assert not torch.equal(layer.weight[3], plain.weight[3])


def test_weight_decay_spares_vectors_and_what_a_module_exempts():
    class Frame(nn.Module):
        def __init__(self):
            super().__init__()
            self.frame = nn.Parameter(torch.eye(3))
            self.matrix = nn.Parameter(torch.eye(3))
            self.scale = nn.Parameter(torch.ones(()))
            self.frozen = nn.Parameter(torch.eye(3), requires_grad=False)

        def no_weight_decay(self):
            return [self.frame]

    model = nn.Sequential(nn.Linear(3, 3), Frame())
    decayed, plain = optim.build_optimizer(model, 0.1, 0.5).param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    assert [names[id(p)] for p in decayed["params"]] == ["0.weight", "1.matrix"]
    assert [names[id(p)] for p in plain["params"]] == ["0.bias", "1.frame", "1.scale"]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.5, 0.0)


def test_after_step_is_called_once_per_outermost_module():
    calls = []

    class Inner(nn.Module):
        def after_step(self):
            calls.append("inner")

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def after_step(self):
            calls.append("outer")
            self.inner.after_step()

    optim.after_step(nn.Sequential(Outer(), nn.Linear(2, 2), nn.Sequential(Inner())))
    assert calls == ["outer", "inner", "inner"]


def schedule(kind, total, warmup_share=0.3, final_lr_share=0.0, lr=2.0):
    optimizer = optim.build_optimizer(nn.Linear(2, 2), lr, 0.0)
    options = SimpleNamespace(schedule=kind, lr=lr, warmup_share=warmup_share, final_lr_share=final_lr_share)
    rates = [optim.set_schedule(optimizer, step, total, options) for step in range(total)]
    assert optimizer.param_groups[1]["lr"] == rates[-1]
    return rates, optimizer


def test_cosine_with_warmup_by_hand():
    # 4 of 12 steps rise 1/4, 2/4, 3/4, 1 of the peak 2; then (1 + cos(pi k / 8)) from k = 0: half way at k = 4
    rates, _ = schedule("cosine", 12, warmup_share=1 / 3)
    assert rates[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert rates[8] == pytest.approx(1.0)
    assert rates[11] == pytest.approx(1 + math.cos(math.pi * 7 / 8))
    floored, _ = schedule("cosine", 1000, final_lr_share=0.1)
    assert floored[-1] == pytest.approx(0.2, rel=1e-3)


@pytest.mark.parametrize("total", [10, 37])
def test_one_cycle_equals_torch(total):
    # final learning rate = max_lr / 25 / final_div_factor = 0.001 max_lr
    optimizer = torch.optim.AdamW(nn.Linear(2, 2).parameters(), lr=1.0)
    reference = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=2.0, total_steps=total, pct_start=0.3, div_factor=25, final_div_factor=40
    )
    expected = []
    for _ in range(total):
        expected.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"][0]))
        optimizer.step()
        if len(expected) < total:
            reference.step()
    ours = optim.build_optimizer(nn.Linear(2, 2), 2.0, 0.0)
    options = SimpleNamespace(schedule="one_cycle", lr=2.0, warmup_share=0.3, final_lr_share=0.001)
    for step in reversed(range(total)):  # a pure function of the step: any order
        assert optim.set_schedule(ours, step, total, options) == pytest.approx(expected[step][0], rel=1e-9)
        assert ours.param_groups[0]["betas"] == (pytest.approx(expected[step][1], rel=1e-9), 0.999)


def test_clipping_returns_the_norm_before():
    model = nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    assert float(optim.clip_gradients(model, 1.0)) == 5.0
    assert torch.allclose(model.weight.grad, torch.tensor([[0.6, 0.8]]))


def test_optimizer_tensors_round_trip_and_are_copies():
    torch.manual_seed(2)
    layer, twin = FakeRouted(), FakeRouted()
    twin.load_state_dict(layer.state_dict())
    ours, theirs = optim.build_optimizer(layer, 0.1, 0.5), optim.build_optimizer(twin, 0.1, 0.5)
    gradients(layer)
    layer.shared.grad = None  # a parameter without a gradient has no slots
    optim.update(ours, layer)
    twin.load_state_dict(layer.state_dict())
    tensors = {name: tensor.clone() for name, tensor in optim.optimizer_tensors(ours, layer).items()}
    assert set(tensors) == set(optim.expected_shapes(layer, tensors))
    assert all(tensors[name].shape == shape for name, shape in optim.expected_shapes(layer, tensors).items())
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    optim.load_optimizer_tensors(theirs, twin, tensors)
    for _ in range(3):
        gradients(layer)
        for mine, other in zip(layer.parameters(), twin.parameters(), strict=True):
            other.grad = mine.grad.clone()
        optim.update(ours, layer)
        optim.update(theirs, twin)
    assert all(map(torch.equal, layer.parameters(), twin.parameters()))
    # torch's optimiser adopts tensors that it is given and writes into them
    assert all(torch.equal(tensors[name], kept[name]) for name in kept)


def test_moments_come_back_from_a_file_laid_out_as_the_weights_are():
    """A fused step on a GPU refuses moments of other strides than the weights'."""
    net = nn.Conv3d(8, 4, 3)
    net.weight.data = net.weight.data.contiguous(memory_format=torch.channels_last_3d)
    optimizer = optim.build_optimizer(net, 0.1, 0.0)
    net(torch.randn(1, 8, 3, 3, 3)).sum().backward()
    optim.update(optimizer, net)
    kept = {name: tensor.contiguous() for name, tensor in optim.optimizer_tensors(optimizer, net).items()}
    fresh = optim.build_optimizer(net, 0.1, 0.0)
    optim.load_optimizer_tensors(fresh, net, kept)
    for slot in ("exp_avg", "exp_avg_sq"):
        assert fresh.state[net.weight][slot].stride() == net.weight.stride() != (216, 27, 9, 3, 1)
        assert torch.equal(fresh.state[net.weight][slot], kept[f"weight/{slot}"])
