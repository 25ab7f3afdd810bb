"""The files of `expert_maps/`: NIfTI with the true affine, tables, sidecars; group figures alone, no person in any."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from emoe_med.brainage.maps.background import Background
from emoe_med.brainage.maps.cells import CellGrid
from emoe_med.brainage.maps.routes import Routes
from emoe_med.data.grid import box_grid
from emoe_med.data.volume import write_volume
from emoe_med.storage import replace_file
from emoe_med.training.allow_list import MAP_FILE

MIN_MARGIN = 0.1  # of the first over the second expert, for a cell to be given to the first
# Okabe and Ito 2008, with Tol's indigo for black: told apart by every kind of colour vision, and from a grey brain.
# From the ninth on each is the colour farthest, to the eye of whoever sees it nearest, from all before it, among the
# coloured ones: distance in Oklab, as seen by normal, protan, deutan and tritan eyes (Machado et al. 2009).
_COLOURS = (
    *("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#332288"),
    *("#740000", "#8bffff", "#a22e46", "#8b00ff", "#a274ff", "#2e005d", "#a2d1ff", "#0000d1"),
    *("#ffb9a2", "#d1ffa2", "#a2468b", "#742ea2", "#d12ed1", "#744600", "#b9d15d", "#5d002e"),
    *("#b94646", "#5de8d1", "#8b005d", "#ff74d1", "#e8742e", "#174674", "#a2b95d", "#ff4674"),
)
TEMPLATES = {
    "MNI152NLin2009aSym": "MNI152 nonlinear 2009a symmetric, as nilearn ships it",
    "MNI152NLin6Asym": "MNI152 nonlinear 6th generation, as FSL ships it",
    "centred": "none: heads were centred and not aligned, so a place differs between heads by centimetres",
}
DESCRIPTIONS = {  # by quantity, and whether of one expert
    ("occupancy", True): "share of heads in which the expert serves the cell",
    ("gate", True): "mean combine weight of the expert, 0 in heads where it does not serve the cell",
    ("contribution", True): "mean over heads of the predicted age minus that with the expert's output replaced by the "
    "mean of all experts'",
    ("contribution", False): "standard deviation over heads, within runs, of the change of the predicted age when the "
    "expert that serves is replaced",
    ("occlusion", False): "standard deviation over heads of the predicted age minus that with the cell painted grey, "
    "within runs",
    ("contributionage", False): "slope over heads, on age, of the contribution of the expert that serves, within runs",
    ("occlusionage", False): "slope over heads, on age, of what occlusion changes, within runs",
    ("entropy", False): "entropy of occupancy over experts",
    ("margin", False): "largest minus second largest occupancy",
    ("coverage", False): "share of heads in which the cell was routed",
    ("topexpert", False): "expert of most heads; see dseg.tsv",
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

    def file(self, space: str, spacing_mm: float) -> str:
        """Name after BIDS derivatives; there is no entity for a layer, which the sidecar tells."""
        label = "" if self.expert is None else f"_label-E{self.expert:02d}"
        suffix = _SUFFIX.get(self.quantity, "statmap")
        return f"space-{space}_res-{resolution(spacing_mm)}{label}_desc-{self.quantity}_{suffix}.nii.gz"


def resolution(spacing_mm: float) -> str:
    """Label of a grid in file names: its voxel edge in mm, with p for the point."""
    return f"{spacing_mm:g}".replace(".", "p")


def colours(num_experts: int) -> list[str]:
    """One colour for each expert; beyond 32 they come again, and the number at the crosshair tells."""
    return [_COLOURS[e % len(_COLOURS)] for e in range(num_experts)]


def entropy(occupancy: np.ndarray) -> np.ndarray:
    """Entropy over experts of occupancy [C, E], in units of ln E: 0 one expert alone, 1 all alike."""
    share = np.where(occupancy > 0, occupancy, 1)
    return -(occupancy * np.log(share)).sum(1) / np.log(occupancy.shape[1])


def margin(occupancy: np.ndarray) -> np.ndarray:
    """Largest minus second largest occupancy, [C]."""
    top = np.sort(occupancy, axis=1)[:, -2:]
    return top[:, 1] - top[:, 0]


def group_maps(routes: Routes, least: int = 1) -> list[Map]:
    """Make all maps of a group.

    Cells that were routed in fewer than half of the heads are 0, and those of fewer persons than ``least``: of
    contribution and occlusion, of fewer whose heads were measured.
    """
    inside = routes.inside(least)
    occupancy = routes.occupancy() * inside[:, None]
    gate = routes.gate_mass() * inside[:, None]
    signed = None
    if len(routes.contribution):
        signed = routes.contribution.mean(0) * (inside & routes.inside(least, routes.contribution_of))[:, None]
    maps = []
    for e in range(routes.num_experts):
        maps += [
            Map("occupancy", occupancy[:, e], "share of heads", expert=e),
            Map("gate", gate[:, e], "combine weight", expert=e),
        ]
        if signed is not None:
            maps.append(Map("contribution", signed[:, e], "years", "diverging", e))
    for name, found in routes.influence().items():
        if len(found):
            known = inside & routes.inside(least, found.heads)
            maps.append(Map(name, found.deviation() * known, "years, SD over heads"))
            if np.any(found.age):
                slope = np.where(known, found.per_decade(), 0)
                maps.append(Map(f"{name}age", slope, "years per decade of age", "diverging"))
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
        facts: `space`, `subjects`, and the like, for maps.json; `weights` are the digests of the runs' weights.
    """
    clear(folder)
    space = facts["space"]
    affine = box_grid(grid.spacing_mm)[1]
    brain = _on_model_grid(background.inside, grid) >= background.needed
    experts = [f"E{e:02d}" for e in range(max(item.expert or 0 for item in maps) + 1)]
    common = {
        "Space": space,
        "SpatialReference": TEMPLATES[space],
        "Model": facts["model"],
        "Runs": dict(zip(facts["runs"], facts["weights"], strict=True)),
        "Layer": layer,
        "CellSizeMm": grid.cell_mm,
        "ReceptiveFieldMm": grid.field * grid.spacing_mm,
        "View": facts["view"],
        "HeldOut": facts["held_out"],
        "Synthetic": facts["synthetic"],
    }
    entries = []
    for item in maps:
        voxels = np.where(brain, grid.spread(item.values), 0)
        voxels = voxels if item.kind == "labels" else voxels.astype(np.float32)
        name, expert = item.file(space, grid.spacing_mm), None if item.expert is None else experts[item.expert]
        own = {
            "Description": DESCRIPTIONS[item.quantity, item.expert is not None],
            "Resolution": f"{grid.spacing_mm:g} mm; each voxel has the value of its cell of {grid.cell_mm:g} mm",
            "Expert": expert,
            "Quantity": item.quantity,
            "Units": item.units,
            "Subjects": facts.get(f"subjects_{item.quantity.removesuffix('age')}", facts["subjects"]),
            "Smoothing": "none",
        }
        _volume(folder / name, voxels, affine, space, common | own)
        entry = {"file": name, "quantity": item.quantity, "expert": expert, "units": item.units, "kind": item.kind}
        entries.append(entry | dict(zip(("low", "high"), _ends(voxels[brain], item.kind), strict=True)))
    fine = resolution(grid.spacing_mm / grid.oversample)
    name = f"space-{space}_res-{fine}_desc-mean_T1w.nii.gz"
    own = {"Description": "mean intensity of the heads where they are brain", "Subjects": facts["subjects"]}
    _volume(folder / name, background.mean(), background.affine, space, common | own | {"SkullStripped": True})
    table = pd.DataFrame({"index": range(1, len(experts) + 1), "name": experts, "color": colours(len(experts))})
    _text(folder / "dseg.tsv", table.to_csv(sep="\t", index=False, lineterminator="\n"))
    _json(
        folder / "dataset_description.json",
        {
            "Name": "Expert maps" + (" of SYNTHETIC heads" if facts["synthetic"] else ""),
            "BIDSVersion": "1.10.0",
            "DatasetType": "derivative",
            "GeneratedBy": [{"Name": "emoe-med", "Version": version("emoe-med"), "Description": "maps of experts"}],
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
    folder: Path, index: dict[str, Any], volume: np.ndarray, names: dict[int, str], name: str, background: Background
) -> None:
    """Write the parcels on the grid of the cache with their table, and tell of them in the index."""
    space, affine = index["space"], background.affine
    stem = f"space-{space}_seg-{name}_res-{resolution(float(affine[0, 0]))}_dseg"
    sidecar = {
        "Space": space,
        "SpatialReference": index["template"],
        "Description": "parcels of the tables; of labels of each head, the one that more than half have there, or else "
        "a common one",
        "Subjects": index["subjects"],
        "Synthetic": index["synthetic"],
    }
    _volume(folder / f"{stem}.nii.gz", volume.astype(np.int32), affine, space, sidecar)
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


def _volume(path: Path, voxels: np.ndarray, affine: np.ndarray, space: str, sidecar: dict[str, Any]) -> None:
    """Write a volume and its sidecar; the affine is named as that of a template, or of aligned anatomy."""
    write_volume(path, voxels, affine, dtype=voxels.dtype, form_code=4 if space.startswith("MNI") else 2)
    _json(path.with_name(path.name.replace(".nii.gz", ".json")), sidecar)


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
