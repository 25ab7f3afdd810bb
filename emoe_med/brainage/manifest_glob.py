"""Build a manifest from any files and a table of ages."""

from __future__ import annotations

import re
from pathlib import Path

from emoe_med.brainage.age_table import AgeTable
from emoe_med.brainage.build_manifest import Builder, BuiltManifest
from emoe_med.data.scan import identity_from_path, person_key
from emoe_med.errors import ConfigError, Fault


def from_glob(folder: Path, pattern: str, table: Path, mask_pattern: str | None = None) -> BuiltManifest:
    """List the files that match a pattern, with ages from a table.

    A file belongs to the participant whose id stands in its path between separators; the longest one wins, with
    its ``sub-``, and a path with two such ids is skipped. Masks are joined in the same way, by participant and session.

    Args:
        folder: Data root.
        pattern: As ``**/*_T1w.nii.gz``, relative to ``folder``.
        table: ``participant_id``, ``age`` and, where it has one, ``session_id``.
        mask_pattern: Brain masks, relative to ``folder``. These are no images, and an image without exactly
            one of its own is skipped.

    Raises:
        ConfigError: A pattern is empty or absolute.
        DataError: No folder, no table, or a column missing.
    """
    builder = Builder(folder)
    ages = AgeTable(table)

    def identity(path: Path) -> tuple[tuple[str, ...], str]:
        name = builder.name(path)
        return tuple(_ids_in(name, ages.people)), identity_from_path(name)[1]

    masks = _files(folder, mask_pattern) if mask_pattern else []
    masks_of: dict[tuple[tuple[str, ...], str], list[Path]] = {}
    for mask in masks:
        masks_of.setdefault(identity(mask), []).append(mask)
    for image in sorted(set(_files(folder, pattern)) - set(masks)):
        participants, session = identity(image)
        record = ages.find(participants[0], session) if len(participants) == 1 else None
        own = masks_of.get((participants, session), [])
        if len(participants) > 1:
            builder.skip(image, f"path names several participants of {table.name}")
        elif record is None:
            builder.skip(image, f"path names no participant, or no session, of {table.name}")
        elif mask_pattern and len(own) != 1:
            builder.skip(image, f"{len(own) or 'no'} masks name this participant and session")
        else:
            builder.add((participants[0], session), image, record, own[0] if own else None)
    return builder.finish()


def _files(folder: Path, pattern: str) -> list[Path]:
    try:
        return [path for path in folder.glob(pattern) if path.is_file()]
    except (NotImplementedError, ValueError):
        reason = f"{pattern!r} is no pattern of files below a folder"
        raise ConfigError(Fault("CLI-PATTERN", reason, hint="such as '**/*_T1w.nii.gz'")) from None


def _ids_in(path: str, people: set[str]) -> list[str]:
    """Return the longest ids of the table that stand in a path as whole words."""
    words = [match.span() for match in re.finditer(r"[^/_.\- ]+", path)]
    spans = [path[start:end] for i, (start, _) in enumerate(words) for _, end in words[i:]]
    found = {person_key(text): text for text in sorted(spans, key=len) if person_key(text) in people}
    longest = max((len(text) for text in found.values()), default=0)
    return [text for text in found.values() if len(text) == longest]
