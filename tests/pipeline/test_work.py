"""A run that another pipeline has at work is waited for; what a dead process left is not."""

import json
import os
import socket
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest

from emoe_med.pipeline.work import Work, run_verbs
from emoe_med.training.run_folder import is_claimed, wait_until_free

HOLD = """
import fcntl, json, os, socket, sys, time
with open(sys.argv[1], "a+") as file:
    fcntl.lockf(file, fcntl.LOCK_EX)
    json.dump({"pid": os.getpid(), "host": socket.gethostname(), "start": "now"}, file)
    file.flush()
    print("locked", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def locked(folder, seconds):
    """A run folder that a process has for some seconds; the process, which is reaped as it ends."""
    command = [sys.executable, "-c", HOLD, folder / "run.lock", str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    with process.stdout:
        process.stdout.readline()
    threading.Thread(target=process.wait).start()  # a process that nobody asked for its end still counts as alive
    return process


def test_a_run_that_is_at_work_is_waited_for_and_told_once(tmp_path, caplog):
    process = locked(tmp_path, 1)
    wait_until_free(tmp_path)
    assert process.returncode == 0
    assert [record.message.partition(": ")[0] for record in caplog.records] == [f"{tmp_path} is in use"]
    caplog.clear()
    wait_until_free(tmp_path)  # its lock still lies there
    assert not caplog.records


def test_a_dead_process_whose_number_another_one_has_is_not_waited_for(tmp_path, caplog):
    (tmp_path / "run.lock").write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "start": "then"}))
    assert is_claimed(tmp_path)  # as far as the number tells
    wait_until_free(tmp_path)
    assert not caplog.records


VERB = """
from pathlib import Path
def app(arguments, **rest):
    tries = Path("tries")
    tries.write_text((tries.read_text() if tries.exists() else "") + "x")
    if len(tries.read_text()) > 1:
        return 0
    Path("taken").rename("run.lock")
    return int(arguments[0])
"""


@pytest.mark.parametrize(("code", "tries"), [(2, "xx"), (5, "x")])
def test_a_verb_whose_folder_was_taken_before_it_waits_for_its_turn(tmp_path, monkeypatch, code, tries):
    """Only the code of a refused folder is tried again: what failed by itself would fail for ever."""
    (tmp_path / "verb").mkdir()
    (tmp_path / "verb" / "__main__.py").write_text(VERB)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("verb", "verb.__main__"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    process = locked(tmp_path, 1)
    (tmp_path / "run.lock").rename(tmp_path / "taken")
    assert run_verbs([("verb", str(code))], tmp_path) == (0 if code == 2 else code)
    assert (tmp_path / "tries").read_text() == tries
    process.wait()


def test_work_is_known_by_what_it_does():
    def key(label, *arguments):
        return Work(label, Path("log"), partial(run_verbs, *arguments)).key

    assert key("arm/seed0", [("verb", "a")]) == key("arm/seed0", [("verb", "a")])
    assert (
        len({key("arm/seed0", [("verb", "a")]), key("arm/seed0", [("verb", "b")]), key("b/seed0", [("verb", "a")])})
        == 3
    )
