"""Scans for a model of preprocessed volumes: raw ones go through the very steps of its training scans first.

So a raw head and the volume that `preprocess` made of it give the network the same voxels.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from emoe_med.brainage.preprocess import Outcome, each, process
from emoe_med.brainage.preprocess_files import Outputs
from emoe_med.data.cache import FileDigests
from emoe_med.data.prepare import Preparation, lacking_extra, missing_extra, require_extra
from emoe_med.data.scan import Scan
from emoe_med.data.sidecar import prepared_before, vouching
from emoe_med.errors import Fault, VolumeError
from emoe_med.training.progress import counted

LOG = logging.getLogger("emoe_med")


def prepared_like(
    contract: Mapping[str, Any], scans: Sequence[Scan], cache_dir: Path, jobs: int = 0
) -> tuple[list[Scan], list[Fault]]:
    """Put the preprocessed volume, made in the cache, in the place of every raw scan.

    What `preprocess` wrote is left as it is, by whatever steps: the contract tells them apart. A head that was
    stripped before, by another tool, or a volume that was altered since cannot go the full path: it goes the light
    one, which mends orientation, spacing and scale, and the contract flags it.

    Args:
        contract: Of the model; where its training scans were not preprocessed, nothing is done.
        scans: To predict.
        cache_dir: Keeps the volumes, under the digests of what they were made from.
        jobs: Processes side by side.

    Returns:
        The scans that can be used, in their order, and the faults of the others, each with its row.

    Raises:
        ConfigError: PREP-EXTRA, packages of the full path are missing, and no scan can do without.
    """
    steps = contract.get("strip", {}).get("prepared")
    if steps is None:
        return list(scans), []
    cache_dir.mkdir(parents=True, exist_ok=True)
    digests = FileDigests(cache_dir / "file-digests.txt")
    raw = {scan.row: scan for scan in scans if vouching(scan.image, scan.mask or scan.labels, digests.of) is None}
    if not raw:
        return list(scans), []
    LOG.warning("note: scans that are preprocessed first, as the training scans of this model were: %d", len(raw))
    usual = Preparation.of(steps)
    full = usual.path == "full"
    stripped = {row: scan for row, scan in raw.items() if full and prepared_before(scan.image)}
    whole = {row: scan for row, scan in raw.items() if row not in stripped}
    made: dict[int, tuple[Outcome, Scan]] = {}
    if full and whole and missing_extra():
        if len(whole) == len(scans):
            require_extra()
        made |= {row: (Outcome(row, (lacking_extra(str(scan.image), row),)), scan) for row, scan in whole.items()}
    elif whole:
        made |= _prepare(whole, usual, cache_dir, digests, jobs)
    stripped |= {row: raw[row] for row, (outcome, _) in made.items() if outcome.broke("VOL-STRIPPED")}
    if stripped:
        LOG.warning("note: of these stripped before, which go without strip and bias field: %d", len(stripped))
        own = {row: replace(scan, mask=scan.mask or scan.labels or scan.image) for row, scan in stripped.items()}
        made |= _prepare(own, replace(usual, path="light"), cache_dir, digests, jobs)
    usable = [scan for scan in scans if scan.row not in made or not made[scan.row][0].faults]
    kept = [made[scan.row][1] if scan.row in made else scan for scan in usable]
    return kept, [fault for outcome, _ in made.values() for fault in outcome.faults]


def _prepare(
    scans: Mapping[int, Scan], preparation: Preparation, cache_dir: Path, digests: FileDigests, jobs: int
) -> dict[int, tuple[Outcome, Scan]]:
    """Preprocess scans into the cache; what became of each row, and the scan as it then is."""
    out = cache_dir / f"prepared-{preparation.digest()}"
    names = {row: _name(scan, digests) for row, scan in scans.items()}
    work = partial(process, out=out, preparation=preparation)
    tasks = [(scan, names[row]) for row, scan in scans.items()]

    def volume(scan: Scan) -> Scan:
        files = Outputs(names[scan.row], preparation.spacing_mm)
        return replace(scan, image=out / files.image, mask=out / files.mask, labels=None, transform=None, sha256=None)

    found = each(work, tasks, jobs, counted("preprocessing scans"))
    return {outcome.row: (outcome, volume(scans[outcome.row])) for outcome in found}


def _name(scan: Scan, digests: FileDigests) -> str:
    """Name a scan by the content of its files: nobody's name, and one volume for one head."""
    try:
        content = "".join(digests.of(file) for file in (scan.image, scan.mask or scan.labels) if file)
    except VolumeError:  # preprocessing will tell
        content = str(scan.row)
    name = hashlib.sha256(content.encode()).hexdigest()[:32]
    return f"{name[:2]}/{name}"
