"""Assign scans to train, val and test so that no person, family or twice-named image is in two of them.

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
    """A participant with family and duplicates: what a split must not divide."""

    key: str
    participants: tuple[str, ...]
    rows: tuple[int, ...]
    stratum: tuple[int, str]  # decade of age, site


def assign_splits(
    scans: Sequence[Scan],
    *,
    seed: int,
    folds: int,
    fold: int,
    val_share: float,
    previous: Mapping[str, int] | None = None,
    duplicates: Iterable[Sequence[int]] = (),
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
        previous: Participant to fold of an earlier cohort (`folds_of_participants`). These keep their
            fold, and stay in or out of val as that cohort had it, so that a grown cohort can be compared.
        duplicates: Groups of rows that hold one image.

    Returns:
        Columns row, split (train, val or test) and fold, in the order of ``scans``. Fold is -1 where the
        split was given.

    Raises:
        DataError: ``MAN-SPLIT``, a person in two given splits or two earlier folds; ``MAN-COHORT``, too few
            persons, or a split without scans.
    """
    if folds < 2 or not 0 <= fold < folds or not 0 < val_share < 1:
        raise ValueError(f"{folds=}, {fold=}, {val_share=}: folds >= 2, 0 <= fold < folds, 0 < val_share < 1")
    labels = persons(scans, duplicates)
    if any(scan.split for scan in scans):
        return _given_splits(scans, labels)
    earlier = {person_key(participant): place for participant, place in (previous or {}).items()}
    people = _describe(scans, labels, earlier)
    fixed = _earlier_places(people, earlier, folds)
    place = _deal(people, [1 / folds] * folds, f"{seed}", fixed)
    rest = [person for person in people if place[person.key] != fold]
    is_val = _draw_val(rest, val_share, f"{seed} val {fold}", fixed)
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


def folds_of_participants(scans: Sequence[Scan], splits: pd.DataFrame) -> dict[str, int]:
    """Join an earlier ``splits.csv`` to its manifest: the fold of each participant, for ``previous``."""
    fold_of_row = dict(zip(splits["row"], splits["fold"], strict=True))
    return {
        person_key(scan.participant_id): int(fold_of_row[scan.row])
        for scan in scans
        if fold_of_row.get(scan.row, GIVEN) != GIVEN
    }


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


def _describe(scans: Sequence[Scan], labels: np.ndarray, earlier: Mapping[str, int]) -> list[_Person]:
    """Describe each person by the scan at the youngest age, which new sessions and relatives do not change."""
    groups: list[list[Scan]] = [[] for _ in range(labels.max(initial=-1) + 1)]
    for scan, label in zip(scans, labels, strict=True):
        groups[label].append(scan)
    people = []
    for group in groups:
        participants = sorted({person_key(scan.participant_id) for scan in group})
        known = [key for key in participants if key in earlier]
        basis = [scan for scan in group if person_key(scan.participant_id) in known] or group
        first = min(basis, key=lambda scan: (math.inf if scan.age is None else scan.age, scan.row))
        decade = -1 if first.age is None else int(first.age // 10)
        rows = tuple(scan.row for scan in group)
        stratum = (decade, first.site or "")
        people.append(_Person((known or participants)[0], tuple(participants), rows, stratum))
    return people


def _earlier_places(people: Sequence[_Person], earlier: Mapping[str, int], folds: int) -> dict[str, int]:
    """Return the fold of each person known before; refuse those whom a new link found in two folds."""
    places, faults = {}, []
    for person in people:
        found = {earlier[key] for key in person.participants if key in earlier}
        if len(found) > 1 or any(not 0 <= place < folds for place in found):
            reason = f"person was in fold {' and '.join(map(str, sorted(found)))} of the earlier splits"
            faults += [Fault("MAN-SPLIT", reason, row=row, hint=f"now there are {folds} folds") for row in person.rows]
        elif found:
            places[person.key] = found.pop()
    if faults:
        raise DataError(*faults)
    return places


def _draw_val(rest: Sequence[_Person], share: float, salt: str, fixed: Mapping[str, int]) -> dict[str, int]:
    """Draw val (1) from the persons outside the test fold: the known ones as they were, then the new."""
    known = [person for person in rest if person.key in fixed]

    def draw(people: Sequence[_Person], settled: Mapping[str, int]) -> dict[str, int]:
        val = max(share, 1 / len(people)) if people else share
        return _deal(people, [1 - val, val], salt, settled)

    return draw(rest, draw(known, {}))


def _deal(people: Sequence[_Person], shares: Sequence[float], salt: str, settled: Mapping[str, int]) -> dict[str, int]:
    """Give each person a place 0, 1, ... in the given shares; ``settled`` ones stay.

    Source: systematic sampling with a random start in each stratum (Madow & Madow 1944), the order and the
    start being hashes.
    """
    places = {person.key: settled[person.key] for person in people if person.key in settled}
    order = {person.key: _uniform(salt, person.key) for person in people if person.key not in places}
    strata: dict[tuple[int, str], list[str]] = {}
    for person in people:
        if person.key in order:
            strata.setdefault(person.stratum, []).append(person.key)
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
    """Move persons of ``order`` from too full to too empty places until no two differ by more than one.

    Who moves first: one whose decade, then whose stratum, is too full in the same way; then by hash.
    """
    while True:
        counts = Counter(places[person.key] for person in people)
        excess = [counts[place] - share * len(people) for place, share in enumerate(shares)]
        movable = [person for person in people if person.key in order]
        sources = {places[person.key] for person in movable}
        if not sources:
            return
        source, target = max(sources, key=excess.__getitem__), int(np.argmin(excess))
        if excess[source] - excess[target] <= 1 + 1e-9:  # the rest is rounding of the shares
            return
        level = Counter()
        for person in people:
            sign = (places[person.key] == source) - (places[person.key] == target)
            level[person.stratum[0]] += sign
            level[person.stratum] += sign
        candidates = [person for person in movable if places[person.key] == source]
        chosen = max(candidates, key=lambda p: (level[p.stratum[0]], level[p.stratum], order[p.key]))
        places[chosen.key] = target


def _uniform(*words: str) -> float:
    """Hash words to [0, 1)."""
    digest = hashlib.sha256("\0".join(words).encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48
