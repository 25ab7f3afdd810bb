"""Time the image classifier: an optimiser step of the routed ViT beside the dense one, and reading images.

    python benchmarks/vision.py [--arms vit_b emoe_vit_b] [--batch 8] [--images DIR_OR_ZIP]

Prints medians over rounds, arms interleaved round by round so that their ratios hold on a shared machine, and the
peak memory of one step of each arm in a process of its own. On a CPU: process CPU seconds at one thread.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch

from emoe_med.data.image_layouts import Listing, Pixels
from emoe_med.data.images import ImageDataset, list_images
from emoe_med.training.optim import build_optimizer, clip_gradients, update
from emoe_med.vision.config import VisionConfig
from emoe_med.vision.run import CONFIGS, load_vision
from emoe_med.vision.task import VisionTask

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CLASSES = 1000


def seconds(work: Callable[[], object]) -> float:
    if DEVICE.type == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def training_step(config: VisionConfig, batch: int) -> Callable[[], None]:
    """Build one optimiser step on random pixels: speed does not depend on them."""
    edge = config.data.resize
    pixels = np.random.default_rng(0).integers(0, 256, (batch, 3, edge, edge), np.uint8)
    part = Pixels(pixels, np.arange(batch))
    data = ImageDataset(Listing(tuple(map(str, range(CLASSES))), part, part).train, edge, 3)
    meta = {"classes": range(CLASSES), "channels": 3, "mean": [0.5] * 3, "std": [0.5] * 3}
    task = VisionTask(config, data, range(batch), range(batch), {}, meta)
    net = task.build_model().to(DEVICE).train()
    optimizer = build_optimizer(net, 1e-4, 0.05)
    given = torch.utils.data.default_collate([data[i] for i in range(batch)])
    given = {name: value.to(DEVICE) for name, value in given.items()}

    def step() -> None:
        prepared = task.prepare(given, True, torch.arange(batch))
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
            loss, _ = task.loss(net, prepared)
        optimizer.zero_grad()
        loss.backward()
        clip_gradients(net, 1.0)
        update(optimizer, net)

    return step


def peak_gib() -> float:
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


def time_reading(root: Path, edge: int, count: int) -> None:
    listing = list_images("imagenet", root)
    data = ImageDataset(listing.train, edge, 3)
    indices = np.linspace(0, len(data) - 1, min(count, len(data))).astype(int).tolist()
    spent = [seconds(lambda i=i: data[i]) for i in indices]
    print(f"{'read and decode':26} {median(spent) * 1e3:9.2f} ms/image   {len(listing.classes)} classes")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--arms", nargs="+", default=["vit_b", "emoe_vit_b"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=Path, help="train/<class>/ and val/<class>/ to time reading on")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    configs = {arm: load_vision(CONFIGS / f"{arm}.yaml") for arm in options.arms}
    if options.peak:
        training_step(configs[options.peak], options.batch)()
        print(json.dumps(peak_gib()))
        return
    if options.images:
        time_reading(options.images, 256, 200)
    for arm in configs:
        again = [sys.executable, __file__, "--arms", arm, "--batch", str(options.batch), "--peak", arm]
        peak = json.loads(subprocess.run(again, capture_output=True, text=True, check=True).stdout)
        print(f"peak of a step {arm:16} {peak:6.2f} GiB", flush=True)
    steps = {arm: training_step(config, options.batch) for arm, config in configs.items()}
    times: dict[str, list[float]] = defaultdict(list)
    for number in range(options.rounds + 1):
        for arm, step in steps.items():
            spent = seconds(step)
            if number:  # the first one allocates
                times[arm].append(spent / options.batch)
    base = median(times[options.arms[0]])
    for arm, values in times.items():
        ratio = median(values) / base
        print(f"step {arm:26} {median(values) * 1e3:9.1f} ms/image   {ratio:5.2f} of {options.arms[0]}")


if __name__ == "__main__":
    main()
