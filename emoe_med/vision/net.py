"""From a configuration to the network."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from torch import nn

from emoe_med.errors import ConfigError, Fault
from emoe_med.models.deep_moe import DeepMoE
from emoe_med.models.resnet import ResNet
from emoe_med.models.single_gated import ClassEnsembler, SingleGated
from emoe_med.models.state import load_by_name
from emoe_med.models.vit import ViT
from emoe_med.models.weights import ViTWeights, load_weights
from emoe_med.vision.config import ALWAYS_LEARN, ResNetConfig, ViTConfig

LOG = logging.getLogger("emoe_med")
Net = ViT | ResNet | DeepMoE | SingleGated


def build_net(config: ViTConfig | ResNetConfig, channels: int, classes: int, start: ViTWeights | None = None) -> Net:
    """Build a network; the dense part first, so that arms of one seed start from the same weights.

    Raises:
        ConfigError: CFG-FREEZE, a prefix that names no parameter to hold.
        CheckpointError: The weights to start from are of another shape.
    """
    net = MODELS[config.kind](config, channels, classes)
    if start is not None:
        path = Path(config.weights or "weights")
        if isinstance(net, ViT):
            has_head = load_weights(net, start, path)
        else:
            has_head = load_by_name(net.net if isinstance(net, DeepMoE) else net, start.tensors, path, "fc")
        if not has_head:
            LOG.info("the head of %s is for other classes: it starts anew", config.weights)
    _freeze(net, config.freeze)
    gated = config.single_gated if isinstance(config, ResNetConfig) else None
    return net if gated is None else SingleGated(net, gated.num_experts, gated.stages, ClassEnsembler(), gated.tau)


def _vit(config: ViTConfig, channels: int, classes: int) -> ViT:
    return config.build(classes, channels)


def _resnet(config: ResNetConfig, channels: int, classes: int) -> ResNet | DeepMoE:
    net = ResNet(classes, config.options(channels))
    return net if config.gating is None else DeepMoE(net, 2, channels, classes, config.gating.options())


MODELS: dict[str, Callable[..., ViT | ResNet | DeepMoE]] = {"vit": _vit, "resnet": _resnet}


def _freeze(net: nn.Module, prefixes: tuple[str, ...]) -> None:
    for prefix in prefixes:
        held = [
            parameter
            for name, parameter in net.named_parameters()
            if name.startswith(prefix) and not any(part in name for part in ALWAYS_LEARN)
        ]
        if not held:
            raise ConfigError(Fault("CFG-FREEZE", f"model.freeze {prefix}: no parameter to hold begins so"))
        for parameter in held:
            parameter.requires_grad_(False)
