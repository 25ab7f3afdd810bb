from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from emoe_med.models.deep_moe import DeepMoE, DeepMoEOptions
from emoe_med.models.gates import gated
from emoe_med.models.resnet import ResNet, ResNetOptions
from emoe_med.models.sfcn import SFCN, SFCNOptions


def resnet(depth=18, convolutions="all", **options) -> DeepMoE:
    torch.manual_seed(depth)
    net = ResNet(5, ResNetOptions(depth=depth, stem="cifar", width=1 / 8))
    return DeepMoE(net, 2, 3, 5, DeepMoEOptions((8, 12), convolutions, **options))


def sfcn(**options) -> DeepMoE:
    torch.manual_seed(2)
    net = SFCN(5, SFCNOptions(channels=(8, 12), pooled=1, neck=6, dropout=0.0))
    return DeepMoE(net, 3, 1, 5, DeepMoEOptions((8, 12), **options))


NETS = {
    "resnet18": lambda **options: (resnet(**options), (3, 16, 16)),
    "resnet50, inner": lambda **options: (resnet(50, "inner", **options), (3, 16, 16)),
    "sfcn": lambda **options: (sfcn(**options), (1, 8, 8, 8)),
}


def built(name, **options):
    """A network in evaluation mode whose norms are not the identity, and an input of two samples."""
    model, shape = NETS[name](**options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
    return model.eval(), torch.randn(2, *shape)


def half_off(model):
    """Turn off about half of the channels of each layer, other ones for other samples."""
    nn.init.normal_(model.gate.weight)
    return model


def test_multiply_adds_by_hand():
    net = SFCN(1, SFCNOptions(channels=(2, 3), pooled=0, neck=2))
    model = DeepMoE(net, 3, 1, 1, DeepMoEOptions(embedding=(2, 4)))
    gates = {
        "blocks.0": torch.tensor([[0.3, 0.0], [1.0, 2.0]]),
        "blocks.1": torch.tensor([[1.0, 0.0, 0.1], [1.0, 1.0, 1.0]]),
    }
    macs, full = model.macs(torch.zeros(1, 1, 4, 4, 4), gates)
    first, second, neck, head = 64 * 27 * 1 * 2, 64 * 27 * 2 * 3, 64 * 3 * 2, 2
    gating = 8 * 27 * 1 * 2 + 1 * 27 * 2 * 4 + 4 * (2 + 3)
    assert full == first + second + neck + head + gating
    part = first * 1 / 2 + second * 1 / 2 * 2 / 3 + neck * 2 / 3 + head + gating
    assert macs.tolist() == pytest.approx([part, full])


def test_gates_by_hand():
    model = sfcn()
    nn.init.zeros_(model.gate.weight)
    model.gate.weight.data[0, :2] = torch.tensor([1.0, -0.5])
    model.gate.weight.data[9, 3] = -1.0
    embedded = torch.tensor([[2.0, 1.0, 0.0, 3.0, *[0.0] * 8]])
    gates = model._gates(embedded)
    assert {name: gate.shape for name, gate in gates.items()} == {"blocks.0": (1, 8), "blocks.1": (1, 12)}
    assert gates["blocks.0"][0, 0].item() == pytest.approx((2 - 0.5) * 10 / 12)
    assert torch.count_nonzero(torch.cat([*gates.values()], 1)) == 1  # the other one is below 0


def test_gates_start_at_about_one():
    model, image = built("resnet18")
    for module in model.embedding.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
    gates = torch.cat([*model.train()(torch.randn(64, *image.shape[1:])).gates.values()], 1)
    assert gates.mean().item() == pytest.approx(1, abs=0.15)
    assert (gates > 0).float().mean() > 0.95


@pytest.mark.parametrize("name", NETS)
def test_every_convolution_has_its_place_and_the_wide_ones_their_gates(name):
    model, _ = built(name)
    places = model.net.places()
    known = {id(place.convolution) for place in places.values()}
    heads = ("head",) if name == "sfcn" else ()
    for found, module in model.net.named_modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d) and found not in heads:
            assert id(module) in known, found
    assert len(known) == len(places)
    # those of the published ResNet-18 are 17
    assert len(model.sizes) == {"resnet18": 17, "resnet50, inner": 32, "sfcn": 2}[name]


@pytest.mark.parametrize("name", NETS)
def test_what_is_counted_is_what_runs_one_sample_at_a_time_and_the_answer_is_the_same(name):
    model, image = built(name)
    half_off(model)
    image[1] += 3
    own_answer = 12 * 5
    with torch.no_grad():
        both = model(image)
        macs, full = model.macs(image[:1], both.gates)
        assert macs[0] != macs[1]
        assert 0 < macs.max() < full
        for number in range(2):
            with FlopCounterMode(display=False) as counter:
                alone = model(image[number : number + 1])
            assert counter.get_total_flops() / 2 == pytest.approx(macs[number].item() + own_answer, rel=1e-9)
            torch.testing.assert_close(alone.output[0], both.output[number], rtol=1e-4, atol=1e-5)
    assert "forward" not in vars(model.net.places()["neck" if name == "sfcn" else "conv1"].convolution)


def test_a_layer_without_a_channel_runs():
    model, image = built("resnet18")
    nn.init.constant_(model.gate.weight, -1.0)
    with torch.no_grad():
        both, alone = model(image), model(image[:1])
    assert all((gate == 0).all() for gate in both.gates.values())
    torch.testing.assert_close(alone.output[0], both.output[0])


@pytest.mark.parametrize("name", NETS)
def test_gates_of_one_leave_the_network_as_it_is(name):
    model, image = built(name)
    ones = {layer: torch.ones(2, size) for layer, size in model.sizes.items()}
    with torch.no_grad(), gated(model.net.places(), ones):
        found = model.net(image).output
    with torch.no_grad():
        assert torch.equal(found, model.net(image).output)


def test_a_gate_scales_its_channel():
    model, image = built("resnet18")
    gate = torch.ones(2, 8)
    gate[1, 3] = 2.0
    seen = []
    handle = model.net.layer1[0].bn1.register_forward_hook(lambda module, given, x: seen.append(x))
    with torch.no_grad():
        model.net(image)
        with gated(model.net.places(), {"layer1.0.conv1": gate}):
            handle.remove()
            handle = model.net.layer1[0].conv2.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
            model.net(image)
    expected = seen[0].relu()
    expected[1, 3] *= 2
    torch.testing.assert_close(seen[1], expected)


@pytest.mark.parametrize("name", NETS)
def test_embedding_and_gates_learn_from_the_task_in_the_first_stage_alone(name):
    model, image = built(name, sparsity=0.0)
    model.train()
    model(image).output.square().sum().backward()
    first = model.embedding[0].conv.weight.grad
    assert first.abs().sum() > 0
    assert model.gate.weight.grad.abs().sum() > 0
    assert model.answer.weight.grad is None  # only its own loss reaches it
    model.zero_grad(set_to_none=True)
    model.hold_gating(True)
    before = [buffer.clone() for buffer in model.embedding.buffers()]
    out = model(image)
    assert (out.side_output, out.aux_loss.item()) == (None, 0)
    out.output.square().sum().backward()
    assert all(parameter.grad is None for part in (model.embedding, model.gate) for parameter in part.parameters())
    assert next(model.net.parameters()).grad.abs().sum() > 0
    model.train()  # as every epoch does
    model(image)
    assert all(torch.equal(a, b) for a, b in zip(before, model.embedding.buffers(), strict=True))


def test_losses_are_ready_to_add():
    model, image = built("resnet18", sparsity=0.5)
    out = model(image)
    norm = sum(gate.sum() for gate in out.gates.values()) / 2
    torch.testing.assert_close(out.aux_loss, 0.5 * norm)
    assert out.side_output.shape == (2, 5)
    out.side_output.sum().backward()
    assert model.embedding[0].conv.weight.grad.abs().sum() > 0


def test_the_network_keeps_its_names(tmp_path: Path):
    model, _ = built("resnet18")
    names = {name.removeprefix("net.") for name in model.state_dict() if name.startswith("net.")}
    assert names == set(model.net.state_dict())
    assert {name.split(".")[0] for name in model.state_dict()} == {"net", "embedding", "answer", "gate"}
