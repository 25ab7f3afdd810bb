"""What the gate of a single-gated mixture does, and what its choices and its early exit are worth, for any task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor

from emoe_med.models.single_gated import SingleGated, weigh
from emoe_med.moe import Routing, RoutingStats, TokenSample, output_homogeneity
from emoe_med.training.routing_report import PERMUTATIONS

TAUS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.99)  # 0.5 and 0.75 are the paper's


@torch.no_grad()
def describe_gate(
    whole: SingleGated,
    batches: Iterable[tuple[Mapping[str, Any], Tensor]],
    error: Callable[[Tensor, Mapping[str, Any]], Tensor],
    compare: Callable[[np.ndarray, np.ndarray], Mapping[str, Any]],
    score: Callable[[np.ndarray], Mapping[str, Any]],
    metric: str,
    autocast: Callable[[], torch.autocast],
    label: str | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tell how the gate loads the experts, what it is worth, and what each exit threshold costs and gives.

    Args:
        whole: The mixture, in evaluation mode.
        batches: Of the evaluation set: whatever `error` needs, and the images.
        error: Returns the error [B], at least 0, of outputs [B, O] for a batch.
        compare: Estimates the mean of the first errors [S] minus the mean of the second, with its interval.
        score: Estimates the metric of the curve from errors [S].
        metric: Name of the mean error.
        autocast: The precision that the run predicts in.
        label: Name of the class in a batch, where there is one.

    Returns:
        Routing as `routing_report.describe_routing` has it, as of one layer: `RoutingStats.summary` of the likeliest
        expert, homogeneity of the experts' outputs, gains in error over the mixture as it is of the base alone
        (`<metric>_without_branch`) and of another image's experts (`<metric>_permuted_routing`); and with classes `nmi`
        of expert and class (arithmetic).
        Early exit: multiply-accumulates `macs` of an image (base, gate, and each expert that runs), and the `curve`: by
        `tau` (0 is the base alone; None is one expert always) the `score`, mean `macs`, and share `answered_alone`.
    """
    count = len(whole.experts)
    taus: list[float | None] = [*(TAUS if whole.ensembler.has_confidence else TAUS[:1]), None]
    stats, sample = RoutingStats(count), TokenSample()
    pairs: list[np.ndarray] = []
    generators = [torch.Generator().manual_seed(seed) for seed in range(PERMUTATIONS)]
    errors: dict[Any, list[np.ndarray]] = {}
    experts: dict[Any, list[np.ndarray]] = {}
    cost: dict[str, int] = {}
    for batch, image in batches:
        cost = cost or whole.cost(image[:1])
        with autocast():
            answers = whole.answers(image)
        chosen = {tau: weigh(answers.probs, answers.confidence, tau) for tau in {*taus, whole.tau}}
        own = chosen[whole.tau]
        shuffled = [own[torch.randperm(len(own), generator=generator).to(own.device)] for generator in generators]
        for key, weights in [*chosen.items(), *((("permuted", seed), other) for seed, other in enumerate(shuffled))]:
            found = error(whole.joined(answers.outputs, weights), batch)
            errors.setdefault(key, []).append(found.double().cpu().numpy())
            experts.setdefault(key, []).append((weights > 0).sum(1).cpu().numpy())
        gate, index = answers.probs.max(1, keepdim=True)
        stats.update(Routing(index, gate, answers.probs, gate.new_zeros(())))
        sample.update(answers.outputs[:, 1:].float().flatten(1))
        if label is not None:
            pairs.append(np.stack([index.squeeze(1).cpu().numpy(), batch[label].cpu().numpy()]))
    by = {key: np.concatenate(parts) for key, parts in errors.items()}
    ran = {key: np.concatenate(parts) for key, parts in experts.items()}
    permuted = np.mean([by["permuted", seed] for seed in range(PERMUTATIONS)], axis=0)
    routing: dict[str, Any] = {
        **stats.summary(),
        **(output_homogeneity(sample.tokens.unflatten(1, (count, -1)).transpose(0, 1)) if count > 1 else {}),
        f"{metric}_without_branch": compare(by[0.0], by[whole.tau]),
        f"{metric}_permuted_routing": compare(permuted, by[whole.tau]),
    }
    if pairs:
        routing["nmi"] = float(normalized_mutual_info_score(*np.concatenate(pairs, axis=1)))
    curve = [
        {
            "tau": tau,
            "score": score(by[tau]),
            "macs": cost["base"] + cost["gate"] + cost["expert"] * float(ran[tau].mean()),
            "answered_alone": float((ran[tau] == 0).mean()),
        }
        for tau in taus
    ]
    return routing, {"tau": whole.tau, "macs": cost, "curve": curve}
