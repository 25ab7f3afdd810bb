"""From a configuration to the network."""

from __future__ import annotations

import logging
from pathlib import Path

from emoe_med.errors import ConfigError, Fault
from emoe_med.models.vit import ViT
from emoe_med.models.weights import ViTWeights, load_weights
from emoe_med.vision.config import ALWAYS_LEARN, ViTConfig

LOG = logging.getLogger("emoe_med")


def build_net(config: ViTConfig, channels: int, classes: int, start: ViTWeights | None = None) -> ViT:
    """Build a transformer; the dense part first, so that arms of one seed start from the same weights.

    Raises:
        ConfigError: CFG-FREEZE, a prefix that names no parameter to hold.
        CheckpointError: The weights to start from are of another shape.
    """
    net = ViT(classes, config.options(channels))
    if config.moe is not None:
        layers = {block: config.moe.build(config.width) for block in config.moe.blocks}
        net.insert(layers, config.moe.placement, config.moe.route_prefix)
    if start is not None and not load_weights(net, start, Path(config.weights or "weights")):
        LOG.info("the head of %s is for other classes: it starts anew", config.weights)
    _freeze(net, config.freeze)
    return net


def _freeze(net: ViT, prefixes: tuple[str, ...]) -> None:
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
