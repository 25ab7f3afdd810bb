"""`train` under torchrun: two ranks do what one process does that accumulates the same two half-batches."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from emoe_med.brainage.__main__ import app
from emoe_med.data.cohort import write_cohort
from emoe_med.training.checkpoint import CheckpointFolder
from emoe_med.training.journal import read_journal

pytestmark = pytest.mark.timeout(900)  # three processes import everything
REPOSITORY = Path(__file__).parents[2]
RUN = """
name: {name}
data: {{spacing_mm: 8, oversample: 1, align: centred, folds: 3, val_share: 0.3}}
augment: {{flip: 0.5, shift_voxels: 1}}
model:
  {{stem: 1, channels: [4, 8], pooled: 1, neck: 8, dropout: 0, head: l1,
    moe: {{after_block: 1, num_experts: 3, router: {{kind: eigen, rank: 3}}, experts: {{kind: mlp, hidden: 2}}}}}}
training: {{epochs: 6, batch_size: 2, accumulate: {accumulate}, lr: 1e-3, threads: 1, clip_norm: 1.0}}
evaluation: {{bootstrap: 1000}}
tracking: {{mlflow: false}}
"""


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_cohort(tmp_path_factory.mktemp("cohort") / "synthetic", persons=12, seed=5, spacing_mm=8.0)


def write(folder, name, accumulate):
    path = folder / f"{name}.yaml"
    path.write_text(RUN.format(name=name, accumulate=accumulate))
    return path


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "emoe_med.brainage"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, timeout=300, env=environment, cwd=REPOSITORY
    )


@pytest.fixture(scope="module")
def runs(cohort, tmp_path_factory):
    """The same run in one process that accumulates, and on two ranks; folder of each, and what the ranks printed."""
    out = tmp_path_factory.mktemp("runs")
    options = ("--manifest", cohort, "--out", out, "--cache", out / "cache")
    printed = torchrun("train", *options, "--config", write(out, "ranks", 1))
    assert printed.returncode == 0, printed.stderr
    alone = ["train", *options, "--config", write(out, "alone", 2)]
    result = CliRunner().invoke(app, [str(argument) for argument in alone], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return out / "alone" / "seed0-fold0", out / "ranks" / "seed0-fold0", printed


def metrics(folder, name):
    events = (event for _, event in read_journal(folder / "journal.jsonl") if event["kind"] == "metrics")
    return [event["values"][name] for event in events if name in event["values"]]


def test_the_losses_are_those_of_one_process(runs):
    alone, ranks, _ = runs
    one, two = (metrics(folder, "train/step_loss") for folder in (alone, ranks))
    assert len(one) == len(two) >= 6
    assert two == pytest.approx(one, abs=1e-5)
    assert len(set(one)) > 3
    assert metrics(ranks, "train/loss") == pytest.approx(metrics(alone, "train/loss"), abs=1e-5)
    assert metrics(ranks, "train/gradient_norm") == pytest.approx(metrics(alone, "train/gradient_norm"), rel=1e-4)


def test_weights_basis_and_balance_are_those_of_one_process(runs):
    alone, ranks, _ = runs
    one, two = (CheckpointFolder(folder).load("last").model for folder in (alone, ranks))
    own = {name for name in one if "running_" in name or "num_batches" in name}  # BatchNorm's, of each rank
    for part in ("basis", "bias"):
        assert any(part in name for name in set(one) - own), sorted(one)
    for name in sorted(set(one) - own):
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=1e-4, msg=name)
    assert own, "the test is too easy without BatchNorm"


def test_one_rank_writes_and_one_speaks(runs):
    _, ranks, printed = runs
    assert (ranks / "report" / "report.html").is_file()
    assert json.loads((ranks / "metrics.json").read_text())["test"]["mae"]["n"] > 0
    assert printed.stdout.count("MAE") == 1
    assert printed.stderr.count("epoch 1/6") == 1
    assert not list(ranks.rglob(".tmp-*"))


@pytest.mark.faults
def test_ranks_share_the_reading_and_agree_on_what_cannot_be_read(runs, cohort, tmp_path):
    """Scans 3 and 4 are damaged, one for each rank: both are told, once, and nothing is written."""
    out = tmp_path / "runs"
    data = shutil.copytree(cohort.parent, tmp_path / "data")
    images = sorted(data.rglob("*_T1w.nii.gz"))
    for image in images[2:4]:
        image.write_bytes(image.read_bytes()[:-100])
    cache = shutil.copytree(runs[0].parents[1] / "cache", tmp_path / "cache")
    options = ("--manifest", data / cohort.name, "--out", out, "--cache", cache)
    printed = torchrun("train", *options, "--config", write(tmp_path, "ranks", 1))
    assert printed.returncode == 1  # torchrun's own code, whatever its ranks end with
    told = [line for line in printed.stderr.splitlines() if line.startswith("error ")]
    assert len(told) == 2, printed.stderr
    assert all("VOL-TRUNC" in line or "VOL-CRC" in line for line in told)
    assert "exitcode  : 3" in printed.stderr
    assert not (out / "ranks").exists()
