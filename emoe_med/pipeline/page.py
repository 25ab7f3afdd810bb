"""The table of a pipeline as Markdown, CSV and one self-contained page; what is literature is marked as such."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from emoe_med.brainage import report_page
from emoe_med.pipeline.plan import Job
from emoe_med.pipeline.schema import Pipeline
from emoe_med.pipeline.state import counted_states, seconds_spent, state
from emoe_med.pipeline.table import Cell, ColumnOfCells, as_frame
from emoe_med.storage import replace_file
from emoe_med.training.paired import Estimate

NAMES = ("table.md", "table.csv")
MIN_SEEDS = 2  # the p value of a single seed says nothing about another one
UNITS = {
    "persons": "95 % bootstrap intervals over seeds and persons",
    "images": "95 % bootstrap intervals over seeds and test images",
    "draws": "95 % t intervals over seeds and draws of supports",
    "runs": "means over runs",
}
Lines = tuple[list[str], list[list[str]]]  # header, rows


def write_pages(pipeline: Pipeline, jobs: Sequence[Job], columns: Sequence[ColumnOfCells], out: Path) -> str:
    """Write table.md, table.csv and report/report.html into the pipeline's folder; returns the Markdown."""
    folder = out / pipeline.name
    (folder / "report").mkdir(parents=True, exist_ok=True)
    text = markdown(pipeline, jobs, columns, out)
    replace_file(folder / "table.md", text.encode())
    replace_file(folder / "table.csv", as_frame(columns).to_csv(index=False, float_format="%.4f").encode())
    replace_file(folder / "report" / "report.html", html(pipeline, jobs, columns, out).encode())
    return text


def markdown(pipeline: Pipeline, jobs: Sequence[Job], columns: Sequence[ColumnOfCells], out: Path) -> str:
    """Return title, a table for each column, and what must be known to read them."""
    parts = [f"# {pipeline.name}", "", *([pipeline.about + ".", ""] if pipeline.about else [])]
    for part in columns:
        header, rows = lines(part)
        parts += [f"## {part.column.name}", "", _row(header), _row(["---"] * len(header)), *map(_row, rows), ""]
    parts += [f"- {line}" for line in remarks(pipeline, jobs, columns, out)]
    return "\n".join(parts) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def lines(part: ColumnOfCells) -> Lines:
    """Return the header and the rows of one column's table, as text; columns that nobody fills are left out."""
    cells = part.cells
    columns = [
        ("row", [cell.row for cell in cells]),
        ("run here", [_own(cell) for cell in cells]),
        ("by seed", [_by_seed(cell) for cell in cells]),
        ("runs", [f"{cell.done} of {cell.planned}" if cell.planned else "" for cell in cells]),
        (_against(cells), [_difference(cell) for cell in cells]),
        ("p, Holm", [_p(cell) for cell in cells]),
        ("guessing", [_number(cell.guess) for cell in cells]),
        ("paper †", [_number(cell.printed) for cell in cells]),
        ("note", [cell.note for cell in cells]),
    ]
    filled = [(name, texts) for name, texts in columns if any(texts) or name in ("row", "run here")]
    return [name for name, _ in filled], [list(row) for row in zip(*(texts for _, texts in filled), strict=True)]


def _own(cell: Cell) -> str:
    if cell.own is None:
        return "not run"
    text = _interval(cell.own)
    return f"**{text}**" if cell.wins else text


def _by_seed(cell: Cell) -> str:
    return ", ".join(f"{value:.2f}" for value in cell.by_seed.values()) if len(cell.by_seed) > 1 else ""


def _against(cells: Sequence[Cell]) -> str:
    controls = {cell.control for cell in cells if cell.difference}
    return f"difference to {controls.pop()}" if len(controls) == 1 else "difference to its control"


def _difference(cell: Cell) -> str:
    if cell.arm is not None and cell.control == cell.arm:
        return "control"
    return "" if cell.difference is None else _interval(cell.difference)


def _p(cell: Cell) -> str:
    if cell.difference is None or cell.difference.get("p_holm") is None:
        return ""
    return "one seed" if cell.difference["seeds"] < MIN_SEEDS else f"{cell.difference['p_holm']:.3f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _interval(found: Estimate) -> str:
    if found["low"] is None:
        return f"{found['value']:.2f}"
    return f"{found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def remarks(pipeline: Pipeline, jobs: Sequence[Job], columns: Sequence[ColumnOfCells], out: Path) -> list[str]:
    """Return what must be known to read the table: its intervals, what was run on what, literature, differences."""
    units = dict.fromkeys(UNITS[part.figure.unit] for part in columns)
    found = [f"Run here: {counted_states(jobs, out)}; {'; '.join(units)}."]
    if any(cell.difference for part in columns for cell in part.cells):
        found.append(
            "Differences are paired on the seeds and samples that both have; p is two-sided, the larger of that over "
            "seeds and samples and that of a t test over seeds alone, corrected for the number of arms. An interval "
            "from one seed says nothing about another one; one from two or three is too narrow where seeds differ by "
            "more than samples do. Bold: arms whose difference to their control is clear of 0 after correction, on "
            "three seeds or more; no bold, no winner."
        )
    if missing := [part.column.name for part in columns if not any(cell.own for cell in part.cells)]:
        found.append(f"Measured for no run so far: {'; '.join(missing)}.")
    found += guessing(pipeline, columns)
    if any(cell.printed is not None for part in columns for cell in part.cells):
        found.append(f"† Literature, not run here: {pipeline.table.source or 'printed in the paper'}.")
    found += [f"Differs: {line}." for line in pipeline.table.differs]
    return found + _machines(jobs, out)


def guessing(pipeline: Pipeline, columns: Sequence[ColumnOfCells]) -> list[str]:
    """Say which arms beat guessing with their whole interval, and which are no evidence of learning."""
    verdicts = [
        (f"{cell.row}, {part.column.name}", cell.beats_guessing(part.figure.better))
        for part in columns
        for cell in part.cells
    ]
    judged = [(name, beaten) for name, beaten in verdicts if beaten is not None]
    lost = [name for name, beaten in judged if not beaten]
    if not judged:
        return []
    if lost:
        return [f"PLUMBING ONLY, not better than guessing beyond the interval: {'; '.join(lost)}."]
    return ["Every figure beats guessing (the commonest labels, the median training age) with its whole interval."]


def _machines(jobs: Sequence[Job], out: Path) -> list[str]:
    """Tell by which code, on what and how long the runs were made."""
    facts: dict[str, set[str]] = {"commit": set(), "torch": set(), "device": set()}
    seconds = 0.0
    for job in jobs:
        path = out / job.folder / "environment.json"
        if state(job, out) != "done" or not path.is_file():
            continue
        environment = json.loads(path.read_text())
        commit = str(environment["git_commit"] or "unknown")
        facts["commit"].add(commit[:7] + "+" * commit.endswith("+"))  # +: and changes that are not committed
        facts["torch"].add(environment["versions"]["torch"])
        facts["device"].add(environment["device"])
        seconds += seconds_spent(job, out)
    if not seconds:
        return []
    told = ", ".join(f"{name} {' and '.join(sorted(values))}" for name, values in facts.items())
    return [f"Made by {told}, in {seconds / 3600:.2f} hours of runs."]


def html(pipeline: Pipeline, jobs: Sequence[Job], columns: Sequence[ColumnOfCells], out: Path) -> str:
    """Return the table and the runs as one page; no path, no person."""
    parts = [f"<p class=lead>{escape(pipeline.about)}</p>"]
    for part in columns:
        header, rows = lines(part)
        marked = [[_bold(escape(cell)) for cell in row] for row in rows]
        parts.append(report_page.section(escape(part.column.name), report_page.table(header, marked, "figures")))
    parts.append(
        "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in remarks(pipeline, jobs, columns, out)) + "</ul>"
    )
    runs = [[escape(job.label), state(job, out), f"{seconds_spent(job, out):.0f} s", job.arm.key] for job in jobs]
    listed = report_page.table(["run", "state", "time", "configuration"], runs)
    parts.append(f"<details><summary>{len(jobs)} runs</summary>{listed}</details>")
    return report_page.page(pipeline.name, "\n".join(parts), is_synthetic=False)


def _bold(text: str) -> str:
    return f"<b>{text.strip('*')}</b>" if text.startswith("**") else text
