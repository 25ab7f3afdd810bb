"""The verb `maps`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from emoe_med.errors import ConfigError, Fault
from emoe_med.training.cli import say, verb


@verb
def maps(
    run: Annotated[Path, typer.Option("--run", help="a run, or an arm with its runs: they are matched and compared")],
    manifest: Annotated[
        Path | None,
        typer.Option("--manifest", help="heads: those of the run, or others; else its maps, shown again"),
    ] = None,
    atlas: Annotated[
        str | None, typer.Option("--atlas", help="file in MNI152, or a name that nilearn fetches; else labels of heads")
    ] = None,
    labels: Annotated[Path | None, typer.Option("--labels", help="table of the names of the labels")] = None,
    everyone: Annotated[bool, typer.Option("--everyone", help="also heads that the run learned from")] = False,
    contribution: Annotated[int, typer.Option("--contribution", min=0, help="heads measured cell by cell")] = 40,
    occlusion: Annotated[int, typer.Option("--occlusion", min=0, help="heads painted grey cell by cell")] = 40,
    data_root: Annotated[Path | None, typer.Option("--data-root", help="folder of the manifest's paths")] = None,
    cache: Annotated[Path | None, typer.Option("--cache", help="volumes in the model's space; beside the runs")] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=0, help="scans read at once; 0 is one by one")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="print a machine-readable summary")] = False,
) -> None:
    """Map which expert handles which part of the brain, with the evidence that it means something.

    Writes RUN/expert_maps: NIfTI, tables over parcels, stability, sanity, montage.png, and viewer.html, a page that
    shows it all. MLflow gets the folder. Without a manifest, page and record are made anew of maps that are there.

    Example: python -m emoe_med.brainage maps --run runs/emoe_4mm --manifest ixi/manifest.csv
    """
    from emoe_med.brainage.map_record import publish_maps
    from emoe_med.brainage.maps.make import MapOptions, make_maps, runs_in
    from emoe_med.data.manifest import read_manifest

    options = MapOptions(atlas, labels, everyone, contribution, occlusion)
    arm = runs_in(run)[0].parent
    if manifest is None:
        if options != MapOptions() or any((data_root, cache, jobs)):
            hint = "without --manifest the maps that are there are shown again, as they are"
            raise ConfigError(Fault("CLI-MANIFEST", "options of new maps without their heads", hint=hint))
        out = run / "expert_maps"
        if not (out / "maps.json").is_file():
            hint = "name the heads by --manifest: a run folder holds no path"
            raise ConfigError(Fault("MAPS-NONE", "this folder has no maps yet", str(out), hint=hint))
    else:
        out = make_maps(run, read_manifest(manifest, data_root), cache or arm.parent / "cache", options, jobs)
    link = publish_maps(out)
    index, found, checks = (json.loads((out / f"{n}.json").read_text()) for n in ("maps", "stability", "sanity"))
    if as_json:
        say(json.dumps({"folder": str(out), "stability": found, **checks, "subjects": index["subjects"]}, indent=1))
        return
    say(f"page: {out / 'viewer.html'}")
    if link:
        say(f"in MLflow, while `ui` runs: {link}")
    say(f"{index['subjects']} heads, {len(index['runs'])} runs, cells of {index['cell_mm']:g} mm: {out}")
    say(f"stability: {found['verdict']}. {found['reason']}")
    for check in checks["checks"]:
        word = {True: "passed", False: "NOT passed", None: "told"}[check["passed"]]
        say(f"{word}: {check['title']}. {check['text']}")
