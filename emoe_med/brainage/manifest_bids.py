"""Build a manifest from a BIDS data set: participants.tsv, the sessions of each participant, runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Literal

from emoe_med.brainage.age_table import AgeTable, read_columns, session_key
from emoe_med.brainage.build_manifest import Builder, BuiltManifest
from emoe_med.data.scan import KNOWN, YEARS, identity_from_path, person_key
from emoe_med.errors import DataError, Fault

Runs = Literal["first", "last", "all"]


def from_bids(folder: Path, table: Path | None = None, runs: Runs = "first") -> BuiltManifest:
    """List the T1w images of a BIDS data set, raw or derivative.

    Of several versions of one scan the one in native space is taken, preprocessed before raw; a
    ``desc-brain_mask`` beside it becomes its mask. Runs and acquisitions are told apart in ``session_id``.

    Args:
        folder: Data set with ``sub-*/[ses-*/]anat``.
        table: Ages by ``participant_id`` and, where it has one, ``session_id``; default ``participants.tsv``,
            for a derivative also that of its raw data set. An age in ``sub-*_sessions.tsv`` comes first.
        runs: Which scans of one session are taken: that of the lowest or highest run number (of several, the first by
            name), or all of them.

    Raises:
        DataError: No folder, no table, a column missing, or an age unit other than years.
    """
    builder = Builder(folder)
    homes = [folder, folder.parent.parent] if folder.parent.name == "derivatives" else [folder]
    tables = [home / "participants.tsv" for home in homes if (home / "participants.tsv").is_file()]
    if not (table or tables):
        raise DataError(Fault("MAN-FILE", "no participants.tsv; give ages by --table", file=str(folder)))
    source = table or tables[0]
    _check_unit(source.with_suffix(".json"))
    files = sorted(source.parent.glob("sub-*/sub-*_sessions.tsv"))
    ages = AgeTable(source, ages_elsewhere=bool(files))
    with_ages = _add_sessions(ages, files)
    taken: dict[tuple[str, str], str] = {}  # participant and session -> its image
    borrowed = 0
    images = [path for depth in ("sub-*", "sub-*/ses-*") for path in folder.glob(f"{depth}/anat/*_T1w.nii*")]
    for image in sorted(images, key=lambda image: _rank(image, runs)):
        participant, session = identity_from_path(builder.name(image))
        record = ages.find(participant, session) if participant else None
        if participant is None or record is None:
            builder.skip(image, f"participant or session is not in {source.name}")
            continue
        visit = (participant, session_key(session) if session.startswith("ses-") else "")
        if runs != "all" and visit in taken and (participant, session) not in builder.taken:
            builder.skip(image, f"another scan of this session was taken, {taken[visit]}; --runs all takes each")
            continue
        mask = image.with_name(re.sub(r"(_desc-[^_]+)?_T1w(\.nii.*)$", r"_desc-brain_mask\2", image.name))
        builder.add((participant, session), image, record, mask if mask.is_file() else None)
        if builder.taken.get((participant, session)) == builder.name(image):
            taken[visit] = builder.name(image)
            borrowed += (person_key(participant), visit[1]) not in with_ages and any(
                person == person_key(participant) for person, _ in with_ages
            )
    notes = []
    if spaces := sum("_space-" in row["image"] for row in builder.rows):
        notes.append(f"{spaces} images are in a template space: a nonlinear warp hides age; prefer native images")
    if borrowed:
        notes.append(f"{borrowed} scans have the age of {source.name}; other sessions of the person have their own")
    return builder.finish(*notes)


def _add_sessions(ages: AgeTable, files: list[Path]) -> set[tuple[str, str]]:
    """Add the sessions of each participant; returns participant and session of those with an age of their own."""
    found = set()
    for path in files:
        sessions = read_columns(path, KNOWN, ("session_id",))
        ages.add(((line, {**cells, "participant_id": path.parent.name}) for line, cells in sessions), path.name)
        person = person_key(path.parent.name)
        found |= {(person, session_key(cells["session_id"])) for _, cells in sessions if cells.get("age")}
    return found


def _rank(image: Path, runs: Runs) -> tuple[bool, bool, str, int, str]:
    """Sort native before template, preprocessed before raw, then by run number and name."""
    run = re.search(r"_run-(\d+)_", image.name)
    number = int(run[1]) if run else 0
    return (
        "_space-" in image.name,
        "_desc-preproc" not in image.name,
        image.parent.as_posix(),
        -number if runs == "last" else number,
        image.name,
    )


def _check_unit(sidecar: Path) -> None:
    if not sidecar.is_file():
        return
    try:
        age = json.loads(sidecar.read_text(encoding="utf-8")).get("age", {})
        unit = age.get("Units", "years") if isinstance(age, dict) else "years"
    except (ValueError, AttributeError) as error:
        raise DataError(Fault("MAN-FILE", f"cannot be read as JSON: {error}", file=str(sidecar))) from None
    if str(unit).casefold() not in YEARS:
        raise DataError(Fault("MAN-UNIT", f"age is given in {unit!r}, not in years", file=str(sidecar)))
