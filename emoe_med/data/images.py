"""Image data sets by name: listed, split, and read one image at a time.

The published validation or test images are the test set, which is touched once; a validation set to select on is
taken from the training images, the same share of each class, unless the data set has one of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from emoe_med.data.cifar import cifar, published
from emoe_med.data.image_decode import decode, to_square
from emoe_med.data.image_layouts import Files, Listing, Pixels, class_folders, test_folders
from emoe_med.errors import DataError, Fault

ROOT_VARIABLE = "EMOE_MED_DATA_ROOT"
DIGITS_TEST_SHARE = 0.2


@dataclass(frozen=True)
class Known:
    """A data set that goes by a name.

    Attributes:
        list_images: From the root to what is there.
        channels: C.
        mean: of the training pixels, [C], as is customary for the set.
        std: of the training pixels, [C].
        embedded: ships with a library, and has no root.
        archive: lists a root that holds something else than class folders; None where it holds these.
    """

    list_images: Callable[[Path], Listing]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    embedded: bool = False
    archive: Callable[[Path], Listing | None] = lambda root: None


def digits(root: Path) -> Listing:
    """List scikit-learn's 1,797 handwritten digits of 8 x 8 pixels; a fixed fifth of each class is the test set."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = np.round(found.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = found.target.astype(np.int64)
    test = _chosen(labels, DIGITS_TEST_SHARE, seed=0)
    parts = [Pixels(pixels[where], labels[where]) for where in (~test, test)]
    return Listing(tuple("0123456789"), parts[0], parts[1])


IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DATASETS: dict[str, Known] = {
    "digits": Known(digits, 1, (0.305,), (0.376,), embedded=True),
    "cifar10": Known(
        partial(cifar, name="cifar10"),
        3,
        (0.491, 0.482, 0.447),
        (0.247, 0.243, 0.262),
        archive=partial(published, name="cifar10"),
    ),
    "cifar100": Known(
        partial(cifar, name="cifar100"),
        3,
        (0.507, 0.487, 0.441),
        (0.267, 0.256, 0.276),
        archive=partial(published, name="cifar100"),
    ),
    "tiny_imagenet": Known(class_folders, 3, *IMAGENET_STATISTICS),
    "imagenet": Known(class_folders, 3, *IMAGENET_STATISTICS),
}


def list_images(name: str, root: Path | None) -> Listing:
    """List a data set; the root is needed unless it is embedded, else taken from the environment.

    Raises:
        DataError: IMG-ROOT, none given or none there, or one given where there can be none; or what the layout refuses.
    """
    known = DATASETS[name]
    if known.embedded:
        _refuse_root(name, root)
        return known.list_images(Path())
    if root is None and (given := os.environ.get(ROOT_VARIABLE)):
        root = Path(given)
    if root is None:
        hint = f"give --data-root, or set {ROOT_VARIABLE}"
        raise DataError(
            Fault("IMG-ROOT", f"{name} does not come with this package, and no folder was named", hint=hint)
        )
    return known.list_images(root)


def list_test(name: str, root: Path, classes: Sequence[str]) -> Files | Pixels:
    """List the part to test on of other images in a layout of this data set, labelled by the classes given.

    Raises:
        DataError: IMG-CLASSES, the archive has others; or as `list_images` and `test_folders`.
    """
    known = DATASETS[name]
    if known.embedded:
        _refuse_root(name, root)
    listing = known.archive(root)
    if listing is None:
        return test_folders(root, classes)
    if listing.classes != tuple(classes):
        reason = f"these {len(listing.classes)} classes are not the {len(classes)} wanted"
        raise DataError(Fault("IMG-CLASSES", reason, str(root)))
    return listing.test


def _refuse_root(name: str, root: Path | None) -> None:
    if root is not None:
        reason = f"{name} ships with a library: no other images take its place"
        raise DataError(Fault("IMG-ROOT", reason, str(root), hint="leave out --data-root"))


class ImageDataset(Dataset):
    """One part of a data set as samples {image [C, S, S] uint8, label, row}; row is the place in the part."""

    def __init__(self, part: Files | Pixels, size: int, channels: int) -> None:
        self.part, self.size, self.channels = part, size, channels

    def __len__(self) -> int:
        return len(self.part.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read one image.

        Raises:
            DataError: The file cannot be read, or is no picture.
        """
        label = int(self.part.labels[index])
        return {"image": self._image(index), "label": label, "row": index}

    def _image(self, index: int) -> torch.Tensor:
        if isinstance(self.part, Files):
            path = self.part.paths[index]
            return decode(self.part.tree.read(path), f"{self.part.tree.root}/{path}", self.size, self.channels)
        pixels = self.part.pixels[index]
        if pixels.shape[1:] == (self.size, self.size):
            return torch.from_numpy(pixels.copy())
        return to_square(Image.fromarray(pixels.transpose(1, 2, 0).squeeze()), self.size)


def split(
    labels: np.ndarray, val_share: float, train_images: int | None, seed: int, held: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Split training images into those to learn from and those to select on.

    Args:
        labels: [n].
        val_share: Share of each class to select on, at least one image of it.
        train_images: How many of the rest to learn from, equally many of each class as far as they go; None is all.
        seed: Another seed is another split; an image's place does not depend on `train_images`.
        held: The last so many are those to select on, whatever the share; 0 where the data set does not say.

    Returns:
        Indices to learn from and to select on, each sorted.

    Raises:
        DataError: IMG-SPLIT, a class of a single image.
    """
    classes, counts = np.unique(labels, return_counts=True)
    if counts.min() < 2:
        reason = f"class {classes[counts.argmin()]} has a single image: none would be left to select on"
        raise DataError(Fault("IMG-SPLIT", reason))
    val = np.arange(len(labels)) >= len(labels) - held if held else _chosen(labels, val_share, seed)
    rest = np.flatnonzero(~val)
    if train_images is not None:
        # the first of each class, then the second of each, in an order of their own
        order = np.concatenate([_rank(labels[rest], c, seed) for c in classes])
        where = np.concatenate([np.flatnonzero(labels[rest] == c) for c in classes])
        rest = np.sort(rest[where[np.argsort(order, kind="stable")[:train_images]]])
    return rest, np.flatnonzero(val)


def _chosen(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Choose a share of each class, at least one: [n] bool."""
    chosen = np.zeros(len(labels), bool)
    for c in np.unique(labels):
        where = np.flatnonzero(labels == c)
        chosen[where[_rank(labels, c, seed) < max(1, round(share * len(where)))]] = True
    return chosen


def _rank(labels: np.ndarray, c: int, seed: int) -> np.ndarray:
    """Give the images of a class a random order, which depends on class, number and seed alone."""
    return np.random.default_rng([seed, int(c)]).permutation(np.count_nonzero(labels == c))
