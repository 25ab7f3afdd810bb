"""What the pipelines at the papers' size would cost on GPUs, from two measured training steps.

    python benchmarks/cost.py [--scans 50000]

Measured on one H100 (benchmarks/RESULTS.md): SFCN, 8 volumes of 1 mm in bfloat16, 98 ms, with the routed layer 109 ms;
plain ViT-B, 32 images of 224 pixels in float32, 90 ms. Every other network is EXTRAPOLATED by its multiply-adds,
counted here in one forward pass; reading, validation and probes are left out, and an epoch of a single-gated mixture
counts as one of its whole network. A run that an earlier pipeline of the list has costs nothing more. Prints Markdown.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from emoe_med.brainage.net import BrainAgeNet
from emoe_med.models.heads import TrainingAges
from emoe_med.models.single_gated import macs
from emoe_med.moe import LinearRouter
from emoe_med.pipeline.plan import Arm, Job, plan, read_pipeline
from emoe_med.vision.net import build_net

PIPELINES = Path(__file__).parents[1] / "pipelines"
NAMES = ("paper_table1", "paper_table2_fewshot", "paper_fig2_oneshot", "paper_fig3_heatmap", "paper_brainage", "ermoe")
STEPS = {"cnn3d": 0.098 / 8, "emoe": 0.109 / 8, "vit_b": 0.090 / 32}  # measured seconds of a sample
ANCHORS = {"brainage": "cnn3d", "vision": "vit_b"}
BOX_MM = (160, 192, 160)
IMAGES = {"imagenet": 1_281_167, "tiny_imagenet": 100_000, "cifar10": 50_000, "cifar100": 50_000}  # to train on


def counted(arm: Arm) -> int:
    """Count the multiply-adds of one sample in a forward pass; without data where nothing is routed."""
    try:
        with FakeTensorMode():
            return _counted(arm)
    except (DynamicOutputShapeException, DataDependentOutputException):
        return _counted(arm)


def _counted(arm: Arm) -> int:
    model, task = arm.config.model, arm.task
    if getattr(model, "single_gated", None) is not None:
        model = model.model_copy(update={"single_gated": None})
    if task == "brainage":
        net: Any = BrainAgeNet(model, TrainingAges.of([45.0, 60.0, 80.0]))
        image = torch.rand(1, 1, *BOX_MM)
    else:
        net = build_net(model.model_copy(update={"weights": None}), 3, 1000)
        image = torch.rand(1, 3, model.image_size, model.image_size)
    for module in net.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()  # one sample may end in one value a channel
        if isinstance(module, LinearRouter):  # a trained router is balanced, this one would overflow its experts
            module.options = replace(module.options, capacity=None)
    with torch.no_grad():
        return macs(lambda: net(image))


def hours(job: Job, scans: int, known: dict[str, int]) -> float:
    """GPU-hours of a run."""
    arm, data = job.arm, job.arm.config.data
    samples = scans * (1 - 1 / data.folds) if arm.task == "brainage" else IMAGES[data.dataset]
    step = STEPS.get(arm.name) or STEPS[ANCHORS[arm.task]] * known[arm.name] / known[ANCHORS[arm.task]]
    return samples * (1 - data.val_share) * arm.config.training.epochs * step / 3600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scans", type=int, default=50_000, help="of the cohort")
    options = parser.parse_args()
    torch.set_num_threads(1)
    jobs = {name: plan(read_pipeline(PIPELINES / f"{name}.yaml"), PIPELINES / f"{name}.yaml") for name in NAMES}
    arms = {job.arm.name: job.arm for found in jobs.values() for job in found}
    known = {name: counted(arm) for name, arm in arms.items()}
    print("| arm | 10^9 multiply-adds | GPU-hours a run | from |\n|---|---|---|---|")
    for name, arm in arms.items():
        job = next(job for found in jobs.values() for job in found if job.arm.name == name)
        how = (
            "measured step" if name in STEPS else f"{known[name] / known[ANCHORS[arm.task]]:.2f} x {ANCHORS[arm.task]}"
        )
        print(f"| {name} | {known[name] / 1e9:.1f} | {hours(job, options.scans, known):.0f} | {how} |")
    print("\n| pipeline | runs | of these new | GPU-hours of the new ones |\n|---|---|---|---|")
    done: set[Path] = set()
    for name, found in jobs.items():
        new = [job for job in found if job.folder not in done]
        done |= {job.folder for job in found}
        total = sum(hours(job, options.scans, known) for job in new)
        print(f"| {name} | {len(found)} | {len(new)} | {total:,.0f} |")


if __name__ == "__main__":
    main()
