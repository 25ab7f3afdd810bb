"""The synthetic cohort keeps its promises: known anatomy, known age effects, true affines, same bytes."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from emoe_med.data.cohort import SITES, draw_person, scan_person, write_cohort
from emoe_med.data.phantom import LABELS, PLANTED_CENTRE_MM, PLANTED_RADII_MM, draw_head
from emoe_med.errors import DataError

SPACING_MM = 4.5


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    return write_cohort(tmp_path_factory.mktemp("cohort") / "new", 24, seed=3, repeat_share=0.4, spacing_mm=SPACING_MM)


def load(path: Path) -> tuple[np.ndarray, np.ndarray]:
    image = nib.load(path)
    return np.asarray(image.dataobj), image.affine


def label(*names: str) -> list[int]:
    return [LABELS.index(name) for name in names]


def fraction_of_brain(row: pd.Series, root: Path, *names: str) -> float:
    return np.isin(load(root / row.labels)[0], label(*names)).sum() / load(root / row["mask"])[0].sum()


def truth(root: Path) -> dict:
    return json.loads((root / "derivatives/phantom/truth.json").read_text())


def test_manifest_and_bids_tables_agree(cohort):
    root, scans = cohort.parent, pd.read_csv(cohort)
    assert list(scans) == ["participant_id", "session_id", "image", "age", "sex", "site", "mask", "labels"]
    assert all((root / path).is_file() for path in pd.concat([scans.image, scans["mask"], scans.labels]))
    people = pd.read_csv(root / "participants.tsv", sep="\t")
    first = scans[scans.session_id == "ses-01"].reset_index(drop=True)
    pd.testing.assert_frame_equal(people, first[list(people)])
    assert set(people.site) == {site.name for site in SITES}
    assert set(people.sex) == {"F", "M"}
    for document in ("dataset_description.json", "derivatives/phantom/dataset_description.json"):
        assert "SYNTHETIC" in json.loads((root / document).read_text())["Name"]
    names = pd.read_csv(root / "derivatives/phantom/dseg.tsv", sep="\t")
    assert tuple(names.name) == LABELS


def test_later_sessions_are_one_to_three_years_later(cohort):
    scans = pd.read_csv(cohort)
    spans = scans.groupby("participant_id").age.agg(np.ptp)[scans.participant_id.value_counts() == 2]
    assert len(spans) >= 5
    assert spans.between(0.98, 3.02).all()
    for person, sessions in scans.groupby("participant_id"):
        table = pd.read_csv(cohort.parent / person / f"{person}_sessions.tsv", sep="\t")
        assert table.age.tolist() == sessions.age.tolist()


def test_ages_fill_the_range_at_any_size():
    for persons in (8, 30):
        ages = np.sort([draw_person(index, seed=5).ages[0] for index in range(persons)])
        assert 20 <= ages[0] < 35
        assert 70 < ages[-1] <= 85
        assert np.diff(ages).max() < 3 * 65 / persons


def test_anatomy_follows_age(cohort):
    root, scans = cohort.parent, pd.read_csv(cohort)
    ventricles = [fraction_of_brain(row, root, "left_ventricle", "right_ventricle") for _, row in scans.iterrows()]
    cortex = [fraction_of_brain(row, root, "left_cortex", "right_cortex") for _, row in scans.iterrows()]
    assert np.corrcoef(ventricles, scans.age)[0, 1] > 0.8
    assert np.corrcoef(cortex, scans.age)[0, 1] < -0.7


def test_planted_region_fades_and_its_mirror_does_not(cohort):
    root, scans = cohort.parent, pd.read_csv(cohort)
    planted, healthy = [], []
    for _, row in scans.iterrows():
        image, labels = load(root / row.image)[0], load(root / row.labels)[0]
        white = image[labels == LABELS.index("right_white_matter")].mean()
        planted.append(image[labels == LABELS.index("planted_region")].mean() / white)
        healthy.append(image[labels == LABELS.index("left_white_matter")].mean() / white)
    assert np.corrcoef(planted, scans.age)[0, 1] < -0.75
    assert abs(np.corrcoef(healthy, scans.age)[0, 1]) < 0.5


def test_sessions_of_a_person_are_alike(cohort):
    root, scans = cohort.parent, pd.read_csv(cohort)
    scans["ventricles"] = [
        fraction_of_brain(row, root, "left_ventricle", "right_ventricle") for _, row in scans.iterrows()
    ]
    repeated = scans.groupby("participant_id").filter(lambda sessions: len(sessions) == 2)
    within = repeated.groupby("participant_id").ventricles.std(ddof=1).pow(2).mean() ** 0.5
    assert within < 0.2 * scans.ventricles.std()


def test_affine_tells_the_truth_in_every_orientation(cohort):
    root, scans = cohort.parent, pd.read_csv(cohort)
    orientations = set()
    for _, row in scans.iterrows():
        labels, affine = load(root / row.labels)
        image_affine = load(root / row.image)[1]
        np.testing.assert_array_equal(affine, image_affine)
        orientations.add(nib.aff2axcodes(affine))
        pose = np.array(truth(root)["pose"][f"{row.participant_id}_{row.session_id}"])
        found = affine @ [*np.argwhere(labels == LABELS.index("planted_region")).mean(0), 1]
        assert np.linalg.norm((found - pose @ [*PLANTED_CENTRE_MM, 1])[:3]) < SPACING_MM / 2
        left = affine @ [*np.argwhere(labels == LABELS.index("left_white_matter")).mean(0), 1]
        right = affine @ [*np.argwhere(labels == LABELS.index("right_white_matter")).mean(0), 1]
        assert left[0] < right[0]
    assert len(orientations) > 10


def test_masking_matters_and_sites_differ(cohort):
    root, scans = cohort.parent, pd.read_csv(cohort)
    white = {}
    for _, row in scans.drop_duplicates("site").iterrows():
        image, brain = load(root / row.image)[0], load(root / row["mask"])[0] > 0
        labels = load(root / row.labels)[0]
        assert not labels[~brain].any()
        white[row.site] = np.median(image[labels == LABELS.index("right_white_matter")])
        assert (image[~brain] > 0.7 * white[row.site]).sum() > 0.2 * brain.sum()  # scalp, face and neck
    assert white["B"] > 1.8 * white["A"]


def test_same_seed_same_bytes_whatever_the_size(tmp_path):
    manifests = [
        write_cohort(tmp_path / name, persons, seed, spacing_mm=8)
        for name, persons, seed in (("a", 2, 1), ("b", 3, 1), ("c", 2, 2))
    ]
    small, large, other = (
        {path.relative_to(manifest.parent): path.read_bytes() for path in sorted(manifest.parent.rglob("sub-*.nii.gz"))}
        for manifest in manifests
    )
    assert small == {path: large[path] for path in small}
    images = [path for path in small if path.name.endswith("_T1w.nii.gz")]
    assert all(other.get(path) != small[path] for path in images)
    assert manifests[1].read_text().startswith(manifests[0].read_text())


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(DataError, match="COH-EXISTS"):
        write_cohort(tmp_path, 1, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def grid(spacing_mm: float) -> np.ndarray:
    axis = np.arange(-120, 121, spacing_mm, dtype=np.float32)
    return np.stack(np.meshgrid(axis, axis, axis, indexing="ij"))


@pytest.mark.parametrize("age", [20.0, 85.0])
def test_volumes_are_those_of_the_ellipsoids(age):
    head = draw_head(grid(2), np.full(3, age), np.zeros(3), planted=True, edge_mm=2)
    planted_ml = (head.labels == LABELS.index("planted_region")).sum() * 8 / 1000
    assert planted_ml == pytest.approx(4 / 3 * np.pi * np.prod(PLANTED_RADII_MM) / 1000, rel=0.03)
    ventricles_ml = np.isin(head.labels, label("left_ventricle", "right_ventricle")).sum() * 8 / 1000
    scale = 0.8 if age == 20 else 1.2
    assert ventricles_ml == pytest.approx(2 * 4 / 3 * np.pi * 8 * 30 * 10 * scale**3 / 1000, rel=0.05)
    assert 1500 < head.brain.sum() * 8 / 1000 < 2200


def test_negative_control_keeps_the_label_and_loses_the_effect():
    old = np.full(3, 85.0)
    with_region, without = (
        draw_head(grid(4), old, np.zeros(3), planted=planted, edge_mm=4) for planted in (True, False)
    )
    np.testing.assert_array_equal(with_region.labels, without.labels)
    region = without.labels == LABELS.index("planted_region")
    assert without.image[region].min() > 0.99
    assert with_region.image[region].mean() < 0.7
    np.testing.assert_array_equal(with_region.image[grid(4)[0] > 0], without.image[grid(4)[0] > 0])


@pytest.mark.parametrize("others_age", [True, False])
def test_the_rest_ages_where_it_is_told_to(others_age):
    person = draw_person(0, 4)
    how = {"planted": True, "spacing_mm": 8.0, "others_age": others_age}
    young, old = (scan_person(person, age, np.random.default_rng(0), **how)[2] for age in (25.0, 80.0))
    count = [np.isin(head.labels, label("left_ventricle", "right_ventricle")).sum() for head in (young, old)]
    assert (count[1] > 1.2 * count[0]) == others_age
    assert others_age or count[0] == count[1]
    inside = young.labels == LABELS.index("planted_region")
    assert old.image[inside].mean() < 0.8 * young.image[inside].mean()
