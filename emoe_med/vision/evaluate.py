"""Score a run: predictions of test images, accuracy with intervals, and what the routing is worth."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Subset

from emoe_med.data.image_layouts import contents
from emoe_med.data.images import ImageDataset, list_test
from emoe_med.data.memory import Held
from emoe_med.errors import CheckpointError, DataError, Fault
from emoe_med.models.deep_moe import DeepMoE
from emoe_med.models.output import ModelOutput
from emoe_med.models.single_gated import SingleGated
from emoe_med.storage import replace_file
from emoe_med.training.channel_report import describe_channels
from emoe_med.training.checkpoint import MODEL_FILE, CheckpointFolder, load_model_weights
from emoe_med.training.gate_report import describe_gate
from emoe_med.training.journal import read_journal
from emoe_med.training.loader import make_loader, mixed, read_batches
from emoe_med.training.routing_report import describe_routing
from emoe_med.training.task import MapDataset
from emoe_med.vision.config import VisionConfig
from emoe_med.vision.metrics import Estimate, accuracy, mean_estimate
from emoe_med.vision.net import Net, build_net
from emoe_med.vision.run import load_vision
from emoe_med.vision.task import rank_of_label, seen_image

LOG = logging.getLogger("emoe_med")


@dataclass
class TrainedClassifier:
    """A network with its configuration, what its images must be like, and the digest of its weights.

    `meta` has `classes`, `channels`, `mean` and `std`.
    """

    net: Net
    config: VisionConfig
    meta: dict[str, Any]
    sha256: str

    @classmethod
    def load(cls, run_dir: Path) -> TrainedClassifier:
        """Load the selected checkpoint of a run folder.

        Raises:
            CheckpointError: Missing, damaged, or weights of another shape.
        """
        config = load_vision(run_dir / "config.yaml")
        checkpoint = CheckpointFolder(run_dir).load(config.training.select)
        if checkpoint is None:
            raise CheckpointError(Fault("CKPT-NONE", "this run has no checkpoint", str(run_dir)))
        meta = checkpoint.state["meta"]
        net = build_net(config.model, meta["channels"], len(meta["classes"]))
        load_model_weights(net, checkpoint.model, checkpoint.folder)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return cls(net.eval().to(device), config, meta, checkpoint.state["files"][MODEL_FILE]["sha256"])

    @torch.no_grad()
    def outputs(self, data: MapDataset) -> Iterator[tuple[dict[str, Any], ModelOutput]]:
        """Yield the collated batches of a data set, as `inputs` has them, with the output in the run's precision."""
        for batch, image in self.inputs(data):
            with self.autocast():
                yield batch, self.net(image)

    @torch.no_grad()
    def features(self, data: MapDataset) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
        """Yield the collated batches, as `inputs` has them, with what the head could see [B, F] by kind."""
        for batch, image in self.inputs(data):
            with self.autocast():
                yield batch, self.net.probed(image)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.net.parameters()).device

    @property
    def routes(self) -> bool:
        """Whether anything in the network chooses among experts for patches or images; a dense adapter has one."""
        layers = self.net.routed_layers().values()
        return isinstance(self.net, SingleGated) or any(layer.router.num_experts > 1 for layer in layers)

    def inputs(self, data: MapDataset) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """Yield the collated batches of a data set, in mixed order, with the images that the network sees."""
        options = self.config.training
        for batch in read_batches(make_loader(mixed(data), options.batch_size, options.workers)):
            pixels = batch["image"].to(self.device)
            yield batch, seen_image(pixels, self.config.model.image_size, self.meta)

    def autocast(self) -> torch.autocast:
        """Return the precision that the run was trained in, as a context."""
        low = self.config.training.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=low)


def predict(model: TrainedClassifier, data: MapDataset) -> pd.DataFrame:
    """Classify the images of a data set.

    Returns:
        Columns row (in rising order), label, predicted, p (probability of the predicted class), and rank (place of the
        label among the outputs, 0 where it is predicted).
    """
    parts = []
    for batch, out in model.outputs(data):
        logits, label = out.output.float(), batch["label"].to(out.output.device)
        p, _ = logits.softmax(1).max(1)
        found = {"predicted": logits.argmax(1), "p": p, "rank": rank_of_label(logits, label)}
        columns = {"row": batch["row"], "label": batch["label"], **found}
        parts.append(pd.DataFrame({name: value.cpu().numpy() for name, value in columns.items()}))
    return pd.concat(parts).sort_values("row", ignore_index=True)


def evaluate_run(run_dir: Path, train: ImageDataset, test: ImageDataset, val: np.ndarray) -> dict[str, Any]:
    """Predict validation and test images once, and write predictions/ and metrics.json.

    Args:
        run_dir: Run folder with a trained checkpoint.
        train: The training part of the data.
        test: The part to test on.
        val: Indices into `train` that the run was selected on.

    Returns:
        The content of metrics.json.
    """
    model = TrainedClassifier.load(run_dir)
    start = time.monotonic()
    tables = {"test": predict(model, test)}
    seconds = time.monotonic() - start
    tables["val"] = predict(model, Subset(train, val.tolist()))
    write_predictions(run_dir / "predictions", tables)
    metrics: dict[str, Any] = _scores(tables, model.config)
    metrics["images_per_second"] = {"training": _training_speed(run_dir), "test": len(test) / max(seconds, 1e-9)}
    if isinstance(model.net, SingleGated):
        metrics |= gate_report(model, model.net, test)
    if model.net.routed_layers():
        metrics["routing"] = routing_report(model, test)
    if isinstance(model.net, DeepMoE):
        metrics["channels"] = channel_report(model, model.net, test)
    write_metrics(run_dir, metrics)
    return metrics


def _scores(tables: Mapping[str, pd.DataFrame], config: VisionConfig) -> dict[str, Any]:
    return {name: accuracy(table["rank"].to_numpy(), config.evaluation.bootstrap) for name, table in tables.items()}


def _training_speed(run_dir: Path) -> float | None:
    """Median over epochs, reading and augmentation included."""
    name = "system/samples_per_second"
    found = [e["values"][name] for _, e in read_journal(run_dir / "journal.jsonl") if name in e.get("values", {})]
    return median(found) if found else None


def routing_report(model: TrainedClassifier, test: ImageDataset) -> dict[str, Any]:
    """Tell whether each routed layer is alive, and what it and its choices are worth, on evenly spaced test images.

    `error_without_branch` and `error_permuted_routing` are gains in top-1 error, in percent of the images.
    """
    return describe_routing(model.net.routed_layers(), *_judged(model, test))


def channel_report(model: TrainedClassifier, net: DeepMoE, test: ImageDataset) -> dict[str, Any]:
    """Tell which channels are on and what the choice is worth, on the same images, in percent of them."""
    return describe_channels(net, *_judged(model, test))


def gate_report(model: TrainedClassifier, whole: SingleGated, test: MapDataset) -> dict[str, Any]:
    """Tell what gate, experts and early exit of a single-gated mixture are worth, on all test images.

    Errors are in percent of the images; the curve of `early_exit` has top-1 accuracy in percent.
    """
    draws = model.config.evaluation.bootstrap

    def error(output: Tensor, batch: Mapping[str, Any]) -> Tensor:
        return 100.0 * (rank_of_label(output, batch["label"].to(output.device)) > 0)

    routing, early_exit = describe_gate(
        whole,
        model.inputs(test),
        error,
        compare=lambda changed, intact: mean_estimate(changed - intact, draws),
        score=lambda errors: mean_estimate(100 - errors, draws),
        metric="error",
        autocast=model.autocast,
        label="label",
    )
    return {"routing": {"gate": routing}, "early_exit": early_exit}


def _judged(
    model: TrainedClassifier, test: ImageDataset
) -> tuple[Callable[[], np.ndarray], Callable[[np.ndarray, np.ndarray], Estimate], str]:
    """Return how errors on evenly spaced test images are made and compared, and their name."""
    evaluation = model.config.evaluation
    chosen = np.linspace(0, len(test) - 1, min(len(test), evaluation.routing_images)).round().astype(int)
    data = Held(Subset(test, chosen.tolist()))

    def errors() -> np.ndarray:
        return 100.0 * (predict(model, data)["rank"].to_numpy() > 0)

    return errors, lambda changed, intact: mean_estimate(changed - intact, evaluation.bootstrap), "error"


def score_again(run_dir: Path) -> dict[str, Any]:
    """Make metrics.json anew from the predictions of a run; no image is touched.

    Raises:
        DataError: RUN-METRICS, the run was not evaluated to its end, or what it wrote is damaged.
    """
    before = read_back(run_dir / "metrics.json", lambda path: dict(json.loads(path.read_text())))
    paths = {name: run_dir / "predictions" / f"{name}.csv" for name in ("test", "val")}
    tables = {name: read_back(path, _ranks) for name, path in paths.items()}
    metrics = {**before, **_scores(tables, load_vision(run_dir / "config.yaml"))}
    write_metrics(run_dir, metrics)
    return metrics


def _ranks(path: Path) -> pd.DataFrame:
    table = pd.read_csv(path, usecols=["rank"], dtype={"rank": "int64"})
    if table.empty or table["rank"].min() < 0:
        raise ValueError("it holds no ranks")
    return table


def read_back(path: Path, read: Callable[[Path], Any]) -> Any:
    """Read what a run wrote.

    Raises:
        DataError: RUN-METRICS, it is not there or is damaged.
    """
    try:
        return read(path)
    except (OSError, ValueError, TypeError) as error:
        missing = isinstance(error, FileNotFoundError)
        reason = "is not there: this run was not evaluated to its end" if missing else f"is damaged ({error})"
        hint = "finish the run by `train --resume`" if missing else "copy it again, or train the run anew"
        raise DataError(Fault("RUN-METRICS", reason, str(path), hint=hint)) from error


def evaluate_elsewhere(run_dir: Path, root: Path) -> tuple[dict[str, Any], Path]:
    """Score a run on the test part of other images in a layout of its data set, or on a folder of class folders.

    Written under `<run>/evaluations/<digest of names, labels and sizes>/`.

    Raises:
        CheckpointError: The run has no usable checkpoint.
        DataError: The images cannot be read, or are of a class that the run does not know.
    """
    model = TrainedClassifier.load(run_dir)
    data, classes = model.config.data, model.meta["classes"]
    test = list_test(data.dataset, root, classes)
    if missing := len(classes) - len(np.unique(test.labels)):
        LOG.warning("classes of the run without an image here: %d of %d", missing, len(classes))
    tables = {"test": predict(model, ImageDataset(test, data.resize, model.meta["channels"]))}
    folder = run_dir / "evaluations" / contents(test)[:16]
    metrics = _scores(tables, model.config)
    write_predictions(folder, tables)
    write_metrics(folder, metrics)
    return metrics, folder / "metrics.json"


def write_metrics(folder: Path, metrics: Mapping[str, Any]) -> None:
    """Write metrics.json in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / "metrics.json", (json.dumps(metrics, indent=1) + "\n").encode())


def write_predictions(folder: Path, tables: Mapping[str, pd.DataFrame]) -> None:
    """Write predictions by row, the place of the image in its part of the data set."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        replace_file(folder / f"{name}.csv", table.to_csv(index=False, float_format="%.4f").encode())
