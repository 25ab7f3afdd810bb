"""Check a manifest and every file it names, and tell all faults of all rows at once.

What is written names rows, never persons or paths: the reader joins them with the manifest. ``scans.html`` shows
heads, though, and stays with the person who asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from emoe_med.brainage.check_page import scans_page, thumbnail
from emoe_med.data.flirt import given_matrix
from emoe_med.data.limits import DEFAULT_LIMITS, VolumeLimits
from emoe_med.data.manifest import Manifest, Scan, inspect_manifest
from emoe_med.data.splits import persons, split_faults
from emoe_med.data.volume import Volume, file_digest, read_volume, voxel_digest
from emoe_med.errors import DataError, Fault, StorageError, VolumeError
from emoe_med.storage import replace_file

COLUMNS = ("row", "status", "code", "reason", "shape", "spacing_mm", "file_sha256", "voxel_sha256")
_GRID_TOLERANCE_MM = 0.1
_DRAWN = 1000  # scans, from the first, with a thumbnail, beside every faulty one: a page holds no more
_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Manifest check</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; margin: 1rem 0 }}
th, td {{ border-bottom: 1px solid #ddd; padding: .3rem .9rem .3rem 0; text-align: left; vertical-align: top }}
</style>
<h1>{verdict}</h1>
{summary}
<h2>Rows to look at</h2>
<p>A row is a line of the manifest, its header being line 1.</p>
{rows}
</html>
"""


@dataclass(frozen=True)
class Check:
    """What a look at every row found.

    Attributes:
        table: Text columns ``COLUMNS``, status being ok, note or refused; one line per row, and one with an
            empty row for faults of the whole table.
        faults: All faults in order of rows, with the file names that ``table`` leaves out.
        duplicates: Groups of rows that hold the same voxels.
        manifest: None where the file is no table.
        thumbnails: JPEG of three slices, by row as text.
        figures: What a run's contract was held against, by row as text.
    """

    table: pd.DataFrame
    faults: tuple[Fault, ...]
    duplicates: tuple[tuple[int, ...], ...]
    manifest: Manifest | None
    thumbnails: Mapping[str, bytes] = field(default_factory=dict)
    figures: Mapping[str, str] = field(default_factory=dict)

    def accepted(self) -> Manifest:
        """Return the manifest, if nothing was refused.

        Raises:
            DataError: All faults.
        """
        if self.faults or self.manifest is None:
            raise DataError(*self.faults)
        return self.manifest

    def write(self, folder: Path) -> None:
        """Write ``check.csv`` and ``check.html``, one self-contained page.

        Raises:
            StorageError: The folder cannot be written to.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = f"cannot be made: {error.strerror}"
            raise StorageError(Fault("OUT-FOLDER", reason, file=str(folder))) from error
        replace_file(folder / "check.csv", self.table.to_csv(index=False, lineterminator="\n").encode())
        replace_file(folder / "check.html", _page(self.table).encode())

    def write_scans(self, folder: Path) -> None:
        """Write ``scans.html`` into the folder of `write`: thumbnails for the person who asked."""
        replace_file(folder / "scans.html", scans_page(self.table, self.thumbnails, self.figures).encode())


@dataclass(frozen=True)
class _Look:
    """What the files of one row are."""

    row: int
    faults: tuple[Fault, ...] = ()
    notes: tuple[str, ...] = ()
    shape: str = ""
    spacing_mm: str = ""
    file_sha256: str = ""
    voxel_sha256: str = ""
    thumbnail: bytes | None = None


def check_manifest(
    manifest: Path,
    data_root: Path | None = None,
    out: Path | None = None,
    jobs: int = 0,
    progress: Callable[[Collection], Iterator] = iter,
    judge: Callable[[Check], Check] | None = None,
) -> pd.DataFrame:
    """Check a manifest and its files, write the findings, and refuse it with all faults at once.

    Args:
        manifest: CSV or TSV file.
        data_root: Folder of relative paths, as in `read_manifest`.
        out: Folder for the table and the pages; written before anything is refused.
        jobs: Volumes read at once, in threads: inflating and hashing release Python's lock.
        progress: Wraps the scans to show how far it is.
        judge: Holds scans against the contract of a run (`judge.judge_by`).

    Returns:
        Columns `COLUMNS`, one line per row.

    Raises:
        DataError: All faults of all rows.
        StorageError: ``out`` cannot be written to.
    """
    check = look_through(manifest, data_root, jobs=jobs, progress=progress)
    check = check if judge is None else judge(check)
    if out is not None:
        check.write(out)
        check.write_scans(out)
    check.accepted()
    return check.table


def look_through(
    manifest: Path,
    data_root: Path | None = None,
    *,
    require_age: bool = True,
    jobs: int = 0,
    progress: Callable[[Collection], Iterator] = iter,
    limits: VolumeLimits = DEFAULT_LIMITS,
) -> Check:
    """Read the table and every image, mask and label file, and collect all faults without refusing.

    Arguments as in `check_manifest` and `read_manifest`; ``limits`` say what a volume may be.
    """
    try:
        listed, faults = inspect_manifest(manifest, data_root, require_age)
    except DataError as error:
        return Check(_tabulate([], error.faults), tuple(error.faults), (), None)
    with ThreadPoolExecutor(max(jobs, 1)) as pool:
        try:
            pending = [pool.submit(_look_at, scan, limits, i < _DRAWN) for i, scan in enumerate(listed.scans)]
            looks = [look.result() for look in (progress(pending) if pending else ())]
        finally:
            pool.shutdown(cancel_futures=True)  # an interrupt does not wait for all the other scans
    duplicates = _same_voxels(looks)
    found = [*(fault for look in looks for fault in look.faults), *_duplicate_faults(duplicates, faults)]
    found += _divided_persons(listed.scans, duplicates)
    faults = (*faults, *(replace(fault, manifest=manifest.name) for fault in found))
    faults = tuple(sorted(faults, key=lambda fault: fault.row or 0))
    thumbnails = {str(look.row): look.thumbnail for look in looks if look.thumbnail}
    return Check(_tabulate(looks, faults), faults, duplicates, listed, thumbnails)


def _look_at(scan: Scan, limits: VolumeLimits, draw: bool) -> _Look:
    """Read the files of one row; whatever is wrong with them is part of the look."""
    faults: list[Fault] = []
    look = _Look(scan.row)
    volume, mask = None, None
    with _collected(faults):
        volume = read_volume(scan.image, limits)
        look = _describe(scan.row, volume, file_digest(scan.image))
        if scan.sha256 not in (None, look.file_sha256):
            faults.append(Fault("VOL-DIGEST", "sha256 differs from the manifest's", file=str(scan.image)))
    for column, path in (("mask", scan.mask), ("labels", scan.labels)):
        if path is not None:
            with _collected(faults, f"{column}: "):
                other = read_volume(path, limits)
                reasons = _misfits(column, other, volume or other)
                faults += (Fault(code, f"{column}: {reason}", file=str(path)) for code, reason in reasons)
                mask = other.voxels > 0 if mask is None else mask
    if scan.transform is not None:
        with _collected(faults, "transform: "):
            given_matrix(scan.transform, scan.image)
    if volume is not None and (draw or faults):
        on_grid = mask if mask is not None and mask.shape == volume.voxels.shape else None
        look = replace(look, thumbnail=thumbnail(volume, on_grid))
    return replace(look, faults=tuple(replace(fault, row=scan.row) for fault in faults))


@contextmanager
def _collected(faults: list[Fault], prefix: str = "") -> Generator[None]:
    try:
        yield
    except VolumeError as error:
        faults += (replace(fault, reason=f"{prefix}{fault.reason}") for fault in error.faults)


def _describe(row: int, volume: Volume, file_sha256: str) -> _Look:
    return _Look(
        row=row,
        notes=volume.notes,
        shape="x".join(map(str, volume.voxels.shape)),
        spacing_mm="x".join(f"{size:.3g}" for size in np.linalg.norm(volume.affine[:3, :3], axis=0)),
        file_sha256=file_sha256,
        voxel_sha256=voxel_digest(volume),
    )


def _misfits(column: str, other: Volume, volume: Volume) -> Iterator[tuple[str, str]]:
    """Say why a mask or label volume cannot belong to an image."""
    if other.voxels.shape != volume.voxels.shape:
        yield "VOL-GRID", f"size {other.voxels.shape} is not that of the image, {volume.voxels.shape}"
    else:
        corners = np.array(list(product(*((0, size - 1) for size in volume.voxels.shape), (1,))))
        distance_mm = np.linalg.norm(corners @ (other.affine - volume.affine).T, axis=1).max()
        if distance_mm > _GRID_TOLERANCE_MM:
            yield "VOL-GRID", f"lies {distance_mm:.3g} mm off the image"
    if column == "labels" and not np.array_equal(other.voxels, np.rint(other.voxels)):
        yield "VOL-LABELS", "values are not whole numbers"


def _same_voxels(looks: Sequence[_Look]) -> tuple[tuple[int, ...], ...]:
    rows: dict[str, list[int]] = {}
    for look in looks:
        if look.voxel_sha256:
            rows.setdefault(look.voxel_sha256, []).append(look.row)
    return tuple(tuple(group) for group in rows.values() if len(group) > 1)


def _duplicate_faults(duplicates: Iterable[Sequence[int]], known: Iterable[Fault]) -> Iterator[Fault]:
    """Refuse an image under a second name, unless the table alone already told."""
    told = {fault.row for fault in known if fault.code == "MAN-IMAGE"}
    for first, *others in duplicates:
        for row in others:
            if row not in told:
                yield Fault("MAN-IMAGE", f"same voxels as row {first}", row=row)


def _divided_persons(scans: Sequence[Scan], duplicates: Iterable[Sequence[int]]) -> list[Fault]:
    placed = [scan for scan in scans if scan.split]
    return split_faults(placed, persons(placed, duplicates)) if placed else []


def _tabulate(looks: Iterable[_Look], faults: Iterable[Fault]) -> pd.DataFrame:
    """Make one line per row; hints and file names stay out, as they may name a person."""
    faults_of: dict[int | None, list[Fault]] = {}
    for fault in faults:
        faults_of.setdefault(fault.row, []).append(fault)
    look_of = {look.row: look for look in looks}
    lines = []
    for row in sorted({*look_of, *faults_of}, key=lambda row: row or 0):
        look, found = look_of.get(row, _Look(row or 0)), faults_of.get(row, [])
        lines.append(
            {
                "row": "" if row is None else str(row),
                "status": "refused" if found else "note" if look.notes else "ok",
                "code": " ".join(fault.code for fault in found),
                "reason": "; ".join((*(fault.reason for fault in found), *look.notes)),
                "shape": look.shape,
                "spacing_mm": look.spacing_mm,
                "file_sha256": look.file_sha256,
                "voxel_sha256": look.voxel_sha256,
            }
        )
    return pd.DataFrame(lines, columns=COLUMNS, dtype=str)


def _page(table: pd.DataFrame) -> str:
    """Lay the table out as one HTML page: counts, then every row that is not simply fine."""
    shown = table.loc[table["status"] != "ok", ["row", "status", "code", "reason", "shape", "spacing_mm"]]
    codes = Counter(code for cell in table["code"] for code in cell.split())
    seen = table[table["shape"] != ""]
    grids = Counter(seen["shape"] + " voxels of " + seen["spacing_mm"] + " mm")
    counts = {**table["status"].value_counts(), **codes, **dict(grids.most_common(10))}
    summary = pd.DataFrame({"what": list(counts), "rows": list(counts.values())})
    with pd.option_context("display.max_colwidth", None):
        return _PAGE.format(
            verdict="Refused" if codes else "Accepted",
            summary=summary.to_html(index=False, border=0),
            rows=shown.to_html(index=False, border=0) if len(shown) else "<p>Every row is fine.</p>",
        )
