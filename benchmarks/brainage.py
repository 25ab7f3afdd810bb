"""Time the main job: reading a scan for the first time and from the cache, a training step, a prediction.

    python benchmarks/brainage.py --manifest M.csv [--scans 16]

Prints process CPU seconds at one thread per volume, medians over rounds; arms are interleaved round by round, so
that their ratios hold on a shared machine. The heads are real, the weights are random: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from emoe_med.brainage.cohort import chain_options
from emoe_med.brainage.inference import TrainedModel
from emoe_med.brainage.net import BrainAgeNet
from emoe_med.brainage.task import BrainAgeTask
from emoe_med.config import BrainAgeConfig, load_run
from emoe_med.data.cache import HeadDataset
from emoe_med.data.manifest import read_manifest
from emoe_med.training.optim import build_optimizer

ARMS = ("cnn3d", "emoe", "dense_adapter", "dense_adapter_8x")
ROUNDS = 7


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def training_step(task: BrainAgeTask, net: BrainAgeNet, batch: dict, bf16: bool) -> Callable[[], None]:
    optimizer = build_optimizer(net, 1e-4, 0.01)

    def step() -> None:
        prepared = task.prepare(batch, True, torch.arange(len(batch["age"])))
        prepared["image"] = prepared["image"].contiguous(memory_format=torch.channels_last_3d)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss, _ = task.loss(net, prepared)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for layer in net.routed_layers().values():
            layer.after_step()

    return step


def time_arms(configs: dict[str, BrainAgeConfig], heads: HeadDataset) -> None:
    indices = list(range(len(heads)))
    size = min(8, len(heads))
    batch = torch.utils.data.default_collate([heads[i] for i in range(size)])
    times: dict[str, list[float]] = defaultdict(list)
    steps, models = {}, {}
    for arm, config in configs.items():
        task = BrainAgeTask(config, heads, indices, indices, {})
        net = task.build_model().to(memory_format=torch.channels_last_3d)
        steps[arm] = training_step(task, net, batch, config.training.precision == "bf16")
        models[arm] = TrainedModel(task.build_model().eval().to(memory_format=torch.channels_last_3d), config, {})
    for _ in range(ROUNDS):
        for arm in configs:
            times[f"step {arm}"].append(seconds(steps[arm]) / size)
            times[f"predict {arm}"].append(seconds(lambda arm=arm: models[arm].age(heads[0]["image"], True)))
    for name, values in times.items():
        base = median(times[f"{name.split()[0]} {ARMS[0]}"])
        print(f"{name:26} {median(values) * 1e3:9.2f} ms/volume   {median(values) / base:5.2f} of {ARMS[0]}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--configs", type=Path, default=Path(__file__).parent.parent / "configs" / "brainage")
    parser.add_argument("--preset", default="_4mm", help="suffix of the run files")
    parser.add_argument("--scans", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    configs = {arm: load_run(options.configs / f"{arm}{options.preset}.yaml") for arm in ARMS}
    manifest = read_manifest(options.manifest)
    chain = chain_options(configs["emoe"], manifest)
    with tempfile.TemporaryDirectory() as cache:
        heads = HeadDataset(manifest.scans[: options.scans], chain, Path(cache))
        first = seconds(lambda: [heads[i] for i in range(len(heads))]) / len(heads)
        cached = median(seconds(lambda: [heads[i] for i in range(len(heads))]) for _ in range(ROUNDS)) / len(heads)
        print(f"{'first read':26} {first * 1e3:9.2f} ms/volume")
        print(f"{'cached read':26} {cached * 1e3:9.2f} ms/volume")
        time_arms(configs, heads)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "emoe_med.brainage", "--help"], check=True, stdout=subprocess.DEVNULL)
    print(f"{'--help':26} {time.perf_counter() - start:9.2f} s wall")


if __name__ == "__main__":
    main()
