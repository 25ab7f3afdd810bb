"""Do the maps find what is there, and nothing where nothing is?

    python benchmarks/known_answer.py OUT [--seeds 70 71 72 73 74] [--persons 64]

Each seed draws a synthetic cohort twice: with one region that fades with age while ventricles and cortex do not age,
and without its fading, so that nothing tells age. A small routed net is trained on each, and makes its maps from its
held-out heads. Told are the parcel with the largest contribution, the rank of the planted one, its p against parcels
turned at random, the same by what goes with age, and the smallest p of its enrichments, times the number of experts.
Wanted: the planted parcel is first in at least 4 of 5 seeds; without the effect in at most 1 of 5, and p > 0.05. Heads
lie in the template by the poses that they were drawn with, so that registration is no part of the question.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from emoe_med.brainage.train import train
from emoe_med.config import BrainAgeConfig
from emoe_med.data.cohort import DERIVATIVES, write_cohort
from emoe_med.data.flirt import given_matrix
from emoe_med.data.manifest import read_manifest

PLANTED = "planted_region"
FSL_TO_RAS = np.array([[-1.0, 0, 0, 90], [0, 1, 0, -126], [0, 0, 1, -72], [0, 0, 0, 1]])  # of MNI152_T1_1mm


def config(seed: int) -> BrainAgeConfig:
    """Return a net with cells of 16 mm on heads of 8 mm: small, so that ten of them train in minutes."""
    moe = {
        "after_block": 1,
        "num_experts": 4,
        "router": {"kind": "eigen", "rank": 8, "gate": "prob_times_E"},
        "experts": {"kind": "mlp", "hidden": 8},
    }
    return BrainAgeConfig.model_validate(
        {
            "name": "known_answer",
            "data": {"spacing_mm": 8, "oversample": 2, "folds": 4, "val_share": 0.1, "split_seed": seed},
            "augment": {"flip": 0.0, "shift_voxels": 0},  # one side has the effect, and a flip would smear it
            "model": {"channels": [16, 32], "pooled": 1, "neck": 32, "dropout": 0.0, "head": "l1", "moe": moe},
            "training": {
                **{"epochs": 25, "batch_size": 8, "lr": 2e-3, "weight_decay": 0.02, "schedule": "one_cycle"},
                **{"warmup_share": 0.2, "select": "last", "threads": 1, "seed": seed},
            },
            "tracking": {"mlflow": False},
        }
    )


def write_poses(manifest: Path) -> None:
    """Add the column `transform`: the pose of each head, as FSL's flirt would write it."""
    root, table = manifest.parent, pd.read_csv(manifest)
    poses = true_poses(root)
    found = []
    for image in table["image"]:
        name = Path(image).name.removesuffix("_T1w.nii.gz")
        path = root / DERIVATIVES / f"{name}.mat"
        np.savetxt(path, np.eye(4))
        to_scan = given_matrix(path, root / image) @ FSL_TO_RAS  # FSL's millimetres of the scan to its RAS mm
        to_template = np.linalg.inv(FSL_TO_RAS) @ np.linalg.inv(poses[name]) @ to_scan
        np.savetxt(path, to_template)
        found.append(path.relative_to(root).as_posix())
    table.assign(transform=found).to_csv(manifest, index=False)


def true_poses(root: Path) -> dict[str, np.ndarray]:
    """Return the pose of each scan of a cohort, template RAS mm to scan RAS mm, [4, 4]."""
    poses = json.loads((root / DERIVATIVES / "truth.json").read_text())["pose"]
    return {scan: np.array(pose) for scan, pose in poses.items()}


def one(out: Path, seed: int, persons: int, planted: bool) -> dict[str, object]:
    """Train on one cohort and look where the prediction comes from."""
    folder = out / f"{'with' if planted else 'without'}{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    given = {"planted_region": planted, "repeat_share": 0, "spacing_mm": 6.0, "others_age": False}
    manifest = write_cohort(folder / "cohort", persons, seed, **given)
    write_poses(manifest)
    table = read_manifest(manifest)
    (run,) = train(config(seed), table, folder, [0], folder / "cache", synthetic=True)
    return {"seed": seed, "effect": planted, **judge(run / "expert_maps"), "mae": error(run)}


def error(run: Path) -> float:
    """Return the mean absolute error of a run on its test heads, years."""
    return json.loads((run / "metrics.json").read_text())["test"]["mae"]["value"]


def judge(maps: Path) -> dict[str, object]:
    """Read from the tables of a folder of maps how clearly the planted region is found."""
    parcels, regions = (pd.read_csv(maps / f"{name}.csv") for name in ("parcels", "regions"))
    planted = parcels["name"] == PLANTED
    own = parcels[planted].iloc[0]
    enrichment = regions.loc[regions["name"] == PLANTED, "p"]
    return {
        "top": parcels.loc[parcels["contribution"].idxmax(), "name"],
        "rank": int((parcels["contribution"] >= own["contribution"]).sum()),
        "ratio": own["contribution_ratio"],
        "p": own["contribution_p"],
        "age_rank": int((parcels["contribution_per_decade"] >= own["contribution_per_decade"]).sum()),
        "age_p": own["contribution_per_decade_p"],
        "enrichment_p": min(1.0, enrichment.min() * len(enrichment)),
    }


def main() -> None:
    """Run all seeds and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[70, 71, 72, 73, 74])
    parser.add_argument("--persons", type=int, default=64)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for seed in arguments.seeds:
        for planted in (True, False):
            rows.append(one(arguments.out, seed, arguments.persons, planted))
            if len(rows) == 1:
                print("| " + " | ".join(rows[0]) + " |")
            print(
                "| " + " | ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in rows[-1].values()) + " |",
                flush=True,
            )
    table = pd.DataFrame(rows)
    for effect, name in ((True, "with the effect"), (False, "without it")):
        some = table[table["effect"] == effect]
        first, by_age = ((some[key] == 1).sum() for key in ("rank", "age_rank"))
        chance, enriched = ((some[key] > 0.05).sum() for key in ("p", "enrichment_p"))
        print(
            f"{name}: planted parcel first in {first} of {len(some)} seeds, p > 0.05 in {chance}; by what goes with "
            f"age first in {by_age}; enrichment p > 0.05 in {enriched}"
        )


if __name__ == "__main__":
    main()
