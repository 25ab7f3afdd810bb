"""What of a folder of maps reaches MLflow."""

import gzip
import json
from pathlib import Path

import pytest
from map_folder import write_map_folder

from emoe_med.brainage.map_record import publish_maps
from emoe_med.errors import DataError
from emoe_med.training.outbox import read_record
from emoe_med.training.tracking import Tracker

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")
CONFIG = Path(__file__).parents[2] / "configs" / "brainage" / "emoe_4mm.yaml"
CANARY = "canary-of-ward-7"


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """An arm with one run, below a folder whose name must not leave."""
    out = tmp_path_factory.mktemp(CANARY) / "runs"
    run_dir = out / "emoe_4mm" / "seed0-fold0"
    with (
        Tracker(run_dir.parent, out=out, experiment="brainage"),
        Tracker(run_dir, out=out, experiment="brainage", parent=run_dir.parent) as tracker,
    ):
        tracker.metrics(40, {"val/mae": 6.0})
    (run_dir / "config.yaml").write_text(CONFIG.read_text())
    return out


def artifacts(out, run_dir):
    root = out / "mlartifacts" / read_record(run_dir)["artifact_uri"].removeprefix("mlflow-artifacts:/")
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def metrics_of(out, run_dir):
    from mlflow.tracking import MlflowClient

    return MlflowClient(f"sqlite:///{out}/mlflow.db").get_run(read_record(run_dir)["run_id"]).data.metrics


def test_maps_of_a_run_and_of_its_arm_go_to_their_own_record(out):
    run_dir = out / "emoe_4mm" / "seed0-fold0"
    write_map_folder(run_dir / "expert_maps", verdict="not tested: needs runs of other seeds and folds")
    link = publish_maps(run_dir / "expert_maps")
    page = "artifacts/expert_maps/viewer.html?workflowType=machine_learning"
    assert link.endswith(f"/runs/{read_record(run_dir)['run_id']}/{page}")
    write_map_folder(run_dir.parent / "expert_maps")
    assert read_record(run_dir.parent)["run_id"] in publish_maps(run_dir.parent / "expert_maps")
    for owner in (run_dir, run_dir.parent):
        found, folder = artifacts(out, owner), owner / "expert_maps"
        assert {name.removeprefix("expert_maps/") for name in found} == {path.name for path in folder.iterdir()}
        assert found["expert_maps/viewer.html"] == (folder / "viewer.html").read_bytes()
        for name, content in found.items():
            text = gzip.decompress(content) if name.endswith(".gz") else content
            assert CANARY.encode() not in text, name
    checks = {"map/shift": 0.97, "map/position_only": 0.8, "map/experts_alive": 8}
    assert metrics_of(out, run_dir) == {"val/mae": 6.0, **checks}
    assert metrics_of(out, run_dir.parent)["map/matched_r"] == 0.81


def test_maps_of_few_persons_are_neither_shown_nor_sent(out):
    run_dir = out / "emoe_4mm" / "seed0-fold1"
    with Tracker(run_dir, out=out, experiment="brainage", parent=run_dir.parent):
        pass
    (run_dir / "config.yaml").write_text(CONFIG.read_text())
    folder = write_map_folder(run_dir / "expert_maps", subjects=19)
    with pytest.raises(DataError, match="MAPS-FEW"):
        publish_maps(folder)
    assert not (folder / "viewer.html").exists()
    assert artifacts(out, run_dir) == {}
    assert "artifact" not in {json.loads(line)["kind"] for line in (run_dir / "journal.jsonl").read_text().splitlines()}
