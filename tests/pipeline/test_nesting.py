"""The record of an arm lies below that of its pipeline, on whatever server; without one the runs have none."""

import json
import os

import pytest

from emoe_med.errors import ConfigError
from emoe_med.pipeline.plan import Places, plan, read_pipeline
from emoe_med.pipeline.pool import Pool
from emoe_med.pipeline.runner import run_pipeline

FILE = """
name: some
tracking: {pipeline}
set: ["tracking={arms}"]
runs: [{{config: configs/vision/digits_dense.yaml, set: ["training.epochs=1"]}}]
table: {{columns: [{{name: x, metric: test/top1}}]}}
"""


class Nothing(Pool):
    """Does no work: what is asked is who is told of it."""

    def run(self, works, on_end):
        pass


def nested(folder, monkeypatch, uri, pipeline, arms):
    """Return the addresses of the arm's record and of those that its runs would make."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    path = folder / "some.yaml"
    path.write_text(FILE.format(pipeline=pipeline, arms=arms))
    read = read_pipeline(path)
    jobs = plan(read, path)
    run_pipeline(read, jobs, folder / "out", Places(read, folder), Nothing(1, []), lambda tracker: None)
    record = json.loads((folder / "out" / jobs[0].arm.folder / "tracking.json").read_text())
    return record["uri"], os.environ["MLFLOW_TRACKING_URI"]


def test_another_machine_is_reached_where_both_allow_it(tmp_path, monkeypatch):
    remote = "https://nobody.invalid:5000"
    assert nested(tmp_path, monkeypatch, remote, "{allow_remote: true}", "{allow_remote: true}") == (remote, remote)
    with pytest.raises(ConfigError, match="TRACK-URI"):
        nested(tmp_path, monkeypatch, remote, "{allow_remote: true}", "{allow_remote: false}")


def test_a_pipeline_without_a_record_has_runs_without_one(tmp_path, monkeypatch):
    assert nested(tmp_path, monkeypatch, "", "{mlflow: false}", "{mlflow: true}") == ("none", "none")
