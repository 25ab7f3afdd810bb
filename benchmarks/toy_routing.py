"""Does alignment with the principal subspace help? Compare routers on made-up tokens whose right expert is known.

    OMP_NUM_THREADS=1 python benchmarks/toy_routing.py [--out DIR]

One routed residual layer learns x -> x + A_k x, where k is the token's cluster, which only the oracle is told, and A_k
is within reach of one expert: it takes the right expert for each token, and little else. `toy_tokens.py` tells the
three kinds of tokens. A seed draws the maps, the start of the experts and the stream of tokens, the same for all
routers. The step of the balance bias, or the weight of the balance loss, is chosen for each router among as many
multiples of its default, by the mean error over the kinds of tokens on a tuning seed that is not reported.

ERMoE is not here: it compares a token with its surroundings, and these tokens have none; surroundings of the same
cluster would give the answer away, any other would be noise.

Writes runs.csv (a started study goes on from there), tables.md and toy_routing.png.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy import stats
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor
from toy_tokens import VARIANTS, WIDTH, Batch, Problem

from emoe_med.moe import (
    BALANCES,
    ROUTERS,
    MLPExperts,
    MLPOptions,
    MoELayer,
    Routing,
    RoutingStats,
    homogeneity,
    permuted_routing,
    rerouted,
)
from emoe_med.training.optim import build_optimizer, update

EXPERTS, HIDDEN, RANK = 8, 16, 24
STEPS, BATCH, HELD_OUT, LR, WEIGHT_DECAY = 600, 512, 8, 3e-3, 0.01
SEEDS, TUNING_SEEDS = range(5), range(100, 101)
MULTIPLES = (0.25, 1.0, 4.0)  # of the default strength of a balance
KEY = ["variant", "seed", "arm", "multiple"]

EIGEN = {"rank": RANK}  # and the defaults: tracked basis, learned rotation, centred, bias
BARE = EIGEN | {"rotation": "none", "centre": False}
CODE = BARE | {"basis": "paper_code", "gate": "prob"}
NONE = {"balance": "none"}
DENSE = {"dense": HIDDEN, "dense, 8 x as wide": 8 * HIDDEN}  # one expert so wide
ARMS: dict[str, tuple[str, dict[str, Any]]] = {  # name: router, its options
    "oracle": ("random", {}),
    **{name: ("random", {}) for name in DENSE},
    "random": ("random", {}),
    "linear": ("linear", {"noise": 0.0, "balance": "none"}),
    "linear, bias": ("linear", {"noise": 0.0, "balance": "bias"}),
    "linear, sigmoid, sign bias": ("linear", {"noise": 0.0, "score": "sigmoid", "balance": "bias_sign"}),
    "linear, Switch loss": ("linear", {"noise": 0.0, "jitter": 0.01, "balance": "switch"}),
    "linear, V-MoE losses": ("linear", {}),
    "expert choice": ("expert_choice", {}),
    "tracked, rotation": ("eigen", EIGEN),
    "tracked, rotation, uncentred": ("eigen", EIGEN | {"centre": False}),
    "tracked": ("eigen", EIGEN | {"rotation": "none"}),
    "tracked, uncentred": ("eigen", BARE),
    "tracked, uncentred, no balance": ("eigen", BARE | NONE),
    "learned": ("eigen", EIGEN | {"basis": "learned"}),
    "learned, uncentred": ("eigen", EIGEN | {"basis": "learned", "centre": False}),
    "fixed, rotation": ("eigen", EIGEN | {"basis": "fixed"}),
    "fixed": ("eigen", EIGEN | {"basis": "fixed", "rotation": "none"}),
    "published code, bias": ("eigen", CODE),
    "published code, no balance": ("eigen", CODE | NONE),
}
PAIRS = {  # question: the error of the first less that of the second
    "aligned subspace, rotated": ("tracked, rotation", "fixed, rotation"),
    "aligned subspace, not rotated": ("tracked", "fixed"),
    "principal directions or rotated": ("tracked", "tracked, rotation"),
    "default or learned": ("tracked, rotation", "learned"),
    "principal directions or learned": ("tracked", "learned"),
    "centred or not, default": ("tracked, rotation", "tracked, rotation, uncentred"),
    "centred or not, learned": ("learned", "learned, uncentred"),
    "balance for the paper's text": ("tracked, uncentred", "tracked, uncentred, no balance"),
    "balance for the published code": ("published code, bias", "published code, no balance"),
    "default or linear": ("tracked, rotation", "linear, bias"),
    "learned, uncentred, or linear": ("learned, uncentred", "linear, bias"),
}
# how arms are drawn, up to the next name; told apart by every kind of colour vision
STYLES = {"oracle": ("#5b6875", "D"), "linear": ("#D55E00", "s"), "tracked, rotation": ("#0072B2", "o")}


def default_strength(arm: str) -> float | None:
    """Return the default strength of the arm's balance, None where there is nothing to tune."""
    name, options = ARMS[arm]
    balance = BALANCES[getattr(ROUTERS[name][1](**options), "balance", "none")]
    return balance.DEFAULT_STRENGTH or None


def build(arm: str, multiple: float) -> MoELayer:
    """Make the layer; tokens are handed in at unit mean square, and all routers see them as they are."""
    name, options = ARMS[arm]
    if strength := default_strength(arm):
        options = options | {"balance_strength": strength * multiple}
    router_class, options_class = ROUTERS[name]
    count = 1 if arm in DENSE else EXPERTS
    experts = MLPExperts(WIDTH, count, MLPOptions(DENSE.get(arm, HIDDEN)))  # drawn first: the same for all routers
    return MoELayer(router_class(WIDTH, count, 1, options_class(**options)), experts, normalise=False)


def told(layer: MoELayer, arm: str, cluster: Tensor) -> AbstractContextManager[None]:
    """Let the oracle alone know the clusters."""
    if arm != "oracle":
        return nullcontext()
    return rerouted(layer, lambda routing: replace(routing, expert_index=cluster.unsqueeze(1)))


@torch.no_grad()
def evaluate(layer: MoELayer, arm: str, batches: list[Batch]) -> dict[str, float]:
    layer.eval()
    counted, chosen = RoutingStats(layer.router.num_experts), []
    error = permuted = identity = 0.0
    for number, (x, target, cluster) in enumerate(batches):
        with told(layer, arm, cluster):
            out, routing = layer(x.unsqueeze(0))
            with permuted_routing(layer, number):
                shuffled, _ = layer(x.unsqueeze(0))
        counted.update(routing)
        chosen.append(first_expert(routing))
        error += float((out[0] - target).square().sum())
        permuted += float((shuffled[0] - target).square().sum())
        identity += float((x - target).square().sum())
    tokens, _, clusters = (torch.cat(part) for part in zip(*batches, strict=True))
    layer.train()
    return {
        "relMSE": error / identity,
        "routing value": (permuted - error) / identity,
        "CV": counted.summary()["cv"],
        "NMI": float(normalized_mutual_info_score(clusters, torch.cat(chosen))),
        "cosine": homogeneity(layer.experts, tokens).get("output_cosine", np.nan),
        "captured": layer.router.health().get("captured_variance", np.nan),
    }


def first_expert(routing: Routing) -> Tensor:
    """Return the expert with the largest gate of each token, [N]; E where it has none."""
    gate, slot = routing.gate.max(dim=1)
    return torch.where(gate > 0, routing.expert_index.gather(1, slot.unsqueeze(1)).squeeze(1), routing.probs.shape[1])


@lru_cache(maxsize=1)
def batches_of(variant: str, seed: int) -> list[Batch]:
    """Draw the problem of a seed and all its tokens, once for all routers; the last batches are held out."""
    problem, stream = Problem.draw(variant, seed), torch.Generator().manual_seed(1000 + seed)
    return [problem.tokens(BATCH, stream) for _ in range(STEPS + HELD_OUT)]


def train(variant: str, seed: int, arm: str, multiple: float) -> dict[str, float]:
    stream, held_out = batches_of(variant, seed)[:STEPS], batches_of(variant, seed)[STEPS:]
    torch.manual_seed(2000 + seed)
    layer = build(arm, multiple).train()
    optimizer = build_optimizer(layer, LR, WEIGHT_DECAY)
    start = np.nan
    for step, (x, target, cluster) in enumerate(stream):
        with told(layer, arm, cluster):
            out, routing = layer(x.unsqueeze(0))
        optimizer.zero_grad()
        ((out[0] - target).square().mean() + routing.aux_loss).backward()
        update(optimizer, layer)
        if step == 0:  # by then a tracked basis has seen data
            start = evaluate(layer, arm, held_out)["CV"]
    return {**evaluate(layer, arm, held_out), "CV at start": start}


def run_all(path: Path, jobs: list[tuple[str, int, str, float]]) -> pd.DataFrame:
    """Run what the file has not yet, a row at a time; return the rows of these jobs."""
    done = pd.read_csv(path).set_index(KEY) if path.exists() else pd.DataFrame()
    for number, job in enumerate(jobs):
        if job not in done.index:
            start = time.process_time()
            row = {**dict(zip(KEY, job, strict=True)), **train(*job), "cpu_s": time.process_time() - start}
            pd.DataFrame([row]).to_csv(path, mode="a", header=not path.exists(), index=False)
            print(f"{number + 1}/{len(jobs)}", *job, f"relMSE {row['relMSE']:.3f}", file=sys.stderr, flush=True)
    return pd.read_csv(path).set_index(KEY).loc[jobs].reset_index()


def mean_interval(values: pd.Series) -> tuple[float, float]:
    """Return the mean and half its 95 % interval, by Student's t over seeds."""
    return values.mean(), float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)) if len(values) > 1 else np.nan


def tables(runs: pd.DataFrame) -> Iterator[str]:
    for variant, rows in runs.groupby("variant", sort=False):
        yield f"\n{variant}\n\n| router | x | relMSE | load CV | NMI | cosine | routing value | captured |"
        yield "|---|---|---|---|---|---|---|---|"
        for arm, own in rows.groupby("arm", sort=False):
            error, half = mean_interval(own["relMSE"])
            mean = own.drop(columns=["variant", "arm"]).mean()
            known = {name: "" if np.isnan(mean[name]) else f"{mean[name]:.2f}" for name in ("cosine", "captured")}
            multiple = f"{mean['multiple']:g}" if default_strength(str(arm)) else ""
            yield (
                f"| {arm} | {multiple} | {error:.3f} ± {half:.3f} | {mean['CV at start']:.2f} → {mean['CV']:.2f} "
                f"| {mean['NMI']:.2f} | {known['cosine']} | {mean['routing value']:.2f} | {known['captured']} |"
            )
    yield "\n| relMSE of A - B | " + " | ".join(VARIANTS) + " |\n|---|" + "---|" * len(VARIANTS)
    by_seed = runs.pivot(index=["variant", "seed"], columns="arm", values="relMSE")
    for question, (one, other) in PAIRS.items():
        gaps = by_seed[one] - by_seed[other]
        cells = ["{:+.3f} ± {:.3f}".format(*mean_interval(gaps[variant])) for variant in VARIANTS]
        yield f"| {question}: {one} - {other} | " + " | ".join(cells) + " |"


def draw(runs: pd.DataFrame, path: Path) -> None:
    """One panel for each kind of tokens: mean error with its interval, and each seed as a point."""
    figure = Figure(figsize=(9.6, 5.2), layout="constrained")
    panels = figure.subplots(1, len(VARIANTS), sharey=True)
    color = marker = ""
    for axes, variant in zip(panels, VARIANTS, strict=True):
        for row, arm in enumerate(ARMS):
            color, marker = STYLES.get(arm, (color, marker))
            error = runs.query("variant == @variant and arm == @arm")["relMSE"]
            mean, half = mean_interval(error)
            axes.plot(error, [row] * len(error), ".", color=color, alpha=0.35, ms=4, mew=0)
            axes.errorbar(mean, row, xerr=half, fmt=marker, color=color, ms=4.5, capsize=2, lw=1.2)
        axes.set(title=variant, xlabel="error / error of the identity", xlim=(-0.02, 0.85))
        axes.grid(axis="x", color="#dddddd", lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(ARMS)), list(ARMS))
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/toy_routing"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    tuned = [arm for arm in ARMS if default_strength(arm)]
    places = [(variant, seed) for seed in TUNING_SEEDS for variant in VARIANTS]
    trials = run_all(out / "runs.csv", [(*place, arm, m) for place in places for arm in tuned for m in MULTIPLES])
    error = trials.groupby(["arm", "multiple"])["relMSE"].mean().unstack()
    best = {**dict.fromkeys(ARMS, 1.0), **error.idxmin(axis=1)}
    places = [(variant, seed) for seed in SEEDS for variant in VARIANTS]
    runs = run_all(out / "runs.csv", [(*place, arm, best[arm]) for place in places for arm in ARMS])
    text = "\n".join(tables(runs))
    (out / "tables.md").write_text(text + "\n")
    draw(runs, out / "toy_routing.png")
    print(text)


if __name__ == "__main__":
    main()
