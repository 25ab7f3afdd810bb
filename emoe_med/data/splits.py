"""Assign scans to train, val and test so that no person and no family is in two of them.

A person's place follows from the person's key, the seed and the stratum (site and decade of age), so that
new rows move few others: inside a stratum persons are ordered by ``sha256(seed, key)`` and the order is cut
into blocks, one per fold (systematic sampling). Blocks of many small strata do not add up evenly; the few
persons that even out each decade, then the whole cohort, are moved after.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from emoe_med.data.scan import SPLITS, Scan, person_key
from emoe_med.errors import DataError, Fault

GIVEN = -1  # fold of a scan whose split was given in the manifest


@dataclass(frozen=True)
class _Person:
    """A participant with family: what a split must not divide."""

    key: str
    stratum: tuple[int, str]  # decade of age, site


def assign_splits(
    scans: Sequence[Scan],
    *,
    seed: int,
    folds: int,
    fold: int,
    val_share: float,
) -> pd.DataFrame:
    """Split scans by person: test is fold ``fold``, val a share of the persons in the other folds.

    A split given in the manifest is used as it is. Else folds hold equally many persons, give or take one,
    and each decade of age is spread over them evenly, and within it each site as far as it goes.

    Args:
        scans: Rows of one manifest.
        seed: Another seed is another partition.
        folds: Number of folds, at least 2.
        fold: The fold to test on, from 0.
        val_share: Share of val among the persons outside the test fold, between 0 and 1.

    Returns:
        Columns row, split (train, val or test) and fold, in the order of ``scans``. Fold is -1 where the
        split was given.

    Raises:
        DataError: ``MAN-SPLIT``, a person in two given splits; ``MAN-COHORT``, a split without scans.
    """
    if folds < 2 or not 0 <= fold < folds or not 0 < val_share < 1:
        raise ValueError(f"{folds=}, {fold=}, {val_share=}: folds >= 2, 0 <= fold < folds, 0 < val_share < 1")
    labels = persons(scans)
    if any(scan.split for scan in scans):
        return _given_splits(scans, labels)
    people = _describe(scans, labels)
    place = _deal(people, [1 / folds] * folds, f"{seed}")
    rest = [person for person in people if place[person.key] != fold]
    val = max(val_share, 1 / len(rest)) if rest else val_share
    is_val = _deal(rest, [1 - val, val], f"{seed} val {fold}")
    keys = [people[label].key for label in labels]
    table = pd.DataFrame(
        {
            "row": [scan.row for scan in scans],
            "split": ["test" if place[key] == fold else ("train", "val")[is_val[key]] for key in keys],
            "fold": [place[key] for key in keys],
        }
    )
    return _filled(table, f"{len(people)} persons in {folds} folds")


def persons(scans: Sequence[Scan], duplicates: Iterable[Sequence[int]] = ()) -> np.ndarray:
    """Number the persons: scans that share participant, family or image, directly or through others.

    Args:
        scans: Rows of one manifest.
        duplicates: Groups of rows that hold one image.

    Returns:
        Person of each scan, from 0, shape [scans].
    """
    index = {scan.row: position for position, scan in enumerate(scans)}
    links: list[tuple[int, Hashable]] = []
    for position, scan in enumerate(scans):
        links.append((position, ("participant", person_key(scan.participant_id))))
        if scan.family_id is not None:
            links.append((position, ("family", scan.family_id.casefold())))
    links += [(index[row], ("image", group)) for group, rows in enumerate(duplicates) for row in rows if row in index]
    nodes = {key: len(scans) + number for number, key in enumerate(dict.fromkeys(key for _, key in links))}
    edges = [(position, nodes[key]) for position, key in links]
    size = len(scans) + len(nodes)
    graph = coo_array((np.ones(len(edges)), tuple(np.array(edges).reshape(-1, 2).T)), shape=(size, size))
    return connected_components(graph, directed=False)[1][: len(scans)]


def split_warnings(scans: Sequence[Scan], splits: pd.DataFrame) -> list[str]:
    """Tell what makes val or test another population than train: ages apart, no site or sex in common."""
    split_of_row = dict(zip(splits["row"], splits["split"], strict=True))
    warnings = []
    for name in ("val", "test"):
        train, other = ([scan for scan in scans if split_of_row[scan.row] == each] for each in ("train", name))
        ages, others = ([scan.age for scan in part if scan.age is not None] for part in (train, other))
        if ages and others and (max(others) < min(ages) or min(others) > max(ages)):
            warnings.append(f"the age ranges of train and {name} do not overlap")
        for column in ("site", "sex"):
            known, seen = ({getattr(scan, column) for scan in part} - {None} for part in (train, other))
            if known and seen and not known & seen:
                warnings.append(f"train and {name} have no {column} in common")
    return warnings


def split_faults(scans: Sequence[Scan], labels: np.ndarray) -> list[Fault]:
    """List every scan of a person whom the manifest's ``split`` column puts in two splits."""
    rows_of: dict[int, dict[str | None, int]] = {}  # person -> split -> first row
    for scan, label in zip(scans, labels, strict=True):
        rows_of.setdefault(label, {}).setdefault(scan.split, scan.row)
    faults = []
    for scan, label in zip(scans, labels, strict=True):
        others = [f"{split} (row {row})" for split, row in rows_of[label].items() if split != scan.split]
        if others:
            reason = f"person is in {scan.split} and in {', '.join(others)}"
            hint = "scans of a person, a family or one image belong in one split"
            faults.append(Fault("MAN-SPLIT", reason, row=scan.row, hint=hint))
    return faults


def _given_splits(scans: Sequence[Scan], labels: np.ndarray) -> pd.DataFrame:
    if faults := split_faults(scans, labels):
        raise DataError(*faults)
    table = pd.DataFrame({"row": [s.row for s in scans], "split": [s.split for s in scans], "fold": GIVEN})
    return _filled(table, "the given splits")


def _filled(table: pd.DataFrame, what: str) -> pd.DataFrame:
    empty = [name for name in SPLITS if name not in set(table["split"])]
    if empty:
        raise DataError(Fault("MAN-COHORT", f"{what} leave {' and '.join(empty)} empty"))
    return table


def _describe(scans: Sequence[Scan], labels: np.ndarray) -> list[_Person]:
    """Describe each person by the scan at the youngest age, which new sessions do not change."""
    groups: list[list[Scan]] = [[] for _ in range(labels.max(initial=-1) + 1)]
    for scan, label in zip(scans, labels, strict=True):
        groups[label].append(scan)
    people = []
    for group in groups:
        first = min(group, key=lambda scan: (math.inf if scan.age is None else scan.age, scan.row))
        decade = -1 if first.age is None else int(first.age // 10)
        people.append(_Person(min(person_key(scan.participant_id) for scan in group), (decade, first.site or "")))
    return people


def _deal(people: Sequence[_Person], shares: Sequence[float], salt: str) -> dict[str, int]:
    """Give each person a place 0, 1, ... in the given shares.

    Source: systematic sampling with a random start in each stratum (Madow & Madow 1944), the order and the
    start being hashes.
    """
    order = {person.key: _uniform(salt, person.key) for person in people}
    strata: dict[tuple[int, str], list[str]] = {}
    for person in people:
        strata.setdefault(person.stratum, []).append(person.key)
    places = {}
    bounds = np.cumsum(shares)[:-1]
    for stratum, keys in strata.items():
        start = _uniform(salt, repr(stratum))
        for rank, key in enumerate(sorted(keys, key=order.__getitem__)):
            places[key] = int(np.searchsorted(bounds, (rank + start) / len(keys), side="right"))
    for decade in sorted({person.stratum[0] for person in people}):
        _even_out([person for person in people if person.stratum[0] == decade], shares, order, places)
    _even_out(people, shares, order, places)
    return places


def _even_out(
    people: Sequence[_Person], shares: Sequence[float], order: Mapping[str, float], places: dict[str, int]
) -> None:
    """Move persons from too full to too empty places until no two differ by more than one.

    Who moves first: one whose decade, then whose stratum, is too full in the same way; then by hash.
    """
    while people:
        counts = Counter(places[person.key] for person in people)
        excess = [counts[place] - share * len(people) for place, share in enumerate(shares)]
        source, target = max(sorted(counts), key=excess.__getitem__), int(np.argmin(excess))
        if excess[source] - excess[target] <= 1 + 1e-9:  # the rest is rounding of the shares
            return
        level = Counter()
        for person in people:
            sign = (places[person.key] == source) - (places[person.key] == target)
            level[person.stratum[0]] += sign
            level[person.stratum] += sign
        candidates = [person for person in people if places[person.key] == source]
        chosen = max(candidates, key=lambda p: (level[p.stratum[0]], level[p.stratum], order[p.key]))
        places[chosen.key] = target


def _uniform(*words: str) -> float:
    """Hash words to [0, 1)."""
    digest = hashlib.sha256("\0".join(words).encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48
