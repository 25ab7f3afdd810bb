import getpass
import json
import logging
import os
import socket
import subprocess
import sys
import time

import pytest
import torch
from small_disk import small_disk

from emoe_med.errors import ConfigError, StorageError
from emoe_med.training.run_folder import claim, environment, git_commit, write_environment

HOLD = "import sys, pathlib, time; from emoe_med.training.run_folder import claim\n"
HOLD += "with claim(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_run_is_refused_at_once_naming_the_first(tmp_path, holder):
    start = time.monotonic()
    with pytest.raises(ConfigError) as caught, claim(tmp_path):
        pass
    assert time.monotonic() - start < 2
    assert caught.value.exit_code == 2
    assert f"process {holder.pid} on {socket.gethostname()} since 20" in str(caught.value)


def test_the_lock_of_a_killed_run_is_taken_over_with_a_note(tmp_path, holder, caplog):
    holder.kill()
    holder.wait()
    assert (tmp_path / "run.lock").exists()
    with caplog.at_level(logging.WARNING, "emoe_med"), claim(tmp_path):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    assert f"process {holder.pid}, which is dead" in caplog.text
    assert not (tmp_path / "run.lock").exists()


def test_the_lock_of_another_machine_is_left_alone(tmp_path):
    lock = {"pid": 1, "host": "elsewhere", "start": "2026-01-01T00:00:00Z"}
    (tmp_path / "run.lock").write_text(json.dumps(lock))
    with pytest.raises(ConfigError, match=r"process 1 on elsewhere .* delete the lock file"), claim(tmp_path):
        pass
    assert json.loads((tmp_path / "run.lock").read_text()) == lock


def test_one_process_cannot_own_a_folder_twice_and_keeps_it(tmp_path, holder):
    mine = tmp_path / "mine"
    with claim(mine):
        with pytest.raises(ConfigError, match="it is this process"), claim(mine):
            pass
        assert (mine / "run.lock").exists()
    with claim(mine):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}'])
def test_an_unreadable_lock_nobody_holds_is_no_lock(tmp_path, text):
    (tmp_path / "run.lock").write_text(text)
    with claim(tmp_path):
        pass


@pytest.mark.parametrize("where", ["file", "file/below"])
def test_a_file_in_the_folder_s_place_is_code_6(tmp_path, where):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="output folder cannot be written") as caught, claim(tmp_path / where):
        pass
    assert caught.value.exit_code == 6
    assert "\n" not in str(caught.value)


def test_a_read_only_disk_is_code_6(tmp_path):
    disk = small_disk(tmp_path / "disk", 16, ",ro")
    with disk as folder, pytest.raises(StorageError, match="Read-only file system"), claim(folder):
        pass


def test_local_log_has_the_package_s_messages(tmp_path):
    with claim(tmp_path):
        logging.getLogger("emoe_med").warning("rows %s", [3, 4])
    logging.getLogger("emoe_med").warning("after the run")
    assert (tmp_path / "local.log").read_text().endswith("WARNING rows [3, 4]\n")


def test_environment_names_versions_but_neither_host_nor_user(tmp_path):
    write_environment(tmp_path, torch.device("cpu"), {"seed": 3})
    text = (tmp_path / "environment.json").read_text()
    found = json.loads(text)
    assert found["versions"]["torch"] == torch.__version__
    assert (found["seed"], found["device"], found["threads"]) == (3, "cpu", torch.get_num_threads())
    assert socket.gethostname() not in text
    assert f'"{getpass.getuser()}"' not in text
    assert str(tmp_path) not in text


def test_a_resume_elsewhere_keeps_the_first_environment_and_tells_the_difference(tmp_path, caplog):
    write_environment(tmp_path, torch.device("cpu"), {"seed": 3})
    first = (tmp_path / "environment.json").read_text()
    with caplog.at_level(logging.WARNING, "emoe_med"):
        write_environment(tmp_path, torch.device("cpu"), {"seed": 4})
    assert "resumed under another seed: 4, was 3" in caplog.text
    assert (tmp_path / "environment.json").read_text() == first


def test_commit_is_one_or_none():
    commit = git_commit()
    assert commit is None or len(commit.removesuffix("+")) == 40
    assert environment(torch.device("cpu"))["git_commit"] == commit
