"""A real MLflow server on loopback, and many processes at one store."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from emoe_med.errors import ConfigError
from emoe_med.training import outbox
from emoe_med.training.store import serve
from emoe_med.training.tracking import Tracker, sync

pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy"),
]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def read(address):
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(address, timeout=30) as answer:
        return answer.read()


def call(base, method, **arguments):
    query = "&".join(f"{name}={value}" for name, value in arguments.items())
    return json.loads(read(f"{base}/ajax-api/2.0/mlflow/{method}?{query}"))


def work(tracker, steps, start=1):
    for step in range(start, start + steps):
        tracker.metrics(step, {"train/loss": 1 / step})
        tracker.flush()


def steps_at(base, run_id):
    found = call(base, "metrics/get-history", run_id=run_id, metric_key="train/loss")
    return sorted(metric["step"] for metric in found["metrics"])


def test_the_server_shows_runs_children_and_artifacts_of_a_local_store(tmp_path):
    parent, child = tmp_path / "runs", tmp_path / "runs" / "fold0"
    with (
        Tracker(parent, out=tmp_path, run_name="table1"),
        Tracker(child, out=tmp_path, run_name="fold0", parent=parent) as tracker,
    ):
        work(tracker, 20)
        (child / "expert_maps").mkdir()
        (child / "expert_maps" / "viewer.html").write_text("<html>the map</html>")
        tracker.log_artifact(child / "expert_maps" / "viewer.html", "expert_maps", persons=20)
    with serve(tmp_path, free_port()) as base:
        record = outbox.read_record(child)
        run = call(base, "runs/get", run_id=record["run_id"])["run"]
        assert (run["info"]["status"], run["info"]["run_name"]) == ("FINISHED", "fold0")
        tags = {tag["key"]: tag["value"] for tag in run["data"]["tags"]}
        assert tags["mlflow.parentRunId"] == outbox.read_record(parent)["run_id"]
        assert steps_at(base, record["run_id"]) == list(range(1, 21))
        files = call(base, "artifacts/list", run_id=record["run_id"], path="expert_maps")["files"]
        assert [entry["path"] for entry in files] == ["expert_maps/viewer.html"]
        page = f"{base}/get-artifact?run_id={record['run_id']}&path=expert_maps/viewer.html"
        assert read(page) == b"<html>the map</html>"


def test_a_server_that_dies_and_comes_back(tmp_path):
    out, run_dir, port = tmp_path / "server", tmp_path / "run", free_port()
    with Tracker(out / "any", out=out):  # makes the store
        pass
    with serve(out, port) as base:
        tracker = Tracker(run_dir, uri=base)
        tracker.__enter__()
        work(tracker, 5)
        deadline = time.monotonic() + 30
        while outbox.rest(run_dir) and time.monotonic() < deadline:
            tracker.flush()
            time.sleep(0.1)
        assert outbox.rest(run_dir) == 0
        run_id = outbox.read_record(run_dir)["run_id"]
        assert steps_at(base, run_id) == [1, 2, 3, 4, 5]
    start = time.monotonic()
    work(tracker, 15, start=6)
    (run_dir / "report").mkdir()
    (run_dir / "report" / "report.html").write_text("report")
    tracker.log_artifact(run_dir / "report" / "report.html", "report")
    tracker.__exit__(None, None, None)
    assert time.monotonic() - start < 5
    with pytest.raises(ConfigError, match="start the server and sync again"):
        sync(run_dir)
    with serve(out, port) as base:
        sync(run_dir)
        assert outbox.read_record(run_dir)["run_id"] == run_id
        assert steps_at(base, run_id) == list(range(1, 21))
        run = call(base, "runs/get", run_id=run_id)["run"]
        assert run["info"]["status"] == "FINISHED"
        page = f"{base}/get-artifact?run_id={run_id}&path=report/report.html"
        assert read(page) == b"report"
        assert sync(run_dir) == 0


def test_a_port_in_use_is_one_line(tmp_path):
    with Tracker(tmp_path / "any", out=tmp_path):
        pass
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match="MLflow server did not start"), serve(tmp_path, port):
            pass


PROGRAM = """
import sys
from pathlib import Path
from emoe_med.training.tracking import Tracker
out, name = Path(sys.argv[1]), sys.argv[2]
with Tracker(out / "runs" / name, out=out, run_name=name, parent=out / "runs") as tracker:
    for step in range(1, 101):
        tracker.metrics(step, {"train/loss": 1 / step, "val/mae": step})
        if step % 10 == 0:
            tracker.flush()
"""


def test_four_processes_make_one_store_together(tmp_path):
    with Tracker(tmp_path / "runs", out=tmp_path, uri="none"):
        pass
    outbox.settle_record(tmp_path / "runs", f"sqlite:///{tmp_path}/mlflow.db", {})  # not yet at MLflow
    names = ["a", "b", "c", "d"]
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path), name], env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        for name in names
    ]
    assert [program.wait(800) for program in programs] == [0, 0, 0, 0]
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    parent_id = outbox.read_record(tmp_path / "runs")["run_id"]
    experiment = client.get_experiment_by_name("emoe_med")
    assert len(client.search_runs([experiment.experiment_id])) == 5
    for name in names:
        run_dir = tmp_path / "runs" / name
        sync(run_dir)  # where the machine was too busy for the last wait
        run = client.get_run(outbox.read_record(run_dir)["run_id"])
        assert run.data.tags["mlflow.parentRunId"] == parent_id
        assert len(client.get_metric_history(run.info.run_id, "val/mae")) == 100
    assert sorted(path.name for path in Path(tmp_path).iterdir()) == ["mlflow.db", "runs"]
