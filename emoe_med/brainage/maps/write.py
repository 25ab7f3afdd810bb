"""The files of `expert_maps/`: NIfTI with the true affine, tables, sidecars; group figures alone, no person in any."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.colors import to_hex

from emoe_med.brainage.maps.background import Background
from emoe_med.brainage.maps.cells import CellGrid
from emoe_med.brainage.maps.regions import COVERED
from emoe_med.brainage.maps.routes import Routes
from emoe_med.data.register import box_grid
from emoe_med.data.volume import write_volume
from emoe_med.training.allow_list import MAP_FILE
from emoe_med.training.run_folder import replace_file

MIN_MARGIN = 0.1  # of the first over the second expert, for a cell to be given to the first
# Okabe and Ito 2008, with Tol's indigo for black: told apart by every kind of colour vision, and from a grey brain
_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#332288")
TEMPLATES = {
    "MNI152NLin2009aSym": "MNI152 nonlinear 2009a symmetric, as nilearn ships it",
    "centred": "none: heads were centred and not aligned, so a place differs between heads by centimetres",
}
_SUFFIX = {"occupancy": "probseg", "gate": "probseg", "coverage": "probseg", "topexpert": "dseg"}


@dataclass(frozen=True)
class Map:
    """One map over cells.

    Attributes:
        quantity: As in the file name.
        values: [C]; 0 where there is nothing to tell.
        units: Of the values.
        kind: How to draw it: sequential, diverging about 0, or labels.
        expert: Index, None for a map of the group as a whole.
    """

    quantity: str
    values: np.ndarray
    units: str
    kind: str = "sequential"
    expert: int | None = None

    def file(self, space: str, layer: str) -> str:
        """Name after BIDS derivatives."""
        label = "" if self.expert is None else f"_label-E{self.expert:02d}"
        suffix = _SUFFIX.get(self.quantity, "statmap")
        return f"space-{space}_layer-{layer}{label}_desc-{self.quantity}_{suffix}.nii.gz"


def colours(num_experts: int) -> list[str]:
    """One colour for each expert."""
    if num_experts <= len(_COLOURS):
        return list(_COLOURS[:num_experts])
    return [to_hex(colormaps["turbo"](e / (num_experts - 1))) for e in range(num_experts)]


def entropy(occupancy: np.ndarray) -> np.ndarray:
    """Entropy over experts of occupancy [C, E], in units of ln E: 0 one expert alone, 1 all alike."""
    share = np.where(occupancy > 0, occupancy, 1)
    return -(occupancy * np.log(share)).sum(1) / np.log(occupancy.shape[1])


def margin(occupancy: np.ndarray) -> np.ndarray:
    """Largest minus second largest occupancy, [C]."""
    top = np.sort(occupancy, axis=1)[:, -2:]
    return top[:, 1] - top[:, 0]


def group_maps(routes: Routes) -> list[Map]:
    """Make all maps of a group; cells that were routed in fewer than half of the heads are 0."""
    inside = routes.coverage() >= COVERED
    occupancy = routes.occupancy() * inside[:, None]
    gate = routes.gate_mass() * inside[:, None]
    signed = routes.contribution.mean(0) * inside[:, None] if len(routes.contribution) else None
    maps = []
    for e in range(routes.num_experts):
        maps += [
            Map("occupancy", occupancy[:, e], "share of heads", expert=e),
            Map("gate", gate[:, e], "combine weight", expert=e),
        ]
        if signed is not None:
            maps.append(Map("contribution", signed[:, e], "years", "diverging", e))
    maps += [
        Map(name, values.std(0) * inside, "years, SD over heads")
        for name, values in routes.influence().items()
        if len(values)
    ]
    clear = margin(occupancy)
    top = np.where(inside & (clear >= MIN_MARGIN), occupancy.argmax(1) + 1, 0)
    return [
        *maps,
        Map("entropy", entropy(occupancy) * inside, "share of ln E"),
        Map("margin", clear, "share of heads"),
        Map("coverage", routes.coverage() * inside, "share of heads"),
        Map("topexpert", top.astype(np.int16), "expert + 1; 0 is none or no clear one", "labels"),
    ]


def clear(folder: Path) -> None:
    """Make a folder for maps, without what an earlier call left: a table of another atlas would pass for this one's."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if MAP_FILE.fullmatch(path.name):
            path.unlink()


def write_maps(
    folder: Path, maps: list[Map], background: Background, grid: CellGrid, layer: str, facts: dict[str, Any]
) -> dict[str, Any]:
    """Write volumes and their sidecars; returns the index of them, for `maps.json`.

    Args:
        folder: `expert_maps`.
        maps: From `group_maps`.
        background: Of the same heads.
        grid: Of the cells.
        layer: Name of the routed layer.
        facts: `space`, `subjects`, and the like, for maps.json.
    """
    clear(folder)
    space, form_code = facts["space"], 4 if facts["space"].startswith("MNI") else 2
    affine = box_grid(grid.spacing_mm)[1]
    brain = _on_model_grid(background.inside, grid) >= 0.5 * background.heads
    entries = []
    for item in maps:
        voxels = np.where(brain, grid.spread(item.values), 0)
        voxels = voxels if item.kind == "labels" else voxels.astype(np.float32)
        name = item.file(space, layer)
        write_volume(folder / name, voxels, affine, form_code=form_code)
        sidecar = {
            "Space": space,
            "Template": TEMPLATES[space],
            "Layer": layer,
            "Expert": None if item.expert is None else f"E{item.expert:02d}",
            "Quantity": item.quantity,
            "Units": item.units,
            "CellSizeMm": grid.cell_mm,
            "ReceptiveFieldMm": grid.field * grid.spacing_mm,
            "Subjects": facts.get(f"subjects_{item.quantity}", facts["subjects"]),
            "Smoothing": "none",
            "View": facts["view"],
            "HeldOut": facts["held_out"],
            "Synthetic": facts["synthetic"],
        }
        _json(folder / f"{name.removesuffix('.nii.gz')}.json", sidecar)
        ends = _ends(voxels[brain], item.kind)
        expert = sidecar["Expert"]
        entry = {"file": name, "quantity": item.quantity, "expert": expert, "units": item.units, "kind": item.kind}
        entries.append(entry | dict(zip(("low", "high"), ends, strict=True)))
    name = f"space-{space}_desc-mean_T1w.nii.gz"
    write_volume(folder / name, background.mean(), background.affine, form_code=form_code)
    experts = [f"E{e:02d}" for e in range(max(item.expert or 0 for item in maps) + 1)]
    table = pd.DataFrame({"index": range(1, len(experts) + 1), "name": experts, "color": colours(len(experts))})
    _text(folder / "dseg.tsv", table.to_csv(sep="\t", index=False, lineterminator="\n"))
    _json(
        folder / "dataset_description.json",
        {
            "Name": "Expert maps" + (" of SYNTHETIC heads" if facts["synthetic"] else ""),
            "BIDSVersion": "1.10.0",
            "DatasetType": "derivative",
            "GeneratedBy": [{"Name": "emoe_med"}],
            "SourceDatasets": [],
        },
    )
    return {
        "version": 1,
        "space": space,
        "template": TEMPLATES[space],
        "layer": layer,
        "experts": experts,
        "colors": colours(len(experts)),
        "cell_mm": grid.cell_mm,
        "receptive_field_mm": grid.field * grid.spacing_mm,
        "grid_mm": grid.spacing_mm,
        "background": name,
        **facts,
        "atlas": None,
        "maps": entries,
    }


def write_parcels(
    folder: Path, index: dict[str, Any], volume: np.ndarray, names: dict[int, str], name: str, affine: np.ndarray
) -> None:
    """Write the parcels on the grid of the cache with their table, and tell of them in the index."""
    space = index["space"]
    stem = f"space-{space}_seg-{name}_dseg"
    write_volume(folder / f"{stem}.nii.gz", volume, affine, dtype=np.int32, form_code=4 if space != "centred" else 2)
    rows = pd.DataFrame({"index": list(names), "name": list(names.values())})
    _text(folder / f"{stem}.tsv", rows.to_csv(sep="\t", index=False, lineterminator="\n"))
    index["atlas"] = {"name": name, "file": f"{stem}.nii.gz", "table": f"{stem}.tsv"}


def write_tables(folder: Path, regions: pd.DataFrame, parcels: pd.DataFrame) -> None:
    """Write regions.csv and parcels.csv; an undefined figure is an empty cell."""
    for name, table in (("regions", regions), ("parcels", parcels)):
        _text(folder / f"{name}.csv", table.to_csv(index=False, float_format="%.5g", lineterminator="\n"))


def write_json(folder: Path, **documents: Any) -> None:
    """Write each document under its name."""
    for name, content in documents.items():
        _json(folder / f"{name}.json", content)


def _on_model_grid(fine: np.ndarray, grid: CellGrid) -> np.ndarray:
    """Average a volume of the cache's grid over the voxels of the model's."""
    k = grid.oversample
    x, y, z = (size // k for size in fine.shape)
    return fine.reshape(x, k, y, k, z, k).mean((1, 3, 5))


def _ends(values: np.ndarray, kind: str) -> tuple[float, float]:
    if not values.size:
        return 0.0, 0.0
    if kind == "diverging":
        most = float(np.abs(values).max())
        return -most, most
    return float(values.min()), float(values.max())


def _json(path: Path, content: Any) -> None:
    _text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _text(path: Path, text: str) -> None:
    replace_file(path, text.encode())
