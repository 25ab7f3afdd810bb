"""What a preprocessed volume says of itself in the JSON file beside it, and what a training set says as a whole."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emoe_med.data.scan import Scan
from emoe_med.errors import VolumeError

_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Sidecar:
    """What `preprocess` wrote beside a volume.

    Attributes:
        file: The sidecar.
        steps: Tools, versions and settings, alike for all volumes of one chain.
        matrix: Template RAS mm -> scanner RAS mm [4, 4], which the volume has already gone through.
        figures: For quality control.
        outputs: SHA-256 of each file that it vouches for.
    """

    file: Path
    steps: dict[str, Any]
    matrix: np.ndarray
    figures: dict[str, float]
    outputs: dict[str, str]

    @classmethod
    def read(cls, file: Path) -> Sidecar | None:
        """Read a sidecar; None where it is none of `preprocess`, or its steps were altered."""
        content = _content(file)
        try:
            steps, matrix = content["Steps"], np.array(content["Matrix"], np.float64)
            figures = {name: float(value) for name, value in content["QualityControl"].items()}
            if matrix.shape == (4, 4) and content["ChainHash"] == steps_digest(steps):
                return cls(file, steps, matrix, figures, dict(content["OutputSha256"]))
        except (KeyError, TypeError, ValueError, AttributeError):
            pass
        return None

    def statement(self) -> str:
        """Return the steps as one line of JSON."""
        return json.dumps(self.steps, sort_keys=True)


def vouching(image: Path, mask: Path | None, digest: Callable[[Path], str]) -> Sidecar | None:
    """Return the sidecar of a volume that is, with its brain mask, byte for byte as `preprocess` wrote it."""
    sidecar = Sidecar.read(_beside(image)) if mask is not None else None
    if sidecar is None or mask is None:
        return None
    try:
        whole = (digest(image), digest(mask)) == (sidecar.outputs.get("image"), sidecar.outputs.get("mask"))
    except VolumeError:  # not there
        return None
    return sidecar if whole else None


def prepared_before(image: Path) -> bool:
    """Tell whether `preprocess` wrote a sidecar for a volume of this name, be the volume as it was or altered since."""
    return Sidecar.read(_beside(image)) is not None


def steps_digest(steps: Mapping[str, Any]) -> str:
    """Return the hash that names a chain of steps."""
    return hashlib.sha256(json.dumps(steps, sort_keys=True).encode()).hexdigest()[:16]


def statement(image: Path) -> str:
    """Return what the sidecar of another tool states of an image, as JSON; empty where there is none.

    Kept are `SkullStripped` and the programs in `GeneratedBy`, as BIDS derivatives have them. The rest of such a file
    may tell of the person.
    """
    content = _content(_beside(image))
    kept = {key: content[key] for key in ("SkullStripped",) if key in content}
    programs = content.get("GeneratedBy")
    if isinstance(programs, list):
        kept["GeneratedBy"] = [
            {key: program.get(key) for key in ("Name", "Version")} for program in programs if isinstance(program, dict)
        ]
    return json.dumps(kept, sort_keys=True) if kept else ""


def strip_statement(scans: Sequence[Scan], stated: Sequence[str], mask: str) -> dict[str, Any]:
    """Return where the brain masks of a training set came from, and what its volumes state of their preprocessing.

    Args:
        scans: Training scans.
        stated: What each of them states.
        mask: `ChainOptions.mask`.

    Returns:
        ``mask``: which columns of the manifest gave it, or that the whole head was used; ``stated``: each statement
        that occurs, with its number of scans.
    """
    used = {"head": {"none: whole head"}}.get(mask) or {"mask" if scan.mask else "labels" for scan in scans}
    return {"mask": sorted(used), "stated": dict(Counter(stated))}


def other_steps(stated: str, training: Sequence[str]) -> str:
    """Tell in which steps a scan differs from what the training scans state; empty where it does not."""
    if stated in training:
        return ""
    if not stated:
        return "states none, unlike the training scans"
    own, usual = (json.loads(text) if text else {} for text in (stated, training[0]))
    if "Path" not in own or "Path" not in usual:
        return "states other steps than the training scans"
    names = [name for name in sorted({*own, *usual}) if own.get(name) != usual.get(name)]
    return ", ".join(f"{name} is {own.get(name)}, in training {usual.get(name)}" for name in names)


def _beside(image: Path) -> Path:
    return image.with_name(f"{image.name.removesuffix('.gz').removesuffix('.nii')}.json")


def _content(file: Path) -> dict[str, Any]:
    """Return what a sidecar holds; nothing where it cannot be read."""
    try:
        content = json.loads(file.read_bytes()) if file.stat().st_size <= _MAX_BYTES else None
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
