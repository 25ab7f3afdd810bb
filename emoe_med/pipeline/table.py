"""The table of a pipeline, from what its runs left: own figures, the papers' beside them, paired with a control."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from emoe_med.errors import DataError, Fault
from emoe_med.pipeline.figures import Figure, figure
from emoe_med.pipeline.plan import Job
from emoe_med.pipeline.schema import Column, Pipeline, Row
from emoe_med.training.arm import check_alike, is_done
from emoe_med.training.paired import (
    Estimate,
    difference,
    difference_of_draws,
    estimate,
    estimate_of_draws,
    holm,
)

WINNER_SEEDS = 3  # two tell so little of the scatter of training that one arm in seven would win by it alone
ALPHA = 0.05
MIXED = "its runs are of different data or splits: no figure is made of them"


@dataclass
class Cell:
    """One row in one column.

    Attributes:
        row: Name of the row.
        arm: Name of the arm; None where nothing is run.
        control: Arm that it is compared with; its own name where it is a control itself.
        printed: The papers' figure.
        note: Why there is no own figure, or no difference.
        done: Runs that the figure is made of.
        planned: Runs there should be.
        own: Mean with interval; None without a run.
        by_seed: Mean of each seed.
        guess: What guessing gets on the same samples.
        difference: To the control, with `p` and, corrected, `p_holm`.
        wins: Better than the control beyond its interval and Holm's correction, on enough seeds.
    """

    row: str
    arm: str | None
    control: str | None = None
    printed: float | None = None
    note: str = ""
    done: int = 0
    planned: int = 0
    own: Estimate | None = None
    by_seed: dict[int, float] = field(default_factory=dict)
    guess: float | None = None
    difference: dict[str, Any] | None = None
    wins: bool = False

    def beats_guessing(self, better: str | None) -> bool | None:
        """Whether the whole interval is better than guessing; without an interval it is not; None: nobody can guess."""
        if self.own is None or self.guess is None:
            return None
        if self.own["low"] is None or self.own["high"] is None:
            return False
        return self.own["high"] < self.guess if better == "lower" else self.own["low"] > self.guess


@dataclass
class ColumnOfCells:
    """One figure of every row."""

    column: Column
    figure: Figure
    cells: list[Cell]


def make_table(pipeline: Pipeline, jobs: Sequence[Job], out: Path) -> list[ColumnOfCells]:
    """Read what the runs left and compare it, column by column; unfinished runs are not used, steps may be waiting.

    Args:
        pipeline: As read.
        jobs: All its runs.
        out: Folder of all runs.
    """
    by_arm: dict[str, list[Job]] = {}
    for job in jobs:
        by_arm.setdefault(job.arm.name, []).append(job)
    done = {name: [job for job in found if is_done(out / job.folder)] for name, found in by_arm.items()}
    rows = pipeline.table.rows or tuple(Row(name=name, arm=name) for name in by_arm)
    return [_column(pipeline, rows, index, by_arm, done, out) for index in range(len(pipeline.table.columns))]


def _column(
    pipeline: Pipeline,
    rows: Sequence[Row],
    index: int,
    by_arm: dict[str, list[Job]],
    done: dict[str, list[Job]],
    out: Path,
) -> ColumnOfCells:
    column = pipeline.table.columns[index]
    shown = figure(column.metric)
    control = next((name for name in pipeline.table.paired_with if name in by_arm and _has(shown, by_arm[name])), None)
    cells, values = [], {}
    for row in rows:
        cell = Cell(row.name, row.arm, row.control or control, note=row.note)
        cell.printed = row.printed[index] if row.printed else None
        found = by_arm.get(row.arm or "")
        if found and not _has(shown, found):
            continue
        if row.arm is None and not row.note and cell.printed is None:
            continue
        if found and row.arm is not None:
            cell.planned = len(found)
            values[row.arm] = _own(cell, shown, done[row.arm], out)
            if done[row.arm] and cell.own is None and cell.note != MIXED:
                continue  # its runs have no such figure
        cells.append(cell)
    for name in {cell.control for cell in cells if cell.control} - values.keys():  # a control need not be a row
        values[name] = _own(Cell(name, name), shown, done[name], out)
    if shown.unit != "runs":
        _compare(cells, values, shown, done, out)
    for cell in cells:
        cell.wins = shown.better is not None and _is_clear(cell.difference, 1 if shown.better == "lower" else -1)
    return ColumnOfCells(column, shown, cells)


def _has(shown: Figure, jobs: Sequence[Job]) -> bool:
    return shown.task is None or jobs[0].arm.task == shown.task


def _own(cell: Cell, shown: Figure, jobs: Sequence[Job], out: Path) -> pd.DataFrame:
    """Fill in an arm's own figure; returns its values, seeds by samples."""
    parts: dict[int, list[pd.Series]] = {}
    guesses = []
    try:
        check_alike((job.fold, out / job.folder) for job in jobs)
    except DataError:
        cell.note = MIXED
        jobs = []
    for job in jobs:
        found, guess = _read(shown, out / job.folder)
        if shown.unit == "runs":
            found = found.set_axis([job.fold or 0] * len(found))
        if len(found):
            cell.done += 1
            parts.setdefault(job.seed, []).append(found)
            guesses.append((guess, len(found)))
    values = pd.DataFrame({seed: pd.concat(found) for seed, found in sorted(parts.items())}).T.sort_index(axis=1)
    if values.empty:
        cell.note = cell.note or "no run is done yet"
        return values
    cell.by_seed = dict(zip(sorted(parts), values.mean(axis=1).tolist(), strict=True))
    cell.own = _estimated(shown, values.to_numpy())
    known = [(guess, count) for guess, count in guesses if guess is not None]
    if known:
        guess, count = np.array(known).T
        cell.guess = float((guess * count).sum() / count.sum())
    return values


def _read(shown: Figure, run_dir: Path) -> tuple[pd.Series, float | None]:
    try:
        return shown.read(run_dir)
    except (ValueError, KeyError, TypeError) as error:
        reason, hint = f"its figures are damaged ({error})", "copy them again, or train the run anew"
        raise DataError(Fault("RUN-METRICS", reason, str(run_dir), hint=hint)) from error


def _estimated(shown: Figure, values: np.ndarray) -> Estimate:
    if shown.unit == "draws":
        return estimate_of_draws(values)
    if shown.unit == "runs":
        return {"value": float(np.nanmean(values)), "low": None, "high": None, "n": values.size, "seeds": len(values)}
    return estimate(values)


def _compare(
    cells: Iterable[Cell], values: dict[str, pd.DataFrame], shown: Figure, done: dict[str, list[Job]], out: Path
) -> None:
    """Give every arm its difference to its control, on the seeds and samples that both have."""
    tested = []
    for cell in cells:
        if cell.own is None or cell.arm is None or cell.control is None or cell.control == cell.arm:
            continue
        a, b = values[cell.arm].align(values.get(cell.control, pd.DataFrame()), join="inner")
        if not (a.notna() & b.notna()).to_numpy().any():
            cell.note = cell.note or "no seed with the same samples in common with the control"
            continue
        try:
            check_alike((job.fold, out / job.folder) for arm in (cell.control, cell.arm) for job in done[arm])
        except DataError:
            cell.note = cell.note or "not paired: other data or splits than the control"
            continue
        compare = difference_of_draws if shown.unit == "draws" else difference
        cell.difference = compare(a.to_numpy(), b.to_numpy())
        if cell.difference["p"] is not None:
            tested.append(cell.difference)
    for found, p in zip(tested, holm(np.array([found["p"] for found in tested])), strict=True):
        found["p_holm"] = float(p)


def _is_clear(found: dict[str, Any] | None, sign: int) -> bool:
    if found is None or found.get("p_holm") is None or found["seeds"] < WINNER_SEEDS:
        return False
    worst = found["high"] if sign > 0 else found["low"]
    return sign * worst < 0 and found["p_holm"] < ALPHA


def as_frame(columns: Sequence[ColumnOfCells]) -> pd.DataFrame:
    """Return every cell as a line, for the CSV."""
    lines = []
    for part in columns:
        for cell in part.cells or [Cell("", None, note="measured for no run")]:
            line: dict[str, Any] = {
                "column": part.column.name,
                "metric": part.column.metric,
                "row": cell.row,
                "arm": cell.arm,
            }
            line |= {name: (cell.own or {}).get(name) for name in ("value", "low", "high", "n", "seeds")}
            line |= {"runs_done": cell.done, "runs_planned": cell.planned, "guessing": cell.guess}
            line["by_seed"] = " ".join(f"{seed}:{value:.4f}" for seed, value in cell.by_seed.items())
            line["control"] = cell.control
            names = ("value", "low", "high", "p", "p_holm")
            line |= {f"difference_{name}": (cell.difference or {}).get(name) for name in names}
            line |= {"printed_in_paper": cell.printed, "note": cell.note}
            lines.append(line)
    return pd.DataFrame(lines).astype({"n": "Int64", "seeds": "Int64"})


def as_json(columns: Sequence[ColumnOfCells]) -> list[dict[str, Any]]:
    """Return every column with its cells, for machines."""
    return [
        {"column": part.column.name, "metric": part.column.metric, "cells": [asdict(cell) for cell in part.cells]}
        for part in columns
    ]
