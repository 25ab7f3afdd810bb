"""Command line: python -m emoe_med.brainage <verb>. Verbs import what they need when they run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from emoe_med.brainage.export_cli import FOLD, RunOption, export, selftest
from emoe_med.brainage.manifest_cli import manifest_app
from emoe_med.brainage.maps_cli import maps
from emoe_med.brainage.preprocess_cli import preprocess
from emoe_med.errors import ConfigError, Fault
from emoe_med.training.cli import first_rank, say, verb
from emoe_med.training.record_cli import sync, ui

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Brain age from T1 MRI with an eigenbasis-routed mixture of experts. Not for diagnosis.",
)
app.add_typer(manifest_app, name="manifest")
app.command()(preprocess)
app.command()(export)
app.command()(selftest)
app.command()(maps)
app.command()(ui)
app.command()(sync)

PAGES = ("check.csv", "check.html", "scans.html")  # what `check` writes
CONFIGS = Path(__file__).parent.parent.parent / "configs" / "brainage"


ManifestOption = Annotated[Path, typer.Option("--manifest", help="CSV or TSV: one scan a row")]
RootOption = Annotated[Path | None, typer.Option("--data-root", help="folder of the manifest's relative paths")]
OutOption = Annotated[Path, typer.Option("--out", help="folder of all runs, their cache and the tracking store")]
JobsOption = Annotated[int, typer.Option("--jobs", min=0, help="scans read at once; 0 is one by one")]
JsonOption = Annotated[bool, typer.Option("--json", help="print a machine-readable summary")]


@app.command()
@verb
def train(
    manifest: ManifestOption,
    config: Annotated[
        Path,
        typer.Option("--config", help="run file; those in 4mm suit a CPU", show_default="configs/brainage/emoe.yaml"),
    ] = CONFIGS / "emoe.yaml",
    out: OutOption = Path("runs"),
    fold: Annotated[str, typer.Option("--fold", help="folds to test on, each a run: 0, or 0,2, or all")] = "0",
    resume: Annotated[bool, typer.Option("--resume", help="go on with unfinished folds, skip finished ones")] = False,
    assignments: Annotated[list[str] | None, typer.Option("--set", help="key=value, e.g. training.seed=1")] = None,
    data_root: RootOption = None,
    cache: Annotated[Path | None, typer.Option("--cache", help="volumes in the model's space; OUT/cache")] = None,
    jobs: JobsOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Check, split, train, evaluate and report.

    Example: python -m emoe_med.brainage train --manifest ixi/manifest.csv --config configs/brainage/emoe_4mm.yaml
    """
    from emoe_med.config import load_run

    run = load_run(config, assignments)
    folds = _folds(fold, run.data.folds)
    from emoe_med.brainage import train as verbs
    from emoe_med.data.manifest import read_manifest

    table = read_manifest(manifest, data_root)
    for note in table.notes if first_rank() else ():
        typer.echo(f"note: {note}", err=True)
    run_dirs = verbs.train(run, table, out, folds, cache or out / "cache", resume, jobs)
    _show_runs(run_dirs, out, as_json)


def _folds(text: str, count: int) -> list[int]:
    if text == "all":
        return list(range(count))
    folds = [int(part) for part in text.split(",") if part.strip().isdigit()]
    if not folds or len(folds) != text.count(",") + 1 or max(folds) >= count:
        raise ConfigError(Fault("CLI-FOLD", f"--fold {text}: expected `all` or numbers from 0 to {count - 1}"))
    return folds


def _show_runs(run_dirs: list[Path], out: Path, as_json: bool) -> None:
    from emoe_med.training.arm import headline
    from emoe_med.training.store import served_from
    from emoe_med.training.ui import map_links

    metrics = {str(run_dir): json.loads((run_dir / "metrics.json").read_text()) for run_dir in run_dirs}
    if as_json:
        say(json.dumps({run: headline(values) for run, values in metrics.items()}, indent=1))
        return
    for run, values in metrics.items():
        test = values["test"]
        guess = _estimate(test["mae_training_median"])
        say(f"{run}: MAE {_estimate(test['mae'])}, in years; guessing the training median: {guess}")
    say(f"report: {run_dirs[-1] / 'report' / 'report.html'}")
    say(f"tracking: python -m emoe_med.brainage ui --out {served_from(out)}")
    for line in map_links(out, run_dirs):
        say(line)


@app.command()
@verb
def evaluate(
    run: RunOption,
    manifest: Annotated[Path | None, typer.Option("--manifest", help="score other scans with ages")] = None,
    bias: Annotated[
        Literal["beheshti", "cole"],
        typer.Option("--bias", help="correction of age bias, shown beside the raw figures"),
    ] = "beheshti",
    data_root: RootOption = None,
    cache: Annotated[Path | None, typer.Option("--cache", help="volumes in the model's space; RUN/../../cache")] = None,
    jobs: JobsOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Score a run again from its predictions and renew its report, or score it on other scans.

    `predict` uses the correction of the last call without --manifest.
    MLflow keeps what training sent.

    Example: python -m emoe_med.brainage evaluate --run runs/emoe_4mm/seed0-fold0 --manifest other.csv
    """
    from emoe_med.brainage import evaluate as verbs
    from emoe_med.data.manifest import read_manifest

    if manifest is None and any((data_root, cache, jobs)):
        raise ConfigError(Fault("CLI-MANIFEST", "without --manifest no scan is read: where they lie says nothing"))
    if manifest is None:
        metrics, where = verbs.score_again(run, bias), run / "metrics.json"
    else:
        table = read_manifest(manifest, data_root)
        metrics, where = verbs.evaluate_elsewhere(run, table, cache or run.parent.parent / "cache", jobs, bias)
    if as_json:
        say(json.dumps(metrics, indent=1))
        return
    for name, estimate in metrics["test"].items():
        say(f"{name:20} {_estimate(estimate)}")
    if interval := metrics["interval"]:
        covered = _estimate(interval["coverage"])
        say(f"{interval['level']:.0%} interval: +- {interval['half_width']:.1f} years, covers {covered}")
    say("scans: " + ", ".join(f"{count} {status}" for status, count in metrics["verdicts"].items()))
    say(f"written: {where}")


def _estimate(found: dict[str, Any]) -> str:
    from emoe_med.brainage.metrics import in_words

    return in_words(found)


@app.command()
@verb
def predict(
    run: RunOption,
    source: Annotated[Path, typer.Option("-i", "--input", help="scan, folder of scans, or manifest")],
    output: Annotated[Path, typer.Option("-o", "--output", help="CSV to write")],
    data_root: RootOption = None,
    cache: Annotated[Path | None, typer.Option("--cache", help="volumes in the model's space; RUN/../../cache")] = None,
) -> None:
    """Predict the age of every scan; a row for each, with status and reason.

    Where the run was trained on what `preprocess` wrote, raw heads go through the same steps first.
    Without a manifest a brain mask is looked for beside each head:
    *_desc-brain_mask, HEAD_mask, HEAD_brain_mask, T1_brain_mask or brainmask.
    Ages are in years; brain_pad is predicted minus chronological age.

    Example: python -m emoe_med.brainage predict --run runs/emoe_4mm/seed0-fold0 -i scans/ -o ages.csv
    """
    from emoe_med.brainage import predict as verbs

    table = verbs.predict(verbs.Predictor.of_run(run), source, output, cache or run.parent.parent / "cache", data_root)
    verbs.finish(table, output)


@app.command()
@verb
def compare(
    groups: Annotated[
        list[Path], typer.Argument(help="folders of arms, each with its runs; the first is the reference")
    ],
    as_json: JsonOption = False,
) -> None:
    """Compare arms on identical test scans: pooled error, paired differences, Holm-corrected.

    Example: python -m emoe_med.brainage compare runs/cnn3d_4mm runs/emoe_4mm runs/dense_adapter_4mm
    """
    from emoe_med.brainage.compare import compare_groups

    result, text = compare_groups(groups)
    say(json.dumps(result, indent=1) if as_json else text)


@app.command()
@verb
def reliability(
    predictions: Annotated[Path, typer.Option("--predictions", help="CSV that `predict` wrote: repeated sessions")],
    sessions: Annotated[int, typer.Option("--sessions", min=2, help="sessions of each person to use")] = 2,
    as_json: JsonOption = False,
) -> None:
    """Measure how well repeated sessions agree: ICC, limits of agreement, smallest detectable change.

    Ages in the table give the figures of brain_pad too, which the age range of the persons does not flatter.

    Example: python -m emoe_med.brainage reliability --predictions ages.csv
    """
    from emoe_med.brainage.reliability import MEASURES
    from emoe_med.brainage.reliability import reliability as measure

    found = measure(predictions, sessions)
    if as_json:
        say(json.dumps(found, indent=1))
        return
    say(f"{found['persons']} persons with {sessions} sessions; {found['left_out']} with fewer left out")
    if found["repeats"]:
        say(f"{found['repeats']} scans left out: further runs of a session, of which the first counts")
    if found["ageless"]:
        say(f"no brain_pad: {found['ageless']} of the scans used have no age")
    if found["flagged"]:
        say(f"{found['flagged']} of the scans used are flagged by `predict`: look at them first")
    for name in ("predicted_age", "brain_pad"):
        for measured, label in MEASURES.items() if name in found else ():
            say(f"{name:14} {label:52} {_estimate(found[name][measured])}")


@app.command()
@verb
def check(
    manifest: ManifestOption,
    run: Annotated[
        Path | None, typer.Option("--run", help="hold the scans against the contract of this run", callback=FOLD)
    ] = None,
    data_root: RootOption = None,
    out: Annotated[Path, typer.Option("--out", help="folder for check.csv and the pages")] = Path("check"),
    cache: Annotated[Path | None, typer.Option("--cache", help="volumes in the model's space; RUN/../../cache")] = None,
    jobs: JobsOption = 0,
) -> None:
    """Read every scan strictly and list every fault of every row at once, with a page of thumbnails.

    With --run each scan is held against what the run was trained on: another preprocessing, or the same images.

    Example: python -m emoe_med.brainage check --manifest ixi/manifest.csv --out check
    """
    from emoe_med.brainage.check import check_manifest
    from emoe_med.training.progress import counted

    judge = None
    if run is not None:
        from emoe_med.brainage.judge import judge_by

        judge = judge_by(run, cache or run.parent.parent / "cache", jobs)
    table = check_manifest(manifest, data_root, out, jobs, counted("reading scans"), judge)
    counts = ", ".join(f"{count} {status}" for status, count in table["status"].value_counts().items())
    say(f"all scans are usable ({counts}); table and pages: {', '.join(str(out / name) for name in PAGES)}")


@app.command()
@verb
def demo(
    out: Annotated[Path, typer.Option("--out", help="folder for cohort and runs")] = Path("demo"),
    jobs: JobsOption = 2,
) -> None:
    """Make a synthetic cohort, train EMoE and the plain CNN on it, and compare with what is expected.

    Example: python -m emoe_med.brainage demo --out demo
    """
    from emoe_med.brainage.demo import run_demo

    for line in run_demo(out, CONFIGS, jobs):
        say(line)


@app.command()
@verb
def doctor(out: OutOption = Path("runs"), as_json: JsonOption = False) -> None:
    """Print versions, device and what is missing.

    Example: python -m emoe_med.brainage doctor
    """
    from emoe_med.brainage.doctor import diagnose

    facts, missing = diagnose(out)
    if as_json:
        say(json.dumps({"facts": facts, "missing": missing}, indent=1))
    else:
        for name, value in facts.items():
            say(f"{name:16} {value}")
        for line in missing:
            say(f"missing: {line}")
    raise typer.Exit(2 if missing else 0)


if __name__ == "__main__":
    app(prog_name="python -m emoe_med.brainage")
