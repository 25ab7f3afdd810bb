"""Command line: python -m emoe_med.pipeline <verb>. Verbs import what they need when they run."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from emoe_med.training.cli import say, verb
from emoe_med.training.record_cli import sync, ui

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Many runs from one file, and the table that they make: pipelines/*.yaml.",
)

FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="pipeline file, as pipelines/comparison_ixi.yaml")]
OutOption = Annotated[Path, typer.Option("--out", help="folder of all runs, their cache and the tracking store")]
JsonOption = Annotated[bool, typer.Option("--json", help="print a machine-readable table")]
OnlyOption = Annotated[
    list[str] | None, typer.Option("--only", help="runs whose arm or arm/run fits, as 'emoe*' or '*/seed0-fold0'")
]


@app.command()
@verb
def run(
    file: FileArgument,
    jobs: Annotated[
        int, typer.Option("--jobs", min=1, help="runs at a time on this machine; they share threads and GPUs")
    ] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check all files and print the commands")] = False,
    submit: Annotated[
        Literal["slurm", "local"] | None,
        typer.Option("--submit", help="hand the runs to a cluster; local tries it out"),
    ] = None,
    cluster: Annotated[
        list[str] | None, typer.Option("--cluster", help="key=value for submitit, as timeout_min=600")
    ] = None,
    only: OnlyOption = None,
    out: OutOption = Path("runs"),
    data_root: Annotated[
        Path | None,
        typer.Option("--data-root", help="folder of the data sets (docs/pipelines.md); default EMOE_MED_DATA_ROOT"),
    ] = None,
    manifest: Annotated[
        Path | None,
        typer.Option(
            "--manifest",
            help="scans, not those that the file names; paths start in EMOE_MED_DATA_ROOT, or else beside this file",
        ),
    ] = None,
) -> None:
    """Run what is not done, take up what was interrupted, and make the table.

    Example: python -m emoe_med.pipeline run pipelines/paper_table1_smoke.yaml --jobs 2
    """
    from emoe_med.pipeline.plan import Places, commands, plan, read_pipeline
    from emoe_med.pipeline.state import counted_states, state

    pipeline = read_pipeline(file)
    planned = plan(pipeline, file, only or ())
    places = Places(pipeline, data_root, manifest)
    if dry_run:
        places.check(planned)
        for job in planned:
            say(f"# {job.label}: {state(job, out)}")
            for command in commands(job, out, places):
                say(f"python -m {shlex.join(command)}")
        say(f"# {len(planned)} runs: {counted_states(planned, out)}")
        return
    from emoe_med.pipeline.report import report
    from emoe_med.pipeline.runner import run_pipeline

    executor = _executor(submit, cluster or [], jobs, out / pipeline.name)
    every = plan(pipeline, file)  # `--only` narrows what is run, not what is shown
    run_pipeline(pipeline, planned, out, places, executor, lambda tracker: say(report(pipeline, every, out, tracker)))


def _executor(submit: Literal["slurm", "local"] | None, options: list[str], jobs: int, folder: Path) -> Any:
    if submit is not None:
        from emoe_med.pipeline.cluster import Cluster

        return Cluster(submit, folder / "local" / "submitit", options)
    if options:
        from emoe_med.errors import ConfigError, Fault

        raise ConfigError(Fault("CLI-CLUSTER", "--cluster without --submit: there is no cluster to tell"))
    from emoe_med.pipeline.pool import Pool, visible_gpus

    return Pool(jobs, visible_gpus())


@app.command()
@verb
def status(file: FileArgument, only: OnlyOption = None, out: OutOption = Path("runs")) -> None:
    """Print how far each run is, and the time it took.

    Example: python -m emoe_med.pipeline status pipelines/comparison_ixi.yaml
    """
    from emoe_med.pipeline.plan import plan, read_pipeline
    from emoe_med.pipeline.state import counted_states, seconds_spent, state

    planned = plan(read_pipeline(file), file, only or ())
    for job in planned:
        say(f"{state(job, out):12} {seconds_spent(job, out):8.0f} s  {job.label}  {out / job.folder}")
    say(f"{len(planned)} runs: {counted_states(planned, out)}")


@app.command()
@verb
def table(
    file: FileArgument,
    out: OutOption = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """Make the table anew from what the runs left, and print it; runs that are not done are left out.

    Example: python -m emoe_med.pipeline table pipelines/comparison_ixi.yaml
    """
    from emoe_med.pipeline.plan import plan, read_pipeline
    from emoe_med.pipeline.report import report
    from emoe_med.pipeline.runner import tracked_pipeline
    from emoe_med.pipeline.table import as_json as cells
    from emoe_med.pipeline.table import make_table
    from emoe_med.training.run_folder import is_claimed

    pipeline = read_pipeline(file)
    planned = plan(pipeline, file)
    if as_json:
        say(json.dumps(cells(make_table(pipeline, planned, out)), indent=1))
    elif is_claimed(out / pipeline.name):  # it is running, and tracks its table at the end
        say(report(pipeline, planned, out))
    else:
        with tracked_pipeline(pipeline, planned, out) as tracker:
            say(report(pipeline, planned, out, tracker))


@app.command()
@verb
def compare(
    runs: Annotated[list[Path], typer.Argument(help="folders of arms or of single runs; the first is the control")],
    metric: Annotated[
        list[str] | None, typer.Option("--metric", help="as test/top1 or routing/cv; without any the tasks' headlines")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare any finished runs, of one pipeline, of several or of none; the table is printed and not kept.

    Example: python -m emoe_med.pipeline compare runs/digits_dense runs/digits_emoe
    """
    from emoe_med.pipeline.compare import compare as compared
    from emoe_med.pipeline.page import markdown
    from emoe_med.pipeline.table import as_json as cells

    pipeline, found, columns = compared(runs, metric or ())
    say(json.dumps(cells(columns), indent=1) if as_json else markdown(pipeline, found, columns, Path()))


app.command()(ui)
app.command()(sync)

if __name__ == "__main__":
    app(prog_name="python -m emoe_med.pipeline")
