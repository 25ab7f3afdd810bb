"""Command line: python -m emoe_med.vision <verb>. Verbs import what they need when they run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from emoe_med.errors import ConfigError, Fault
from emoe_med.training.cli import holds_run, say, verb
from emoe_med.training.record_cli import sync, ui

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Image classification with an eigenbasis-routed mixture of experts in a vision transformer.",
)


RootOption = Annotated[Path | None, typer.Option("--data-root", help="folder or zip; default EMOE_MED_DATA_ROOT")]
OutOption = Annotated[Path, typer.Option("--out", help="folder of all runs and the tracking store")]
SEED = holds_run("the folder of a seed, as runs/digits_emoe/seed0")
RunOption = Annotated[Path, typer.Option("--run", help="folder of one seed", callback=SEED)]
JsonOption = Annotated[bool, typer.Option("--json", help="print a machine-readable summary")]


@app.command()
@verb
def train(
    dataset: Annotated[
        str | None, typer.Option("--dataset", help="digits, cifar10, cifar100, tiny_imagenet or imagenet")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="run file; the default one of the data set if not given")
    ] = None,
    data_root: RootOption = None,
    out: OutOption = Path("runs"),
    seeds: Annotated[str | None, typer.Option("--seeds", help="training seeds, each a run: 0, or 0,1,2")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with unfinished seeds, skip finished ones")] = False,
    assignments: Annotated[list[str] | None, typer.Option("--set", help="key=value, e.g. training.epochs=9")] = None,
    as_json: JsonOption = False,
) -> None:
    """List, split, train and evaluate; without options, on handwritten digits that need no download.

    Example: python -m emoe_med.vision train --dataset imagenet --data-root ILSVRC2012
    """
    from emoe_med.training.store import served_from
    from emoe_med.vision.run import chosen_run

    _check_dataset(dataset)
    run = chosen_run(config, dataset, assignments)
    numbers = None if seeds is None else _numbers("--seeds", seeds)
    from emoe_med.vision import train as verbs

    run_dirs = verbs.train(run, data_root, out, numbers, resume)
    metrics = {str(run_dir): json.loads((run_dir / "metrics.json").read_text()) for run_dir in run_dirs}
    if as_json:
        say(json.dumps({name: {part: found[part] for part in ("test", "val")} for name, found in metrics.items()}))
        return
    for name, found in metrics.items():
        say(f"{name}: top-1 {_percent(found['test']['top1'])}; top-5 {_percent(found['test']['top5'])}")
    say(f"tracking: python -m emoe_med.vision ui --out {served_from(out)}")


def _check_dataset(name: str | None) -> None:
    from emoe_med.vision.run import DEFAULTS

    if name is not None and name not in DEFAULTS:
        raise ConfigError(Fault("CLI-DATASET", f"--dataset {name}: expected one of {', '.join(DEFAULTS)}"))


def _numbers(option: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 4 for part in parts):
        raise ConfigError(Fault("CLI-NUMBERS", f"{option} {text}: expected whole numbers, as 0,1,2"))
    return [int(part) for part in parts]


def _percent(found: dict[str, Any]) -> str:
    return f"{found['value']:.2f} % [{found['low']:.2f}, {found['high']:.2f}], n = {found['n']}"


@app.command()
@verb
def evaluate(
    run: RunOption,
    data_root: Annotated[
        Path | None, typer.Option("--data-root", help="folder or zip of other images; else the run's predictions")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Score a run again from its predictions, or on other images of its classes.

    Other images lie in a layout of its data set, or in <class>/ of the root; nothing is asked of train/, and not every
    class needs images.

    Example: python -m emoe_med.vision evaluate --run runs/cifar10_emoe_small/seed0 --data-root other_images
    """
    from emoe_med.vision import evaluate as verbs

    if data_root is None:
        metrics, where = verbs.score_again(run), run / "metrics.json"
    else:
        metrics, where = verbs.evaluate_elsewhere(run, data_root)
    if as_json:
        say(json.dumps(metrics, indent=1))
        return
    for name, found in metrics["test"].items():
        say(f"{name} {_percent(found)}")
    say(f"written: {where}")


@app.command()
@verb
def fewshot(
    run: RunOption,
    dataset: Annotated[str | None, typer.Option("--dataset", help="another data set than that of the run")] = None,
    data_root: RootOption = None,
    shots: Annotated[str, typer.Option("--shots", help="supports of each class")] = "1,5,10",
    draws: Annotated[
        int | None, typer.Option("--draws", min=1, help="random draws of supports; 100 for one shot, 5 for more")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Probe the frozen features with a few labelled images of each class.

    By ridge and logistic regression and by the nearest class mean.

    The penalty is chosen on further training images, never on the test images. Probe the dense run beside.

    Example: python -m emoe_med.vision fewshot --run runs/emoe_vit_b/seed0 --dataset cifar100 --data-root CIFAR100
    """
    from emoe_med.vision import fewshot as verbs

    _check_dataset(dataset)
    numbers = _numbers("--shots", shots)
    if 0 in numbers:
        raise ConfigError(Fault("CLI-NUMBERS", f"--shots {shots}: expected 1 and more"))
    report, where = verbs.fewshot(run, dataset, data_root, numbers, draws)
    if as_json:
        say(json.dumps(report, indent=1))
        return
    for shot, by_feature in report.items():
        for feature, by_probe in by_feature.items():
            for probe, found in by_probe.items():
                interval = "" if found["low"] is None else f" [{found['low']:.2f}, {found['high']:.2f}]"
                say(f"{shot:>3}-shot {feature:6} {probe:13} {found['value']:.2f} %{interval}, {found['n']} draws")
    say(f"written: {where}")


@app.command()
@verb
def heatmap(run: RunOption, data_root: RootOption = None, as_json: JsonOption = False) -> None:
    """Count the patches of the test images by expert and class, by layer: table, figures and pictures.

    Example: python -m emoe_med.vision heatmap --run runs/digits_emoe/seed0
    """
    from emoe_med.vision import heatmap as verbs

    figures, where = verbs.heatmap(run, data_root)
    if as_json:
        say(json.dumps(figures, indent=1))
        return
    for layer, found in figures.items():
        say(f"{layer:8} " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()))
    say(f"written: {where}")


@app.command("import-weights")
@verb
def import_weights(
    source: Annotated[
        str, typer.Argument(help="safetensors of timm or Hugging Face, the EMoE authors' .pth, or hub:OWNER/NAME")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="file to write, for model.weights of a run")],
    image_size: Annotated[
        int | None, typer.Option("--image-size", help="interpolate the position embedding to images of this edge")
    ] = None,
    mean: Annotated[str | None, typer.Option("--mean", help="of pixels in 0 to 1, as 0.5,0.5,0.5")] = None,
    std: Annotated[str | None, typer.Option("--std", help="of pixels in 0 to 1")] = None,
) -> None:
    """Check every name and shape of published weights and write them with their normalisation constants.

    These are read from timm's config.json or Hugging Face's preprocessor_config.json beside the file, or given.
    `hub:OWNER/NAME[@REVISION]` is fetched from the Hugging Face hub (extra `hub`); nothing else ever is.

    Example: python -m emoe_med.vision import-weights vit_b/model.safetensors -o vit_b.safetensors
    """
    from emoe_med.vision.hub import PREFIX, fetch
    from emoe_med.vision.weights import import_file

    given = [None if text is None else _constants(name, text) for name, text in (("--mean", mean), ("--std", std))]
    say(import_file(fetch(source) if source.startswith(PREFIX) else Path(source), output, image_size, *given))


def _constants(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(Fault("CLI-NUMBERS", f"{option} {text}: expected numbers, as 0.5,0.5,0.5")) from None


app.command()(ui)
app.command()(sync)

if __name__ == "__main__":
    app(prog_name="python -m emoe_med.vision")
