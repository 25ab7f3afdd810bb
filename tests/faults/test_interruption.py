"""Kills and signals at random moments of a real program; short form of reliability.md 7.D."""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from emoe_med.training.checkpoint import CheckpointFolder
from emoe_med.training.journal import read_journal

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]

TOY = Path(__file__).parents[1] / "training" / "toy_task.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
# 120 steps of about 20 ms, a checkpoint every 0.2 s
SETTINGS = ["epochs=30", "delay=0.003", "checkpoint_minutes=0.003", "resume=true"]


def start(folder, *settings):
    command = [sys.executable, str(TOY), str(folder), *SETTINGS, *settings]
    return subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)


def begun(folder, child):
    """Wait until the program writes its first metric of this session; false if it ended before."""
    journal = folder / "journal.jsonl"
    size = journal.stat().st_size if journal.exists() else 0
    while child.poll() is None:
        if journal.exists() and b'"metrics"' in journal.read_bytes()[size:]:
            return True
        time.sleep(0.005)
    return False


def outcome(folder):
    last, best = (CheckpointFolder(folder).load(which).state for which in ("last", "best"))
    metrics = [
        (event["step"], name, value)
        for _, event in read_journal(folder / "journal.jsonl")
        if event["kind"] == "metrics"
        for name, value in event["values"].items()
        if not name.startswith("system/")
    ]
    return last["files"], last["random"], last["position"], best["files"], metrics


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    """A folder whose fsync costs nothing, where there is one: a kill does not reach the disk anyway."""
    if not Path("/dev/shm").is_dir():
        yield tmp_path_factory.mktemp("runs")
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture
def folder(memory, request):
    return memory / request.node.name.replace("[", "-").rstrip("]")


@pytest.fixture(scope="module")
def uninterrupted(memory):
    folder = memory / "whole"
    child = start(folder)
    child.communicate(timeout=600)
    assert child.returncode == 0
    found = outcome(folder)
    assert found[2]["step"] == 120
    assert len(found[4]) == len({(step, name) for step, name, _ in found[4]})
    return found


@pytest.mark.parametrize("run", range(2))
def test_killed_at_random_moments_all_is_equal_to_the_bit(folder, uninterrupted, run):
    """D1: `kill -9`; journal, weights, moments, random state and history equal the uninterrupted run."""
    dice = random.Random(run)
    kills = 0
    for _ in range(5):
        child = start(folder, f"workers={dice.choice((0, 2))}")
        if begun(folder, child):
            time.sleep(dice.uniform(0, 1.0))
        if child.poll() is None:
            child.kill()
            kills += 1
        _, message = child.communicate(timeout=600)
        if child.returncode == 0:
            break
        assert child.returncode == -signal.SIGKILL, message
    else:
        child = start(folder)
        child.communicate(timeout=600)
    assert child.returncode == 0
    assert kills >= 2
    assert outcome(folder) == uninterrupted
    assert list(folder.glob("**/.tmp*")) == []


@pytest.mark.parametrize("run", range(2))
def test_sigterm_at_random_moments(folder, uninterrupted, run):
    """D3: exit 143 soon, and the resumed run is equal."""
    dice = random.Random(100 + run)
    for _ in range(3):
        child = start(folder, f"workers={2 * run}")
        if begun(folder, child):
            time.sleep(dice.uniform(0, 0.6))
        # as a cluster does, to all processes of the job
        for pid in (child.pid, *children(child.pid)):
            os.kill(pid, signal.SIGTERM)
        told = time.monotonic()
        _, message = child.communicate(timeout=600)
        assert child.returncode == 143, message
        assert time.monotonic() - told < 60
        assert "Traceback" not in message
        assert "error RUN-STOPPED" in message
    child = start(folder)
    child.communicate(timeout=600)
    assert outcome(folder) == uninterrupted


def children(pid):
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def test_sigint_saves_and_a_second_one_ends_at_once(folder):
    """D4: 130 with a checkpoint; a second SIGINT does not wait for the step."""
    child = start(folder)
    assert begun(folder, child)
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=600)
    assert child.returncode == 130
    first = CheckpointFolder(folder).load("last")
    slow = subprocess.Popen(
        [sys.executable, str(TOY), str(folder), "epochs=30", "delay=20", "resume=true"],
        env=ENVIRONMENT,
        stderr=subprocess.DEVNULL,
    )
    while not (folder / "run.lock").exists():
        time.sleep(0.01)
    time.sleep(5)  # inside a sample of 20 s
    slow.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert slow.poll() is None
    slow.send_signal(signal.SIGINT)
    assert slow.wait(1) == -signal.SIGINT
    assert CheckpointFolder(folder).load("last").state == first.state


def test_two_programs_in_one_folder(folder):
    """D9: the second ends with code 2 and names the first."""
    first = start(folder)
    assert begun(folder, first)
    second = start(folder)
    _, message = second.communicate(timeout=600)
    assert second.returncode == 2
    assert f"process {first.pid} on" in message
    first.kill()
    first.communicate()
