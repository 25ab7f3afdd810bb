"""Regions of a head on the grid of the cache: one atlas for all, or the labels of each head."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy import sparse

from emoe_med.brainage.maps.cells import CellGrid
from emoe_med.brainage.maps.label_table import fetch_atlas, names_of, read_labels
from emoe_med.data.grid import box_grid, resample
from emoe_med.data.manifest import Scan
from emoe_med.data.volume import read_volume
from emoe_med.errors import ConfigError, Fault


@dataclass
class Parcels:
    """A parcellation of every head.

    Attributes:
        name: Letters and digits, for file names.
        names: Name of each label.
        grid: Cells and voxels.
        volume: The atlas on the grid of the cache, [X, Y, Z] int32; None where each head has labels of its own.
    """

    name: str
    names: dict[int, str]
    grid: CellGrid
    volume: np.ndarray | None = None

    @classmethod
    def of_atlas(cls, source: str, labels: Path | None, grid: CellGrid, space: str) -> Parcels:
        """Take an atlas, a file or a name that nilearn knows, onto the grid, nearest voxel.

        World coordinates are taken as they are: variants of MNI152 differ by a few mm, less than a cell.

        Raises:
            ConfigError: The heads are not in a template's space (MAPS-SPACE), or the atlas is not known.
            DataError: The volume or the table cannot be read.
        """
        if space == "centred":
            hint = "train with align: affine, or use the labels column of the manifest"
            raise ConfigError(Fault("MAPS-SPACE", "heads were centred and not aligned: no atlas applies", hint=hint))
        path = Path(source)
        if path.is_file():
            if labels is None:
                raise ConfigError(Fault("MAPS-LABELS", "an atlas file needs its table of names", hint="give --labels"))
            found = read_volume(path)
            voxels, affine, names = found.voxels.astype(np.int32), found.affine, read_labels(labels)
            source = path.name.split(".")[0]
        else:
            voxels, affine, names = fetch_atlas(source)
            names |= read_labels(labels) if labels else {}
        shape, to_world = box_grid(grid.spacing_mm / grid.oversample)
        volume = resample(voxels, affine, np.eye(4), to_world, shape, order=0)
        return cls("".join(filter(str.isalnum, source)), names, grid, volume)

    @classmethod
    def of_heads(cls, labels: Path | None, grid: CellGrid, scans: list[Scan]) -> Parcels | None:
        """Take the labels column of the manifest, named by a table or as `names_of` finds; None where one has none."""
        files = [scan.labels for scan in scans if scan.labels is not None]
        if not files or len(files) < len(scans):
            return None
        return cls("labels", read_labels(labels) if labels else names_of(files[0]), grid)

    def of(self, scan: Scan, matrix: np.ndarray) -> np.ndarray:
        """Return the labels of a head on the grid of the cache, [X, Y, Z] int32.

        Args:
            scan: The head.
            matrix: Template RAS mm to the head's RAS mm, [4, 4].
        """
        if self.volume is not None or scan.labels is None:
            return self.volume if self.volume is not None else np.zeros(self.grid.cell_of_voxel.shape, np.int32)
        found = read_volume(scan.labels)
        shape, affine = box_grid(self.grid.spacing_mm / self.grid.oversample)
        return resample(found.voxels.astype(np.int32), found.affine, matrix, affine, shape, order=0)

    def name_of(self, label: int) -> str:
        """Return the name of a label, or its number where the table has none."""
        return self.names.get(label, f"label {label}")


@dataclass
class ParcelCounts:
    """Voxels of each parcel in each cell, one entry a head; only what is not 0 is kept.

    Attributes:
        parcels: What the labels mean.
        entries: Per head: label, cell and count of brain voxels, [m] each.
        totals: Per head: label and count of all voxels that have it, in cells or not.
    """

    parcels: Parcels
    entries: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)
    totals: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    seen: dict[int, int] = field(default_factory=dict)

    def add(self, head: int, scan: Scan, matrix: np.ndarray, inside: np.ndarray) -> np.ndarray | None:
        """Count the labels of a head, and return them; None where the head was counted before, by another run.

        Args:
            head: Number of the head in its cohort.
            scan: The head.
            matrix: Template RAS mm to the head's RAS mm, [4, 4].
            inside: Brain voxels, [X, Y, Z].
        """
        if head in self.seen:
            self.entries.append(self.entries[self.seen[head]])
            self.totals.append(self.totals[self.seen[head]])
            return None
        self.seen[head] = len(self.entries)
        labels = self.parcels.of(scan, matrix)
        self.count(labels, inside)
        return labels

    def count(self, labels: np.ndarray, inside: np.ndarray) -> None:
        """Count labels [X, Y, Z] in the brain voxels [X, Y, Z] of one more head."""
        cells = self.parcels.grid.cell_of_voxel
        known = labels > 0
        used = known & inside
        size = int(cells.max()) + 1
        keys, counts = np.unique(labels[used].astype(np.int64) * size + cells[used], return_counts=True)
        self.entries.append(((keys // size).astype(np.int32), (keys % size).astype(np.int32), counts.astype(np.int32)))
        self.totals.append(np.unique(labels[known], return_counts=True))

    def labels(self) -> np.ndarray:
        """Return all labels that occur, [P], sorted."""
        return np.unique(np.concatenate([label for label, _ in self.totals] or [np.zeros(0, np.int32)]))

    def matrix(self, head: int, labels: np.ndarray, num_cells: int) -> sparse.csr_array:
        """Return the brain voxels of each of ``labels`` in each cell of a head, [P, C]."""
        label, cell, count = self.entries[head]
        return sparse.csr_array(
            (count.astype(np.float32), (np.searchsorted(labels, label), cell)), shape=(len(labels), num_cells)
        )

    def total(self, head: int, labels: np.ndarray) -> np.ndarray:
        """Return the voxels of each of ``labels`` in a head, [P]."""
        label, count = self.totals[head]
        found = np.zeros(len(labels))
        found[np.searchsorted(labels, label)] = count
        return found
