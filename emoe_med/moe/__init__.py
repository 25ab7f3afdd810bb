"""The router core: eigenbasis-routed mixture of experts on tokens [N, D], torch alone.

    from emoe_med.moe import EigenOptions, EigenRouter, MLPExperts, MLPOptions, MoELayer

`ROUTERS` and `EXPERTS` are all there is to choose from: name -> (class, its options).
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from emoe_med.moe.balance import BiasBalance
from emoe_med.moe.basis import TrackedBasis, orthonormality_error, random_orthonormal, retract
from emoe_med.moe.experts.mlp import MLPExperts, MLPOptions
from emoe_med.moe.layer import MoELayer
from emoe_med.moe.router import Router, Routing
from emoe_med.moe.routers.eigen import EigenOptions, EigenRouter
from emoe_med.moe.routers.fixed import RandomOptions, RandomRouter
from emoe_med.moe.stats import RoutingStats, load_statistics

ROUTERS: dict[str, tuple[Callable[..., Router], Any]] = {
    "eigen": (EigenRouter, EigenOptions),
    "random": (RandomRouter, RandomOptions),
}
EXPERTS: dict[str, tuple[Callable[..., nn.Module], Any]] = {
    "mlp": (MLPExperts, MLPOptions),
}

__all__ = [
    "EXPERTS",
    "ROUTERS",
    "BiasBalance",
    "EigenOptions",
    "EigenRouter",
    "MLPExperts",
    "MLPOptions",
    "MoELayer",
    "RandomOptions",
    "RandomRouter",
    "Router",
    "Routing",
    "RoutingStats",
    "TrackedBasis",
    "load_statistics",
    "orthonormality_error",
    "random_orthonormal",
    "retract",
]
