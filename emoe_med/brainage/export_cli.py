"""The verbs `export` and `selftest`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from emoe_med.errors import EXIT_PARTIAL
from emoe_med.training.cli import holds_run, say, verb

FOLD = holds_run("the folder of a fold, as runs/emoe_4mm/seed0-fold0")
RunOption = Annotated[Path, typer.Option("--run", help="folder of one fold and seed", callback=FOLD)]


@verb
def export(
    run: RunOption,
    out: Annotated[Path, typer.Option("-o", "--out", help="folder of the bundle, new or empty")],
) -> None:
    """Write a run as a MONAI bundle: weights, contract, self-test, model card. No id, no path, no person's image.

    Complete the cells of docs/README.md that only its author can fill.

    Example: python -m emoe_med.brainage export --run runs/emoe_4mm/seed0-fold0 -o bundle
    """
    from emoe_med.brainage import export as verbs

    bundle = verbs.export(run, out)
    digests = len(bundle.record["meta"]["seen"])
    say(f"{out}: written, read back, self-test passed; it holds digests of {digests} training scans, no names")
    say(
        f"complete {out / 'docs' / 'README.md'}, then: python -m monai.bundle run --config_file "
        f"{out / 'configs' / 'inference.json'} --bundle_root {out} --input HEAD --output ages.csv"
    )


@verb
def selftest(
    bundle: Annotated[Path, typer.Option("--bundle", help="folder that `export` wrote")],
    as_json: Annotated[bool, typer.Option("--json", help="print a machine-readable summary")] = False,
) -> None:
    """Tell whether this machine gives a bundle's numbers: a drawn head, stage by stage, against what is stored.

    Exit codes: 0 the same numbers, 8 some stage differs, 4 the bundle is damaged or of another version.

    Example: python -m emoe_med.brainage selftest --bundle bundle
    """
    from dataclasses import asdict

    from emoe_med.brainage import selftest as verbs
    from emoe_med.brainage.bundle import load_bundle

    read = load_bundle(bundle)
    stages, others = verbs.selftest(read), verbs.other_versions(read)
    same = all(stage.same for stage in stages)
    if as_json:
        told = [asdict(stage) | {"same": stage.same} for stage in stages]
        say(json.dumps({"same": same, "stages": told, "other": others}, indent=1))
    else:
        for line in (*map(str, stages), *(f"other   {text}" for text in others)):
            say(line)
        say("this machine gives the same numbers" if same else "this machine gives OTHER numbers")
    if not same:
        raise typer.Exit(EXIT_PARTIAL)
