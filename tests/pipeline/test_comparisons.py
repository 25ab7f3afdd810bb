"""Every arm of the comparisons is built from its file and takes one step."""

from pathlib import Path

import pytest
import torch

from emoe_med.brainage.net import BrainAgeNet
from emoe_med.models.heads import TrainingAges
from emoe_med.pipeline.plan import plan, read_pipeline
from emoe_med.vision.net import build_net

OTHERS = ("deepmoe", "single_gated", "resnet", "ermoe_ba")
PIPELINES = Path(__file__).parents[2] / "pipelines"


def arms(name):
    path = PIPELINES / f"{name}.yaml"
    return {job.arm.name: job.arm for job in plan(read_pipeline(path), path)}


def step(net, image):
    out = net(image)
    (out.output.float().pow(2).mean() + out.aux_loss).backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    for layer in net.routed_layers().values():
        layer.after_step()
    return out


@pytest.mark.parametrize(("name", "least"), [("comparison_ixi", 16), ("comparison_cifar10", 16)])
def test_arms_differ_in_what_their_file_says_and_take_a_step(name, least):
    found = arms(name)
    assert len({(arm.config.data, arm.config.augment, arm.config.evaluation) for arm in found.values()}) == 1
    # the nets that differ in more than the routed layer have tests of their own
    like = [arm for name, arm in found.items() if not any(part in name for part in OTHERS)]
    assert len(like) >= least
    for arm in like:
        config = arm.config
        torch.manual_seed(0)
        if arm.task == "brainage":
            net, image = BrainAgeNet(config.model, TrainingAges.of([20.0, 50.0, 80.0])), torch.rand(2, 1, 40, 48, 40)
        else:
            net, image = build_net(config.model, 3, 10), torch.rand(2, 3, 32, 32)
        step(net, image)
    assert len({arm.config.training for arm in like}) == 1
    assert len({arm.key for arm in found.values()}) == len(found)
