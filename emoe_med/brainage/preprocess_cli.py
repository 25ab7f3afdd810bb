"""The verb `preprocess`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

import typer

from emoe_med.errors import EXIT_DATA, EXIT_PARTIAL
from emoe_med.training.cli import say, verb


@verb
def preprocess(
    manifest: Annotated[
        Path, typer.Option("--manifest", help="manifest, or folder: BIDS, fMRIPrep, deepmriprep, FreeSurfer, any heads")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="folder of the results; done scans in it are kept")],
    data_root: Annotated[Path | None, typer.Option("--data-root", help="folder of the manifest's paths")] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=0, help="processes side by side; 0 is one by one")] = 0,
    spacing: Annotated[float, typer.Option("--spacing", help="voxel edge of the results, mm")] = 1.0,
    steps: Annotated[
        Literal["auto", "full", "light"],
        typer.Option("--steps", help="light: the mask you give, no bias field; auto: full where installed"),
    ] = "auto",
) -> None:
    """Take raw T1 heads to the model's space: RAS, brain mask, bias field, affine to MNI152, quality control.

    Writes a manifest of the results for train and predict, qc.tsv and qc.html; look at the page.

    Example: python -m emoe_med.brainage preprocess --manifest ages.csv -o prepared --jobs 4
    """
    from emoe_med.brainage import preprocess as verbs
    from emoe_med.training.progress import counted

    found = verbs.preprocess(
        manifest,
        out,
        spacing_mm=spacing,
        path=steps,
        data_root=data_root,
        jobs=jobs,
        progress=counted("preprocessing scans"),
    )
    for fault in (fault for outcome in found for fault in outcome.faults):
        typer.echo(str(fault), err=True)
    counts = Counter(outcome.status for outcome in found)
    told = ", ".join(f"{counts[status]} {status}" for status in ("ok", "check", "failed") if counts[status])
    say(f"{out / 'manifest.csv'}: {told}; use it with --data-root {out}; look at {out / 'qc.html'}")
    if counts["failed"]:
        raise typer.Exit(EXIT_PARTIAL if counts["failed"] < len(found) else EXIT_DATA)
