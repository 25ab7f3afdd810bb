"""What a preprocessed volume says of itself in the JSON file beside it, and what a training set says as a whole."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emoe_med.data.scan import Scan

_MAX_BYTES = 1 << 20


def statement(image: Path) -> str:
    """Return what the sidecar of an image states of its preprocessing, as JSON; empty where there is none.

    Kept is `Steps`, which names tools and versions; without it `SkullStripped` and the programs in `GeneratedBy`, as
    BIDS derivatives have them. The rest of such a file may tell of the person.
    """
    name = image.name.removesuffix(".gz").removesuffix(".nii")
    file = image.with_name(f"{name}.json")
    try:
        content = json.loads(file.read_bytes()) if file.stat().st_size <= _MAX_BYTES else None
    except (OSError, ValueError, RecursionError):
        return ""
    if not isinstance(content, dict):
        return ""
    if "Steps" in content:
        return json.dumps(content["Steps"], sort_keys=True)
    kept = {key: content[key] for key in ("SkullStripped",) if key in content}
    programs = content.get("GeneratedBy")
    if isinstance(programs, list):
        kept["GeneratedBy"] = [
            {key: program.get(key) for key in ("Name", "Version")} for program in programs if isinstance(program, dict)
        ]
    return json.dumps(kept, sort_keys=True) if kept else ""


def strip_statement(scans: Sequence[Scan], mask: str) -> dict[str, Any]:
    """Return where the brain masks of a training set came from, and what its volumes state of their preprocessing.

    Args:
        scans: Training scans.
        mask: `ChainOptions.mask`.

    Returns:
        ``mask``: which columns of the manifest gave it, or that the whole head was used; ``stated``: each statement
        that occurs, with its number of scans.
    """
    used = {"head": {"none: whole head"}}.get(mask) or {"mask" if scan.mask else "labels" for scan in scans}
    return {"mask": sorted(used), "stated": dict(Counter(statement(scan.image) for scan in scans))}
