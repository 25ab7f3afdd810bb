import http.server
import io
import json
import logging
import os
import re
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image
from small_disk import small_disk

from emoe_med.errors import ConfigError, Interrupted
from emoe_med.training import outbox, store
from emoe_med.training.journal import read_journal
from emoe_med.training.pictures import TAG, Picture, picture_files
from emoe_med.training.tracking import Tracker, sync

# the library's own deprecation, raised while it maps its tables
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory):
    """A store as our code makes it: once, because that takes seconds."""
    out = tmp_path_factory.mktemp("store")
    with Tracker(out / "first", out=out):
        pass
    return out / "mlflow.db"


@pytest.fixture
def out(tmp_path, empty_store):
    with sqlite3.connect(empty_store) as source, sqlite3.connect(tmp_path / "mlflow.db") as target:
        source.backup(target)
    source.close()
    target.close()
    return tmp_path


def client(out):
    from mlflow.tracking import MlflowClient

    return MlflowClient(f"sqlite:///{out}/mlflow.db")


def run_of(out, run_dir):
    return client(out).get_run(outbox.read_record(run_dir)["run_id"])


def history(out, run_dir, name):
    found = client(out).get_metric_history(outbox.read_record(run_dir)["run_id"], name)
    return [(metric.step, metric.value) for metric in sorted(found, key=lambda metric: metric.step)]


def record(tracker, steps, start=1):
    for step in range(start, start + steps):
        tracker.metrics(step, {"train/loss": 1 / step, "expert/E03/load": 0.25})


def test_a_run_arrives_whole_and_ends_finished(out):
    run_dir = out / "fold0"
    with Tracker(run_dir, out=out, run_name="fold0-seed1", words={"cosine"}, strict=True) as tracker:
        tracker.params({"training.lr": 1e-3, "training.schedule": "cosine", "data.root": "/scans"})
        tracker.tags({"fold": 0, "manifest_sha256": "a" * 64})
        record(tracker, 20)
        tracker.metrics(20, {"val/r": float("nan"), "val/mae": 4.5})
        tracker.flush()
    run = run_of(out, run_dir)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "fold0-seed1"
    assert run.data.params == {"training.lr": "0.001", "training.schedule": "cosine"}
    assert run.data.metrics == {"train/loss": 1 / 20, "expert/E03/load": 0.25, "val/mae": 4.5}
    assert history(out, run_dir, "train/loss") == [(step, 1 / step) for step in range(1, 21)]
    assert run.data.tags["manifest_sha256"] == "a" * 64
    assert client(out).get_experiment(run.info.experiment_id).name == "emoe_med"
    assert outbox.rest(run_dir) == 0


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError("secret"), "FAILED"), (Interrupted(143), "KILLED"), (KeyboardInterrupt(), "KILLED")],
)
def test_a_run_that_ends_badly_says_so_and_a_resume_goes_on_in_it(out, error, status):
    run_dir = out / "run"

    def fail():
        with Tracker(run_dir, out=out) as tracker:
            record(tracker, 3)
            raise error

    with pytest.raises(type(error)):
        fail()
    first = run_of(out, run_dir)
    assert first.info.status == status
    with Tracker(run_dir, out=out) as tracker:
        record(tracker, 5, start=2)  # from a checkpoint at step 1
    second = run_of(out, run_dir)
    assert (second.info.run_id, second.info.status) == (first.info.run_id, "FINISHED")
    assert [step for step, _ in history(out, run_dir, "train/loss")] == [1, 2, 3, 4, 5, 6]
    assert len(client(out).search_runs([second.info.experiment_id])) == 2  # the store's own first, and this


def test_folds_are_children_of_their_parent(out):
    parent = out / "pipeline"
    with Tracker(parent, out=out, run_name="table1"):
        for fold in range(2):
            child = parent / f"fold{fold}"
            with Tracker(child, out=out, run_name=f"fold{fold}", parent=parent) as tracker:
                record(tracker, fold + 1)
    parent_id = outbox.read_record(parent)["run_id"]
    for fold in range(2):
        run = run_of(out, parent / f"fold{fold}")
        assert run.data.tags["mlflow.parentRunId"] == parent_id
        assert run.info.status == "FINISHED"
        assert len(history(out, parent / f"fold{fold}", "train/loss")) == fold + 1
    assert run_of(out, parent).info.status == "FINISHED"
    assert "mlflow.parentRunId" not in run_of(out, parent).data.tags


def test_artifacts_keep_their_folders_and_lie_where_the_server_looks(out):
    run_dir = out / "run"
    with Tracker(run_dir, out=out, strict=True) as tracker:
        for folder in ("expert_maps", "report"):
            (run_dir / folder).mkdir()
            (run_dir / folder / "viewer.html").write_text(folder)
            tracker.log_artifact(run_dir / folder / "viewer.html", folder, persons=20)
        (run_dir / "predictions.csv").write_text("row,age")
        for path, folder in ((run_dir / "predictions.csv", "predictions"), (run_dir / "sub-01.png", "report")):
            with pytest.raises(ValueError, match="not on the allow-list"):
                tracker.log_artifact(path, folder)
        with pytest.raises(ValueError, match="is not in the subpath"):
            tracker.log_artifact(out / "mlflow.db", "report")
    assert run_of(out, run_dir).info.artifact_uri.startswith("mlflow-artifacts:/emoe_med/")
    assert files_of(out, run_dir) == {"expert_maps/viewer.html": b"expert_maps", "report/viewer.html": b"report"}


def files_of(out, run_dir):
    artifact_uri = run_of(out, run_dir).info.artifact_uri
    root = out / "mlartifacts" / artifact_uri.removeprefix("mlflow-artifacts:/")
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_map_of_few_persons_stays(out, caplog):
    run_dir = out / "run"
    with Tracker(run_dir, out=out) as tracker:
        (run_dir / "expert_maps").mkdir()
        for name, persons in (("viewer.html", 19), ("maps.json", 20), ("IXI002.nii.gz", 500)):
            (run_dir / "expert_maps" / name).write_text("map")
            tracker.log_artifact(run_dir / "expert_maps" / name, "expert_maps", persons)
    assert list(files_of(out, run_dir)) == ["expert_maps/maps.json"]
    assert "not on the allow-list: expert_maps/viewer.html" in caplog.text


def png_of(colour):
    content = io.BytesIO()
    Image.new("RGB", (600, 300), colour).save(content, "PNG")
    return content.getvalue()


def test_pictures_of_epochs_lie_where_the_pages_of_mlflow_look_and_once(out):
    run_dir = out / "run"
    with Tracker(run_dir, out=out, strict=True) as tracker:
        for step in (10, 20, 20):  # a resumed run may draw an epoch again
            tracker.picture(step, Picture("map/top_expert", png_of((step, 0, 0)), persons=20))
        with pytest.raises(ValueError, match="not on the allow-list"):
            tracker.picture(30, Picture("map/top_expert", png_of((30, 0, 0)), persons=19))
    found = files_of(out, run_dir)
    names = {re.sub(r"timestamp.\d+.[0-9a-f-]{36}", "<...>", name): name for name in found}
    steps = [f"images/map~top_expert+step+{step}+<...>" for step in (10, 20)]
    assert sorted(names) == sorted([f"{step}{end}" for step in steps for end in (".png", "+compressed.webp")])
    assert found[names[f"{steps[1]}.png"]] == png_of((20, 0, 0))
    with Image.open(io.BytesIO(found[names[f"{steps[0]}+compressed.webp"]])) as preview:
        assert preview.size == (256, 128)
    assert run_of(out, run_dir).data.tags["mlflow.loggedImages"] == "True"


def test_pictures_are_named_as_mlflow_names_them(tmp_path):
    """The pages read step and key off the name: what the client of this very version writes is the reference."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.create_experiment("reference", artifact_location=(tmp_path / "files").as_uri())
    run_id = client.create_run(experiment).info.run_id
    picture = Image.new("RGB", (600, 300))
    client.log_image(run_id, picture, key="map/top_expert", step=7, timestamp=123, synchronous=True)
    theirs = {re.sub(r"[0-9a-f-]{36}", "<id>", path.name) for path in (tmp_path / "files").rglob("images/*")}
    picture.save(tmp_path / "mine.png")
    mine = picture_files(tmp_path / "mine.png", "map/top_expert", 7, "key", 123, tmp_path)
    assert {re.sub(r"[0-9a-f-]{36}", "<id>", path.name) for path in mine} == theirs
    assert client.get_run(run_id).data.tags.items() >= TAG.items()


def test_the_deep_link_names_experiment_run_and_artifact(out):
    run_dir = out / "run"
    with Tracker(run_dir, out=out) as tracker:
        assert tracker.deep_link("expert_maps/viewer.html") is None
        record(tracker, 1)
        tracker.flush()
        tracker._sender._thread.join(60)
        info = run_of(out, run_dir).info
        assert tracker.deep_link("expert_maps/viewer.html") == (
            f"http://127.0.0.1:5000/#/experiments/{info.experiment_id}/runs/{info.run_id}"
            "/artifacts/expert_maps/viewer.html?workflowType=machine_learning"
        )


def test_a_moved_folder_of_runs_still_syncs(out, tmp_path_factory):
    run_dir = out / "run"
    with Tracker(run_dir, out=out) as tracker:
        record(tracker, 2)
    moved = tmp_path_factory.mktemp("elsewhere") / "runs"
    out.rename(moved)
    with (moved / "run" / "journal.jsonl").open("a") as journal:
        journal.write('{"kind": "metrics", "time": 1700000000000, "step": 3, "values": {"train/loss": 9.0}}\n')
    assert sync(moved / "run") == 1
    assert history(moved, moved / "run", "train/loss") == [(1, 1.0), (2, 0.5), (3, 9.0)]


# --- strictness and privacy ---


def test_unknown_names_raise_when_strict_and_are_dropped_with_one_warning_otherwise(tmp_path, caplog):
    with Tracker(tmp_path / "a", uri="none", strict=True) as tracker:
        for call in (tracker.metrics, lambda step, values: tracker.params(values)):
            with pytest.raises(ValueError, match="allow-list"):
                call(1, {"sub-01": 1.0})
        with pytest.raises(ValueError, match="allow-list"):
            tracker.tags({"task": "Error: /scans/sub-01"})
    with caplog.at_level(logging.WARNING, "emoe_med"), Tracker(tmp_path / "b", uri="none") as tracker:
        for step in (1, 2):
            tracker.metrics(step, {"val/mae": 1.0, "val/sub-01": 2.0})
    assert caplog.text.count("not recorded, not on the allow-list: val/sub-01") == 1
    text = (tmp_path / "b" / "journal.jsonl").read_text()
    assert text.count("val/mae") == 2
    assert "sub-01" not in text


@pytest.mark.parametrize("label", ["sub-01/fold", "a b", "1234567", "fold_1234567", ""])
def test_labels_cannot_carry_paths_or_numbers_of_persons(tmp_path, label):
    with pytest.raises(ConfigError, match="cannot name an experiment or a run"):
        Tracker(tmp_path, uri="none", run_name=label)


def test_nothing_private_is_in_store_and_record(tmp_path_factory, monkeypatch, capfd):
    canary = f"canary{uuid.uuid4().hex[:12]}"
    out = tmp_path_factory.mktemp(canary)
    monkeypatch.chdir(out)
    for name in ("USER", "LOGNAME", "HOME"):
        monkeypatch.setenv(name, canary)
    run_dir = out / "run"

    def crash():
        with Tracker(run_dir, out=out) as tracker:
            tracker.params({"data.root": canary, "data.paths": [canary], "model.note": canary, canary: 1})
            tracker.tags({"task": canary, "user": canary})
            tracker.metrics(1, {"val/mae": 1.0, f"val/{canary}-1": 2.0})
            (run_dir / "expert_maps").mkdir()
            (run_dir / "expert_maps" / "viewer.html").write_text("<html>")
            tracker.log_artifact(run_dir / "expert_maps" / "viewer.html", "expert_maps", persons=20)
            raise RuntimeError(f"/{canary}/sub-01.nii.gz")

    with pytest.raises(RuntimeError):
        crash()
    written = [path for path in out.rglob("*") if path.is_file() and path.name != "local.log"]
    assert {"mlflow.db", "journal.jsonl", "tracking.json", "viewer.html"} <= {path.name for path in written}
    assert [path for path in written if canary.encode() in path.read_bytes()] == []
    assert sorted(path.name for path in out.iterdir()) == ["mlartifacts", "mlflow.db", "run"]
    assert capfd.readouterr().out == ""


# --- servers that fail ---


@contextmanager
def server(answer):
    """A real HTTP server on loopback; `answer(handler)` replies to every request."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def reply(self):
            length = int(self.headers.get("Content-Length") or 0)
            seen.append((self.path, self.rfile.read(length)))
            answer(self)

        def log_message(self, *arguments):
            pass

    for verb in ("GET", "POST", "PATCH"):
        setattr(Handler, f"do_{verb}", Handler.reply)
    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.daemon_threads = True
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}", seen
    finally:
        listening.shutdown()
        listening.server_close()
        thread.join()


def error_500(handler):
    handler.send_response(500)
    handler.end_headers()


def never_in_time(handler):
    time.sleep(30)


def nonsense(handler):
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(b"<html>not MLflow</html>")


def steps_in(run_dir):
    return [event["step"] for _, event in read_journal(run_dir / "journal.jsonl") if event["kind"] == "metrics"]


def run_against(uri, run_dir):
    """Twenty epochs of nothing; returns how long they took, and how long the end took."""
    start = time.monotonic()
    with Tracker(run_dir, uri=uri) as tracker:
        for epoch in range(20):
            record(tracker, 1, start=epoch + 1)
            tracker.flush()
            time.sleep(0.01)
        trained = time.monotonic()
    return trained - start, time.monotonic() - trained


@pytest.fixture(scope="module", autouse=True)
def mlflow_is_imported():
    """So that the seconds below are the server's."""
    import mlflow.tracking  # noqa: F401


@pytest.mark.parametrize("answer", [error_500, never_in_time, nonsense])
def test_a_failing_server_costs_a_run_nothing(out, caplog, answer):
    run_dir = out / "run"
    with server(answer) as (uri, seen):
        training, ending = run_against(uri, run_dir)
    assert training < 2
    assert ending < 6
    assert seen
    assert len(seen) < 15  # no retries, and a rest after three failures
    assert steps_in(run_dir) == list(range(1, 21))
    assert "MLflow did not take the record" in caplog.text
    assert "MLflow lacks the end of this run" in caplog.text
    # and what it missed is sent later, to where it is wanted
    assert sync(run_dir, f"sqlite:///{out}/mlflow.db") == 22  # 20 steps, begin and end
    assert [step for step, _ in history(out, run_dir, "train/loss")] == list(range(1, 21))
    assert run_of(out, run_dir).info.status == "FINISHED"
    assert sync(run_dir) == 0


def test_a_dead_server_costs_a_run_nothing(tmp_path):
    with server(error_500) as (uri, _):
        pass
    training, ending = run_against(uri, tmp_path)
    assert training < 2
    assert ending < 3
    assert steps_in(tmp_path) == list(range(1, 21))
    with pytest.raises(ConfigError, match="MLflow did not take the record"):
        sync(tmp_path)


def test_a_store_that_is_none_is_told_in_one_line(tmp_path):
    with Tracker(tmp_path / "run", uri="none"):
        pass
    (tmp_path / "notes.db").write_text("no database" * 1000)
    with pytest.raises(ConfigError, match="not a database") as caught:
        sync(tmp_path / "run", f"sqlite:///{tmp_path}/notes.db")
    assert "\n" not in str(caught.value)


def test_a_full_disk_at_the_store_costs_a_run_nothing(tmp_path, caplog):
    with small_disk(tmp_path / "disk", 100) as disk:  # a store takes some 800 kB
        with Tracker(tmp_path / "run", out=disk) as tracker:
            record(tracker, 5)
        assert list(disk.iterdir()) == []
    assert steps_in(tmp_path / "run") == [1, 2, 3, 4, 5]
    assert "MLflow lacks the end of this run" in caplog.text


class Shaky:
    """A store that takes a call and fails to say so, or fails before taking it."""

    def __init__(self, real, fail_at, before):
        self.real, self.fail_at, self.before, self.calls = real, fail_at, before, 0

    def __getattr__(self, name):
        method = getattr(self.real, name)
        if name == "refused_for_good":
            return method

        def call(*arguments):
            self.calls += 1
            if self.calls == self.fail_at and self.before:
                raise ConnectionError
            result = method(*arguments)
            if self.calls == self.fail_at:
                raise ConnectionError
            return result

        return call


def test_whatever_call_fails_everything_arrives_once(out):
    from emoe_med.training.mlflow_store import MlflowStore

    uri = f"sqlite:///{out}/mlflow.db"
    experiments = set()
    for before in (True, False):
        for fail_at in range(1, 9):
            run_dir = out / f"run-{before}-{fail_at}"
            with Tracker(run_dir, uri="none", words={"cosine"}) as tracker:
                tracker.params({"training.schedule": "cosine"})
                record(tracker, 3)
                tracker.tags({"fold": 1})
                record(tracker, 2, start=4)
            outbox.settle_record(run_dir, uri, {})
            shaky = Shaky(MlflowStore(uri), fail_at, before)
            with pytest.raises(ConnectionError):
                outbox.send(shaky, run_dir)
            outbox.send(shaky, run_dir)
            run = run_of(out, run_dir)
            experiments.add(run.info.experiment_id)
            assert [step for step, _ in history(out, run_dir, "train/loss")] == [1, 2, 3, 4, 5]
            assert (run.data.params, run.info.status) == ({"training.schedule": "cosine"}, "FINISHED")
    (experiment,) = experiments
    assert len(client(out).search_runs([experiment])) == 17  # none made twice, and the store's own first


def test_what_mlflow_refuses_for_good_blocks_nothing(out, caplog):
    run_dir = out / "run"
    with Tracker(run_dir, uri="none") as tracker:
        tracker.note("params", values={"a" * 300: "1"})  # longer than MLflow's longest name
        record(tracker, 2)
    assert sync(run_dir, f"sqlite:///{out}/mlflow.db") == 5
    assert [step for step, _ in history(out, run_dir, "train/loss")] == [1, 2]
    assert "MLflow refuses a params event" in caplog.text


def test_without_mlflow_a_run_keeps_its_journal(tmp_path):
    code = "import sys; sys.modules['mlflow'] = None\n"
    code += "from pathlib import Path; from emoe_med.training.tracking import Tracker\n"
    code += "with Tracker(Path(sys.argv[1])) as tracker:\n"
    code += "    tracker.metrics(1, {'val/mae': 1.0}); tracker.flush()\n"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert steps_in(tmp_path) == [1]
    assert "mlflow is not installed" in (tmp_path / "local.log").read_text()


def test_importing_the_tracker_does_not_import_mlflow():
    code = "import sys, emoe_med.training.loop; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_environment_forbids_reports_retries_and_pickle(out):
    with Tracker(out / "run", out=out) as tracker:
        record(tracker, 1)
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "2"


def test_other_ranks_record_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with Tracker(tmp_path / "run", strict=True) as tracker:
        tracker.metrics(1, {"sub-01": 1.0})
        tracker.params({"sub-01": 1.0})
        tracker.flush()
        assert not tracker.begun
    assert not (tmp_path / "run").exists()


def test_tracking_json_has_no_address_of_this_machine(out):
    run_dir = out / "run"
    with Tracker(run_dir, out=out):
        pass
    text = (run_dir / "tracking.json").read_text()
    assert str(out) not in text
    assert json.loads(text)["uri"] == "sqlite:../mlflow.db"
    assert store.database(outbox.read_record(run_dir)["uri"]) == Path(out / "mlflow.db").resolve()
