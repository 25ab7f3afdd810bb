"""A run that another pipeline has at work is waited for; what a dead process left is not."""

import socket
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest

from emoe_med.pipeline.work import Work, run_verbs
from emoe_med.training.run_folder import wait_until_free


def locked(folder, seconds):
    """A run folder that a process has for some seconds; the process, which is reaped as it ends."""
    process = subprocess.Popen(["sleep", str(seconds)])
    threading.Thread(target=process.wait).start()  # a process that nobody asked for its end still counts as alive
    owner = f'{{"pid": {process.pid}, "host": "{socket.gethostname()}", "start": "now"}}'
    (folder / "run.lock").write_text(owner)
    return process


def test_a_run_that_is_at_work_is_waited_for_and_told_once(tmp_path, caplog):
    process = locked(tmp_path, 1)
    wait_until_free(tmp_path)
    assert process.returncode == 0
    assert [record.message.partition(": ")[0] for record in caplog.records] == [f"{tmp_path} is in use"]
    caplog.clear()
    wait_until_free(tmp_path)  # its lock still lies there
    assert not caplog.records


VERB = """
from pathlib import Path
def app(arguments, **rest):
    tries = Path("tries")
    tries.write_text((tries.read_text() if tries.exists() else "") + "x")
    if len(tries.read_text()) > 1:
        return 0
    Path("run.lock").write_text(Path("taken").read_text())
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
