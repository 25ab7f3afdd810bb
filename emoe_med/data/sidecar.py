"""What a preprocessed volume says of itself in the JSON file beside it, and what a training set says as a whole."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emoe_med.data.scan import Scan

_MAX_BYTES = 1 << 20
# BIDS: SkullStripped and GeneratedBy stand beside derivatives; the rest of such a file may tell of the person
_KEPT = ("SkullStripped", "GeneratedBy", "Steps")


def statement(image: Path) -> dict[str, Any]:
    """Return what the sidecar of an image states of its preprocessing; empty where there is none."""
    name = image.name.removesuffix(".gz").removesuffix(".nii")
    file = image.with_name(f"{name}.json")
    try:
        if file.stat().st_size > _MAX_BYTES:
            return {}
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return {key: content[key] for key in _KEPT if key in content} if isinstance(content, dict) else {}


def strip_statement(scans: Sequence[Scan], mask: str) -> dict[str, Any]:
    """Return where the brain masks of a training set came from, and what its volumes state of their preprocessing.

    Args:
        scans: Training scans.
        mask: `ChainOptions.mask`.

    Returns:
        ``mask``: which columns of the manifest gave it, or that the whole head was used; ``stated``: each statement
        that occurs, as text, with its number of scans. Nothing else of a sidecar is kept.
    """
    used = {"head": {"none: whole head"}}.get(mask) or {"mask" if scan.mask else "labels" for scan in scans}
    stated: dict[str, int] = {}
    for scan in scans:
        text = json.dumps(statement(scan.image), sort_keys=True)
        stated[text] = stated.get(text, 0) + 1
    return {"mask": sorted(used), "stated": stated}
