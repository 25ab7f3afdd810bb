"""The commands of the pages run as they stand, on drawn heads and digits (make docs-check)."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from emoe_med.data.cohort import write_cohort

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3000)]

ROOT = Path(__file__).parents[1]
SHORT = ["--set", "training.epochs=1"]


def commands(page):
    """Return the `python -m` lines of a page's blocks."""
    blocks = re.findall(r"```(?:bash)?\n(.*?)```", (ROOT / "docs" / page).read_text(), flags=re.S)
    return [
        line.split("#")[0].strip() for block in blocks for line in block.splitlines() if line.startswith("python -m")
    ]


def run(line, folder, places, more=()):
    for shown, real in places.items():
        line = line.replace(shown, str(real))
    words = [sys.executable, *shlex.split(line)[1:], *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    found = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, line + "\n" + found.stdout + found.stderr
    return found


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mine")
    write_cohort(folder, persons=20, seed=0, spacing_mm=4.0)
    return folder


def test_your_own_cohort_in_five_steps(mine, tmp_path):
    lines = commands("own_cohort.md")
    assert len(lines) == 6
    for line in lines:
        more = SHORT if " train " in line else ()
        # one fold of five tells as much about the command
        run(line, tmp_path, {"/data/mine": mine, "configs/": f"{ROOT}/configs/", "--fold all": "--fold 0"}, more)
    assert len((tmp_path / "predicted.csv").read_text().splitlines()) == len(
        (tmp_path / "ages.csv").read_text().splitlines()
    )


def test_quick_start(tmp_path):
    (tmp_path / "short.yaml").write_text(
        re.sub(r"epochs=\d+", "epochs=1", (ROOT / "pipelines" / "paper_table1_smoke.yaml").read_text())
    )
    for line in commands("quick_start.md"):
        if " ui " in line:
            continue  # stays until it is stopped; tests/training/test_tracking.py starts it
        more = SHORT if " train " in line else ()
        run(line, tmp_path, {"pipelines/paper_table1_smoke.yaml": "short.yaml"}, more)


def test_pipelines(tmp_path, real_data):
    for line in commands("pipelines.md"):
        if "--jobs" not in line and " sync " not in line:
            run(line, tmp_path, {"pipelines/": f"{ROOT}/pipelines/", "../shared/data": real_data})
