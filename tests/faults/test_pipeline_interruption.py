"""A pipeline killed in training, scoring and probing ends, started again, with the table of one left alone."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from emoe_med.training.journal import read_journal

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
CONFIG = """
name: tiny
data: {dataset: digits, resize: 8, val_share: 0.2, train_images: 400}
model: {image_size: 8, patch_size: 4, width: 12, depth: 2, heads: 2, pool: mean}
training: {epochs: 4, batch_size: 20, lr: 3e-3, threads: 1, checkpoint_minutes: 0.02}
evaluation: {bootstrap: 1000, routing_images: 50}
tracking: {mlflow: false}
"""
LAYER = '"model.moe={blocks: [0], num_experts: 3, router: {kind: eigen, rank: 3}, experts: {kind: mlp, hidden: 4}}"'
PIPELINE = f"""
name: killed
tracking: {{mlflow: false}}
runs:
  - {{config: vision/tiny.yaml, seeds: [0, 1]}}
  - {{config: vision/tiny.yaml, set: [name=routed, {LAYER}]}}
steps: [{{verb: fewshot, dataset: digits, shots: [1], draws: 3}}]
table:
  paired_with: tiny
  columns: [{{name: "Top-1, %", metric: test/top1}}, {{name: One-shot, metric: fewshot/digits/1/token/ridge}}]
"""


def start(folder, out):
    command = [sys.executable, "-m", "emoe_med.pipeline", "run", folder / "killed.yaml", "--out", out, "--jobs", "2"]
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL)


def trained(out, share):
    """Whether a run has finished an epoch and its training goes on."""
    journals = [path.read_bytes() for path in out.glob("*/*/seed*/journal.jsonl")]
    return any(b'"metrics"' in text and b"FINISHED" not in text for text in journals)


def evaluated(out, share):
    return any(out.glob("*/*/seed*/metrics.json"))


def probed(out, share):
    return any(out.glob("*/*/seed*/fewshot/digits.json"))


class AnyTime:
    """At a random share of the time that the whole pipeline took."""

    def __init__(self):
        self.moment = random.random()

    def __call__(self, out, share):
        return share > self.moment

    def __repr__(self):
        return f"at {self.moment:.4f} of the time"


@pytest.mark.parametrize(
    ("number", "moments"),
    [
        (signal.SIGKILL, [trained, evaluated, probed]),
        (signal.SIGKILL, [AnyTime(), AnyTime(), AnyTime(), AnyTime()]),
        (signal.SIGTERM, [trained]),
    ],
    ids=["SIGKILL", "SIGKILL at any time", "SIGTERM"],
)
def test_killed_and_started_again_it_ends_with_the_same_table(tmp_path, number, moments):
    (tmp_path / "vision").mkdir()
    (tmp_path / "vision" / "tiny.yaml").write_text(CONFIG)
    (tmp_path / "killed.yaml").write_text(PIPELINE)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    began = time.monotonic()
    assert start(tmp_path, whole).wait() == 0
    took_s = time.monotonic() - began
    kills = 0
    print(moments)
    for moment in moments:
        began, child = time.monotonic(), start(tmp_path, killed)
        while child.poll() is None and not moment(killed, (time.monotonic() - began) / took_s):
            time.sleep(0.002)
        child.send_signal(number)
        kills += child.wait(120) == (-signal.SIGKILL if number == signal.SIGKILL else 143)
    assert kills >= 1  # a moment that had passed before ends in a whole pipeline
    assert start(tmp_path, killed).wait() == 0
    assert (whole / "killed" / "table.csv").read_bytes() == (killed / "killed" / "table.csv").read_bytes()
    runs = [path.relative_to(whole) for path in whole.glob("*/*/seed*/predictions/test.csv")]
    assert len(runs) == 3
    for run in runs:
        assert (whole / run).read_bytes() == (killed / run).read_bytes()


def test_a_preempted_job_of_a_cluster_is_queued_again_and_goes_on(tmp_path):
    submitit = pytest.importorskip("submitit", reason="submitit is not installed")
    from functools import partial

    from emoe_med.pipeline.cluster import Submitted
    from emoe_med.pipeline.work import run_verbs

    (tmp_path / "tiny.yaml").write_text(CONFIG.replace("epochs: 4", "epochs: 60"))
    run_dir = tmp_path / "runs" / "tiny" / "seed0"
    train = ("emoe_med.vision", "train", "--config", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "runs"))
    executor = submitit.AutoExecutor(folder=tmp_path / "jobs", cluster="local")
    executor.update_parameters(timeout_min=20)
    job = executor.submit(Submitted(partial(run_verbs, [(*train, "--resume")], run_dir)))
    journal = run_dir / "journal.jsonl"
    while not (journal.is_file() and b'"checkpoint"' in journal.read_bytes()):
        time.sleep(0.01)
    controller = job.job_id  # of submitit; its child is the job, which a cluster would signal
    (child,) = Path(f"/proc/{controller}/task/{controller}/children").read_text().split()
    os.kill(int(child), signal.SIGUSR2)
    assert job.result() == 0
    events = [event for _, event in read_journal(journal)]
    starts = [event["step"] for event in events if event["kind"] == "start"]
    assert len(starts) == 2
    assert starts[1] > 0  # from its checkpoint
    assert [event["status"] for event in events if event["kind"] == "status"][-1] == "FINISHED"
