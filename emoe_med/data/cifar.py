"""CIFAR as published, in its binary or its Python version, read in place; the latter without trusting its pickles."""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emoe_med.data.image_layouts import Listing, Pixels, class_folders
from emoe_med.data.pickled import read_pickled
from emoe_med.errors import DataError, Fault


@dataclass(frozen=True)
class Cifar:
    """How CIFAR is published.

    Attributes:
        number: Of classes.
        binary: Training files, test file and file of the class names in the binary version.
        label_bytes: Of a binary record; the last one counts.
        python: The same files in the Python version.
        keys: Of the labels and of the class names in the Python version.
    """

    number: int
    binary: tuple[tuple[str, ...], str, str]
    label_bytes: int
    python: tuple[tuple[str, ...], str, str]
    keys: tuple[str, str]


FIVE = tuple(f"data_batch_{i}" for i in range(1, 6))
CIFAR = {
    "cifar10": Cifar(
        10,
        (tuple(f"{name}.bin" for name in FIVE), "test_batch.bin", "batches.meta.txt"),
        1,
        (FIVE, "test_batch", "batches.meta"),
        ("labels", "label_names"),
    ),
    "cifar100": Cifar(
        100,
        (("train.bin",), "test.bin", "fine_label_names.txt"),
        2,
        (("train",), "test", "meta"),
        ("fine_labels", "fine_label_names"),
    ),
}


def cifar(root: Path, name: str) -> Listing:
    """Read CIFAR: the published binary or Python version, as a folder or as its .tar.gz, or class folders.

    Raises:
        DataError: As `class_folders` and `published`.
    """
    found = published(root, name)
    if found is not None:
        return found
    listing = class_folders(root)
    if len(listing.classes) != CIFAR[name].number:
        reason = f"{len(listing.classes)} classes; {name} has {CIFAR[name].number}"
        raise DataError(Fault("IMG-LAYOUT", reason, str(root)))
    return listing


def published(root: Path, name: str) -> Listing | None:
    """Read the published binary or Python version of CIFAR, if it lies there.

    Raises:
        DataError: IMG-ROOT; IMG-CIFAR, records damaged, missing, or a pickle that holds something else.
    """
    layout = CIFAR[name]
    if not root.exists():
        raise DataError(Fault("IMG-ROOT", "is not there", str(root), hint="name the folder or archive by --data-root"))
    for (train, test, names), parse in ((layout.binary, _binary), (layout.python, _python)):
        contents = _files(root, {*train, test, names})
        if not contents.keys() & {*train, test}:
            continue
        if missing := sorted({*train, test} - set(contents)):
            raise DataError(*(Fault("IMG-CIFAR", f"{file} is missing", str(root)) for file in missing))
        parts = []
        for files in (train, (test,)):
            read = [parse(contents[file], layout, f"{root}/{file}") for file in files]
            pixels, labels = (np.concatenate(part) for part in zip(*read, strict=True))
            parts.append(Pixels(pixels, labels))
        classes = _class_names(contents.get(names), layout, f"{root}/{names}", parse is _python)
        return Listing(classes, parts[0], parts[1])
    return None


def _class_names(data: bytes | None, layout: Cifar, where: str, pickled: bool) -> tuple[str, ...]:
    if data is None:
        return tuple(f"class{n:02d}" for n in range(layout.number))
    found = _pickle(data, where).get(layout.keys[1]) if pickled else data.split()
    if not isinstance(found, list) or len(found) != layout.number or not all(isinstance(n, bytes) for n in found):
        raise _damaged(f"does not name {layout.number} classes", where)
    return tuple(name.decode("ascii", "replace") for name in found)


def _binary(data: bytes, layout: Cifar, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Return pixels [n, 3, 32, 32] and labels [n] of a binary file."""
    length = layout.label_bytes + 3072
    if not data or len(data) % length:
        raise _damaged(f"holds {len(data)} bytes, which are no records of {length}", where)
    records = np.frombuffer(data, np.uint8).reshape(-1, length)
    return _checked(records[:, layout.label_bytes :], records[:, layout.label_bytes - 1], layout, where)


def _python(data: bytes, layout: Cifar, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Return pixels [n, 3, 32, 32] and labels [n] of a file of the Python version."""
    batch = _pickle(data, where)
    pixels, labels = batch.get("data"), batch.get(layout.keys[0])
    if not isinstance(pixels, np.ndarray) or not isinstance(labels, list) or pixels.shape != (len(labels), 3072):
        raise _damaged(f"holds no images of 3072 bytes with {layout.keys[0]}", where)
    if not all(type(label) is int and label >= 0 for label in labels):
        raise _damaged(f"has {layout.keys[0]} that are no class numbers", where)
    return _checked(pixels, np.array(labels), layout, where)


def _checked(pixels: np.ndarray, labels: np.ndarray, layout: Cifar, where: str) -> tuple[np.ndarray, np.ndarray]:
    if (highest := int(labels.max(initial=0))) >= layout.number:
        raise _damaged(f"holds class {highest} of {layout.number}", where)
    return pixels.reshape(-1, 3, 32, 32), labels.astype(np.int64)


def _pickle(data: bytes, where: str) -> dict[str, Any]:
    try:
        return read_pickled(data)
    except ValueError as error:
        raise _damaged(str(error), where) from error


def _damaged(reason: str, where: str) -> DataError:
    return DataError(Fault("IMG-CIFAR", reason, where, hint="copy it again"))


def _files(root: Path, wanted: set[str]) -> dict[str, bytes]:
    """Return the wanted files at or one level below a folder, or in a .tar.gz there or given."""
    if root.is_dir():
        found = {p.name: p for p in [*root.glob("*"), *root.glob("*/*")] if p.name in wanted and p.is_file()}
        if found:
            return {name: path.read_bytes() for name, path in found.items()}
        archives = (_files(path, wanted) for path in sorted(root.glob("cifar*.tar.gz")))
        return next((contents for contents in archives if contents), {})
    if not tarfile.is_tarfile(root):
        return {}
    contents = {}
    try:
        with tarfile.open(root) as archive:
            for member in archive:
                name = member.name.rpartition("/")[2]
                if name in wanted and member.isreg() and member.size < 2**28:
                    file = archive.extractfile(member)
                    contents[name] = b"" if file is None else file.read()
    except (OSError, EOFError, tarfile.TarError) as error:
        raise DataError(Fault("IMG-CIFAR", f"cannot be read ({error})", str(root), hint="copy it again")) from error
    return contents
