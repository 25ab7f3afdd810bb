"""The router core: eigenbasis-routed mixture of experts on tokens [N, D], torch alone.

    from emoe_med.moe import EigenOptions, EigenRouter, MLPExperts, MLPOptions, MoELayer

`ROUTERS` and `EXPERTS` are all there is to choose from: name -> (class, its options).
"""

from typing import Any

from emoe_med.moe.balance import BALANCES
from emoe_med.moe.basis import TokenMoments, TrackedBasis, orthonormality_error, random_orthonormal, retract
from emoe_med.moe.dispatch import forget_copies
from emoe_med.moe.engines import Weights
from emoe_med.moe.experts.base import Experts
from emoe_med.moe.experts.eigen import EigenExpertOptions, EigenExperts
from emoe_med.moe.experts.mlp import MLPExperts, MLPOptions
from emoe_med.moe.homogeneity import TokenSample, collected_tokens, homogeneity, output_homogeneity
from emoe_med.moe.interventions import (
    ablated_expert,
    permuted_routing,
    random_routing,
    rerouted,
    without_branch,
    worst_routing,
)
from emoe_med.moe.layer import MoELayer
from emoe_med.moe.published import load_published, retract_before_training
from emoe_med.moe.router import Place, Router, Routing, StepSums
from emoe_med.moe.routers.eigen import EigenOptions, EigenRouter
from emoe_med.moe.routers.ermoe import ERMoEOptions, ERMoERouter
from emoe_med.moe.routers.expert_choice import ExpertChoiceOptions, ExpertChoiceRouter
from emoe_med.moe.routers.fixed import HashOptions, HashRouter, RandomOptions, RandomRouter
from emoe_med.moe.routers.linear import LinearOptions, LinearRouter
from emoe_med.moe.stats import RoutingStats, branch_norms, changed_share, collected_routing, load_statistics

ROUTERS: dict[str, tuple[type[Any], Any]] = {
    "eigen": (EigenRouter, EigenOptions),
    "ermoe": (ERMoERouter, ERMoEOptions),
    "linear": (LinearRouter, LinearOptions),
    "expert_choice": (ExpertChoiceRouter, ExpertChoiceOptions),
    "random": (RandomRouter, RandomOptions),
    "hash": (HashRouter, HashOptions),
}
EXPERTS: dict[str, tuple[type[Any], Any]] = {
    "mlp": (MLPExperts, MLPOptions),
    "eigen": (EigenExperts, EigenExpertOptions),
}

__all__ = [
    "BALANCES",
    "EXPERTS",
    "ROUTERS",
    "ERMoEOptions",
    "ERMoERouter",
    "EigenExpertOptions",
    "EigenExperts",
    "EigenOptions",
    "EigenRouter",
    "ExpertChoiceOptions",
    "ExpertChoiceRouter",
    "Experts",
    "HashOptions",
    "HashRouter",
    "LinearOptions",
    "LinearRouter",
    "MLPExperts",
    "MLPOptions",
    "MoELayer",
    "Place",
    "RandomOptions",
    "RandomRouter",
    "Router",
    "Routing",
    "RoutingStats",
    "StepSums",
    "TokenMoments",
    "TokenSample",
    "TrackedBasis",
    "Weights",
    "ablated_expert",
    "branch_norms",
    "changed_share",
    "collected_routing",
    "collected_tokens",
    "forget_copies",
    "homogeneity",
    "load_published",
    "load_statistics",
    "orthonormality_error",
    "output_homogeneity",
    "permuted_routing",
    "random_orthonormal",
    "random_routing",
    "rerouted",
    "retract",
    "retract_before_training",
    "without_branch",
    "worst_routing",
]
