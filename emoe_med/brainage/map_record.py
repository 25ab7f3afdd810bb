"""Expert maps in the record of a run: every file for download, and the figures that tell whether they mean anything."""

from __future__ import annotations

import json
from pathlib import Path

from emoe_med.brainage.viewer import persons_behind, read_index
from emoe_med.training.allow_list import MAPS
from emoe_med.training.tracking import Tracker


def record_maps(tracker: Tracker, folder: Path, step: int) -> None:
    """Record a folder of expert maps; maps of fewer than 20 persons, and files of any other name, are refused.

    Args:
        tracker: Of the run or arm that the folder lies in.
        folder: Written by `maps`.
        step: That its figures are recorded under.
    """
    persons = persons_behind(read_index(folder))
    for path in sorted(folder.iterdir()):
        if path.is_file():
            tracker.log_artifact(path, MAPS, persons)
    stability, sanity = (json.loads((folder / f"{name}.json").read_text("utf-8")) for name in ("stability", "sanity"))
    figures = {f"map/{name}": found["value"] for name in ("matched_r", "dice") if (found := stability[name])}
    figures |= {f"map/{check['name']}": check["value"] for check in sanity["checks"] if check["value"] is not None}
    tracker.metrics(step, figures)
