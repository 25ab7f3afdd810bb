"""The commands of the pages run as they stand, on drawn heads and digits (make docs-check)."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from fenced import ROOT, RUN_WHOLE, commands, is_left_to_others

from emoe_med.data.cohort import write_cohort

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3000)]

SHORT = ["--set", "training.epochs=1"]
SMALL = [*SHORT, "--config", f"{ROOT}/configs/brainage/emoe_4mm.yaml", "--set", "name=emoe"]  # for the default file
READ: set[str] = set()


def run_page(page, folder, places, more=(), codes=(0,)):
    """Run a page's commands in a folder, places and sizes put in; maps are left to the commands that make them."""
    READ.add(page)
    for line in commands(page):
        if not is_left_to_others(line):
            run(
                line,
                folder,
                {"configs/": f"{ROOT}/configs/", "--fold all": "--fold all --set evaluation.maps=false", **places},
                more,
                codes,
            )


def run(line, folder, places, more=(), codes=(0,)):
    for shown, real in places.items():
        line = line.replace(shown, str(real))
    words = [sys.executable, *shlex.split(line[line.index("python ") :])[1:], *(more if " train" in line else ())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    found = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    assert found.returncode in codes, line + "\n" + found.stdout + found.stderr
    return found


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mine")
    write_cohort(folder, persons=20, seed=0, spacing_mm=4.0)
    return folder


@pytest.fixture(scope="module")
def short_table(tmp_path_factory):
    """The smallest twin, with one epoch."""
    path = tmp_path_factory.mktemp("short") / "short.yaml"
    shown = (ROOT / "pipelines" / "paper_table1_smoke.yaml").read_text()
    path.write_text(re.sub(r"epochs=\d+", "epochs=1", shown))
    return {"pipelines/paper_table1_smoke.yaml": path}


@pytest.fixture(scope="module")
def cohort_done(mine, tmp_path_factory):
    """A folder in which `own_cohort.md` was followed."""
    folder = tmp_path_factory.mktemp("own")
    run_page("docs/own_cohort.md", folder, {"/data/mine": mine}, SHORT)
    return folder


def test_your_own_cohort_in_five_steps(cohort_done):
    assert len(commands("docs/own_cohort.md")) == 6
    ages, predicted = ((cohort_done / name).read_text().splitlines() for name in ("ages.csv", "predicted.csv"))
    assert len(predicted) == len(ages)


def test_maps_and_export(cohort_done, mine, tmp_path):
    shutil.copytree(cohort_done / "runs", tmp_path / "runs")
    places = {"ixi/manifest.csv": mine / "manifest.csv", "data_manifests/": f"{ROOT}/data_manifests/"}
    run_page("docs/expert_maps.md", tmp_path, places)
    run_page("docs/export.md", tmp_path, {})


def test_readme(cohort_done, mine, short_table, tmp_path, monkeypatch):
    monkeypatch.setenv("EMOE_MED_DATA_ROOT", str(mine))
    new = write_cohort(tmp_path / "new", persons=8, seed=1, repeat_share=0.5, spacing_mm=4.0)  # 3 twice, at least
    shutil.copytree(cohort_done / "runs" / "cnn3d_4mm", tmp_path / "runs" / "cnn3d_4mm")  # "after training both"
    places = {"/data/ds000001": mine, "new_scans.csv": f"{new} --data-root {new.parent}", **short_table}
    run_page("README.md", tmp_path, places, SHORT, codes=(0, 8))  # 8: some new scans are told to be unlike


def test_preprocessing(mine, tmp_path):
    shutil.copytree(mine, tmp_path / "raw_heads")
    shutil.copy(mine / "manifest.csv", tmp_path / "raw_heads" / "ages.csv")
    places = {"--manifest ages.csv": "--manifest raw_heads/ages.csv --steps light --spacing 4", "--jobs 4": "--jobs 0"}
    run_page("docs/preprocessing.md", tmp_path, places, SMALL, codes=(0, 8))


def test_quick_start(short_table, tmp_path):
    run_page("docs/quick_start.md", tmp_path, short_table, SHORT)


def test_pipelines(tmp_path, real_data):
    run_page(
        "docs/pipelines.md",
        tmp_path,
        {"pipelines/": f"{ROOT}/pipelines/", "--data-root DIR": f"--data-root {real_data}"},
    )


def test_scale(tmp_path):
    sizes = {"100 1000": "20", "10000 50000": "50", "--registered 16": "--registered 1 --epochs 1"}
    sizes["benchmarks/"] = f"{ROOT}/benchmarks/"
    run_page("docs/scale.md", tmp_path, sizes)


def test_no_page_is_forgotten(request):
    if request.config.option.keyword or len(request.session.items) < len(RUN_WHOLE):
        pytest.skip("only some pages were run")
    assert set(RUN_WHOLE) == READ
