"""What the routed layers of a trained model do, and what they and their choices are worth, for any task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np

from emoe_med.moe import (
    MoELayer,
    RoutingStats,
    TokenSample,
    branch_norms,
    collected_routing,
    collected_tokens,
    homogeneity,
    permuted_routing,
    without_branch,
)

PERMUTATIONS = 5  # draws of permuted routing; their mean error is compared


def describe_routing(
    layers: Mapping[str, MoELayer],
    errors: Callable[[], np.ndarray],
    compare: Callable[[np.ndarray, np.ndarray], Mapping[str, Any]],
    metric: str,
) -> dict[str, Any]:
    """Tell of each layer its load, scale, health and homogeneity, and the error it saves.

    Args:
        layers: Routed layers of one model, by name.
        errors: Runs the model over the evaluation set and returns the error [S] of each sample, at least 0.
        compare: Estimates the mean of the first errors minus the mean of the second, with its interval.
        metric: Name of the mean error.

    Returns:
        By layer: `RoutingStats.summary`, `branch_over_stream`, `alpha`, the router's `health`, `homogeneity`,
        and `<metric>_without_branch` and `<metric>_permuted_routing`: gains in error over the model as it is.
    """
    stats = {name: RoutingStats(layer.router.num_experts) for name, layer in layers.items()}
    samples = {name: TokenSample() for name in layers}
    with ExitStack() as stack:
        norms = {name: stack.enter_context(branch_norms(layer)) for name, layer in layers.items()}
        for name, layer in layers.items():
            stack.enter_context(collected_tokens(layer, samples[name]))
            stack.enter_context(collected_routing(layer, stats[name]))
        intact = errors()
    report = {}
    for name, layer in layers.items():
        summary: dict[str, Any] = stats[name].summary()
        summary["branch_over_stream"] = float(np.mean(norms[name]))
        summary["alpha"] = float(layer.alpha.detach())
        summary |= layer.router.health()
        summary |= homogeneity(layer.experts, samples[name].tokens.to(layer.alpha.device))
        with without_branch(layer):
            summary[f"{metric}_without_branch"] = compare(errors(), intact)
        if layer.router.num_experts > 1:
            draws = []
            for seed in range(PERMUTATIONS):
                with permuted_routing(layer, seed):
                    draws.append(errors())
            summary[f"{metric}_permuted_routing"] = compare(np.mean(draws, axis=0), intact)
        report[name] = summary
    return report
