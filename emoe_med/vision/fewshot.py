"""Few-shot linear probes on frozen features: what a backbone knows of classes it was not trained on.

The protocol is V-MoE's (arXiv 2106.05974) without its leak: the penalty is chosen on training images that are neither
supports nor tests, for each draw by itself. Letters: n supports, d features, C classes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.utils.data import Subset

from emoe_med.data.image_layouts import Files, Listing, Pixels
from emoe_med.data.images import DATASETS, ImageDataset, list_images, split
from emoe_med.errors import DataError, Fault
from emoe_med.storage import replace_file
from emoe_med.training.arm import check_same
from emoe_med.training.paired import estimate_of_draws
from emoe_med.training.task import MapDataset
from emoe_med.vision.evaluate import TrainedClassifier, read_back

PENALTIES = 2.0 ** np.arange(-10, 20)
HELD_OUT = 10  # further training images of each class that choose the penalty
ONE_SHOT_DRAWS, DRAWS = 100, 5  # a single image of each class scatters most
LOG = logging.getLogger("emoe_med")


def fewshot(
    run_dir: Path, dataset: str | None, root: Path | None, shots: Sequence[int], draws: int | None = None
) -> tuple[dict[str, Any], Path]:
    """Probe a run's features by ridge, logistic regression and class means, and write `fewshot/<dataset>.json`.

    What the file has of the same images and weights stays in it: other numbers of shots, and more draws than these.
    On the run's own data set the supports and those that choose the penalty are images that it never learned from or
    was selected on, as long as there are enough; its features have seen labels of the same classes even so.

    Args:
        run_dir: Run folder with a trained checkpoint; its weights stay as they are.
        dataset: Data set to probe on; that of the run if not given.
        root: Where it lies.
        shots: Supports of each class.
        draws: Random draws of supports, over which the intervals are; 100 for one shot and 5 for more if not given.

    Returns:
        ``{shot: {feature: {probe: {value, low, high, n, by_draw, classes}}}}`` in percent of the whole test set, and
        the file, which has `contents` and `weights`, the digests of the images and of the checkpoint, besides.

    Raises:
        CheckpointError: The run has no usable checkpoint, or learned from other images of its data set than these, so
            that those it never saw cannot be told.
        DataError: Images cannot be read, have other channels, or are too few of a class; earlier probes are damaged.
    """
    model = TrainedClassifier.load(run_dir)
    name = dataset or model.config.data.dataset
    if DATASETS[name].channels != model.meta["channels"]:
        raise DataError(Fault("IMG-CHANNELS", f"{name} and the run's images differ in colour"))
    listing = list_images(name, root)
    sources = {"contents": listing.contents()}
    if name == model.config.data.dataset:
        check_same(run_dir, sources)
    sources["weights"] = model.sha256  # a run may be probed before its end, and go on
    path = run_dir / "fewshot" / f"{name}.json"
    before = read_back(path, lambda path: dict(json.loads(path.read_text()))) if path.is_file() else sources
    # what the version that probed did not record is not compared, but for the images
    before = before if {**sources, "contents": None, **before}.items() >= sources.items() else sources
    own = name == model.config.data.dataset
    pools = {shot: _unseen(model, listing, shot) if own else None for shot in shots}
    wanted_draws = {shot: draws or (ONE_SHOT_DRAWS if shot == 1 else DRAWS) for shot in shots}
    chosen = {
        (shot, draw): supports(listing.train.labels, shot, draw, pools[shot])
        for shot, count in wanted_draws.items()
        for draw in range(count)
    }
    wanted = np.unique(np.concatenate([np.concatenate(pair) for pair in chosen.values()]))
    train = features(model, Subset(_dataset(model, listing.train), wanted.tolist()))
    test = features(model, _dataset(model, listing.test))
    train_labels, test_labels = listing.train.labels[wanted], listing.test.labels
    report: dict[str, Any] = {}
    for shot in shots:
        report[str(shot)] = {}
        for kind in train:
            found: dict[str, list[float]] = {name: [] for name in (*PROBES, "nearest_mean")}
            for draw in range(wanted_draws[shot]):
                support, held = (np.searchsorted(wanted, part) for part in chosen[shot, draw])
                x, y = train[kind][support], train_labels[support]
                unseen = train[kind][held], train_labels[held]
                for probe_name, fit in PROBES.items():
                    probe = fit(x, y, len(listing.classes))
                    found[probe_name].append(probe.accuracy(penalty_of(probe, *unseen), test[kind], test_labels))
                found["nearest_mean"].append(nearest_mean(x, y, test[kind], test_labels))
            report[str(shot)][kind] = {
                probe: {**estimate_of_draws(np.array([values])), "by_draw": values, "classes": len(listing.classes)}
                for probe, values in found.items()
            }
    path.parent.mkdir(exist_ok=True)
    report = {shot: max(found, before.get(shot, found), key=_draws) for shot, found in report.items()}
    replace_file(path, (json.dumps({**before, **sources, **report}, indent=1) + "\n").encode())
    return report, path


def penalty_of(probe: Ridge | Logistic, held: np.ndarray, labels: np.ndarray) -> int:
    """Return the place of the penalty that is best on held-out images [n, d]; of equally good ones the largest."""
    accuracies = [probe.accuracy(i, held, labels) for i in range(probe.count)]
    return probe.count - 1 - int(np.argmax(accuracies[::-1]))


def _draws(by_feature: Mapping[str, Mapping[str, Any]]) -> int:
    return min(found["n"] for by_probe in by_feature.values() for found in by_probe.values())


def _unseen(model: TrainedClassifier, listing: Listing, shot: int) -> np.ndarray | None:
    """Return the training images that a run neither learned from nor was selected on; None where these are too few."""
    data, labels = model.config.data, listing.train.labels
    used = np.concatenate(split(labels, data.val_share, data.train_images, data.split_seed, listing.held))
    pool = np.setdiff1d(np.arange(len(labels)), used)
    if np.bincount(labels[pool], minlength=labels.max() + 1).min() > shot:
        return pool
    LOG.warning("note: %d-shot probes are of images that the run learned from: a class has too few others", shot)
    return None


def _dataset(model: TrainedClassifier, part: Files | Pixels) -> ImageDataset:
    return ImageDataset(part, model.config.data.resize, model.meta["channels"])


def supports(labels: np.ndarray, shot: int, draw: int, pool: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Draw supports and held-out images of each class at random, of a pool of indices or of all; returns indices.

    Raises:
        DataError: IMG-SHOTS, a class has fewer images than supports and one held out.
    """
    support, held = [], []
    pool = np.arange(len(labels)) if pool is None else pool
    for c in np.unique(labels):
        order = np.random.default_rng([draw, int(c)]).permutation(pool[labels[pool] == c])
        if len(order) <= shot:
            raise DataError(
                Fault("IMG-SHOTS", f"class {c} has {len(order)} images: too few for {shot} and one held out")
            )
        support.append(order[:shot])
        held.append(order[shot : shot + HELD_OUT])
    return np.concatenate(support), np.concatenate(held)


def features(model: TrainedClassifier, data: MapDataset) -> dict[str, np.ndarray]:
    """Return what the head could see of each image [n, d]: a transformer's class token, and the mean over places.

    The images come in the order of their rows, whatever that of the data set.
    """
    rows: list[np.ndarray] = []
    parts: dict[str, list[np.ndarray]] = {}
    for batch, kinds in model.features(data):
        rows.append(batch["row"].numpy())
        for kind, found in kinds.items():
            parts.setdefault(kind, []).append(found.double().cpu().numpy())
    order = np.argsort(np.concatenate(rows))
    return {kind: np.concatenate(found)[order] for kind, found in parts.items()}


class Ridge:
    """Ridge regression to one-hot targets in -1 and 1 for all penalties at once, by one eigendecomposition.

    Features are standardised by the supports; a constant feature of 100 is a bias that is hardly penalised.
    """

    count = len(PENALTIES)

    def __init__(self, x: np.ndarray, y: np.ndarray, classes: int) -> None:
        self.centre, self.scale = x.mean(0), x.std(0) + 1e-5
        x = self._standardised(x)
        target = 2.0 * np.eye(classes)[y] - 1
        primal = len(x) >= x.shape[1]
        values, vectors = np.linalg.eigh(x.T @ x if primal else x @ x.T)
        right = vectors.T @ (x.T @ target if primal else target)
        solutions = [vectors @ (right / (np.maximum(values, 0)[:, None] + penalty)) for penalty in PENALTIES]
        self.weights = [solution if primal else x.T @ solution for solution in solutions]  # [d + 1, C] each

    def _standardised(self, x: np.ndarray) -> np.ndarray:
        return np.column_stack([(x - self.centre) / self.scale, np.full(len(x), 100.0)])

    def accuracy(self, penalty: int, x: np.ndarray, y: np.ndarray) -> float:
        """Return the accuracy in percent under a penalty, by its place among them."""
        return 100 * float(np.mean((self._standardised(x) @ self.weights[penalty]).argmax(1) == y))


class Logistic:
    """Multinomial logistic regression (scikit-learn) for all penalties; features are standardised by the supports."""

    INVERSE = 10.0 ** np.arange(2, -5, -1)  # C, so that penalties rise
    count = len(INVERSE)

    def __init__(self, x: np.ndarray, y: np.ndarray, classes: int) -> None:
        del classes  # every class has supports
        self.fits = [
            make_pipeline(StandardScaler(), LogisticRegression(C=inverse, max_iter=1000)).fit(x, y)
            for inverse in self.INVERSE
        ]

    def accuracy(self, penalty: int, x: np.ndarray, y: np.ndarray) -> float:
        """Return the accuracy in percent under a penalty, by its place among them."""
        return 100 * float(self.fits[penalty].score(x, y))


PROBES = {"ridge": Ridge, "logistic": Logistic}


def nearest_mean(x: np.ndarray, y: np.ndarray, test: np.ndarray, test_labels: np.ndarray) -> float:
    """Return the accuracy in percent of the class mean of largest cosine."""
    means = np.stack([x[y == c].mean(0) for c in np.unique(y)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    return 100 * float(np.mean(np.unique(y)[(test @ means.T).argmax(1)] == test_labels))
