"""Work handed to submitit, by its local executor: real processes, one failure, and no job sent twice."""

import json
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest

from emoe_med.errors import ConfigError, Interrupted
from emoe_med.pipeline.cluster import Cluster, Submitted
from emoe_med.pipeline.work import Work, run_verbs

submitit = pytest.importorskip("submitit", reason="submitit is not installed")
pytestmark = [pytest.mark.faults, pytest.mark.timeout(1200)]
OPTIONS = ["timeout_min=15"]


def slow(path: Path, seconds: float = 0) -> partial:
    """Leave a line at begin and end; submitit's process imports the call by name, so it is no function of this file."""
    return partial(
        subprocess.call, ["sh", "-c", f"echo begun >> {path}; sleep {seconds}; echo ended >> {path}; echo told"]
    )


def work(folder, name, call):
    return Work(name, folder / f"{name}.log", call)


def test_every_job_ends_with_its_exit_code_and_its_log(tmp_path):
    ended = {}
    works = [
        work(tmp_path, "good", slow(tmp_path / "lines")),
        work(tmp_path, "bad", partial(run_verbs, [("emoe_med.vision", "train", "--seeds", "x")], tmp_path)),
        work(tmp_path, "broken", partial(run_verbs, [("emoe_med.no_such_module",)], tmp_path)),
    ]
    Cluster("local", tmp_path / "jobs", OPTIONS).run(
        works, lambda done, code, seconds: ended.update({done.label: code})
    )
    assert ended == {"good": 0, "bad": 2, "broken": 1}
    assert (tmp_path / "lines").read_text() == "begun\nended\n"
    assert "told" in (tmp_path / "good.log").read_text()
    assert "error CLI-NUMBERS" in (tmp_path / "bad.log").read_text()
    assert "ModuleNotFoundError" in (tmp_path / "broken.log").read_text()


@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")  # that is the point
def test_what_still_runs_is_waited_for_and_not_sent_again(tmp_path):
    works = [
        work(tmp_path, "quick", slow(tmp_path / "quick")),
        work(tmp_path, "long", slow(tmp_path / "long", 20)),
    ]

    def leave(done, code, seconds):
        raise KeyboardInterrupt

    cluster = Cluster("local", tmp_path / "jobs", OPTIONS)
    with pytest.raises(Interrupted, match="1 jobs go on"):
        cluster.run(works, leave)
    ended = []
    cluster.run(works[1:], lambda done, code, seconds: ended.append(code))
    assert ended == [0]
    assert (tmp_path / "long").read_text() == "begun\nended\n"


@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")  # that is the point
def test_changed_work_under_an_old_label_is_work_of_its_own(tmp_path):
    def leave(done, code, seconds):
        raise KeyboardInterrupt

    cluster = Cluster("local", tmp_path / "jobs", OPTIONS)
    with pytest.raises(Interrupted, match="1 jobs go on"):
        cluster.run(
            [work(tmp_path, "quick", slow(tmp_path / "q")), work(tmp_path, "arm", slow(tmp_path / "a", 10))], leave
        )
    cluster.run([work(tmp_path, "arm", slow(tmp_path / "changed"))], lambda done, code, seconds: None)
    assert (tmp_path / "changed").read_text() == "begun\nended\n"
    known = json.loads((tmp_path / "jobs" / "jobs.json").read_text())
    assert [key.split()[0] for key in known] == ["quick", "arm", "arm"]


def test_a_job_may_start_as_many_processes_as_it_has_cpus(tmp_path):
    assert Cluster("local", tmp_path, OPTIONS).processes == 1
    assert Cluster("local", tmp_path, [*OPTIONS, "cpus_per_task=8"]).processes == 8


def test_a_preempted_job_is_queued_again_as_it_was(tmp_path):
    job = Submitted(slow(tmp_path / "lines"))
    again = job.checkpoint()
    assert isinstance(again, submitit.helpers.DelayedSubmission)
    assert again.function is job


@pytest.mark.parametrize(
    ("kind", "option", "told"),
    [
        ("local", "timeout_min", "CLI-CLUSTER.*expected key=value"),
        ("local", "x=[", "CLI-CLUSTER.*no value of YAML"),
        ("local", "gpus=1", "PIPE-SUBMIT.*gpus"),
        ("local", "timeout_min=long", "PIPE-SUBMIT"),
        ("slurm", "mem_gb=1", "CLI-CLUSTER.*how long"),
        pytest.param(
            *("slurm", "timeout_min=5", "PIPE-SUBMIT.*srun"),
            marks=pytest.mark.skipif(shutil.which("srun") is not None, reason="SLURM is here"),
        ),
    ],
)
def test_an_option_that_cannot_be_is_one_line(tmp_path, kind, option, told):
    with pytest.raises(ConfigError, match=told) as refused:
        Cluster(kind, tmp_path, [option])
    assert len(str(refused.value).splitlines()) == 1
