"""One picture of all experts: where each of them serves, on the group's mean head."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure

from emoe_med.brainage.maps.background import Background
from emoe_med.brainage.maps.cells import CellGrid
from emoe_med.brainage.maps.write import Map

_HEIGHTS_MM = (-32, -8, 8, 24, 40, 56)  # axial slices of the winner map
_CUTS_MM = (0, -20, 16)  # sagittal, coronal, axial slice of each expert


def draw_montage(maps: Sequence[Map], background: Background, grid: CellGrid, index: dict[str, Any]) -> bytes:
    """Draw the winner map in axial slices above three cuts of each expert's occupancy; returns a PNG."""
    experts = [item for item in maps if item.quantity == "occupancy"]
    (winner,) = (item for item in maps if item.quantity == "topexpert")
    shares = np.stack([item.values for item in experts])
    most = max(float(np.quantile(shares[:, shares.any(0)], 0.99)), 1e-6)  # one scale, so that experts can be compared
    columns = 2
    rows = -(-len(experts) // columns)
    figure: Any = Figure(figsize=(11, 3.3 + 1.75 * rows), layout="constrained", facecolor="white")
    top, rest = figure.subfigures(2, 1, height_ratios=[2.3, 0.3 + 1.75 * rows])
    head = background.mean()
    brain = background.brain()
    colours = index["colors"]
    palette = ListedColormap(colours)
    for axes, z in zip(top.subplots(1, len(_HEIGHTS_MM)), _HEIGHTS_MM, strict=True):
        _slice(
            axes, head, grid.spread(winner.values, fine=True) * brain, background.affine, 2, z, palette, len(colours)
        )
        axes.set_title(f"z = {z} mm", fontsize=10)
    count = f"{index['subjects']} heads, {len(index['runs'])} run{'s' if len(index['runs']) > 1 else ''}"
    note = "SYNTHETIC heads · " if index["synthetic"] else ""
    verdict = index["verdict"]
    top.suptitle(
        f"{note}Expert that most heads send a cell to · {count} · cells of {grid.cell_mm:g} mm, not smoothed\n"
        f"stability: {verdict}",
        fontsize=11,
    )
    top.legend(
        handles=[_patch(colour) for colour in colours],
        labels=index["experts"],
        loc="outside lower center",
        ncols=min(len(colours), 8),
        fontsize=9,
        frameon=False,
    )
    rest.suptitle(f"Occupancy of each expert: clear at 0, full colour from {most:.0%} of heads on", fontsize=11)
    panels = rest.subfigures(rows, columns, squeeze=False).ravel()
    for panel, item, colour in zip(panels, experts, colours, strict=False):
        shade = LinearSegmentedColormap.from_list("one", ["#ffffff00", colour])
        for axis, (axes, cut) in enumerate(zip(panel.subplots(1, 3), _CUTS_MM, strict=True)):
            voxels = grid.spread(item.values, fine=True) * brain
            _slice(axes, head, voxels, background.affine, axis, cut, shade, most)
            axes.set_title(f"{'xyz'[axis]} = {cut} mm", fontsize=8)
        panel.suptitle(f"{index['experts'][item.expert or 0]}: in up to {item.values.max():.0%} of heads", fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()


def _slice(
    axes: Axes, head: np.ndarray, voxels: np.ndarray, affine: np.ndarray, axis: int, mm: float, colours: Any, top: float
) -> None:
    """Draw one slice at a world coordinate, the left side of the head on the left."""
    at = round((mm - affine[axis, 3]) / affine[axis, axis])
    behind, over = (np.take(v, at, axis).T for v in (head, voxels))
    axes.imshow(behind, cmap="gray", origin="lower", vmin=0, vmax=0.9)
    labels = isinstance(colours, ListedColormap)
    shown = np.ma.masked_equal(over, 0) - (1 if labels else 0)
    high = top - 1 if labels else top
    axes.imshow(
        shown, cmap=colours, origin="lower", vmin=0, vmax=high, alpha=0.6 if labels else 0.85, interpolation="nearest"
    )
    axes.set_axis_off()
    if axis != 0:
        axes.text(0.02, 0.96, "L", transform=axes.transAxes, color="white", fontsize=8, va="top")


def _patch(colour: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=colour)
