"""What the scripts of the viewer get: volumes packed for a browser, colours, tables, and where to begin."""

from __future__ import annotations

import base64
import gzip
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.colors import to_rgb

from emoe_med.brainage.viewer_text import QUANTITIES, remark, warning
from emoe_med.data.volume import Volume, read_map

EMPTY = -32768  # int16 code of "no value here"; the scripts know it too
SEEN = 0.5  # of the heads, at least, were routed in a cell that is shown
BRAIN = 0.15  # of the brightest: where the mean head begins
MARGIN_MM = 4


def page_data(folder: Path, index: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything the page computes with, ready for JSON.

    Args:
        folder: Expert maps.
        index: Its maps.json.
    """
    head = read_map(folder / index["background"])
    tables = _tables(folder)
    volumes = {"anatomy": _packed(head, np.uint8, _grey(head.voxels), 1)}
    if index["atlas"]:
        parcels = read_map(folder / index["atlas"]["file"])
        # the script knows a parcel by its line in the table, 0 being none: any code of an atlas fits
        codes = [0, *(row["parcel"] for row in tables["parcels"])]
        order = np.argsort(codes)
        found = np.searchsorted(np.take(codes, order), parcels.voxels.astype(np.int64)).clip(max=len(codes) - 1)
        lines = np.where(np.take(codes, order)[found] == parcels.voxels, order[found], 0)
        volumes["parcels"] = _packed(parcels, np.int16, lines, 1)
    maps, quantities = _maps(folder, index)
    return {
        "warning": warning(index),
        "layers": list(dict.fromkeys(entry.get("layer", index["layer"]) for entry in index["maps"])),
        "experts": [
            {"name": name, "colour": colour, "remark": remark(name, tables["regions"], bool(warning(index)))}
            for name, colour in zip(index["experts"], index["colors"], strict=True)
        ],
        "quantities": quantities,
        "volumes": volumes | maps,
        "box": _box(head),
        "start": _start(folder, index, head),
        "step_mm": round(float(np.linalg.norm(head.affine[:3, 0])), 3),
        "cell_mm": index["cell_mm"],
        "palette": _palette(index["colors"]),
        **tables,
    }


def _maps(folder: Path, index: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the packed maps, by layer/quantity or layer/quantity/expert, and the quantities that there are."""
    coverage = [folder / entry["file"] for entry in index["maps"] if entry["quantity"] == "coverage"]
    seen = read_map(coverage[0]).voxels >= SEEN if coverage else np.True_
    volumes, found = {}, {}
    for entry in index["maps"]:
        key = (entry["quantity"], entry["expert"] is not None)
        if key not in QUANTITIES:
            continue
        layer = entry.get("layer", index["layer"])
        name = "-".join([entry["quantity"], *(["expert"] if key[1] else [])])
        volume = read_map(folder / entry["file"])
        largest = float(np.abs(volume.voxels).max())
        scale = 1.0 if entry["kind"] == "labels" else max(largest, 1e-12) / 32767
        volumes["/".join([layer, name, *([entry["expert"]] if key[1] else [])])] = _packed(
            volume, np.int16, np.where(seen, np.rint(volume.voxels / scale), EMPTY), scale
        )
        limits = found.setdefault(key, {"name": name, "kind": entry["kind"], "by_expert": key[1], "limit": {}})["limit"]
        limits[layer] = max(limits.get(layer, 0.0), largest)  # of all experts, so that they can be compared
    told = [found[key] | text for key, text in QUANTITIES.items() if key in found]
    for quantity in told:
        quantity["threshold"] = _threshold(quantity, len(index["experts"]))
    return volumes, told


def _threshold(quantity: Mapping[str, Any], experts: int) -> float:
    """Return what is shown at first: shares of an expert above chance, years above a tenth of the largest."""
    if quantity["name"] == "occupancy-expert":
        return 1 / experts
    return max(quantity["limit"].values()) / 10 if quantity["unit"].startswith("years") else 0.0


def _packed(volume: Volume, dtype: type, values: np.ndarray, scale: float) -> dict[str, Any]:
    spacing = np.diag(volume.affine)[:3]
    if not np.allclose(volume.affine[:3, :3], np.diag(spacing)):
        raise ValueError("maps lie on a grid along the axes of their space")
    content = np.ascontiguousarray(values.astype(np.dtype(dtype).newbyteorder("<"))).tobytes()
    return {
        "shape": list(values.shape),
        "origin": np.round(volume.affine[:3, 3], 6).tolist(),
        "spacing": np.round(spacing, 6).tolist(),
        "type": np.dtype(dtype).name,
        "scale": scale,
        "bytes": base64.b64encode(gzip.compress(content, compresslevel=6, mtime=0)).decode(),
    }


def _grey(voxels: np.ndarray) -> np.ndarray:
    return np.rint(255 * np.clip(voxels / max(float(np.percentile(voxels[voxels > 0], 99.5)), 1e-9), 0, 1))


def _box(head: Volume) -> list[list[float]]:
    """Return the low and the high end of the brain along each world axis, mm, with a margin."""
    inside = np.argwhere(_grey(head.voxels) > 255 * BRAIN)
    corners = inside @ head.affine[:3, :3].T + head.affine[:3, 3]
    ends = np.stack([corners.min(0) - MARGIN_MM, corners.max(0) + MARGIN_MM], 1)
    return np.round(ends).tolist()


def _start(folder: Path, index: Mapping[str, Any], head: Volume) -> list[float]:
    """Return where the prediction depends most on the layer, RAS mm; the middle of the head without such a map."""
    for entry in index["maps"]:
        if entry["quantity"] == "contribution" and entry["expert"] is None:
            volume = read_map(folder / entry["file"])
            strongest = np.argwhere(volume.voxels == volume.voxels.max()).mean(0)  # the middle of a cell
            return np.round(volume.affine[:3, :3] @ strongest + volume.affine[:3, 3], 1).tolist()
    middle = np.argwhere(_grey(head.voxels) > 255 * BRAIN).mean(0)
    return np.round(head.affine[:3, :3] @ middle + head.affine[:3, 3], 1).tolist()


def _palette(colours: Sequence[str]) -> dict[str, Any]:
    """Return 256 colours per kind of map, each told apart by every kind of colour vision."""
    # the ends of the second are near black, as is what surrounds the head
    ramps = {"sequential": ("viridis", 0.0, 1.0), "diverging": ("RdBu_r", 0.1, 0.9)}
    steps = {
        kind: colormaps[name](np.linspace(low, high, 256), bytes=True)[:, :3].tolist()
        for kind, (name, low, high) in ramps.items()
    }
    return steps | {"labels": [[round(255 * part) for part in to_rgb(colour)] for colour in colours]}


def _tables(folder: Path) -> dict[str, Any]:
    """Return parcels.csv and regions.csv as lists of rows; an empty cell is null. No table, no rows."""
    found = {}
    for name in ("parcels", "regions"):
        path = folder / f"{name}.csv"
        table = pd.read_csv(path, dtype={"name": "str"}) if path.is_file() else pd.DataFrame()
        found[name] = table.round(5).astype(object).where(table.notna(), None).to_dict("records")
    return found
