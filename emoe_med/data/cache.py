"""The volumes of a cohort in the model's space, each made once: a cache keyed by content and chain."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from io import BytesIO
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
from emoe_med.data.readings import KnownReadings, Reading
from emoe_med.data.sidecar import Sidecar, statement, vouching
from emoe_med.data.volume import file_digest
from emoe_med.errors import Fault, StorageError, VolumeError
from emoe_med.storage import replace_file, storage_error

LOG = logging.getLogger("emoe_med")


class FileDigests:
    """SHA-256 of files, remembered by path, size and time stamps so that a start does not read 50,000 files.

    The time of the last change counts beside that of the last writing, which a copy may take over from another file.
    The memory file names no path: its keys are digests of these.
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

    def remembered(self, path: Path) -> str | None:
        """Return the digest of a file that was read before and has not changed since."""
        try:
            return self.known.get(self._stamp(path))
        except OSError:
            return None

    @staticmethod
    def _stamp(path: Path) -> str:
        file, member = split_member(path)
        stat = file.stat()
        text = f"{os.path.abspath(file)}|{member}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}"
        return hashlib.sha256(text.encode()).hexdigest()

    def of(self, path: Path) -> str:
        """Return the SHA-256 of the bytes of a file or of a member of a zip archive."""
        try:
            key = self._stamp(path)
        except OSError as error:
            raise VolumeError(Fault("VOL-MISSING", error.strerror or "cannot be read", str(path))) from error
        if key not in self.known:
            digest = file_digest(path)
            try:
                with self.memory.open("a") as memory:
                    memory.write(f"{key} {digest}\n")
            except OSError as error:
                raise storage_error(error, self.memory, "cannot be written") from error
            self.known[key] = digest
        return self.known[key]


def misfit(scan: Scan, options: ChainOptions) -> Fault | None:
    """Say why a scan came another way to the template than the chain takes for granted: CON-WARPED, VOL-TRANSFORM."""
    if scan.warped and options.align != "warped":
        reason = "image was warped nonlinearly to a template, which takes signs of age away; unwarped heads are wanted"
        return Fault("CON-WARPED", reason, hint="take the native image")
    if options.align == "warped" and not scan.warped:
        reason = "image is not warped nonlinearly to the template, as all scans of this model are"
        return Fault("CON-WARPED", reason, hint="see the column `warped` of the manifest")
    if options.align == "given" and scan.transform is None:
        return Fault("VOL-TRANSFORM", "no linear transform, as all scans of this model have")
    return None


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
        return _joined(self.digests.of(Path(path)) for path in item.values()).encode()

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
            if (fault := misfit(scan, self.options)) is not None:
                raise VolumeError(fault)
            if scan.sha256 not in (None, self.digests.of(scan.image)):
                raise VolumeError(Fault("VOL-DIGEST", "sha256 differs from the manifest's", str(scan.image)))
            return self._checked(self.data[index])
        except StorageError:
            raise
        except Exception as error:
            raise self._with_row(error, scan) from error

    def _checked(self, item: dict[str, str]) -> dict[str, Any]:
        """Return the cache entry of an item, made anew where it is missing, unreadable or damaged.

        MONAI's own keeps what is whole in form, and moves a new entry from the system's temporary folder, which on
        another file system is a copy that others can see half done.
        """
        file = self.folder / f"{self._key(item).decode()}.pt"
        if file.is_file():
            try:
                entry = torch.load(file, weights_only=True)
                if (entry["digest"], entry["seal"]) == (entry_digest(entry), entry_seal(entry)):
                    return entry
            except Exception:  # torch.load has no one error for damaged files
                LOG.debug("cache entry cannot be read: %s", file.name)
            file.unlink(missing_ok=True)
        entry = self._pre_transform(dict(item))
        content = BytesIO()
        torch.save(entry, content)
        replace_file(file, content.getvalue())
        return entry

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

    def build(
        self,
        jobs: int = 0,
        progress: Callable[[Collection], Iterator] = iter,
        indices: Sequence[int] | None = None,
    ) -> list[Reading]:
        """Fill the cache for scans and tell of each, in their order, whether it can be used.

        What is in the cache already is told from memory, so that a start does not read every volume; the digest of an
        entry is checked when it is used.

        Args:
            jobs: worker processes; 0 works in this one.
            progress: wraps the finished scans, e.g. for a progress bar.
            indices: which scans; all of them if not given.

        Raises:
            StorageError: An entry cannot be written.
        """
        chosen = range(len(self)) if indices is None else indices
        known = KnownReadings(self.folder)
        readings = {index: reading for index in chosen if (reading := known.get(self._known_key(index)))}
        missing = [index for index in chosen if index not in readings]
        attempts = DataLoader(_Readings(self), batch_size=None, sampler=missing, num_workers=min(jobs, len(missing)))
        for index, reading in zip(progress(missing), attempts, strict=True):
            if not isinstance(reading, Reading):
                raise StorageError(*reading)
            readings[index] = reading
        self.digests.recall()
        known.add((self._known_key(index), readings[index]) for index in missing)
        return [readings[index] for index in chosen]

    def _known_key(self, index: int) -> str | None:
        """Return the key of a scan whose files are as they were and whose entry is there; None for all others."""
        scan = self.scans[index]
        digests = [self.digests.remembered(Path(path)) for path in self.data[index].values()]
        if None in digests or scan.sha256 not in (None, digests[0]) or misfit(scan, self.options):
            return None
        key = _joined(filter(None, digests))
        return key if (self.folder / f"{key}.pt").is_file() else None


def _joined(digests: Iterable[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()


class _Readings(TorchDataset):
    """Read each scan of a dataset."""

    def __init__(self, heads: HeadDataset) -> None:
        self.heads = heads

    def __len__(self) -> int:
        return len(self.heads)

    def __getitem__(self, index: int) -> Reading | Sequence[Fault]:
        try:
            entry = self.heads.entry(index)
        except VolumeError as error:
            return Reading(error.faults[0])
        except StorageError as error:
            return error.faults  # torch would rebuild the error of a worker from its printed text
        measured = tuple(entry["fingerprint"].tolist())
        return Reading(None, entry["digest"], entry["voxels"], float(entry["similarity"]), measured)
