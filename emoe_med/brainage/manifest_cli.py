"""The verbs `manifest bids|glob|ukb`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from emoe_med.training.cli import say, verb

Runs = Literal["first", "last", "all"]
manifest_app = typer.Typer(no_args_is_help=True, help="Build a manifest from scans and a table of ages.")


@manifest_app.command("bids")
@verb
def manifest_bids(
    folder: Annotated[Path, typer.Argument(help="BIDS data set or derivative")],
    output: Annotated[Path, typer.Option("-o", "--output", help="CSV to write")],
    table: Annotated[Path | None, typer.Option("--table", help="ages; default participants.tsv")] = None,
    runs: Annotated[Runs, typer.Option("--runs", help="which scans of one session: first, last or all runs")] = "first",
) -> None:
    """From a BIDS tree, its participants.tsv and sub-*_sessions.tsv, with the brain masks beside the images.

    Example: python -m emoe_med.brainage manifest bids /data/ds000001 -o manifest.csv
    """
    from emoe_med.brainage.manifest_bids import from_bids

    _write_manifest(from_bids(folder, table, runs), output, folder)


@manifest_app.command("glob")
@verb
def manifest_glob(
    folder: Annotated[Path, typer.Argument(help="folder of scans")],
    table: Annotated[Path, typer.Option("--table", help="CSV or TSV with participant_id and age")],
    output: Annotated[Path, typer.Option("-o", "--output", help="CSV to write")],
    pattern: Annotated[str, typer.Option("--pattern", help="file pattern below the folder")] = "**/*.nii.gz",
    mask: Annotated[str | None, typer.Option("--mask", help="file pattern of brain masks below the folder")] = None,
) -> None:
    """From any folder of scans and a table of ages, joined by the participant's id in the path.

    Example: python -m emoe_med.brainage manifest glob scans --table ages.csv --pattern '*_T1w.nii.gz' -o manifest.csv
    """
    from emoe_med.brainage.manifest_glob import from_glob

    _write_manifest(from_glob(folder, pattern, table, mask), output, folder)


@manifest_app.command("ukb")
@verb
def manifest_ukb(
    bulk: Annotated[Path, typer.Option("--bulk", help="folder of <eid>_20252_<instance>_0 folders or zips")],
    table: Annotated[
        Path, typer.Option("--table", help="table of eid and fields 21003, 31, 54; better also 53, 34, 52")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="CSV to write")],
    warped: Annotated[bool, typer.Option("--warped", help="use the nonlinearly warped T1_brain_to_MNI")] = False,
) -> None:
    """From UK Biobank bulk items, unzipped or zipped, and a table of fields; instances 2 and 3.

    Example: python -m emoe_med.brainage manifest ukb --bulk bulk --table fields.csv -o ukb_mine.csv
    """
    from emoe_med.brainage.manifest_ukb import from_ukb

    _write_manifest(from_ukb(bulk, table, warped), output, bulk)


def _write_manifest(built: Any, output: Path, root: Path) -> None:
    from emoe_med.brainage.build_manifest import write_manifest

    write_manifest(built, output)
    for skipped in built.skipped:
        typer.echo(f"skipped: {skipped}", err=True)
    for note in built.notes:
        typer.echo(f"note: {note}", err=True)
    say(f"{output}: {len(built.rows)} scans, {len(built.skipped)} skipped; use it with --data-root {root}")
