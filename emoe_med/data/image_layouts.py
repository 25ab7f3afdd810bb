"""The published layouts of image files: class folders, and flat validation files with their ground truth."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from emoe_med.data.image_decode import SUFFIXES
from emoe_med.data.image_tree import Tree, open_tree
from emoe_med.errors import DataError, Fault

INSIDE = ("", "ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")  # where class folders start in published archives
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"


@dataclass(frozen=True)
class Files:
    """Image files with labels, in order."""

    tree: Tree
    paths: Sequence[str]
    labels: np.ndarray  # [n] int64

    def told(self) -> bytes:
        """Return the names."""
        return "\n".join(self.paths).encode()

    def marks(self) -> bytes:
        """Return the size of each file, or its checksum in a zip; nothing is read."""
        return np.array([self.tree.mark(path) for path in self.paths], np.int64).tobytes()


@dataclass(frozen=True)
class Pixels:
    """Images [n, C, H, W] uint8 held in memory, with labels [n] int64."""

    pixels: np.ndarray
    labels: np.ndarray

    def told(self) -> bytes:
        """Return the pixels."""
        return self.pixels.tobytes()

    def marks(self) -> bytes:
        """Return nothing: the pixels tell all."""
        return b""


def contents(*parts: Files | Pixels) -> str:
    """Return a SHA-256 over labels, names and sizes, or checksums in a zip, or pixels.

    It stays the same where a picture in a folder gives way to another of its name and size: no file is read.
    """
    told = hashlib.sha256()
    for part in parts:
        for data in (part.labels.tobytes(), part.told(), part.marks()):
            told.update(data)
    return told.hexdigest()


@dataclass(frozen=True)
class Listing:
    """What a data set holds.

    Attributes:
        classes: Their names, in the order of the labels.
        train: The part to learn from, and to take images to select on from.
        test: The published part to test on.
        held: The last so many of `train` are the data set's own part to select on.
    """

    classes: tuple[str, ...]
    train: Files | Pixels
    test: Files | Pixels
    held: int = 0

    def contents(self) -> str:
        """Return `contents` of both parts."""
        return contents(self.train, self.test)


def class_folders(root: Path) -> Listing:
    """List `train/<class>/` and `val/` or `test/`, in a folder or a zip, or in the one zip of a folder.

    The test part has class folders too, or it is flat: Tiny-ImageNet's `val/images` with `val_annotations.txt`;
    ImageNet's `val` with the development kit's ground truth and `meta.mat`, or with `LOC_val_solution.csv`, which
    may lie in the root, its parents' `devkit` folders or beside the files. Images may lie in a folder `images` of
    their class. Classes are numbered in the order of their names, which is ImageNet's. Where `test/` has class
    folders beside `val/`, `val/` is there to select on; flat files in it have no labels, and are left alone.

    Raises:
        DataError: IMG-ROOT, IMG-LAYOUT, IMG-EMPTY (each class without an image), IMG-LABEL.
    """
    tree, base = _find(root, "train")
    classes = [] if base is None else tree.folders(f"{base}train")
    if base is None or not classes:
        raise _layout(tree, "there is no train/<class>/", "lay the images out as train/<class>/ and val/<class>/")
    train = _complete(_by_class(tree, f"{base}train", classes), f"{base}train", classes)
    parts = {name: _complete(part, f"{base}{name}", classes) for name, part in _labelled(tree, base, classes).items()}
    test = parts.pop("test", None) or parts.pop("val")
    if not parts:
        return Listing(tuple(classes), train, test)
    val = parts["val"]
    both = Files(tree, [*train.paths, *val.paths], np.concatenate([train.labels, val.labels]))
    return Listing(tuple(classes), both, test, len(val.labels))


def test_folders(root: Path, classes: Sequence[str]) -> Files:
    """List the images to test on alone: the test part of `class_folders`, or what lies in `<class>/` of the root.

    Args:
        root: As for `class_folders`; nothing is asked of `train/`.
        classes: Names by label. Not each of them needs an image.

    Raises:
        DataError: IMG-ROOT, IMG-LAYOUT (also a folder of none of the classes), IMG-LABEL.
    """
    tree, base = _find(root, "train", "val", "test")
    if base is not None:
        parts = [part for _, part in sorted(_labelled(tree, base, classes).items()) if part.paths]  # test, then val
        found = parts[0] if parts else Files(tree, [], np.empty(0, np.int64))
    else:
        inside = tree.folders()
        found = _by_class(tree, inside[0] if len(inside) == 1 and inside[0] not in classes else "", classes)
    if not found.paths:
        raise _layout(tree, "there is neither val/ nor test/ nor <class>/ with images")
    return found


def _find(root: Path, *parts: str) -> tuple[Tree, str | None]:
    """Return the tree, and the path prefix that one of the parts lies under."""
    tree = open_tree(root)
    zips = [name for name in tree.files() if name.lower().endswith(".zip")]
    if root.is_dir() and len(zips) == 1 and not {*parts} & {*tree.folders()}:
        tree = open_tree(root / zips[0])
    only = tree.folders()
    for base in [*INSIDE, *(only if len(only) == 1 else [])]:
        if {*parts} & {*tree.folders(base)}:
            return tree, f"{base}/" if base else ""
    return tree, None


def _labelled(tree: Tree, base: str, classes: Sequence[str]) -> dict[str, Files]:
    """Return the parts `val` and `test` as far as their images have classes, at least one of them."""
    parts = {}
    for name in ("val", "test"):
        inside = tree.folders(f"{base}{name}")
        flat = [folder for folder in ("", "/images") if _pictures(tree, f"{base}{name}{folder}")]
        if inside and inside != ["images"]:
            parts[name] = _by_class(tree, f"{base}{name}", classes)
        elif flat and not parts:
            parts[name] = _annotated(tree, base, name, flat[0], classes)
    if not parts:
        raise _layout(tree, "there is neither val/ nor test/ with images", "images to test on lie in val/<class>/")
    return parts


def _pictures(tree: Tree, folder: str) -> list[str]:
    return [name for name in tree.files(folder) if name.lower().endswith(SUFFIXES)]


def _by_class(tree: Tree, folder: str, classes: Sequence[str]) -> Files:
    prefix = f"{folder}/" if folder else ""
    unknown = sorted({*tree.folders(folder)} - {*classes})
    if unknown:
        raise _layout(tree, f"{prefix}{unknown[0]} is none of the {len(classes)} classes (and {len(unknown) - 1} more)")
    paths, labels = [], []
    for label, name in enumerate(classes):
        place = f"{prefix}{name}"
        found = _pictures(tree, place)
        if not found:
            place = f"{place}/images"
            found = _pictures(tree, place)
        paths += [f"{place}/{file}" for file in found]
        labels += [label] * len(found)
    return Files(tree, paths, np.array(labels, np.int64))


def _complete(part: Files, folder: str, classes: Sequence[str]) -> Files:
    """Return the part if every class has an image in it."""
    empty = np.flatnonzero(np.bincount(part.labels, minlength=len(classes)) == 0)
    if len(empty):
        places = (f"{part.tree.root}/{folder}/{classes[label]}" for label in empty)
        raise DataError(*(Fault("IMG-EMPTY", "this class has no image", place) for place in places))
    return part


def _annotated(tree: Tree, base: str, name: str, inside: str, classes: Sequence[str]) -> Files:
    """Join flat files with the class that a ground-truth file gives them."""
    files = _pictures(tree, f"{base}{name}{inside}")
    truth, source = _truth(tree, base, name, files)
    number = {wnid: label for label, wnid in enumerate(classes)}
    wrong = [file for file in files if truth.get(file) not in number]
    if wrong:
        told = truth.get(wrong[0])
        reason = "has no line" if told is None else f"is of class {told}, which train has not"
        reason = f"{wrong[0]} {reason} (and {len(wrong) - 1} more)"
        raise DataError(Fault("IMG-LABEL", reason, f"{tree.root}/{source}"))
    return Files(tree, [f"{base}{name}{inside}/{file}" for file in files], np.array([number[truth[f]] for f in files]))


def _truth(tree: Tree, base: str, name: str, files: Sequence[str]) -> tuple[dict[str, str], str]:
    readers: dict[str, Callable[[bytes, str], dict[str, str]]] = {
        "val_annotations.txt": lambda data, path: dict(line.split()[:2] for line in _lines(data)),
        "LOC_val_solution.csv": lambda data, path: {
            f"{row['ImageId']}.JPEG": row["PredictionString"].split()[0] for row in csv.DictReader(_lines(data))
        },
        GROUND_TRUTH: lambda data, path: _devkit(tree, data, path, files),
    }
    places = (f"{base}{name}/", base, "", "ILSVRC2012_devkit_t12/data/", "devkit/data/", "devkit/")
    for place in dict.fromkeys(places):
        for file in tree.files(place.rstrip("/")):
            if file in readers:
                path = f"{place}{file}"
                try:
                    return readers[file](tree.read(path), path), path
                except (ValueError, KeyError, IndexError) as error:
                    reason = f"is not as published ({error})"
                    raise DataError(Fault("IMG-LABEL", reason, f"{tree.root}/{path}")) from error
    hint = f"put {', '.join(readers)} beside it, or sort the files into {name}/<class>/"
    raise _layout(tree, f"{name}/ holds files without classes, and no ground truth is there", hint)


def _devkit(tree: Tree, data: bytes, path: str, files: Sequence[str]) -> dict[str, str]:
    """Read the development kit: line i has the number of image i's class, and meta.mat the class of a number."""
    from scipy.io import loadmat

    meta = path.removesuffix(GROUND_TRUTH) + "meta.mat"
    # its numbers are not in the order of names: without the table every label would be wrong
    if "meta.mat" not in tree.files(meta.rpartition("/")[0]):
        raise _layout(tree, f"{path} needs meta.mat beside it", "copy it from the development kit")
    table = loadmat(io.BytesIO(tree.read(meta)), squeeze_me=True)["synsets"]
    wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in table}
    numbers = [int(line) for line in _lines(data)]
    if len(numbers) != len(files):
        raise ValueError(f"{len(numbers)} lines for {len(files)} images")
    return {file: wnids[number] for file, number in zip(files, numbers, strict=True)}


def _lines(data: bytes) -> list[str]:
    return [line for line in data.decode("utf-8").splitlines() if line.strip()]


def _layout(tree: Tree, reason: str, hint: str | None = None) -> DataError:
    return DataError(Fault("IMG-LAYOUT", reason, str(tree.root), hint=hint))
