"""The pipeline command as a person uses it: real runs on digits, failures, and what is recorded."""

import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pytest
from command_line import typed

from emoe_med.pipeline.__main__ import app

pytestmark = pytest.mark.timeout(1200)  # seconds on a machine of one's own, minutes on a crowded one

ROOT = Path(__file__).parents[2]
TINY = """
name: tiny
data: {dataset: digits, resize: 8, val_share: 0.2, train_images: 120}
model: {image_size: 8, patch_size: 4, width: 12, depth: 2, heads: 2, pool: mean}
training: {epochs: 1, batch_size: 20, lr: 3e-3, threads: 1}
evaluation: {bootstrap: 1000, routing_images: 50}
"""
LAYER = '"model.moe={blocks: [0], num_experts: 3, router: {kind: eigen, rank: 3}, experts: {kind: mlp, hidden: 4}}"'
PIPELINE = f"""
name: tiny_table
about: Digits, plumbing
runs:
  - {{config: vision/tiny.yaml, seeds: [0]}}
  - {{config: vision/tiny.yaml, set: [name=routed, {LAYER}]}}
  - {{config: vision/tiny.yaml, set: [name=broken, training.lr=1e30]}}
steps:
  - {{verb: fewshot, dataset: digits, shots: [1], draws: 3}}
  - {{verb: heatmap}}
table:
  paired_with: tiny
  columns:
    - {{name: "Top-1, %", metric: test/top1}}
    - {{name: "One-shot, %", metric: fewshot/digits/1/token/ridge}}
    - {{name: NMI, metric: heatmap/nmi}}
"""


SHARED = """
name: tiny_shared
runs: [{config: vision/tiny.yaml, seeds: [0, 1]}]
table: {columns: [{name: "Top-1, %", metric: test/top1}]}
"""


def start(*arguments):
    command = [sys.executable, "-m", "emoe_med.pipeline", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": ""}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    )


def end(process, code):
    found = subprocess.CompletedProcess(process.args, None, *process.communicate())
    assert process.returncode == code, found.stdout + found.stderr
    return found


def pipeline(*arguments, code=0):
    return end(start(*arguments), code)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "vision").mkdir()
    (folder / "vision" / "tiny.yaml").write_text(TINY)
    (folder / "tiny.yaml").write_text(PIPELINE)
    (folder / "shared.yaml").write_text(SHARED)
    first = start("run", folder / "tiny.yaml", "--out", folder / "runs", "--jobs", 2)
    while first.poll() is None and not (folder / "runs" / "tiny_table" / "local").is_dir():
        time.sleep(0.1)
    if find_spec("submitit"):  # beside it, on one of its runs
        submit = ["--submit", "local", "--cluster", "timeout_min=20", "--cluster", "cpus_per_task=1"]
        end(start("run", folder / "shared.yaml", "--out", folder / "runs", *submit), 0)
    return folder, end(first, 8)


def test_a_failing_run_is_named_and_stops_nothing(made):
    folder, first = made
    (error,) = [line for line in first.stderr.splitlines() if line.startswith("error")]
    assert "broken/seed0 ended with exit code 5" in error
    assert "NUM-NONFINITE" in error
    table = pd.read_csv(folder / "runs" / "tiny_table" / "table.csv").set_index(["metric", "row"])
    assert table.loc["test/top1", "runs_done"].to_dict() == {"tiny": 1, "routed": 1, "broken": 0}
    assert table.loc[("fewshot/digits/1/token/ridge", "routed"), "n"] == 3
    assert 0 <= table.loc[("heatmap/nmi", "routed"), "value"] <= 1
    assert ("heatmap/nmi", "tiny") not in table.index  # nothing is routed there
    assert first.stdout.startswith("# tiny_table")
    assert "PLUMBING ONLY" in first.stdout


@pytest.mark.skipif(find_spec("submitit") is None, reason="submitit is not installed")
def test_a_pipeline_beside_it_shares_a_run_and_is_submitted(made):
    folder, _ = made
    tables = [pd.read_csv(folder / "runs" / name / "table.csv") for name in ("tiny_table", "tiny_shared")]
    one, other = (table[(table.row == "tiny") & (table.metric == "test/top1")] for table in tables)
    assert other.runs_done.tolist() == [2]
    assert one.by_seed.item() == other.by_seed.item().split()[0]
    sent = json.loads((folder / "runs" / "tiny_shared" / "local" / "submitit" / "jobs.json").read_text())
    assert [key.split()[0] for key in sent][-1] == "tiny/seed1"
    log = (folder / "runs" / "tiny_shared" / "local" / "tiny-seed1.log").read_text()
    assert "$ python -m emoe_med.vision train" in log


def test_finished_runs_are_compared_and_a_figure_that_none_has_is_refused(made):
    folder, _ = made
    arms = [next((folder / "runs").glob(f"*/{name}")) for name in ("tiny", "routed")]
    shown = typed(app)("compare", *arms, "--metric", "test/top1").stdout
    rows = [line.split(" | ")[0] for line in shown.splitlines() if line.startswith("| ")]
    assert rows[-2:] == ["| tiny", "| routed"]
    refused = typed(app)("compare", *arms, "--metric", "routing/nonsense", code=3)
    assert "error CMP-METRIC  routing/nonsense was measured for none of these runs" in refused.output


def test_status_and_a_second_start_know_what_is_done(made):
    folder, _ = made
    out = folder / "runs"
    status = pipeline("status", folder / "tiny.yaml", "--out", out).stdout
    assert status.splitlines()[-1] == "3 runs: 2 done, 1 failed"
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*/seed0/metrics.json")}
    assert len(before) == 2
    again = pipeline("run", folder / "tiny.yaml", "--out", out, "--only", "tiny")
    assert "1 runs, 0 to do" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/*/seed0/metrics.json")} == before


def test_the_record_nests_and_holds_table_and_page(made):
    from mlflow.tracking import MlflowClient

    folder, _ = made
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    (experiment,) = [found for found in client.search_experiments() if found.name == "vision"]
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    parents = {name: run.data.tags.get("mlflow.parentRunId") for name, run in runs.items()}
    top = runs["tiny_table"].info.run_id
    assert parents["tiny_table"] is None
    assert parents["tiny"] == parents["routed"] == parents["broken"] == top
    assert parents["tiny-seed0"] == runs["tiny"].info.run_id
    assert runs["broken-seed0"].info.status == "FAILED"
    assert runs["tiny_table"].info.status == "FINISHED"
    stored = {path.name for path in (folder / "runs" / "mlartifacts" / "vision" / top).rglob("*") if path.is_file()}
    assert stored == {"table.md", "table.csv", "report.html"}
    figure = runs["tiny_table"].data.metrics["table/routed/fewshot_digits_1_token_ridge"]
    report = json.loads(next((folder / "runs").glob("*/routed/seed0/fewshot/digits.json")).read_text())
    assert figure == pytest.approx(report["1"]["token"]["ridge"]["value"])


def test_nothing_that_is_recorded_names_a_place(made):
    folder, _ = made
    parent = folder / "runs" / "tiny_table"
    for path in parent.rglob("*"):
        if path.is_file() and "local" not in path.relative_to(parent).parts[0]:
            assert str(folder) not in path.read_text(), path


def test_dry_run_prints_the_commands_and_makes_nothing(made, tmp_path):
    folder, _ = made
    shown = pipeline("run", folder / "tiny.yaml", "--out", tmp_path / "none", "--dry-run").stdout
    assert shown.count("python -m emoe_med.vision train") == 3
    assert "python -m emoe_med.vision heatmap" in shown
    assert not (tmp_path / "none").exists()
