"""From raw heads to the model's space: every row in has a row out, and one bad scan never stops the others."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import pandas as pd

from emoe_med.brainage.preprocess_files import Outputs, description, finished, input_digests, stems, write_outputs
from emoe_med.brainage.preprocess_page import page
from emoe_med.data.brain import ChainOptions
from emoe_med.data.cache import misfit
from emoe_med.data.manifest import inspect_manifest
from emoe_med.data.prepare import INSTALL, Preparation, missing_extra, odd, prepare_head, require_extra
from emoe_med.data.scan import KNOWN, Scan
from emoe_med.data.table import Refusals, read_table, records
from emoe_med.data.tree import scans_in
from emoe_med.errors import ConfigError, DataError, Fault, StorageError, VolumeError
from emoe_med.storage import replace_file
from emoe_med.training.parent import end_with_parent
from emoe_med.training.run_folder import claim

FIGURES = (
    "brain_ml",
    "similarity",
    "scale_x",
    "scale_y",
    "scale_z",
    "cut_share",
    "clipped_share",
    "field_range",
    "snr",
)
# columns that the new manifest tells anew, or cannot
_REPLACED = {"image", "mask", "labels", "sha256", "transform"}


@dataclass(frozen=True)
class Outcome:
    """What became of one row: its files, or why there are none."""

    row: int
    faults: tuple[Fault, ...] = ()
    figures: Mapping[str, float] = field(default_factory=dict)
    volume: str = ""  # SHA-256 of what was written
    twin: int | None = None  # row above that gave the very same volume

    def broke(self, code: str) -> bool:
        """Tell whether a fault of this code is the reason."""
        return any(fault.code == code for fault in self.faults)

    @property
    def status(self) -> str:
        """`ok`, `check` where a person should look, or `failed`."""
        if self.faults:
            return "failed"
        return "check" if self.reason else "ok"

    @property
    def reason(self) -> str:
        """Why a scan failed or should be looked at."""
        if self.faults:
            return "; ".join(fault.in_table for fault in self.faults)
        twin = "" if self.twin is None else f"the same image as row {self.twin}"
        return "; ".join(filter(None, (twin, odd(self.figures))))


@dataclass(frozen=True)
class Source:
    """The rows to work on: cells of the manifest by line, scans that can be opened, faults of the others."""

    columns: tuple[str, ...]
    cells: Mapping[int, Mapping[str, str]]
    scans: Mapping[int, Scan]
    faults: Mapping[int, tuple[Fault, ...]]


def preprocess(
    source: Path,
    out: Path,
    *,
    spacing_mm: float = 1.0,
    path: Literal["auto", "full", "light"] = "auto",
    data_root: Path | None = None,
    jobs: int = 0,
    progress: Callable[[Collection], Iterator] = iter,
) -> list[Outcome]:
    """Take every scan of a manifest or folder to the model's space.

    Args:
        source: Manifest, or folder as `scans_in` recognises it.
        out: Folder of the results: files as BIDS derivatives, `manifest.csv`, `qc.tsv`, `qc.html`.
        spacing_mm: Voxel edge of the results.
        path: `auto` takes the full path where its packages are installed, else the light one.
        data_root: Folder of the manifest's relative paths.
        jobs: Processes side by side; 0 works in this one. The results are the same.
        progress: Wraps the scans to show how far it is.

    Returns:
        One outcome per row, in order. What was finished before, from the same input by the same chain, is kept.

    Raises:
        ConfigError: Packages of the full path are missing; results would lie among the heads (PREP-OUT); another
            process works on the folder.
        DataError: There is no table or no scan; no mask for the light path.
        StorageError: The folder cannot be written to.
    """
    rows = _read_source(source, data_root, out)
    preparation = Preparation(spacing_mm, _settle(path, rows))
    names = dict(zip(rows.scans, stems(rows.scans.values()), strict=True))
    with claim(out):
        replace_file(out / "dataset_description.json", description())
        work = partial(process, out=out, preparation=preparation)
        tasks = [(scan, names[row]) for row, scan in rows.scans.items()]
        done = {outcome.row: outcome for outcome in each(work, tasks, jobs, progress)}
        outcomes = _with_twins(done.get(row) or Outcome(row, rows.faults[row]) for row in rows.cells)
        _write_tables(out, rows, outcomes, {row: Outputs(name, spacing_mm) for row, name in names.items()}, preparation)
    return outcomes


def process(task: tuple[Scan, str], out: Path, preparation: Preparation) -> Outcome:
    """Take one scan through all steps and write its files; whatever is wrong with it is part of the outcome.

    Raises:
        StorageError: The disk is full, read-only or gone: no fault of the scan.
    """
    scan, stem = task
    outputs = Outputs(stem, preparation.spacing_mm)
    try:
        if (fault := misfit(scan, ChainOptions())) is not None:  # what was warped cannot be made native again
            raise VolumeError(fault)
        inputs = input_digests(scan, preparation)
        if scan.sha256 not in (None, inputs["image"]):
            raise VolumeError(Fault("VOL-DIGEST", "sha256 differs from the manifest's", str(scan.image)))
        if (done := finished(out, outputs, inputs, preparation)) is None:
            prepared = prepare_head(scan.image, scan.mask or scan.labels, preparation)
            done = prepared.figures, write_outputs(out, outputs, prepared, preparation, inputs)
    except StorageError:
        raise
    except VolumeError as error:
        faults = (replace(fault, row=scan.row, file=fault.file or str(scan.image)) for fault in error.faults)
        return Outcome(scan.row, tuple(faults))
    except Exception as error:  # of a library, on a scan that nobody foresaw
        return Outcome(scan.row, (_unforeseen(scan, f"{type(error).__name__}: {error}"),))
    return Outcome(scan.row, (), *done)


def _unforeseen(scan: Scan, reason: str) -> Fault:
    return Fault("PREP-FAILED", " ".join(reason.split())[:200], file=str(scan.image), row=scan.row)


def each(
    work: Callable[[tuple[Scan, str]], Outcome],
    tasks: Sequence[tuple[Scan, str]],
    jobs: int,
    progress: Callable[[Collection], Iterator],
) -> Iterator[Outcome]:
    """Do the work for every task, `jobs` at a time; a process that dies gives an outcome too."""
    if jobs < 2:
        yield from (work(task) for task in progress(tasks))
        return
    lost = []
    with ProcessPoolExecutor(
        jobs, get_context("spawn"), end_with_parent
    ) as pool:  # torch's threads do not survive a fork
        try:
            pending = {pool.submit(work, task): task for task in tasks}
            for future in progress(list(pending)):
                try:
                    yield future.result()
                except BrokenProcessPool:  # a process died, of too little memory for one: all that waited are lost
                    lost.append(pending[future])
        finally:
            pool.shutdown(cancel_futures=True)
    for task in lost:
        with ProcessPoolExecutor(
            1, get_context("spawn"), end_with_parent
        ) as pool:  # one by one, the guilty one is known
            try:
                yield pool.submit(work, task).result()
            except BrokenProcessPool:
                yield Outcome(task[0].row, (_unforeseen(task[0], "the process died; was there too little memory?"),))


def _with_twins(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Mark every row whose volume is that of a row above: one head under two names."""
    first: dict[str, int] = {}
    marked = []
    for outcome in outcomes:
        row = first.setdefault(outcome.volume, outcome.row) if outcome.volume else outcome.row
        marked.append(outcome if row == outcome.row else replace(outcome, twin=row))
    return marked


def _settle(path: Literal["auto", "full", "light"], rows: Source) -> Literal["full", "light"]:
    """Choose the path; the light one needs a mask for every scan.

    Raises:
        ConfigError: PREP-EXTRA.
        DataError: PREP-MASK, no scan has a mask.
    """
    if path == "full":
        require_extra()
    if path != "light" and not missing_extra():
        return "full"
    if rows.scans and not any(scan.mask or scan.labels for scan in rows.scans.values()):
        if path == "auto":
            require_extra()
        raise DataError(Fault("PREP-MASK", "the light path needs a mask or labels column", hint=f"or {INSTALL}"))
    return "light"


def _read_source(source: Path, data_root: Path | None, out: Path) -> Source:
    if source.is_dir():
        if source.resolve() == out.resolve():
            raise ConfigError(Fault("PREP-OUT", "results would lie among the heads", str(out), hint="give another -o"))
        within = source.resolve() in out.resolve().parents  # a run before may have filled it
        scans = {scan.row: scan for scan in scans_in(source, out if within else None)}
        cells = {
            row: {"participant_id": scan.participant_id, "session_id": scan.session_id} for row, scan in scans.items()
        }
        return Source(("participant_id", "session_id"), cells, scans, {})
    manifest, faults = inspect_manifest(source, data_root, require_age=False)
    by_row: dict[int, tuple[Fault, ...]] = {}
    for fault in faults:
        if fault.row is None or fault.code == "MAN-COLUMN":  # of no row, but of the table
            raise DataError(*faults)
        by_row[fault.row] = (*by_row.get(fault.row, ()), fault)
    table = records(read_table(source), Refusals(source.name))
    names = [KNOWN.get(name.strip().casefold(), name.strip()) for name in next(table)[1]]
    cells = {line: dict(zip(names, values, strict=True)) for line, values in table}
    cells |= {row: {} for row in by_row if row not in cells}  # ragged rows
    scans = {scan.row: scan for scan in manifest.scans if scan.row not in by_row}
    columns = tuple(name for name in names if name not in _REPLACED | {"status", "reason"})
    return Source(columns, dict(sorted(cells.items())), scans, by_row)


def _write_tables(
    out: Path, rows: Source, outcomes: Sequence[Outcome], files: Mapping[int, Outputs], preparation: Preparation
) -> None:
    """Write `manifest.csv` for training and prediction, `qc.tsv` and `qc.html`; each has every row."""
    table = []
    for outcome in outcomes:
        usable, scan = not outcome.faults, rows.scans.get(outcome.row)
        cells = rows.cells[outcome.row]
        table.append(
            {
                "row": outcome.row,
                "participant_id": scan.participant_id if scan else cells.get("participant_id", ""),
                "session_id": scan.session_id if scan else cells.get("session_id", ""),
                "status": outcome.status,
                "reason": outcome.reason,
                "image": files[outcome.row].image.as_posix() if usable else "",
                "mask": files[outcome.row].mask.as_posix() if usable else "",
                **{name: outcome.figures.get(name, math.nan) for name in FIGURES},
            }
        )
    found = pd.DataFrame(table)
    pictures = [None if o.faults else out / files[o.row].picture for o in outcomes]
    qc = found.to_csv(index=False, sep="\t", float_format="%.5g", na_rep="n/a", lineterminator="\n")
    replace_file(out / "qc.tsv", qc.encode())
    replace_file(out / "qc.html", page(found, pictures, {**preparation.steps(), "ChainHash": preparation.digest()}))
    columns = [name for name in rows.columns if name not in ("participant_id", "session_id")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["participant_id", "session_id", *columns, "image", "mask", "status", "reason"])
    for outcome, line in zip(outcomes, table, strict=True):
        kept = [rows.cells[outcome.row].get(name, "") for name in columns]
        ids = [line["participant_id"], line["session_id"]]
        writer.writerow([*ids, *kept, *(line[name] for name in ("image", "mask", "status", "reason"))])
    replace_file(out / "manifest.csv", text.getvalue().encode())
