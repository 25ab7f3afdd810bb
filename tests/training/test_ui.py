"""Where the pages of a folder of runs are."""

import json

from emoe_med.training.outbox import settle_record
from emoe_med.training.ui import map_links, run_links


def known_run(out, name, run_id, *files):
    run_dir = out / name
    run_dir.mkdir(parents=True)
    settle_record(run_dir, f"sqlite:///{out}/mlflow.db", {"experiment": "brainage", "run_name": "run"})
    record = json.loads((run_dir / "tracking.json").read_text())
    (run_dir / "tracking.json").write_text(json.dumps({**record, "experiment_id": "1", "run_id": run_id}))
    for file in files:
        (run_dir / file).parent.mkdir(exist_ok=True)
        (run_dir / file).write_text("")


def test_every_page_of_every_run_and_arm_is_linked(tmp_path):
    known_run(tmp_path, "emoe", "aa", "expert_maps/viewer.html")
    known_run(tmp_path, "emoe/seed0-fold0", "bb", "expert_maps/viewer.html", "report/report.html", "metrics.json")
    known_run(tmp_path, "digits/seed0", "cc", "metrics.json")
    known_run(tmp_path, "emoe/seed0-fold1", None, "metrics.json")  # MLflow never heard of it
    base, query = "http://127.0.0.1:5000/#/experiments/1/runs", "?workflowType=machine_learning"
    assert run_links(tmp_path, "http://127.0.0.1:5000") == {
        "digits/seed0 figures": f"{base}/cc/artifacts/metrics/metrics.json{query}",
        "emoe/seed0-fold0 expert maps": f"{base}/bb/artifacts/expert_maps/viewer.html{query}",
        "emoe/seed0-fold0 report": f"{base}/bb/artifacts/report/report.html{query}",
        "emoe expert maps": f"{base}/aa/artifacts/expert_maps/viewer.html{query}",
    }
    lines = list(map_links(tmp_path, [tmp_path / "emoe" / "seed0-fold0", tmp_path / "emoe" / "seed0-fold1"]))
    assert lines == [
        f"emoe/seed0-fold0 expert maps, while `ui` runs: {base}/bb/artifacts/expert_maps/viewer.html{query}",
        f"emoe expert maps, while `ui` runs: {base}/aa/artifacts/expert_maps/viewer.html{query}",
    ]
