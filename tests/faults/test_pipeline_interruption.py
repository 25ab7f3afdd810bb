"""A pipeline that is killed at random moments and started again ends with the table of one that was left alone."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
CONFIG = """
name: tiny
data: {dataset: digits, resize: 8, val_share: 0.2, train_images: 400}
model: {image_size: 8, patch_size: 4, width: 12, depth: 2, heads: 2, pool: mean}
training: {epochs: 12, batch_size: 20, lr: 3e-3, threads: 1, checkpoint_minutes: 0.003}
evaluation: {bootstrap: 1000, routing_images: 50}
tracking: {mlflow: false}
"""
LAYER = '"model.moe={blocks: [0], num_experts: 3, router: {kind: eigen, rank: 3}, experts: {kind: mlp, hidden: 4}}"'
PIPELINE = f"""
name: killed
tracking: {{mlflow: false}}
runs:
  - {{config: vision/tiny.yaml, seeds: [0, 1]}}
  - {{config: vision/tiny.yaml, set: [name=routed, {LAYER}], seeds: [0, 1]}}
steps: [{{verb: fewshot, dataset: digits, shots: [1], draws: 3}}]
table:
  paired_with: tiny
  columns: [{{name: "Top-1, %", metric: test/top1}}, {{name: One-shot, metric: fewshot/digits/1/token/ridge}}]
"""


def start(folder, out):
    command = [sys.executable, "-m", "emoe_med.pipeline", "run", folder / "killed.yaml", "--out", out, "--jobs", "2"]
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_and_started_again_it_ends_with_the_same_table(tmp_path, number):
    (tmp_path / "vision").mkdir()
    (tmp_path / "vision" / "tiny.yaml").write_text(CONFIG)
    (tmp_path / "killed.yaml").write_text(PIPELINE)
    whole = start(tmp_path, tmp_path / "whole")
    begin = time.monotonic()
    assert whole.wait() == 0
    length = time.monotonic() - begin
    chance = random.Random(0)
    kills = 0
    for _ in range(20):
        child = start(tmp_path, tmp_path / "killed")
        try:
            # the first part goes on loading libraries: aim behind it
            code = child.wait(length * chance.uniform(0.35, 0.8))
        except subprocess.TimeoutExpired:
            child.send_signal(number)
            assert child.wait(120) == (-signal.SIGKILL if number == signal.SIGKILL else 143)
            kills += 1
            continue
        assert code == 0, child.stderr.read()
        break
    else:
        pytest.fail("no start in 20 came to its end")
    assert kills >= 1
    first, second = (tmp_path / name / "killed" / "table.csv" for name in ("whole", "killed"))
    assert first.read_bytes() == second.read_bytes()
    runs = sorted(
        path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").glob("*/*/seed*/predictions/test.csv")
    )
    assert len(runs) == 4
    for run in runs:
        assert (tmp_path / "whole" / run).read_bytes() == (tmp_path / "killed" / run).read_bytes()
