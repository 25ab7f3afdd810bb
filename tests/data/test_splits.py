"""Nobody is in two splits, shares are kept, strata are spread, and few move when a cohort grows."""

from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from emoe_med.data.manifest import Scan, read_manifest
from emoe_med.data.splits import assign_splits, persons, split_faults, split_warnings
from emoe_med.errors import DataError

IMAGE = Path("t1.nii.gz")  # nothing opens it
OPTIONS = {"seed": 0, "folds": 5, "fold": 0, "val_share": 0.1}


def scan(row: int, person: str, age: float | None = 50.0, session: str = "1", **more) -> Scan:
    return Scan(row, IMAGE, age, person, session, **more)


def cohort(rng: np.random.Generator, num_persons: int, num_sites: int, first_row: int = 2) -> list[Scan]:
    """Persons with 1 to 5 sessions a year apart; one in eight has a relative in the cohort."""
    scans = []
    for person in range(num_persons):
        age, site = rng.uniform(8, 95), f"site {rng.integers(num_sites)}"
        family = f"family {rng.integers(num_persons // 8 + 1)}" if rng.random() < 0.25 else None
        for session in range(rng.integers(1, 6)):
            row = first_row + len(scans)
            scans.append(scan(row, f"p{person:03d}", age + session, str(session), site=site, family_id=family))
    return scans


def by_person(scans: list[Scan], table: pd.DataFrame, column: str) -> dict[int, set]:
    found: dict[int, set] = {}
    for label, value in zip(persons(scans), table[column], strict=True):
        found.setdefault(label, set()).add(value)
    return found


@pytest.mark.parametrize("block", range(10))
def test_500_random_cohorts(block):
    for number in range(50):
        rng = np.random.default_rng([block, number])
        scans = cohort(rng, int(rng.integers(10, 301)), int(rng.integers(1, 9)))
        rows = [each.row for each in scans]
        folds, val_share = int(rng.integers(2, 9)), float(rng.uniform(0.05, 0.3))
        fold = int(rng.integers(folds))
        table = assign_splits(scans, seed=block, folds=folds, fold=fold, val_share=val_share)
        assert list(table["row"]) == rows
        splits = by_person(scans, table, "split")
        assert all(len(found) == 1 for found in splits.values())
        places = by_person(scans, table, "fold")
        assert all(len(found) == 1 for found in places.values())
        assert all((places[label] == {fold}) == (splits[label] == {"test"}) for label in splits)
        sizes = Counter(next(iter(found)) for found in places.values())
        assert max(sizes.values()) - min(sizes[k] for k in range(folds)) <= 1
        counts, total = Counter(next(iter(found)) for found in splits.values()), len(splits)
        if total >= 100:
            assert abs(counts["test"] / total - 1 / folds) < 0.02
            assert abs(counts["val"] / total - val_share * (1 - 1 / folds)) < 0.02


def test_new_sessions_move_nobody():
    rng = np.random.default_rng(3)
    old = cohort(rng, 80, 3)
    later = [scan(1000 + i, each.participant_id, each.age + 12, "late", site="new") for i, each in enumerate(old[:40])]
    before = assign_splits(old, **OPTIONS)
    after = assign_splits([*old, *later], **OPTIONS)
    pd.testing.assert_frame_equal(after.iloc[: len(old)], before)


def test_newcomers_move_few():
    rng = np.random.default_rng(1)
    grown = [each for each in cohort(rng, 1010, 4) if each.session_id == "0"]
    before = assign_splits(grown[:1000], **OPTIONS)
    after = assign_splits(grown, **OPTIONS).iloc[:1000]
    assert (before["fold"] != after["fold"]).mean() < 0.05  # reshuffling would move 80 %


def test_order_of_rows_and_spelling_do_not_matter():
    scans = cohort(np.random.default_rng(5), 70, 3)
    table = assign_splits(scans, **OPTIONS)
    turned = assign_splits(scans[::-1], **OPTIONS)
    pd.testing.assert_frame_equal(turned.iloc[::-1].reset_index(drop=True), table)


def test_seeds_and_folds_differ():
    scans = cohort(np.random.default_rng(6), 100, 2)
    first, other = (assign_splits(scans, **OPTIONS | {"seed": seed}) for seed in (0, 1))
    assert (first["fold"] != other["fold"]).mean() > 0.5
    fold_1 = assign_splits(scans, **OPTIONS | {"fold": 1})
    assert list(fold_1["fold"]) == list(first["fold"])
    assert set(first["row"][first["split"] == "test"]).isdisjoint(fold_1["row"][fold_1["split"] == "test"])


def test_every_decade_and_big_site_is_spread():
    rng = np.random.default_rng(2)
    scans = [scan(i, f"p{i}", 20 + i % 60, site=f"s{rng.integers(2)}") for i in range(600)]
    table = assign_splits(scans, **OPTIONS)
    decades = pd.crosstab(table["fold"], [int(each.age // 10) for each in scans])
    assert np.ptp(decades.to_numpy(), axis=0).max() <= 2  # 100 persons a decade: 20 in each fold
    sites = pd.crosstab(table["fold"], [each.site for each in scans])
    assert np.ptp(sites.to_numpy(), axis=0).max() <= 12


def test_one_person_per_site_still_spreads_age():
    scans = [scan(i, f"p{i}", 20 + i % 60, site=f"s{i}") for i in range(300)]
    table = assign_splits(scans, **OPTIONS).assign(age=[each.age for each in scans])
    assert np.ptp(table.groupby("fold")["age"].mean()) < 3


def test_links_run_through_family_and_image():
    scans = [
        scan(2, "a"),
        scan(3, "sub-A", session="2"),
        scan(4, "b", family_id="F"),
        scan(5, "c", family_id="f"),
        scan(6, "d"),
        scan(7, "e"),
    ]
    assert list(persons(scans)) == [0, 0, 1, 1, 2, 3]
    assert list(persons(scans, [(3, 4), (5, 6)])) == [0, 0, 0, 0, 0, 1]
    assert list(persons(scans, [(3, 999)])) == [0, 0, 1, 1, 2, 3]


def test_given_splits_are_used():
    scans = [scan(i, f"p{i}", split=split) for i, split in enumerate(["train", "test", "val", "train"])]
    table = assign_splits(scans, **OPTIONS)
    assert list(table["split"]) == ["train", "test", "val", "train"]
    assert set(table["fold"]) == {-1}


def test_a_person_in_two_given_splits_is_refused_with_all_rows():
    places = [("a", "train"), ("a", "test"), ("b", "val"), ("c", "train"), ("d", "test")]
    scans = [scan(2 + i, person, session=str(i), split=split) for i, (person, split) in enumerate(places)]
    with pytest.raises(DataError) as caught:
        assign_splits(scans, **OPTIONS)
    assert [(fault.code, fault.row) for fault in caught.value.faults] == [("MAN-SPLIT", row) for row in (2, 3)]
    found = split_faults(scans, persons(scans, [(5, 6)]))  # one image under two names
    assert [fault.row for fault in found] == [2, 3, 5, 6]
    assert "person is in train and in test (row 3)" in str(caught.value)


def test_an_empty_split_is_refused():
    scans = [scan(i, f"p{i}", split=split) for i, split in enumerate(["train", "test", "train"])]
    with pytest.raises(DataError, match="leave val empty"):
        assign_splits(scans, **OPTIONS)
    with pytest.raises(DataError, match="MAN-COHORT"):
        assign_splits([scan(1, "a"), scan(2, "b")], **OPTIONS | {"folds": 2})


@pytest.mark.parametrize("count", [3, 4, 5, 7])
def test_smallest_cohorts(count):
    for fold in range(2):
        try:
            table = assign_splits(
                [scan(i, f"p{i}", None) for i in range(count)], **OPTIONS | {"folds": 2, "fold": fold}
            )
        except DataError:
            assert count == 3  # two in the test fold leave one for train and val
        else:
            assert set(table["split"]) == {"train", "val", "test"}


@pytest.mark.parametrize("wrong", [{"folds": 1}, {"fold": 5}, {"fold": -1}, {"val_share": 0}, {"val_share": 1}])
def test_options_out_of_range(wrong):
    with pytest.raises(ValueError, match="folds >= 2"):
        assign_splits(cohort(np.random.default_rng(0), 20, 1), **OPTIONS | wrong)


def test_warnings_of_another_population():
    places = [("train", 20, "A", "F"), ("train", 40, "A", "M"), ("val", 30, "A", "M"), ("test", 60, "B", None)]
    scans = [scan(i, f"p{i}", age, site=site, sex=sex) for i, (_, age, site, sex) in enumerate(places)]
    table = pd.DataFrame({"row": range(4), "split": [place[0] for place in places], "fold": -1})
    assert split_warnings(scans, table) == [
        "the age ranges of train and test do not overlap",
        "train and test have no site in common",
    ]


def test_folds_of_real_heads_have_one_mean_age(real_data):
    scans = read_manifest(real_data / "ixi" / "manifest.csv").scans
    ages = [each.age for each in scans]
    assert np.std(ages) > 15
    for seed in range(10):
        table = assign_splits(scans, **OPTIONS | {"seed": seed}).assign(age=ages)
        assert (abs(table.groupby("fold")["age"].mean() - np.mean(ages)) < 2).all()
        assert sorted(table.groupby("fold").size()) == [36, 36, 36, 36, 37]
        assert abs(table.loc[table["split"] == "val", "age"].mean() - np.mean(ages)) < 4
        assert split_warnings(scans, table) == []
