"""Where the cells of a routed layer lie: one token is one cube of voxels in the model's box."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from emoe_med.brainage.net import BrainAgeNet
from emoe_med.config import BrainAgeConfig
from emoe_med.data.grid import box_grid
from emoe_med.errors import ConfigError, Fault
from emoe_med.models.sfcn import SFCN
from emoe_med.moe import MoELayer

MAX_CELL_MM = 16.0  # a larger cell holds several structures, and its map would name the wrong one


def routed_part(net: BrainAgeNet) -> tuple[SFCN, MoELayer, int]:
    """Return the convolutional net, its routed layer, and the block that the layer stands behind.

    Raises:
        ConfigError: It is another net, or has no routed layer with experts to tell apart (MAPS-LAYER).
    """
    sfcn = net.net
    if not isinstance(sfcn, SFCN) or sfcn.moe is None or sfcn.moe_after is None or sfcn.moe.router.num_experts < 2:
        reason = "maps are made of a routed layer of SFCN with two experts or more, and this net has none"
        raise ConfigError(Fault("MAPS-LAYER", reason))
    return sfcn, sfcn.moe, sfcn.moe_after


@dataclass(frozen=True)
class CellGrid:
    """The grids of one model, all in one box: cells, the model's voxels, and the finer ones of the cache.

    Attributes:
        spacing_mm: Voxel edge of the model's input.
        oversample: Voxels of the cache along one voxel of the model.
        edge: Voxels of the model along one cell.
        field: Voxels of the model that a token can see, along one axis.
    """

    spacing_mm: float
    oversample: int
    edge: int
    field: int

    @classmethod
    def of(cls, net: BrainAgeNet, config: BrainAgeConfig) -> CellGrid:
        """Return the cells of the routed layer of a network.

        Raises:
            ConfigError: Nothing to map (MAPS-LAYER), or cells above 16 mm or that do not fill the box (MAPS-CELL).
        """
        sfcn, _, after = routed_part(net)
        data = config.data
        grid = cls(data.spacing_mm, data.oversample, sfcn.cell(after), sfcn.receptive_field(after))
        if grid.cell_mm > MAX_CELL_MM:
            reason = f"a cell of {config.name} is {grid.cell_mm:g} mm wide, and maps stop at {MAX_CELL_MM:g} mm"
            raise ConfigError(Fault("MAPS-CELL", reason, hint="route after an earlier block"))
        if any(size % grid.edge for size in box_grid(data.spacing_mm)[0]):
            reason = f"cells of {config.name}, {grid.cell_mm:g} mm wide, do not fill the box of the model"
            raise ConfigError(Fault("MAPS-CELL", reason, hint="take another spacing, or route after an earlier block"))
        return grid

    @property
    def cell_mm(self) -> float:
        """Edge of a cell."""
        return self.edge * self.spacing_mm

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """Cells along X, Y, Z."""
        x, y, z = (size // self.edge for size in box_grid(self.spacing_mm)[0])
        return x, y, z

    @cached_property
    def affine(self) -> np.ndarray:
        """Cell index to world RAS mm, [4, 4]."""
        return _coarser(box_grid(self.spacing_mm)[1], self.edge)

    @cached_property
    def centres_mm(self) -> np.ndarray:
        """World coordinates of the cells' centres, [C, 3], in the order of the tokens."""
        index = np.indices(self.shape).reshape(3, -1)
        return (self.affine[:3, :3] @ index + self.affine[:3, 3:]).T

    @cached_property
    def mirror(self) -> np.ndarray:
        """Index of the cell on the other side of the mid-sagittal plane, [C]."""
        return np.arange(np.prod(self.shape)).reshape(self.shape)[::-1].ravel()

    def spread(self, values: np.ndarray, fine: bool = False) -> np.ndarray:
        """Give every voxel the value of its cell: [C] to [X, Y, Z] of the model's or the cache's grid."""
        edge = self.edge * (self.oversample if fine else 1)
        block = np.asarray(values).reshape(self.shape)
        for axis in range(3):
            block = block.repeat(edge, axis)
        return block

    @cached_property
    def cell_of_voxel(self) -> np.ndarray:
        """Cell of each voxel of the cache, [X, Y, Z] int32."""
        return self.spread(np.arange(np.prod(self.shape), dtype=np.int32), fine=True)

    def count(self, inside: np.ndarray) -> np.ndarray:
        """Count the true voxels of the cache's grid in each cell, [C]."""
        return np.bincount(self.cell_of_voxel[inside], minlength=int(np.prod(self.shape)))


def _coarser(affine: np.ndarray, edge: int) -> np.ndarray:
    """Return the affine of the grid whose voxels are cubes of edge^3."""
    step = np.diag([edge, edge, edge, 1.0])
    step[:3, 3] = (edge - 1) / 2
    return affine @ step
