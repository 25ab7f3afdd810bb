"""`make bench-paper-smoke` runs every twin, whatever the one before did, and tells at the end which were no good."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[2] / "Makefile"
# in place of hours of runs: ends as the twin is called, and leaves the table that such a twin leaves
PYTHON = """#!/bin/sh
twin=$(basename $4 _smoke.yaml)
echo "$twin $5 $6" >> asked
[ $twin = fails ] && exit 3
mkdir -p runs/smoke/${twin}_smoke
[ $twin = guesses ] && echo "PLUMBING ONLY, not better than guessing" > runs/smoke/${twin}_smoke/table.md
[ $twin = good ] && echo "| arm | 98.1 |" > runs/smoke/${twin}_smoke/table.md
exit 0
"""


def make(folder, twins):
    (folder / "pipelines").mkdir()
    (folder / "bin").mkdir()
    (folder / "bin" / "python").write_text(PYTHON)
    (folder / "bin" / "python").chmod(0o755)
    for twin in twins:
        (folder / "pipelines" / f"{twin}_smoke.yaml").touch()
    command = ["make", "-C", folder, "-f", MAKEFILE, "-o", ".venv/.installed", "bench-paper-smoke"]
    places = [f"BIN={folder}/bin", "PAPER_DATA=data"]
    return subprocess.run([*map(str, command), *places], capture_output=True, text=True, env=dict(os.environ))


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_a_bad_twin_stops_no_other_and_fails_the_whole(tmp_path):
    found = make(tmp_path, ["fails", "good", "guesses"])
    assert found.returncode != 0
    assert "failed, or no better than guessing: fails_smoke guesses_smoke\n" in found.stdout
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked == [f"{twin} --data-root data" for twin in ("fails", "good", "guesses")]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_good_twins_are_good(tmp_path):
    assert make(tmp_path, ["good"]).returncode == 0
