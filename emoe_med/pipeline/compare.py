"""Any set of finished runs in one table, whoever made them: arms or single runs, each compared with the first."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from emoe_med.errors import ConfigError, DataError, Fault
from emoe_med.pipeline.plan import Arm, Job
from emoe_med.pipeline.schema import METRICS, Column, Pipeline, RunEntry, Table
from emoe_med.pipeline.state import state
from emoe_med.pipeline.table import ColumnOfCells, make_table

RUN = re.compile(r"seed(\d+)(?:-fold(\d+))?")
HEADLINES = {"brainage": {"test/mae": "MAE, years"}, "vision": {"test/top1": "Top-1, %", "test/top5": "Top-5, %"}}


@dataclass(frozen=True)
class FoundRun(Job):
    """A run that lies where it lies."""

    place: Path = Path()

    @property
    def folder(self) -> Path:
        """Run folder."""
        return self.place


def compare(
    folders: Sequence[Path], metrics: Sequence[str] = ()
) -> tuple[Pipeline, list[FoundRun], list[ColumnOfCells]]:
    """Compare what finished runs left, on the seeds and samples that each has in common with the first.

    Args:
        folders: Of arms with their runs, or of single runs.
        metrics: As in a pipeline file; without any the headlines of the tasks.

    Returns:
        What `page.markdown` asks for: a pipeline of these arms, its runs, and the columns of the table.

    Raises:
        ConfigError: No such metric.
        DataError: A folder stands twice or holds no finished run, or a run has no such figure.
    """
    runs = [run for name, folder in _named(folders).items() for run in _runs(name, folder)]
    shown = dict.fromkeys(run.arm.task for run in runs)
    columns = {metric: metric for metric in metrics} or {m: n for task in shown for m, n in HEADLINES[task].items()}
    if unknown := [metric for metric in columns if not re.fullmatch(METRICS, metric)]:
        hint = "as test/mae, fewshot/cifar10/1/token/ridge, routing/cv"
        raise ConfigError(*(Fault("CLI-METRIC", f"no metric is called {metric}", hint=hint) for metric in unknown))
    table = Table(
        columns=tuple(Column(name=name, metric=metric) for metric, name in columns.items()),
        paired_with=(runs[0].arm.name,),
    )
    pipeline = Pipeline(name="comparison", runs=(RunEntry(config="of each run"),), table=table)
    try:
        made = make_table(pipeline, runs, Path())
    except FileNotFoundError as error:
        reason = f"{' or '.join(columns)} was not measured for this run"
        raise DataError(Fault("CMP-METRIC", reason, str(error.filename))) from error
    if empty := [part.column.metric for part in made if not any(cell.own for cell in part.cells)]:
        raise DataError(*(Fault("CMP-METRIC", f"{metric} was measured for none of these runs") for metric in empty))
    return pipeline, runs, made


def _named(folders: Sequence[Path]) -> dict[str, Path]:
    """Call each folder by as much of the end of its path as tells it from the others, a run by its arm too."""
    places = [folder.resolve() for folder in folders]
    if len(set(places)) < len(places):
        raise DataError(Fault("CMP-NAMES", "a folder stands twice"))
    for depth in count(1):
        names = ["/".join(p.parts[-depth - bool(RUN.fullmatch(p.name)) :]) for p in places]
        if len(set(names)) == len(names):
            return dict(zip(names, places, strict=True))
    raise AssertionError


def _runs(name: str, folder: Path) -> list[FoundRun]:
    found = []
    for place in (folder, *sorted(folder.glob("seed*"))):
        if match := RUN.fullmatch(place.name):
            seed, fold = (None if part is None else int(part) for part in match.groups())
            arm = Arm(name, "vision" if fold is None else "brainage", None, place, ())
            found.append(FoundRun(arm, seed or 0, fold, (), place))
    if not any(state(run, Path()) == "done" for run in found):
        raise DataError(Fault("CMP-NONE", "no finished run in this folder", str(folder)))
    return found
