"""Which expert serves which class: counts of routed patches on test images, by layer and on average."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import entropy

from emoe_med.data.image_layouts import Listing
from emoe_med.data.images import ImageDataset, list_images
from emoe_med.errors import ConfigError, Fault
from emoe_med.models.vit import ViT
from emoe_med.storage import replace_file
from emoe_med.training.arm import check_same
from emoe_med.training.task import MapDataset
from emoe_med.vision.evaluate import TrainedClassifier
from emoe_med.vision.heatmap_page import heatmap_page

FOLDER, PAGE = "expert_maps", "expert_class.html"


def heatmap(run_dir: Path, root: Path | None) -> tuple[dict[str, Any], Path]:
    """Write the heat maps of a run, see `write_heatmap`; returns its figures by layer and the folder.

    Raises:
        ConfigError: HEAT-NONE, the run chooses among no experts.
        CheckpointError: The run has no usable checkpoint, or is of other images: its maps stand for its own.
        DataError: The images cannot be read.
    """
    model = TrainedClassifier.load(run_dir)
    if not model.routes:
        raise ConfigError(Fault("HEAT-NONE", "this run chooses among no experts", str(run_dir)))
    listing = list_images(model.config.data.dataset, root)
    check_same(run_dir, {"contents": listing.contents()})
    return write_heatmap(run_dir, model, listing), run_dir / FOLDER


def write_heatmap(run_dir: Path, model: TrainedClassifier, listing: Listing) -> dict[str, Any]:
    """Count patches (under a single gate, images) by expert and class on test images, and write `expert_maps/`.

    `expert_class.html`, a page of all of it; `expert_class.csv` (layer, expert, class, mean patches of an image,
    p(expert | class)), `expert_class.json` (NMI of expert and class, entropy of p(expert | class) over ln E, CV of
    the load; by layer and their mean, and returned) and a picture of each layer.
    """
    data = ImageDataset(listing.test, model.config.data.resize, model.meta["channels"])
    images = np.bincount(listing.test.labels, minlength=len(listing.classes))
    maps = {name: counts / np.maximum(images, 1) for name, counts in expert_class_counts(model, data).items()}
    figures = {name: describe(counts) for name, counts in maps.items()}
    # not those of the mean map: experts of two layers have nothing but their number in common
    figures["mean"] = pd.DataFrame(figures).mean(axis=1).to_dict()
    maps["mean"] = np.mean(list(maps.values()), axis=0)
    folder = run_dir / FOLDER
    folder.mkdir(exist_ok=True)
    replace_file(folder / "expert_class.csv", _table(maps, listing.classes).to_csv(index=False).encode())
    for name, counts in maps.items():
        _draw(counts, listing.classes, f"{name}: patches of an image by expert and class", folder / f"{name}.png")
    title = f"{model.config.name} on {model.config.data.dataset}, {len(listing.test.labels)} images"
    replace_file(folder / PAGE, heatmap_page(title, maps, listing.classes, figures).encode())
    replace_file(folder / "expert_class.json", (json.dumps(figures, indent=1) + "\n").encode())  # last: all is there
    return figures


def expert_class_counts(model: TrainedClassifier, data: MapDataset) -> dict[str, np.ndarray]:
    """Count served patches [E, C] by expert and label, for each routed layer; class token and registers are none."""
    classes, net = len(model.meta["classes"]), model.net
    prefix = net.options.prefix if isinstance(net, ViT) else 0
    counts: dict[str, np.ndarray] = {}
    for batch, out in model.outputs(data):
        for name, routing in out.routing.items():
            experts, routed = routing.probs.shape[1], out.token_mask[name].cpu()
            patch = (torch.arange(routed.shape[1]) >= prefix).expand_as(routed)[routed]
            label = batch["label"].unsqueeze(1).expand_as(routed)[routed]
            pairs = routing.expert_index.cpu() * classes + label.unsqueeze(1)
            served = pairs[(routing.gate > 0).cpu() & patch.unsqueeze(1)]
            found = torch.bincount(served, minlength=experts * classes).view(experts, classes).numpy()
            counts[name] = counts.get(name, 0) + found
    return counts


def describe(counts: np.ndarray) -> dict[str, float]:
    """Summarise patches [E, C]: NMI of expert and class (arithmetic), entropy of p(expert | class), CV of the load."""
    halves = entropy(counts.sum(0)) + entropy(counts.sum(1))
    mutual = halves - entropy(counts.ravel())
    load = counts.sum(1) / counts.sum()
    given = entropy(counts[:, counts.sum(0) > 0], axis=0)
    return {
        "nmi": float(2 * mutual / halves) if halves > 0 else 0.0,
        "entropy_given_class": float(given.mean() / np.log(len(counts))) if len(counts) > 1 else 0.0,
        "load_cv": float(load.std() / load.mean()),
    }


def _table(maps: Mapping[str, np.ndarray], classes: tuple[str, ...]) -> pd.DataFrame:
    rows = [
        (layer, f"E{expert:02d}", name, counts[expert, c], counts[expert, c] / max(counts[:, c].sum(), 1e-12))
        for layer, counts in maps.items()
        for expert in range(len(counts))
        for c, name in enumerate(classes)
    ]
    return pd.DataFrame(rows, columns=["layer", "expert", "class", "patches", "p_expert_given_class"])


def _draw(counts: np.ndarray, classes: tuple[str, ...], title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(min(16, 3 + 0.35 * len(classes)), 1.5 + 0.3 * len(counts)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(counts, aspect="auto", cmap="viridis", vmin=0)
    axes.set(title=title, xlabel="class", ylabel="expert")
    axes.set_yticks(range(len(counts)), [f"E{expert:02d}" for expert in range(len(counts))])
    if len(classes) <= 40:
        axes.set_xticks(range(len(classes)), list(classes), rotation=90)
    figure.colorbar(image, label="patches of an image")
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    replace_file(path, data.getvalue())
