"""The benchmark that asks the maps what they should know."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from emoe_med.data.cohort import write_cohort
from emoe_med.data.flirt import given_matrix

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import known_answer  # ty: ignore[unresolved-import]  # a script beside the package, not a part of it


def test_poses_are_written_as_they_were_drawn(tmp_path):
    manifest = write_cohort(tmp_path / "cohort", 2, 3, repeat_share=0, spacing_mm=8.0)
    known_answer.write_poses(manifest)
    table = pd.read_csv(manifest)
    poses = known_answer.true_poses(manifest.parent)
    for row in table.itertuples():
        pose = poses[Path(row.image).name.removesuffix("_T1w.nii.gz")]
        assert not np.allclose(pose, np.eye(4), atol=0.1)
        np.testing.assert_allclose(
            given_matrix(manifest.parent / row.transform, manifest.parent / row.image), pose, atol=1e-4
        )


def test_the_judge_reads_the_tables(tmp_path):
    parcels = {
        "name": ["cortex", "planted_region", "ventricle"],
        "contribution": [0.3, 0.1, 0.2],
        "contribution_ratio": [1.5, 0.5, 1.0],
        "contribution_p": [0.01, 0.6, 0.3],
        "contribution_per_decade": [-0.5, 0.2, 0.1],
        "contribution_per_decade_p": [0.9, 0.01, 0.2],
    }
    pd.DataFrame(parcels).to_csv(tmp_path / "parcels.csv")
    regions = {"name": ["cortex"] * 2 + ["planted_region"] * 2, "p": [0.001, 0.5, 0.2, 0.7]}
    pd.DataFrame(regions).to_csv(tmp_path / "regions.csv")
    assert known_answer.judge(tmp_path) == {
        "top": "cortex",
        "rank": 3,
        "ratio": 0.5,
        "p": 0.6,
        "age_rank": 1,
        "age_p": 0.01,
        "enrichment_p": 0.4,
    }


@pytest.mark.faults
def test_the_planted_region_is_found(tmp_path):
    """One seed of the documented run."""
    found = known_answer.one(tmp_path, 73, 64, planted=True)
    assert (found["top"], found["rank"]) == ("planted_region", 1)
    assert found["p"] < 0.05
