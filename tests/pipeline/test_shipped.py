"""The command line on the shipped pipeline files: what it would type is what the verbs take."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
import typer
from command_line import typed

from emoe_med.pipeline.__main__ import app
from emoe_med.pipeline.plan import read_pipeline

SHIPPED = sorted((Path(__file__).parents[2] / "pipelines").glob("*.yaml"))
pipeline = typed(app)


def lay_out(folder, path):
    """Make the places of all data and weights that a pipeline asks for, empty, as docs/pipelines.md tells."""
    found = read_pipeline(path)
    for name in ("cifar10", "cifar100", "tiny_imagenet", "imagenet", "weights", "ixi"):
        (folder / name).mkdir()
    for place in filter(None, found.data.model_dump().values()):
        (folder / place).touch()
    for weights in re.findall(r"model\.weights=([\w./]+)", path.read_text()):
        (folder / weights).touch()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_command_of_a_dry_run_is_one_that_its_verb_takes(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lay_out(tmp_path, path)
    Path("mine.csv").touch()
    given = ["--out", tmp_path / "runs"]
    shown = pipeline("run", path, "--dry-run", "--data-root", tmp_path, "--manifest", "mine.csv", *given).stdout
    *lines, last = shown.splitlines()
    labels = [line for line in lines if line.startswith("# ")]
    assert last == f"# {len(labels)} runs: {len(labels)} waiting"
    assert len(pipeline("status", path, *given).stdout.splitlines()) == len(labels) + 1
    assert not (tmp_path / "runs").exists()
    for line in set(lines) - set(labels):
        _, _, module, verb, *rest = shlex.split(line)
        if "--run" in rest:  # which `train` will have made
            run = Path(rest[rest.index("--run") + 1])
            run.mkdir(parents=True, exist_ok=True)
            (run / "config.yaml").touch()
        typer.main.get_command(import_module(f"{module}.__main__").app).commands[verb].make_context(verb, rest)
