"""Do the maps find what is there, and nothing where nothing is?

    python benchmarks/known_answer.py OUT [--seeds 5] [--persons 60]

Each seed draws a synthetic cohort twice: with one region whose age effect is the strongest of all, and without it. A
small routed net is trained on each, and `maps` is made from its held-out heads. Told are the parcel on which the
prediction depends most by the contribution map, the rank of the planted one, and its p against parcels turned at
random. Wanted: the planted parcel is first in at least 4 of 5 seeds; without the effect in at most 1 of 5, p > 0.05.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import pandas as pd
import torch

from emoe_med.brainage.maps.make import MapOptions, make_maps
from emoe_med.brainage.train import train
from emoe_med.config import BrainAgeConfig
from emoe_med.data.cohort import write_cohort
from emoe_med.data.manifest import read_manifest

PLANTED = "planted_region"


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
            "data": {"spacing_mm": 8, "folds": 3, "val_share": 0.1, "split_seed": seed},
            "augment": {"flip": 0.0, "shift_voxels": 0},  # one side has the effect, and a flip would smear it
            "model": {"channels": [16, 32], "pooled": 1, "neck": 32, "dropout": 0.0, "head": "l1", "moe": moe},
            "training": {
                **{"epochs": 40, "batch_size": 8, "lr": 2e-3, "weight_decay": 0.02, "schedule": "one_cycle"},
                **{"warmup_share": 0.2, "select": "last", "threads": 1, "seed": seed},
            },
            "tracking": {"mlflow": False},
        }
    )


def one(out: Path, seed: int, persons: int, planted: bool) -> dict[str, object]:
    """Train on one cohort and look where the prediction comes from."""
    folder = out / f"{'with' if planted else 'without'}{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    table = read_manifest(
        write_cohort(folder / "cohort", persons, seed, planted_region=planted, repeat_share=0, spacing_mm=6.0)
    )
    (run,) = train(config(seed), table, folder, [0], folder / "cache", synthetic=True)
    maps = make_maps(run, table, folder / "cache", MapOptions(contribution=persons, occlusion=0))
    parcels = pd.read_csv(maps / "parcels.csv").sort_values("contribution", ascending=False, ignore_index=True)
    place = parcels.index[parcels["name"] == PLANTED][0]
    return {
        "seed": seed,
        "effect": planted,
        "top": parcels["name"][0],
        "rank": int(place) + 1,
        "ratio": parcels["contribution_ratio"][place],
        "p": parcels["contribution_p"][place],
    }


def main() -> None:
    """Run all seeds and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--persons", type=int, default=60)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for seed in range(arguments.seeds):
        for planted in (True, False):
            rows.append(one(arguments.out, seed, arguments.persons, planted))
            print(
                "| " + " | ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in rows[-1].values()) + " |",
                flush=True,
            )
    table = pd.DataFrame(rows)
    found = table[table["effect"]]
    control = table[~table["effect"]]
    print(f"planted parcel first: {(found['rank'] == 1).sum()} of {len(found)}")
    print(f"control first: {(control['rank'] == 1).sum()} of {len(control)}; p > 0.05: {(control['p'] > 0.05).sum()}")


if __name__ == "__main__":
    main()
