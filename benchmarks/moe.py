"""Time the routed layer against the dense work it cannot avoid, and against running every expert.

    OMP_NUM_THREADS=1 python benchmarks/moe.py [--device cpu|cuda] [--rounds 15] [--cases b192]

One idea: every ratio comes from one interleaved run. Each round runs every variant of a case once, in alternating
order; the ratio is taken within the round, and the median over rounds is printed. Time is process CPU time at one
thread (CUDA: events), so that a shared machine disturbs it little. A step is a forward and a backward pass with the
gradients of tokens and all parameters, as it is after an optimiser step: no copy of a weight survives from the last.

Variants, all on the same tokens [N, D], with E = 8, top-1, r = min(128, D), no layer norm and the same load:

- floor: one dense MLP D -> b -> D with GELU and residual: the work of the chosen experts.
- routed floor: the same, its output weighted by the gate of our router; still one expert.
- layer: `MoELayer` with a learned basis and a balance bias, in training mode; it counts its load and takes the
  moments of 64 tokens.
- tracked: the layer by default, with its upkeep: the covariance is observed, the basis moved once a step.
- all_experts: the published layer (arXiv 2601.12137) in our own words: every expert runs on all tokens and is masked,
  both frames are orthonormalised by QR in every training pass.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from emoe_med.models.sfcn import SFCN, SFCNOptions
from emoe_med.moe import EigenOptions, EigenRouter, MLPExperts, MLPOptions, MoELayer, TrackedBasis

EXPERTS = 8
RANK = 128
MALLOC = "MALLOC_MMAP_THRESHOLD_"  # glibc; without it, tensors above 32 MB are mapped and unmapped each time


def nothing() -> None:
    pass


@dataclass(frozen=True)
class Work:
    """What to time, and what has to be restored before it, untimed."""

    run: Callable[[], object]
    restore: Callable[[], object] = nothing


@dataclass(frozen=True)
class Case:
    """A layer, its tokens, and what is aimed at: by column the bound and, in one number more, that under MALLOC."""

    name: str
    width: int
    hidden: int
    tokens: int
    bf16: bool = False
    zipf: bool = False
    goals: dict[str, tuple[float, ...]] = field(default_factory=dict)


NARROW = {"layer / routed floor": (1.12,), "layer / floor": (1.50,), "all_experts / layer": (5.5,), "peak": (1.25,)}
WIDE = {"layer / routed floor": (1.22, 1.15), "layer / floor": (1.25,)}
CASES = (
    Case("b192 N196", 768, 192, 196, goals={"all_experts / layer": (3.5,)}),
    Case("b192 N1568", 768, 192, 1568, goals=NARROW),
    Case("b192 N6272", 768, 192, 6272, goals=NARROW),
    Case("b192 N1568 Zipf", 768, 192, 1568, zipf=True, goals={"Zipf / even": (1.18,)}),
    Case("b3072 N1568", 768, 3072, 1568, goals=WIDE),
    Case("3-D D128 b512", 128, 512, 13824, goals={"layer / routed floor": (1.15,), "layer / floor": (1.40,)}),
    Case("3-D D256 b1024", 256, 1024, 13824, goals={"layer / routed floor": (1.15,), "layer / floor": (1.25,)}),
    Case("b192 N1568 bf16", 768, 192, 1568, bf16=True, goals={"layer / routed floor": (1.25,)}),
    Case("b192 N6272 bf16", 768, 192, 6272, bf16=True, goals={"layer / routed floor": (1.25,)}),
    Case("b3072 N1568 bf16", 768, 3072, 1568, bf16=True, goals={"layer / routed floor": (1.85, 1.30)}),
    Case("3-D D128 b512 bf16", 128, 512, 13824, bf16=True, goals={"layer / routed floor": (1.25,)}),
    Case("3-D D256 b1024 bf16", 256, 1024, 13824, bf16=True, goals={"layer / routed floor": (1.25,)}),
)
# a batch that fills a GPU; at the sizes above it waits for its kernels to be launched
GPU_CASES = (
    Case("b192 N50176 bf16", 768, 192, 50176, bf16=True, goals={"layer / routed floor": (1.25,)}),
    Case("b3072 N50176 bf16", 768, 3072, 50176, bf16=True, goals={"layer / routed floor": (1.25,)}),
    Case("3-D D256 b1024 N110592 bf16", 256, 1024, 110592, bf16=True, goals={"layer / routed floor": (1.25,)}),
)
AT_LEAST = "all_experts / layer"  # all other goals are upper bounds


class Dense(nn.Module):
    """x + g GELU(x w1) w2, g = 1 or the router's gate, multiplied on where there are fewer numbers."""

    def __init__(self, width: int, hidden: int, router: EigenRouter | None = None) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(width, hidden) * width**-0.5)
        self.w2 = nn.Parameter(torch.randn(hidden, width) * hidden**-0.5)
        self.router = router

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(x @ self.w1)
        if self.router is None:
            return x + hidden @ self.w2
        gate = self.router(x, None).gate  # ty: ignore[invalid-argument-type]
        gate = gate.to(hidden.dtype)
        narrow = self.w1.shape[1] < self.w1.shape[0]
        return x + (hidden * gate) @ self.w2 if narrow else x + gate * (hidden @ self.w2)


class AllExperts(nn.Module):
    """The published layer as its description has it: no expert is skipped unless no token chose it."""

    def __init__(self, width: int, hidden: int, router: EigenRouter) -> None:
        super().__init__()
        self.Q, self.P = (nn.Parameter(router.basis().detach().clone()) for _ in range(2))
        self.gamma, self.mix_logits, self.expert_bias = router.gamma, router.mix_logits, router.expert_bias
        self.alpha = nn.Parameter(torch.ones(()))
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, width, bias=False))
            for _ in range(EXPERTS)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            for frame in (self.Q, self.P):
                frame.copy_(torch.linalg.qr(frame).Q)
        squares = (x @ self.Q).square()
        energies = squares / (squares.sum(-1, keepdim=True) + 1e-6)
        scores = (energies * self.gamma) @ self.mix_logits.softmax(-1) + self.expert_bias
        probs = scores.softmax(-1)
        chosen = probs.argmax(-1)
        branch = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = chosen == e
            if mine.any():
                branch = branch + expert(x) * (probs[:, e] * mine).unsqueeze(-1)
        unit = torch.eye(self.Q.shape[1], device=x.device)
        penalty = sum((frame.T @ frame - unit).square().sum() for frame in (self.Q, self.P))
        return x + self.alpha * branch, 5e-4 * penalty


@torch.no_grad()
def set_load(router: EigenRouter, x: Tensor, zipf: bool) -> Tensor:
    """Move the router's expert bias until its load is even, or Zipf's; a fresh one is skewed. Returns the shares."""
    wanted = 1 / torch.arange(1, EXPERTS + 1, device=x.device) if zipf else torch.ones(EXPERTS, device=x.device)
    wanted = wanted / wanted.sum()
    router.eval()
    spread = router(x, None).probs.log().std(0).mean()  # ty: ignore[invalid-argument-type]
    for step in range(200):
        load = router(x, None).load() / len(x)  # ty: ignore[invalid-argument-type]
        router.expert_bias += spread * 0.97**step * (wanted - load) / wanted.clamp_min(load)
    return router(x, None).load() / len(x)  # ty: ignore[invalid-argument-type]


def make_router(width: int, x: Tensor, zipf: bool, basis: str, balance: str) -> EigenRouter:
    torch.manual_seed(1)
    options = EigenOptions(rank=RANK, basis=basis, balance=balance)  # ty: ignore[invalid-argument-type]
    router = EigenRouter(width, EXPERTS, 1, options).to(x.device)
    for _ in range(3 if basis == "tracked" else 0):  # past the first step, which is an eigendecomposition
        router.moments.observe(x)
        router.moments.after_step()
    set_load(router, x, zipf)
    return router


def make_layer(case: Case, x: Tensor, basis: str, zipf: bool) -> MoELayer:
    router = make_router(case.width, x, zipf, basis, "bias")
    experts = MLPExperts(case.width, EXPERTS, MLPOptions(hidden=case.hidden, zero_init=False))
    return MoELayer(router, experts, normalise=False).to(x.device).train()


def step_of(
    case: Case, x: Tensor, module: nn.Module, forward: Callable[[Tensor], object], after: Callable[[], object] = nothing
) -> Callable[[], object]:
    """Forward and backward with the gradients of x and every parameter."""
    inputs, up = [x, *module.parameters()], torch.randn_like(x)

    def step() -> object:
        increment_version(inputs[1:])  # as an optimiser does
        with torch.autocast(x.device.type, torch.bfloat16, enabled=case.bf16):
            found = forward(x)
        outputs = [out for out in (found if isinstance(found, tuple) else (found,)) if _has_gradient(out)]
        gradients = torch.autograd.grad(outputs, inputs, [up, *(torch.ones_like(out) for out in outputs[1:])])
        after()
        return gradients

    return step


def _has_gradient(out: object) -> bool:
    return isinstance(out, Tensor) and out.requires_grad


def variants(case: Case, device: str) -> tuple[dict[str, Work], Tensor]:
    """Return the step of each variant, and the load of the router that they share."""
    torch.manual_seed(0)
    x = torch.randn(case.tokens, case.width, device=device).requires_grad_()
    batch = x.detach().view(1, *x.shape).requires_grad_()

    def dense(module: nn.Module) -> Work:
        module.to(device)
        return Work(step_of(case, x, module, module))

    def routed(zipf: bool = case.zipf, compiled: bool = False) -> Work:
        layer = make_layer(case, x, "learned", zipf)
        forward = torch.compile(layer) if compiled else layer
        return Work(step_of(case, batch, layer, lambda tokens: forward(tokens)[0]))

    def tracked() -> Work:
        layer = make_layer(case, x, "tracked", case.zipf)
        before = {name: value.clone() for name, value in layer.router.state_dict().items()}
        step = step_of(case, batch, layer, lambda tokens: layer(tokens)[0], layer.after_step)
        return Work(step, lambda: layer.router.load_state_dict(before))  # else the load wanders off

    router = make_router(case.width, x, case.zipf, "learned", "none")
    found = {
        "floor": dense(Dense(case.width, case.hidden)),
        "routed floor": dense(Dense(case.width, case.hidden, router)),
        "layer": routed(),
        "tracked": tracked(),
        "all_experts": dense(AllExperts(case.width, case.hidden, router)),
    }
    if case.zipf:
        found["even"] = routed(zipf=False)
    if device == "cuda" and case.bf16:  # torch compiles grouped_mm in bfloat16 alone
        found["compiled"] = routed(compiled=True)
    with torch.no_grad():
        return found, router(x, None).load() / case.tokens  # ty: ignore[invalid-argument-type]


def seconds(work: Work, device: str) -> float:
    work.restore()
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work.run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    start = time.process_time()
    work.run()
    return time.process_time() - start


def interleaved(works: dict[str, Work], rounds: int, device: str) -> dict[str, list[float]]:
    """Run every work once a round, forwards and backwards in turn, after a warm-up of two rounds."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(-2, rounds):
        for name in list(works)[:: 1 if number % 2 else -1]:
            taken = seconds(works[name], device)
            if number >= 0:
                times[name].append(taken)
    return times


def ratio(times: dict[str, list[float]], above: str, below: str) -> float:
    return median(a / b for a, b in zip(times[above], times[below], strict=True))


def peak_bytes(work: Work, device: str) -> int:
    """Return the most memory that a step holds above its start, its gradients included; exact, by allocations."""
    if device == "cuda":
        start = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work.run()
        return torch.cuda.max_memory_allocated() - start
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work.run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["name"] == "[memory]"]
    return int(max(accumulate(e["args"]["Bytes"] for e in sorted(events, key=lambda e: e["ts"]))))


def host_waits(work: Work) -> int:
    """Count how often a step makes the host wait for the GPU."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


def cell(value: float, goal: tuple[float, ...] | None, at_least: bool = False) -> str:
    """Write a figure with its goal; a missed one is bold."""
    if goal is None:
        return f"{value:.2f}"
    bound = goal[-1] if MALLOC in os.environ else goal[0]
    met = value >= bound if at_least else value <= bound
    return f"{value:.2f} {'≥' if at_least else '≤'} {bound:.2f}" if met else f"**{value:.2f}** / {bound:.2f}"


COLUMNS = ("layer / routed floor", "layer / floor", "tracked / layer", "all_experts / layer")


def time_layers(cases: Iterable[Case], rounds: int, device: str) -> None:
    extra = ("compiled / layer", "host waits") if device == "cuda" else ()
    head = ("case", "load", "layer, ms", *COLUMNS, "peak", "Zipf / even", *extra)
    print("|", " | ".join(head), "|")
    print("|" + "---|" * len(head), flush=True)
    for case in cases:
        works, load = variants(case, device)
        times = interleaved(works, rounds, device)
        row = [case.name, f"{load.min():.2f}-{load.max():.2f}", f"{median(times['layer']) * 1e3:.1f}"]
        for column in COLUMNS:
            row.append(cell(ratio(times, *column.split(" / ")), case.goals.get(column), column == AT_LEAST))
        peaks = {name: peak_bytes(works[name], device) for name in ("layer", "routed floor")}
        row.append(cell(peaks["layer"] / peaks["routed floor"], case.goals.get("peak")))
        row.append(cell(ratio(times, "layer", "even"), case.goals.get("Zipf / even")) if case.zipf else "")
        if device == "cuda":
            row.append(f"{ratio(times, 'compiled', 'layer'):.2f}" if case.bf16 else "")
            row.append(", ".join(f"{name} {host_waits(works[name])}" for name in ("layer", "tracked", "all_experts")))
        print("|", " | ".join(row), "|", flush=True)


def sfcn_step(routed: bool, volumes: int, device: str) -> Work:
    """A training step of the published shape; the routed layer stands after block 4."""
    torch.manual_seed(0)
    options = SFCNOptions()
    layer = None
    if routed:
        width = options.channels[3]
        router = EigenRouter(width, EXPERTS, 1, EigenOptions(rank=32))
        layer = MoELayer(router, MLPExperts(width, EXPERTS, MLPOptions(hidden=64, zero_init=False)))
    net = SFCN(40, options, layer, 4 if routed else None).to(device, memory_format=torch.channels_last_3d).train()
    volume = torch.rand(volumes, 1, 160, 192, 160, device=device).contiguous(memory_format=torch.channels_last_3d)
    optimizer = torch.optim.AdamW(net.parameters())

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            out = net(volume)
        optimizer.zero_grad()
        (out.output.float().logsumexp(1).sum() + out.aux_loss).backward()
        optimizer.step()
        if layer is not None:
            layer.after_step()

    return Work(step)


def vit_step(batch: int, device: str) -> Work:
    """A training step of a plain ViT-B/16 encoder at 224 pixels: 12 pre-norm layers, 197 tokens."""
    layer = nn.TransformerEncoderLayer(768, 12, 3072, activation="gelu", batch_first=True, norm_first=True, dropout=0)
    encoder = nn.TransformerEncoder(layer, 12, enable_nested_tensor=False).to(device)
    tokens = torch.randn(batch, 197, 768, device=device, requires_grad=True)
    up = torch.randn_like(tokens)
    return Work(lambda: torch.autograd.grad(encoder(tokens), [tokens, *encoder.parameters()], up))


def upkeep(layers: int, tokens: int, device: str) -> Work:
    """What the tracked bases of so many layers cost in a step."""
    bases = [TrackedBasis(768, RANK).to(device) for _ in range(layers)]
    sample = torch.randn(tokens, 768, device=device)

    def step() -> None:
        for basis in bases:
            basis.observe(sample)
            basis.after_step()

    return Work(step)


def time_networks(rounds: int, device: str) -> None:
    volumes, part = (8, 32) if device == "cuda" else (1, 4)  # images timed of a batch of 32
    works = {"SFCN": sfcn_step(False, volumes, device), "SFCN routed": sfcn_step(True, volumes, device)}
    times = interleaved(works, rounds, device)
    peaks = {name: peak_bytes(work, device) / 1e9 for name, work in works.items()}
    print("\n| whole networks | time of a step | peak | time, ratio |\n|---|---|---|---|")
    print(f"| SFCN {volumes} x 160 x 192 x 160, bf16 | {median(times['SFCN']):.3f} s | {peaks['SFCN']:.2f} GB | |")
    print(
        f"| the same, routed after block 4 | {median(times['SFCN routed']):.3f} s | {peaks['SFCN routed']:.2f} GB "
        f"| {cell(ratio(times, 'SFCN routed', 'SFCN'), (1.05,))} |"
    )
    works = {"ViT-B": vit_step(part, device), "upkeep": upkeep(6, TrackedBasis.MAX_TOKENS, device)}
    times = interleaved(works, rounds, device)
    vit, bases = (median(times[name]) for name in works)
    share = ratio(times, "upkeep", "ViT-B") * part / 32
    print(f"| ViT-B, 32 images ({part} timed, times {32 // part}) | {vit * 32 / part:.2f} s | | |")
    print(f"| upkeep of six tracked bases, n = 4096 | {bases:.3f} s | | {cell(share, (0.03,))} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cases", default="", help="only cases with this in their name; 'networks' for the last table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    hint = f"{MALLOC}={os.environ[MALLOC]}: its own goals at b3072" if MALLOC in os.environ else f"{MALLOC} not set"
    isa = os.environ.get("ONEDNN_MAX_CPU_ISA", torch.backends.cpu.get_cpu_capability())
    print(f"torch {torch.__version__}, {options.device}, {isa}, {options.rounds} rounds, {hint}\n")
    cases = CASES + (GPU_CASES if options.device == "cuda" else ())
    time_layers([case for case in cases if options.cases in case.name], options.rounds, options.device)
    if options.cases in "networks":
        time_networks(min(options.rounds, 3), options.device)


if __name__ == "__main__":
    main()
