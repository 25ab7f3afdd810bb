"""What may leave in a record: names by pattern, values that are numbers, known words or digests.

A record may be read by people who must not learn who was scanned. Paths, subject ids, free text and the text
of errors fit no pattern here, so they cannot leave by mistake.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping

# four digits in a row would let a participant number pass as a part of a name
_PART = r"(?!\w*\d{4})[a-z][a-z0-9_]{0,39}"
METRIC = re.compile(rf"(train|val|test|expert|router|map|table|system)(/(E\d{{2,3}}|L\d{{1,3}}|{_PART})){{1,4}}")
# keys of a configuration have a section; a bare word could be anything, a person among them
PARAM = re.compile(rf"{_PART}(\.{_PART}){{1,6}}")
LABEL = re.compile(r"(?!.*\d{4})[A-Za-z][A-Za-z0-9_=.-]{0,79}")  # experiment and run names, chosen by the program
FILE = re.compile(r"(?!sub-)[A-Za-z0-9][A-Za-z0-9_.-]{0,79}")
DIGEST = re.compile(r"[0-9a-f]{40}\+?|[0-9a-f]{64}")
TAGS = frozenset(
    {
        "task",
        "model",
        "dataset",
        "arm",
        "fold",
        "seed",
        "synthetic",
        "config_sha256",
        "manifest_sha256",
        "git_commit",
    }
)
FOLDERS = frozenset({"expert_maps", "report", "config", "metrics", "tables", "figures"})
MAPS = "expert_maps"
MAPS_OF_THINGS = frozenset({"expert_class.html", "expert_class.csv", "mean.png"})  # no person is behind these
MIN_PERSONS = 20  # behind such a map: one of fewer shows the heads themselves
MAP_FILE = re.compile(
    r"(maps|stability|sanity|dataset_description)\.json|(regions|parcels)\.csv|dseg\.tsv|montage\.png|viewer\.html|"
    r"space-[A-Za-z0-9]+(_seg-(?!\w*\d{5})[A-Za-z0-9]+)?_res-[0-9p]{1,5}(_label-E\d{2,3})?(_desc-[a-z]+)?"
    r"_(T1w|probseg|statmap|dseg)\.(nii\.gz|json|tsv)"
)
# configuration keys that hold places or names, whatever their value looks like
_PLACES = re.compile(r"(.*_)?(path|paths|root|dir|folder|file|files|manifest|out|output|uri|host|user|id|name)")


def numbers(values: Mapping[str, object]) -> tuple[dict[str, float | None], list[str]]:
    """Split metrics into those that may leave and the names refused; a non-finite value becomes None."""
    kept: dict[str, float | None] = {}
    refused = []
    for name, value in values.items():
        if METRIC.fullmatch(name) is None or isinstance(value, bool) or not isinstance(value, int | float):
            refused.append(name)
        else:
            kept[name] = float(value) if math.isfinite(value) else None
    return kept, refused


def settings(values: Mapping[str, object], words: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """Split flat configuration values into those that may leave, as text, and the names refused.

    A known name whose value is a place or free text is left out in silence: a configuration is full of them.
    """
    kept: dict[str, str] = {}
    refused = []
    for name, value in values.items():
        if _PLACES.fullmatch(name.rpartition(".")[2]) is not None:
            continue
        if PARAM.fullmatch(name) is None:
            refused.append(name)
        elif _plain(value, words):
            kept[name] = str(value)
    return kept, refused


def labels(values: Mapping[str, object], words: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """Split tags into those that may leave, as text, and the names refused."""
    kept: dict[str, str] = {}
    refused = []
    for name, value in values.items():
        digest = isinstance(value, str) and DIGEST.fullmatch(value) is not None
        if name in TAGS and (_plain(value, words) or digest):
            kept[name] = str(value)
        else:
            refused.append(name)
    return kept, refused


def may_leave(folder: str, name: str, persons: float) -> bool:
    """Tell whether a file may leave as an artifact.

    Args:
        folder: Of the artifact.
        name: Of the file.
        persons: Behind it, for the maps of a group; drawn heads count as infinitely many.
    """
    if folder not in FOLDERS or FILE.fullmatch(name) is None:
        return False
    if folder != MAPS or name in MAPS_OF_THINGS:
        return True
    return persons >= MIN_PERSONS and MAP_FILE.fullmatch(name) is not None


def picture_may_leave(key: str, persons: float) -> bool:
    """Tell whether a picture of a group of heads may leave under a key, which is made like a metric's name."""
    return METRIC.fullmatch(key) is not None and persons >= MIN_PERSONS


def _plain(value: object, words: Collection[str]) -> bool:
    if isinstance(value, list | tuple):
        return all(isinstance(item, bool | int | float) for item in value)
    return value is None or isinstance(value, bool | int | float) or value in words
