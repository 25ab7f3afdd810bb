"""One self-contained page on which a person walks through expert maps, made from their folder alone.

Three linked slices, the head from outside and the parcel table, drawn on plain canvases by the scripts in
`viewer_page/`. niivue and nilearn's viewer were weighed: niivue asks for WebGL 2, which a browser without a graphics
card gives no longer by default (remote desktops, virtual machines), and for 2.3 MB of compressed scripts in this
repository; nilearn's page shows one map, not eight to be compared, and knows neither table nor verdict.

Nothing is loaded from elsewhere, and the page forbids its browser to. Maps are shown as they are, one colour per
routing cell; smoothing is a switch of the display alone. No person, path or single head is on the page.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from emoe_med.brainage.viewer_data import page_data
from emoe_med.brainage.viewer_text import checks_html, facts_html, verdict_html
from emoe_med.errors import DataError, Fault
from emoe_med.storage import replace_file
from emoe_med.training.allow_list import MIN_PERSONS

SCRIPTS = ("volume.js", "slices.js", "head.js", "table.js", "main.js")


def write_viewer(folder: Path) -> Path:
    """Write `viewer.html` into a folder that `maps` wrote, and return its path.

    Raises:
        DataError: A file of the folder is missing (MAPS-FILE), or the maps are of fewer than 20 persons, whose
            heads could be recognised (MAPS-FEW).
        VolumeError: A map is damaged.
    """
    index = read_index(folder)
    persons = persons_behind(index)
    if persons < MIN_PERSONS:
        reason = f"maps of {persons:g} persons; a group has {MIN_PERSONS} or more"
        raise DataError(Fault("MAPS-FEW", reason, file=str(folder / "maps.json"), hint="give more scans"))
    stability, sanity = (_read_json(folder / name) for name in ("stability.json", "sanity.json"))
    data = json.dumps(page_data(folder, index), separators=(",", ":"), allow_nan=False)
    sources = files("emoe_med.brainage") / "viewer_page"
    parts = {
        "style": (sources / "style.css").read_text("utf-8"),
        "facts": facts_html(index),
        "verdict": verdict_html(stability),
        "checks": checks_html(sanity["checks"]),
        "data": data.replace("<", "\\u003c"),  # no text of the data can end the script that holds it
        "script": "\n".join((sources / name).read_text("utf-8") for name in SCRIPTS),
    }
    html = (sources / "page.html").read_text("utf-8")
    for name, text in parts.items():
        html = html.replace(f"[[{name}]]", text, 1)
    path = folder / "viewer.html"
    replace_file(path, html.encode("utf-8"))
    return path


def read_index(folder: Path) -> dict[str, Any]:
    """Read maps.json, the list of what is in the folder.

    Raises:
        DataError: There is none, or files that it names are missing (MAPS-FILE).
    """
    index = _read_json(folder / "maps.json")
    atlas = index["atlas"] or {}
    named = [index["background"], *(atlas[key] for key in ("file", "table") if atlas)]
    named += [entry["file"] for entry in index["maps"]]
    missing = [_missing(folder / name) for name in named if not (folder / name).is_file()]
    if missing:
        raise DataError(*missing)
    return index


def persons_behind(index: Mapping[str, Any]) -> float:
    """Return the smallest number of persons that a map is the mean of; infinite for drawn heads, who are nobody."""
    if index["synthetic"]:
        return float("inf")
    counts = (index["subjects"], index.get("subjects_contribution"), index.get("subjects_occlusion"))
    return min(count for count in counts if count)


def _missing(path: Path) -> Fault:
    return Fault("MAPS-FILE", "is missing", file=str(path), hint="make the maps again")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(_missing(path))
    return json.loads(path.read_text("utf-8"))
