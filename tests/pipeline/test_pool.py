"""Work side by side: exit codes, logs, GPUs in turn, no more at a time than asked for."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from emoe_med.pipeline.pool import THREAD_VARIABLES, Pool
from emoe_med.pipeline.work import Work


def shell(script):
    return partial(subprocess.call, ["sh", "-c", script])


def test_processes_share_gpus_and_end_with_their_codes(tmp_path, monkeypatch):
    for name in (*THREAD_VARIABLES, "PYTORCH_NVML_BASED_CUDA_CHECK"):
        monkeypatch.setenv(name, "1")  # the pool sets what is not set, and would leave it behind
    seen, running = tmp_path / "seen", tmp_path / "running"
    running.mkdir()
    script = f"mkdir {running}/$$; ls {running} | wc -l >> {tmp_path}/most; sleep 0.2; rmdir {running}/$$; "
    works = [
        Work(
            f"work{index}", tmp_path / "logs" / f"{index}.log", shell(f"{script} echo $CUDA_VISIBLE_DEVICES >> {seen}")
        )
        for index in range(6)
    ]
    works.append(Work("fails", tmp_path / "logs" / "fails.log", shell("echo told; exit 5")))
    works.append(Work("killed", tmp_path / "logs" / "killed.log", shell("kill -9 $PPID")))
    works.append(Work("raises", tmp_path / "logs" / "raises.log", partial(subprocess.call, ["/no/such/program"])))
    ended = {}
    Pool(3, ["7", "8"]).run(works, lambda work, code, seconds: ended.update({work.label: code}))
    assert ended == {**{f"work{index}": 0 for index in range(6)}, "fails": 5, "killed": 137, "raises": 1}
    assert set(seen.read_text().split()) == {"7", "8"}
    assert max(map(int, (tmp_path / "most").read_text().split())) <= 3
    assert (tmp_path / "logs" / "fails.log").read_text() == "told\n"
    assert "FileNotFoundError" in (tmp_path / "logs" / "raises.log").read_text()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to CPUs")
def test_threads_are_those_of_the_cpus_that_the_process_may_use(monkeypatch):
    for name in (*THREAD_VARIABLES, "PYTORCH_NVML_BASED_CUDA_CHECK"):
        monkeypatch.setenv(name, "1")  # so that what the pool sets is taken back
    monkeypatch.delenv("OMP_NUM_THREADS")
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        Pool(1, [])
    finally:
        os.sched_setaffinity(0, before)
    assert os.environ["OMP_NUM_THREADS"] == "1"


READER = """
import os, sys, time
from functools import partial
from pathlib import Path
from torch.utils.data import DataLoader
from emoe_med.pipeline.pool import Pool
from emoe_med.pipeline.work import Work

class Slow:
    def __len__(self):
        return 10**6
    def __getitem__(self, index):
        Path(sys.argv[1], f"{os.getpid()}").touch()
        time.sleep(0.01)
        return index

def read():
    Path(sys.argv[1], f"{os.getpid()}").touch()
    return sum(int(batch) for batch in DataLoader(Slow(), batch_size=None, num_workers=1))

if __name__ == "__main__":
    Pool(1, []).run([Work("reads", Path(sys.argv[1]) / "log.txt", read)], print)
"""


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_it_leaves_no_process_behind(tmp_path, number):
    (tmp_path / "reader.py").write_text(READER)
    pool = subprocess.Popen([sys.executable, tmp_path / "reader.py", tmp_path], cwd=Path(__file__).parents[2])
    while len(pids := [path.name for path in tmp_path.iterdir() if path.name.isdigit()]) < 2:
        assert pool.poll() is None
        time.sleep(0.05)
    pool.send_signal(number)
    pool.wait(120)
    deadline = time.monotonic() + 120
    while left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.2)
