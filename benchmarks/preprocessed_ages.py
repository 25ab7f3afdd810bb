"""Ages by the light path and by the full one, and of raw heads and their volumes.

    python benchmarks/preprocessed_ages.py arms LIGHT/emoe_4mm FULL/emoe_4mm
    python benchmarks/preprocessed_ages.py rows RAW.csv VOLUMES.csv

`arms` pairs the test predictions of two arms by fold, seed and manifest row: their manifests must list the same persons
in the same rows, as `preprocess` writes them. Prints each error, what the intervals cover, and the paired difference.
`rows` compares two tables of `predict` row by row.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from emoe_med.brainage.compare import compare_groups
from emoe_med.brainage.comparison import paired_difference
from emoe_med.brainage.evaluate import read_predictions


def tested(arm: Path) -> pd.DataFrame:
    tables = [
        read_predictions(file.parent, "test").assign(run=file.parent.name)
        for file in arm.glob("seed*-fold*/metrics.json")
    ]
    return pd.concat(tables).set_index(["run", "row"]).sort_index()


def arms(light: Path, full: Path) -> None:
    for arm in (light, full):
        print(arm, compare_groups([arm])[1], sep="\n")
    pair = tested(light).join(tested(full), how="inner", suffixes=("_light", "_full"))
    assert (pair["age_light"] == pair["age_full"]).all(), "the manifests list other persons"
    errors = [pair[f"predicted_age_{path}"] - pair[f"age_{path}"] for path in ("full", "light")]
    found = paired_difference(*(error.to_numpy() for error in errors), pair["participant_id_light"].to_numpy())
    print(f"full minus light: {found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}], {found['n']} persons")
    print("correlation of the predictions:", f"{pair['predicted_age_light'].corr(pair['predicted_age_full']):.3f}")


def rows(raw: Path, volumes: Path) -> None:
    one, two = pd.read_csv(raw), pd.read_csv(volumes)
    away = (one["predicted_age"] - two["predicted_age"]).abs()
    alike = (one["status"] == two["status"]) & (one["reason"].fillna("") == two["reason"].fillna(""))
    print(f"{len(away)} heads: greatest difference {away.max():.4f} years, {away.isna().sum()} without age")
    print(f"verdict and reason alike: {alike.sum()}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("arms", "rows"))
    parser.add_argument("files", type=Path, nargs=2)
    options = parser.parse_args()
    {"arms": arms, "rows": rows}[options.what](*options.files)


if __name__ == "__main__":
    main()
