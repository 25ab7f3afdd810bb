"""Expert maps where people look: the page beside them, and all of it in the record of their run or arm."""

from __future__ import annotations

import json
from pathlib import Path

from emoe_med.brainage.viewer import persons_behind, read_index, write_viewer
from emoe_med.config import load_run
from emoe_med.training.allow_list import MAPS
from emoe_med.training.arm import tracked
from emoe_med.training.tracking import Tracker


def publish_maps(folder: Path) -> str | None:
    """Write the page of a folder of maps, record both in the run or arm that it lies in, and return their address.

    Args:
        folder: `expert_maps` of a run, or of an arm, the parent of its runs.

    Returns:
        Address of the page in MLflow while `ui` runs; None where MLflow does not know the run.
    """
    owner = folder.parent
    is_run = (owner / "config.yaml").is_file()
    arm = owner.parent if is_run else owner
    config = load_run(owner / "config.yaml" if is_run else next(iter(sorted(arm.glob("seed*/config.yaml")))))
    page = write_viewer(folder)
    with tracked(owner, arm.parent, config, "brainage", owner.name, arm if is_run else None) as tracker:
        record_maps(tracker, folder)
    return tracker.deep_link(f"{MAPS}/{page.name}")


def record_maps(tracker: Tracker, folder: Path) -> None:
    """Record every file of a folder of maps, and the figures that tell whether they mean anything.

    Maps of fewer than 20 persons, and files by any other name than those of maps, are refused by the allow-list.

    Args:
        tracker: Of the run or arm that the folder lies in.
        folder: Written by `maps`.
    """
    persons = persons_behind(read_index(folder))
    for path in sorted(folder.iterdir()):
        if path.is_file():
            tracker.log_artifact(path, MAPS, persons)
    stability, sanity = (json.loads((folder / f"{name}.json").read_text("utf-8")) for name in ("stability", "sanity"))
    figures = {f"map/{name}": found["value"] for name in ("matched_r", "dice") if (found := stability.get(name))}
    figures |= {f"map/{check['name']}": check["value"] for check in sanity["checks"] if check["value"] is not None}
    tracker.results(figures)
