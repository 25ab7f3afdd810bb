import pytest
import torch
from monai.networks.nets import ResNet as MonaiResNet

from emoe_med.errors import CheckpointError
from emoe_med.models.gates import gated
from emoe_med.models.resnet import ResNet, ResNetOptions
from emoe_med.models.state import load_by_name

SMALL = ResNetOptions(stem="cifar", width=1 / 8)


def built(outputs, **options) -> ResNet:
    with torch.device("meta"):
        return ResNet(outputs, ResNetOptions(**options))


@pytest.mark.parametrize(
    ("options", "parameters"),
    [({"depth": 18}, 11_689_512), ({"depth": 50}, 25_557_032), ({"depth": 50, "inner": 2.0}, 68_883_240)],
)
def test_published_shapes_have_the_published_number_of_parameters(options, parameters):
    assert sum(p.numel() for p in built(1000, **options).parameters()) == parameters


@pytest.mark.parametrize(("depth", "kind", "blocks"), [(18, "basic", [2, 2, 2, 2]), (50, "bottleneck", [3, 4, 6, 3])])
def test_weights_load_by_name_from_another_implementation_and_give_its_logits(depth, kind, blocks):
    torch.manual_seed(depth)
    widths = [8, 16, 32, 64]
    other = MonaiResNet(kind, blocks, widths, 2, 3, conv1_t_stride=2, num_classes=5, bias_downsample=False)
    for module in other.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
            torch.nn.init.normal_(module.running_mean)
    net = ResNet(5, ResNetOptions(depth=depth, width=1 / 8))
    net.load_state_dict(other.state_dict())
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(image).output, other.eval()(image), rtol=1e-4, atol=1e-5)


def test_the_net_can_be_cut_behind_any_stage():
    torch.manual_seed(1)
    net = ResNet(4, SMALL).eval()
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        maps = [net.until(image, stages) for stages in range(5)]
        assert [tuple(x.shape[1:]) for x in maps] == [(8, 32, 32), (8, 32, 32), (16, 16, 16), (32, 8, 8), (64, 4, 4)]
        torch.testing.assert_close(maps[4], net.stages[3](maps[3]))
        for stages, x in enumerate(maps):
            torch.testing.assert_close(net.fc(net.beyond(x, stages)), net(image).output)
        torch.testing.assert_close(net.probed(image)["mean"], maps[4].mean((2, 3)))


def test_a_gated_off_channel_is_a_removed_channel():
    torch.manual_seed(2)
    net, rest = ResNet(4, SMALL).eval(), ResNet(4, SMALL).eval()
    rest.load_state_dict(net.state_dict())
    kept, block = [0, 2, 3, 5], rest.layer1[1]
    block.conv1.weight.data = net.layer1[1].conv1.weight[kept]
    block.bn1 = torch.nn.BatchNorm2d(4).eval()
    block.conv2.weight.data = net.layer1[1].conv2.weight[:, kept]
    gate = torch.zeros(1, 8)
    gate[:, kept] = 1
    image = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        with gated(net.places(), {"layer1.1.conv1": gate}):
            found = net(image).output
        torch.testing.assert_close(found, rest(image).output)
        assert (found - net(image).output).abs().max() > 1e-3


def test_weights_of_another_width_are_refused_and_another_head_starts_anew(tmp_path):
    torch.manual_seed(4)
    source, net = ResNet(7, SMALL), ResNet(4, SMALL)
    before = net.fc.weight.clone()
    assert not load_by_name(net, source.state_dict(), tmp_path, "fc")
    torch.testing.assert_close(net.layer4[1].conv2.weight, source.layer4[1].conv2.weight)
    torch.testing.assert_close(net.fc.weight, before)
    assert load_by_name(ResNet(7, SMALL), source.state_dict(), tmp_path, "fc")
    with pytest.raises(CheckpointError, match=r"conv1\.weight has shape"):
        load_by_name(ResNet(7, ResNetOptions(stem="cifar")), source.state_dict(), tmp_path, "fc")
    with pytest.raises(ValueError, match="no channel"):
        ResNetOptions(width=0.001)


@pytest.mark.parametrize("norms", [lambda net: net, torch.nn.SyncBatchNorm.convert_sync_batchnorm])
def test_a_norm_that_is_held_keeps_its_statistics(norms):
    net = ResNet(4, SMALL)
    for parameter in net.layer1.parameters():
        parameter.requires_grad_(False)
    net = norms(net)
    held, learns = (net.get_submodule(f"{layer}.0.bn1").running_mean.clone() for layer in ("layer1", "layer2"))
    net.train()
    assert [part[0].bn1.training for part in net.stages] == [False, True, True, True]
    if isinstance(net.bn1, torch.nn.SyncBatchNorm):
        return  # runs on GPUs alone
    net(torch.randn(4, 3, 16, 16) + 3)
    assert torch.equal(net.layer1[0].bn1.running_mean, held)
    assert not torch.equal(net.layer2[0].bn1.running_mean, learns)
