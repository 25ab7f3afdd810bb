"""The volumes of a cohort in the model's space, each made once: a cache keyed by content and chain."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from monai.data import PersistentDataset
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from emoe_med.data.brain import CHAIN_VERSION, ChainOptions, entry_digest, entry_seal, make_chain
from emoe_med.data.manifest import Scan
from emoe_med.data.opening import split_member
from emoe_med.data.sidecar import Sidecar, statement, vouching
from emoe_med.data.volume import file_digest
from emoe_med.errors import Fault, VolumeError

LOG = logging.getLogger("emoe_med")


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
        """Return the SHA-256 of the bytes of a file or of a member of a zip archive."""
        file, member = split_member(path)
        try:
            stat = file.stat()
        except OSError as error:
            raise VolumeError(Fault("VOL-MISSING", error.strerror or "cannot be read", str(path))) from error
        stamp = f"{file.resolve() / member}|{stat.st_size}|{stat.st_mtime_ns}"
        key = hashlib.sha256(stamp.encode()).hexdigest()
        if key not in self.known:
            self.known[key] = file_digest(path)
            with self.memory.open("a") as memory:
                memory.write(f"{key} {self.known[key]}\n")
        return self.known[key]


def refuse_misfit(scan: Scan, options: ChainOptions) -> None:
    """Refuse a scan that came another way to the template than the chain takes for granted.

    Raises:
        VolumeError: CON-WARPED, or VOL-TRANSFORM where the manifest gives none.
    """
    if scan.warped and options.align != "warped":
        reason = "image was warped nonlinearly to a template, which takes signs of age away; unwarped heads are wanted"
        raise VolumeError(Fault("CON-WARPED", reason, hint="take the native image"))
    if options.align == "warped" and not scan.warped:
        reason = "image is not warped nonlinearly to the template, as all scans of this model are"
        raise VolumeError(Fault("CON-WARPED", reason, hint="see the column `warped` of the manifest"))
    if options.align == "given" and scan.transform is None:
        raise VolumeError(
            Fault("VOL-TRANSFORM", "no linear transform in the manifest, as all scans of this model have")
        )


class HeadDataset(PersistentDataset):
    """Volumes of scans in the model's space, through the cache, with age and row joined afterwards.

    `dataset[i]` gives image [1, X, Y, Z] float16, similarity [] float32, age [] float32 in years (NaN where
    unknown), weight [] float32 and row [] int64. The cache is keyed by the content of image, mask, sidecar and given
    transform and by the chain; an entry whose digest is wrong is removed and made anew. `sidecars[i]` is what vouches
    that a scan is in the model's space already; None for all others.

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
        self.sidecars = [self._sidecar(scan) for scan in scans]
        items = [self._item(scan, sidecar) for scan, sidecar in zip(scans, self.sidecars, strict=True)]
        super().__init__(items, make_chain(options), folder, hash_func=self._key, weights_only=True)

    def _sidecar(self, scan: Scan) -> Sidecar | None:
        """Return what vouches that a scan is in the model's space already."""
        if self.options.align != "affine" or self.options.mask != "brain":
            return None
        sidecar = vouching(scan.image, scan.mask or scan.labels, self.digests.of)
        return sidecar if sidecar and sidecar.steps.get("Space") == self.options.space else None

    def _item(self, scan: Scan, sidecar: Sidecar | None) -> dict[str, str]:
        item = {"image": scan.image}
        if self.options.mask == "brain" and (mask := scan.mask or scan.labels):
            item["mask"] = mask
        if sidecar and "mask" in item:
            item["sidecar"] = sidecar.file
        if self.options.align == "given" and scan.transform:
            item["transform"] = scan.transform
        return {name: str(path) for name, path in item.items()}

    def stated(self, index: int) -> str:
        """Return what a scan states of its preprocessing; of what `preprocess` wrote, only where it is unaltered."""
        sidecar = self.sidecars[index]
        return sidecar.statement() if sidecar else statement(self.scans[index].image)

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
        """Return the cache entry of a scan: image, similarity, matrix, fingerprint, digests of both."""
        scan = self.scans[index]
        try:
            refuse_misfit(scan, self.options)
            if scan.sha256 not in (None, self.digests.of(scan.image)):
                raise VolumeError(Fault("VOL-DIGEST", "sha256 differs from the manifest's", str(scan.image)))
            return self._checked(self.data[index])
        except Exception as error:
            raise self._with_row(error, scan) from error

    def _checked(self, item: dict[str, str]) -> dict[str, Any]:
        """Return the cache entry of an item, made anew where it is missing, unreadable or damaged."""
        file = self.folder / f"{self._key(item).decode()}.pt"
        if file.is_file():
            try:
                entry = torch.load(file, weights_only=True)
                if (entry["digest"], entry["seal"]) == (entry_digest(entry), entry_seal(entry)):
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
    """One scan as it was read: why it cannot be used, or its digests and what was measured of it."""

    fault: Fault | None
    content: str = ""  # of the volume in the model's space: equal for one image under two names
    voxels: str = ""  # of the image as read, whatever the mask
    similarity: float = math.nan
    fingerprint: tuple[float, ...] = ()  # in the order of `MEASURES`


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
        measured = tuple(entry["fingerprint"].tolist())
        return Reading(None, entry["digest"], entry["voxels"], float(entry["similarity"]), measured)
