"""CIFAR in its published binary version, which is read in place; the Python version is pickled and refused."""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from emoe_med.data.image_layouts import Listing, Pixels, class_folders
from emoe_med.errors import DataError, Fault


@dataclass(frozen=True)
class Cifar:
    """How a binary version of CIFAR is laid out: label bytes per record (the last one counts), files, names."""

    label_bytes: int
    train: tuple[str, ...]
    test: tuple[str, ...]
    names: str
    number: int


CIFAR = {
    "cifar10": Cifar(1, tuple(f"data_batch_{i}.bin" for i in range(1, 6)), ("test_batch.bin",), "batches.meta.txt", 10),
    "cifar100": Cifar(2, ("train.bin",), ("test.bin",), "fine_label_names.txt", 100),
}


def cifar(root: Path, name: str) -> Listing:
    """Read CIFAR: the published binary version, as a folder or as its .tar.gz, or class folders.

    Raises:
        DataError: As `class_folders`; IMG-CIFAR, records damaged or the Python version, which is pickled.
    """
    layout = CIFAR[name]
    contents = _cifar_files(root, {*layout.train, *layout.test, layout.names})
    if contents is None:
        listing = class_folders(root)
        if len(listing.classes) != layout.number:
            reason = f"{len(listing.classes)} classes; {name} has {layout.number}"
            raise DataError(Fault("IMG-LAYOUT", reason, str(root)))
        return listing
    missing = sorted({*layout.train, *layout.test} - set(contents))
    if missing:
        raise DataError(*(Fault("IMG-CIFAR", f"{file} is missing", str(root)) for file in missing))
    classes = [f"class{n:02d}" for n in range(layout.number)]
    if layout.names in contents:
        classes = contents[layout.names].decode("ascii", "replace").split()
    parts = []
    for files in (layout.train, layout.test):
        records = [_records(contents[file], layout, f"{root}/{file}") for file in files]
        labels = np.concatenate([r[:, layout.label_bytes - 1] for r in records]).astype(np.int64)
        pixels = np.concatenate([r[:, layout.label_bytes :] for r in records]).reshape(-1, 3, 32, 32)
        parts.append(Pixels(pixels, labels))
    return Listing(tuple(classes), parts[0], parts[1])


def _records(data: bytes, layout: Cifar, where: str) -> np.ndarray:
    length = layout.label_bytes + 3072
    if not data or len(data) % length:
        reason = f"holds {len(data)} bytes, which are no records of {length}"
        raise DataError(Fault("IMG-CIFAR", reason, where, hint="copy it again"))
    records = np.frombuffer(data, np.uint8).reshape(-1, length)
    if (highest := int(records[:, layout.label_bytes - 1].max())) >= layout.number:
        raise DataError(Fault("IMG-CIFAR", f"holds class {highest} of {layout.number}", where, hint="copy it again"))
    return records


def _cifar_files(root: Path, wanted: set[str]) -> dict[str, bytes] | None:
    """Return the wanted files of a binary version at or one level below a folder, or in a .tar.gz; None if none."""
    if not root.exists():
        raise DataError(Fault("IMG-ROOT", "is not there", str(root), hint="name the folder or archive by --data-root"))
    if root.is_dir():
        found = {path.name: path for path in [*root.glob("*"), *root.glob("*/*")] if path.name in wanted}
        if found:
            return {name: path.read_bytes() for name, path in found.items()}
        archives = sorted(root.glob("cifar*-binary.tar.gz"))
        if archives:
            return _cifar_files(archives[0], wanted)
        pickled = [*root.glob("cifar*-python.tar.gz"), *root.glob("*/data_batch_1"), *root.glob("data_batch_1")]
        if pickled and not list(root.glob("*.zip")) and not (root / "train").is_dir():
            hint = "take the binary version (cifar-*-binary.tar.gz) of the same page"
            raise DataError(Fault("IMG-CIFAR", "is pickled, which could run code", str(pickled[0]), hint=hint))
        return None
    if not tarfile.is_tarfile(root):
        return None
    found_bytes = {}
    try:
        with tarfile.open(root) as archive:
            for member in archive:
                name = member.name.rpartition("/")[2]
                if name in wanted and member.isreg() and member.size < 2**28:
                    file = archive.extractfile(member)
                    found_bytes[name] = b"" if file is None else file.read()
    except (OSError, EOFError, tarfile.TarError) as error:
        raise DataError(Fault("IMG-CIFAR", f"cannot be read ({error})", str(root), hint="copy it again")) from error
    return found_bytes
