"""What a pipeline leaves at its end: the table, written, printed and recorded on the parent run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from emoe_med.pipeline.page import NAMES, write_pages
from emoe_med.pipeline.plan import Job
from emoe_med.pipeline.schema import Pipeline
from emoe_med.pipeline.table import ColumnOfCells, make_table
from emoe_med.training import allow_list
from emoe_med.training.tracking import Tracker


def report(pipeline: Pipeline, jobs: Sequence[Job], out: Path, tracker: Tracker | None = None) -> str:
    """Make table and page of what is done; returns the Markdown.

    Args:
        pipeline: As read.
        jobs: All its runs.
        out: Folder of all runs.
        tracker: Entered tracker of the pipeline, which gets figures, table and page.
    """
    columns = make_table(pipeline, jobs, out)
    text = write_pages(pipeline, jobs, columns, out)
    if tracker is not None:
        tracker.results(_figures(columns))
        for name in NAMES:
            tracker.log_artifact(out / pipeline.name / name, "tables")
        tracker.log_artifact(out / pipeline.name / "report" / "report.html", "report")
    return text


def _figures(columns: Sequence[ColumnOfCells]) -> Mapping[str, float]:
    """Return the own figures under their tracking names; an arm whose name may not leave is left out."""
    found = {
        f"table/{cell.arm}/{part.column.metric.replace('/', '_')}": float(cell.own["value"] or 0.0)
        for part in columns
        for cell in part.cells
        if cell.own is not None
    }
    return {name: value for name, value in found.items() if allow_list.METRIC.fullmatch(name)}
