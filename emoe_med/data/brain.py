"""From a scan on disk to the tensor that a network sees: the deterministic chain and its cache.

strict read -> RAS -> brain mask -> affine to the template (or centring) -> area resampling -> intensity, then
a cache entry keyed by the content of the files and by the chain. Nothing random happens here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from monai.data import MetaTensor, PersistentDataset
from monai.transforms import Compose, LoadImaged, MapTransform, Transform
from scipy import ndimage
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from emoe_med.data.manifest import Scan
from emoe_med.data.register import align_affine, box_grid, resample
from emoe_med.data.volume import StrictReader, file_digest
from emoe_med.errors import Fault, VolumeError

LOG = logging.getLogger("emoe_med")

# part of every cache key: raise it when a step below changes what it gives
CHAIN_VERSION = 2


@dataclass(frozen=True)
class ChainOptions:
    """Options of the deterministic chain.

    Attributes:
        spacing_mm: voxel edge of the cached volumes; it divides the box of 160 x 192 x 160 mm.
        align: `affine` takes each head to the MNI152 template by 12 degrees of freedom; `centred` only moves
            its centre there, and MNI atlases then do not apply.
        mask: `brain` keeps the voxels of the manifest's mask (or labels > 0); `head` keeps the whole head.
    """

    spacing_mm: float = 1.0
    align: Literal["affine", "centred"] = "affine"
    mask: Literal["brain", "head"] = "brain"

    @property
    def space(self) -> str:
        """Name of the space that the volumes are in, for file names and reports."""
        return "MNI152NLin2009aSym" if self.align == "affine" else "centred"

    def contract(self) -> dict[str, Any]:
        """Tell what a scan went through; a model is applied only to scans that went the same way."""
        return {
            **asdict(self),
            "orientation": "RAS",
            "space": self.space,
            "box_mm": [160, 192, 160],
            "intensity": "clip((x / mean inside the mask - 1) / 0.25, -4, 3), background 0",
            "chain_version": CHAIN_VERSION,
            "digest": self.digest(),
        }

    def digest(self) -> str:
        """Return what the cache key says of the chain."""
        text = json.dumps([float(self.spacing_mm), self.align, self.mask, CHAIN_VERSION])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class BrainToBoxd(MapTransform):
    """Mask, align, resample and normalise `image` [1, X, Y, Z] into the model's box.

    Adds `similarity` [] (local correlation with the template; NaN where nothing was aligned) and `matrix`
    [4, 4] (template RAS mm -> subject RAS mm). Drops the mask.
    """

    def __init__(self, options: ChainOptions) -> None:
        super().__init__(keys=["image"])
        self.options = options

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Return image [1, X, Y, Z] float32 on the grid of the cache, exactly 0 outside the mask."""
        with one_thread():
            return self._to_box(data)

    def _to_box(self, data: Mapping[str, Any]) -> dict[str, Any]:
        image = data["image"]
        voxels, affine = np.asarray(image[0]), np.asarray(image.affine)
        mask = self._mask(voxels, affine, data.get("mask"))
        matrix, similarity = self._matrix(voxels, affine, mask)
        shape, grid = box_grid(self.options.spacing_mm)
        brain = resample(np.where(mask, voxels, 0), affine, matrix, grid, shape)
        share = resample(mask.astype(np.float32), affine, matrix, grid, shape)
        # a voxel on the edge is the mean of what lies inside: averaged with the zeros outside it would look like CSF
        mean = brain / (np.maximum(share, 0.5) * voxels[mask].mean())
        normal = np.where(share >= 0.5, np.clip((mean - 1) / 0.25, -4, 3), 0)
        return {
            "image": torch.from_numpy(normal.astype(np.float32))[None],
            "similarity": torch.tensor(similarity),
            "matrix": torch.from_numpy(matrix),
        }

    def _mask(self, voxels: np.ndarray, affine: np.ndarray, given: MetaTensor | None) -> np.ndarray:
        if self.options.mask == "head":
            # the mean of a head in air lies between the two; what the scalp encloses is head, dark or not
            mask = ndimage.binary_fill_holes(voxels > voxels.mean())
        elif given is None:
            hint = "give a manifest with a mask or labels column, or put <name>_mask.nii.gz beside the head"
            raise VolumeError(Fault("VOL-MASK", "no mask or labels for a model of masked brains", hint=hint))
        else:
            mask_affine = np.asarray(given.affine)
            same_grid = given.shape[1:] == voxels.shape and np.allclose(mask_affine, affine, atol=1e-3)
            mask = np.asarray(given[0]) > 0
            if not same_grid:
                mask = resample(mask, mask_affine, np.eye(4), affine, voxels.shape, order=0)
        if mask.mean() < 1e-3 or voxels[mask].mean() <= 0:
            raise VolumeError(Fault("VOL-MASK", "mask covers no signal of the image"))
        return mask

    def _matrix(self, voxels: np.ndarray, affine: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, float]:
        if self.options.align == "affine":
            alignment = align_affine(voxels, affine, mask)
            return alignment.matrix, alignment.similarity
        matrix = np.eye(4)
        matrix[:3, 3] = np.argwhere(mask).mean(0) @ affine[:3, :3].T + affine[:3, 3] - box_centre_mm()
        return matrix, float("nan")


@contextmanager
def one_thread() -> Generator[None]:
    """Work with one thread of torch: the same bits on every machine, and no waiting for each other.

    The products of one head are small; scans are read side by side by processes instead.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def box_centre_mm() -> np.ndarray:
    """Return the world coordinates [3] of the middle of the model's box."""
    shape, affine = box_grid(4.0)
    return affine[:3, :3] @ ((np.asarray(shape) - 1) / 2) + affine[:3, 3]


class ToCacheEntry(Transform):
    """Store the image as float16, and the digest of everything beside it."""

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Return what goes to disk."""
        entry = {**data, "image": data["image"].half()}
        return {**entry, "digest": _digest(entry)}


def _digest(entry: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for name in ("image", "similarity", "matrix"):
        digest.update(entry[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def make_chain(options: ChainOptions) -> Compose:
    """Compose the deterministic chain for items {"image": path, "mask": path (optional)}."""
    load = LoadImaged(keys=["image", "mask"], reader=StrictReader, ensure_channel_first=True, allow_missing_keys=True)
    return Compose([load, BrainToBoxd(options), ToCacheEntry()])


class FileDigests:
    """SHA-256 of files, remembered by path, size and time stamp so that a start does not read 50,000 files.

    The memory file names no path: its keys are digests of path, size and time stamp.
    """

    def __init__(self, memory: Path) -> None:
        self.memory = memory
        self.known: dict[str, str] = {}
        self.recall()

    def recall(self) -> None:
        """Take over what other processes wrote into the memory; a half-written line is left out."""
        if self.memory.is_file():
            for line in self.memory.read_text().splitlines():
                key, _, digest = line.partition(" ")
                if len(key) == len(digest) == 64:
                    self.known[key] = digest

    def of(self, path: Path) -> str:
        """Return the SHA-256 of a file's bytes."""
        try:
            stat = path.stat()
        except OSError as error:
            raise VolumeError(Fault("VOL-MISSING", error.strerror or "cannot be read", str(path))) from error
        stamp = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
        key = hashlib.sha256(stamp.encode()).hexdigest()
        if key not in self.known:
            self.known[key] = file_digest(path)
            with self.memory.open("a") as memory:
                memory.write(f"{key} {self.known[key]}\n")
        return self.known[key]


class HeadDataset(PersistentDataset):
    """Volumes of scans in the model's space, through the cache, with age and row joined afterwards.

    `dataset[i]` gives image [1, X, Y, Z] float16, similarity [] float32, age [] float32 in years (NaN where
    unknown), weight [] float32 and row [] int64. The cache is keyed by the content of image and mask and by the
    chain; an entry whose digest is wrong is removed and made anew.

    Raises:
        VolumeError: From `dataset[i]`, with the manifest row, where the scan cannot be used.
    """

    def __init__(self, scans: Sequence[Scan], options: ChainOptions, cache_dir: Path) -> None:
        folder = cache_dir / f"{options.digest()}-v{CHAIN_VERSION}"
        folder.mkdir(parents=True, exist_ok=True)
        self.scans = scans
        self.options = options
        self.folder = folder
        self.digests = FileDigests(cache_dir / "file-digests.txt")
        items = [self._item(scan) for scan in scans]
        super().__init__(items, make_chain(options), folder, hash_func=self._key, weights_only=True)

    def _item(self, scan: Scan) -> dict[str, str]:
        mask = scan.mask or scan.labels
        if mask is None or self.options.mask == "head":
            return {"image": str(scan.image)}
        return {"image": str(scan.image), "mask": str(mask)}

    def _key(self, item: Mapping[str, str]) -> bytes:
        digests = [self.digests.of(Path(path)) for path in item.values()]
        return hashlib.sha256("".join(digests).encode()).hexdigest().encode()

    def __getitem__(self, index: int) -> dict[str, Tensor]:  # ty: ignore[incompatible-method-override]
        """Return one scan in the model's space."""
        scan, entry = self.scans[index], self.entry(index)
        return {
            "image": entry["image"],
            "similarity": entry["similarity"].float(),
            "age": torch.tensor(float("nan") if scan.age is None else scan.age, dtype=torch.float32),
            "weight": torch.tensor(scan.weight, dtype=torch.float32),
            "row": torch.tensor(scan.row),
        }

    def entry(self, index: int) -> dict[str, Any]:
        """Return the cache entry of a scan: image, similarity, matrix and digest."""
        try:
            return self._checked(self.data[index])
        except Exception as error:
            raise self._with_row(error, self.scans[index]) from error

    def _checked(self, item: dict[str, str]) -> dict[str, Any]:
        """Return the cache entry of an item, made anew where it is missing, unreadable or damaged."""
        file = self.folder / f"{self._key(item).decode()}.pt"
        if file.is_file():
            try:
                entry = torch.load(file, weights_only=True)
                if entry["digest"] == _digest(entry):
                    return entry
            except Exception:  # torch.load has no one error for damaged files
                LOG.debug("cache entry cannot be read: %s", file.name)
            file.unlink(missing_ok=True)
        return self._cachecheck(item)

    @staticmethod
    def _with_row(error: BaseException, scan: Scan) -> BaseException:
        """Find the refusal inside MONAI's wrapping errors and add row and file."""
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, VolumeError):
            cause = cause.__cause__
        if cause is None:
            return error
        faults = [replace(f, row=scan.row, file=f.file or str(scan.image)) for f in cause.faults]
        return VolumeError(*faults)

    def build(self, jobs: int = 0, progress: Callable[[Collection], Iterator] = iter) -> list[Reading]:
        """Fill the cache for all scans and tell of each, in their order, whether it can be used.

        Args:
            jobs: worker processes; 0 works in this one.
            progress: wraps the finished scans, e.g. for a progress bar.
        """
        attempts = DataLoader(_Readings(self), batch_size=None, num_workers=jobs)
        readings = [reading for _, reading in zip(progress(range(len(self))), attempts, strict=True)]
        self.digests.recall()
        return readings


@dataclass(frozen=True)
class Reading:
    """One scan as it was read: why it cannot be used, or the digest of its content and its similarity."""

    fault: Fault | None
    content: str = ""  # equal for one image under two names
    similarity: float = math.nan


class _Readings(TorchDataset):
    """Read each scan of a dataset."""

    def __init__(self, heads: HeadDataset) -> None:
        self.heads = heads

    def __len__(self) -> int:
        return len(self.heads)

    def __getitem__(self, index: int) -> Reading:
        try:
            entry = self.heads.entry(index)
        except VolumeError as error:
            return Reading(error.faults[0])
        return Reading(None, entry["digest"], float(entry["similarity"]))
