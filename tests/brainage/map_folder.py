"""A folder `expert_maps/` as `maps` writes it, with a blob planted where the truth is known."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd

from emoe_med.data.grid import box_grid, template

EXPERTS = [f"E{number:02d}" for number in range(8)]
COLOURS = ["#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#332288"]
SPACE, LAYER, CELL_MM = "MNI152NLin2009aSym", "block1", 16.0
PLANTED = {"expert": "E03", "place": (40.0, -25.5, -19.5), "parcel": 7, "years": 1.25}  # on the right, RAS mm
NAMES = ["Occipital", "Cerebellum", "Parietal", "Temporal", "Cortex <left> & more", "Frontal", "Right hippocampus"]


def cell_of(place, shape, affine, cell_mm=CELL_MM):
    """Slices of the voxels in the routing cell that holds a place, RAS mm."""
    voxel = (np.asarray(place) - affine[:3, 3]) / affine[0, 0]
    edge = round(cell_mm / affine[0, 0])
    start = (np.rint(voxel).astype(int) // edge) * edge
    return tuple(slice(low, low + edge) for low in start)


def write_map_folder(folder: Path, *, verdict="stable", subjects=36, synthetic=False, grid_mm=4.0, seed=0) -> Path:
    """Write the folder; occupancy and contribution of expert E03 peak in the cell around PLANTED["place"]."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    head, head_affine = template(2.0)
    save(folder / f"space-{SPACE}_res-2_desc-mean_T1w.nii.gz", head, head_affine)
    shape, affine = box_grid(grid_mm)
    edge = round(CELL_MM / grid_mm)
    inside = blocks(template(CELL_MM)[0] > 0.05, edge)
    planted = cell_of(PLANTED["place"], shape, affine)
    near = np.stack(np.indices([n // edge for n in shape]), -1) / 3
    logits = np.stack([np.sin(near @ random.normal(size=3) * 1.5 + number) for number in range(8)], -1)
    occupancy = np.exp(2.5 * logits)
    occupancy = blocks(occupancy / occupancy.sum(-1, keepdims=True), edge)
    occupancy[planted] = np.where(np.arange(8) == 3, 0.93, 0.01)
    occupancy *= inside[..., None]
    years = blocks(random.normal(0, 0.1, [n // edge for n in shape] + [8]), edge) * inside[..., None]
    years[(*planted, 3)] = PLANTED["years"]
    ranked = np.sort(occupancy, -1)
    margin = ranked[..., -1] - ranked[..., -2]
    top = np.where((margin >= 0.1) & inside, occupancy.argmax(-1) + 1, 0).astype(np.int16)
    entropy = -np.sum(np.where(occupancy > 0, occupancy * np.log(occupancy.clip(1e-12)), 0), -1) / np.log(8)
    maps = []

    def add(name, values, quantity, units, kind, expert=None):
        file = f"space-{SPACE}_res-{grid_mm:g}_{name}.nii.gz"
        save(folder / file, values, affine)
        high = float(np.abs(values).max())
        low = -high if kind == "diverging" else float(values[inside].min())
        maps.append(
            {"file": file, "quantity": quantity, "expert": expert, "units": units, "kind": kind}
            | {"low": low, "high": high}
        )

    for number, expert in enumerate(EXPERTS):
        share, mine = occupancy[..., number], years[..., number]
        add(f"label-{expert}_desc-occupancy_probseg", share, "occupancy", "share", "sequential", expert)
        add(f"label-{expert}_desc-gate_probseg", 0.8 * share, "gate", "weight", "sequential", expert)
        add(f"label-{expert}_desc-contribution_statmap", mine, "contribution", "years", "diverging", expert)
    add("desc-contribution_statmap", np.abs(years).sum(-1), "contribution", "years", "sequential")
    add("desc-occlusion_statmap", np.abs(years).mean(-1), "occlusion", "years", "sequential")
    add("desc-contributionage_statmap", years.sum(-1), "contributionage", "years per decade of age", "diverging")
    add("desc-entropy_statmap", entropy, "entropy", "share", "sequential")
    add("desc-margin_statmap", margin, "margin", "share", "sequential")
    add("desc-coverage_probseg", inside.astype(np.float32), "coverage", "share", "sequential")
    add("desc-topexpert_dseg", top, "topexpert", "expert", "labels")
    parcels = write_parcels(folder, head > 0.1, head_affine)
    write_tables(folder, parcels, random)
    index = {
        **{"version": 1, "space": SPACE, "template": "MNI152 2009a symmetric", "layer": LAYER},
        **{"experts": EXPERTS, "colors": COLOURS, "cell_mm": CELL_MM, "receptive_field_mm": 32.0, "grid_mm": grid_mm},
        **{"subjects": subjects, "subjects_contribution": subjects, "subjects_occlusion": min(subjects, 20)},
        **{"runs": ["seed0-fold0"], "held_out": True, "synthetic": synthetic, "view": "one pass of the head as it is"},
        **{"verdict": verdict, "background": f"space-{SPACE}_res-2_desc-mean_T1w.nii.gz", "maps": maps},
        "atlas": {"name": "labels"}
        | {key: f"space-{SPACE}_seg-labels_res-2_dseg.{end}" for key, end in (("file", "nii.gz"), ("table", "tsv"))},
    }
    write_verdicts(folder, verdict)
    (folder / "maps.json").write_text(json.dumps(index))
    return folder


def blocks(values, edge):
    """Repeat every cell of the first three axes `edge` times along each."""
    for axis in range(3):
        values = np.repeat(values, edge, axis)
    return values


def save(path, values, affine):
    kept = values if values.dtype.kind == "i" else values.astype(np.float32)
    image = nibabel.Nifti1Image(kept, affine)
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    nibabel.save(image, path)


def write_parcels(folder, brain, affine):
    """Six slabs from back to front, and the planted cell as a parcel of its own."""
    slabs = np.indices(brain.shape)[1] * 6 // brain.shape[1] + 1
    parcels = np.where(brain, slabs, 0).astype(np.int32)
    parcels[cell_of(PLANTED["place"], brain.shape, affine)] = PLANTED["parcel"]
    save(folder / f"space-{SPACE}_seg-labels_res-2_dseg.nii.gz", parcels, affine)
    table = pd.DataFrame({"index": range(1, 8), "name": NAMES})
    table.to_csv(folder / f"space-{SPACE}_seg-labels_res-2_dseg.tsv", sep="\t", index=False)
    pd.DataFrame({"index": range(1, 9), "name": EXPERTS, "color": COLOURS}).to_csv(
        folder / "dseg.tsv", sep="\t", index=False
    )
    return parcels


def write_tables(folder, parcels, random):
    counts = np.bincount(parcels.ravel(), minlength=8)[1:]
    rows = []
    for parcel, name in enumerate(NAMES, 1):
        for expert in EXPERTS:
            hit = parcel == PLANTED["parcel"] and expert == PLANTED["expert"]
            share, years = (0.93, 1.25) if hit else (random.uniform(0, 0.2), random.normal(0, 0.05))
            estimate = {"occupancy": share, "occupancy_low": share - 0.03, "occupancy_high": share + 0.03}
            estimate |= {"share_of_mass": share / 9, "contribution": years}
            estimate |= {"contribution_low": years - 0.1, "contribution_high": years + 0.1, "enrichment": 8 * share}
            estimate |= dict.fromkeys(("p_random", "p_rotated", "p"), 0.001 if hit else random.uniform(0.1, 1))
            estimate |= {
                "q": 0.004 if hit else 0.8,
                "p_family": 0.004 if hit else 0.8,
                "laterality": None if hit else 0.02,
            }
            estimate |= {"slope_per_decade": 0.01, "slope_low": -0.01, "slope_high": 0.03, "slope_p": 0.3}
            estimate |= {"slope_q": 0.6, "n_voxels": counts[parcel - 1], "covered": 0.97, "n_subjects": 36}
            rows.append({"parcel": parcel, "name": name, "expert": expert, **estimate})
    pd.DataFrame(rows).to_csv(folder / "regions.csv", index=False)
    whole = [
        {"parcel": parcel, "name": name, "contribution": 0.1 * parcel, "contribution_low": 0.05 * parcel}
        | {"contribution_high": 0.2 * parcel, "contribution_ratio": parcel / 4, "contribution_p": 0.2}
        | {"contribution_q": 0.3, "occlusion": 0.05 * parcel, "occlusion_ratio": 1.0, "top_expert": "E03"}
        | {"top_occupancy": 0.4, "entropy": 0.7, "n_voxels": counts[parcel - 1], "covered": 0.97, "n_subjects": 36}
        for parcel, name in enumerate(NAMES, 1)
    ]
    pd.DataFrame(whole).to_csv(folder / "parcels.csv", index=False)


def write_verdicts(folder, verdict):
    stable = {"stable": True, "unstable, do not interpret": False}.get(verdict)
    estimate = {"value": 0.81 if stable else 0.31, "low": 0.7 if stable else 0.2, "high": 0.9 if stable else 0.4}
    reason = "after matching, maps of two runs agree " + ("well" if stable else "no better than position alone")
    tested = {
        "threshold": 0.5,
        **dict.fromkeys(("matched_r", "dice"), estimate | {"n": 10}),
        "by_kind": {"other seed, same fold": {"pairs": 5, "matched_r": 0.4, "dice": 0.41}},
        "turned_patches": {key: {"value": 0.3, "low": 0.2, "high": 0.4} for key in ("matched_r", "dice")}
        | {"text": "patches at random places agree this much"},
        "position_only": {key: {"value": 0.5, "low": 0.4, "high": 0.6} for key in ("same_expert", "by_place")}
        | {"heads": 36, "text": "an expert chosen by the cell alone agrees this much"},
        "random_router": {key: {"value": 0.0, "low": -0.1, "high": 0.1} for key in ("matched_r", "dice")}
        | {"text": "a router that draws lots agrees this much"},
        "pairs": [{"a": "seed0-fold0", "b": "seed1-fold0", "matched_r": 0.3, "dice": 0.4, "match": [3], "r": [0.3]}],
    }
    nothing = {"matched_r": None, "pairs": []}
    stability = {"verdict": verdict, "stable": stable, "reason": reason, "runs": ["seed0-fold0"]}
    stability |= nothing if stable is None else tested
    (folder / "stability.json").write_text(json.dumps(stability))
    checks = [
        ("shift", "The map moves with the head", 0.97, 0.96, 0.98, ">= 0.9", True, "moved by whole cells it follows"),
        ("position_only", "Position alone explains little", 0.8, 0.7, 0.9, "<= 0.5", False, "most of it is position"),
        ("experts_alive", "Experts in use", 8, None, None, "", None, "8 of 8 serve more than 1 % of the cells"),
    ]
    names = ("name", "title", "value", "low", "high", "threshold", "passed", "text")
    sanity = {"checks": [dict(zip(names, check, strict=True)) | {"details": {}} for check in checks]}
    (folder / "sanity.json").write_text(json.dumps(sanity))
