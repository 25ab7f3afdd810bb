"""Layouts on disk become rows; whatever is left out is listed with its reason."""

import json
from pathlib import Path

import pandas as pd
import pytest

from emoe_med.brainage.build_manifest import write_manifest
from emoe_med.brainage.manifest_bids import from_bids
from emoe_med.brainage.manifest_glob import from_glob
from emoe_med.brainage.manifest_ukb import from_ukb
from emoe_med.data.manifest import read_manifest
from emoe_med.errors import ConfigError, DataError

TEMPLATE = Path(__file__).parents[2] / "data_manifests" / "ukb.csv"


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


def table(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def rows(built) -> list[tuple[str, ...]]:
    return [tuple(row) for row in built.rows.itertuples(index=False)]


def skipped(built) -> dict[str, str]:
    return {each.path: each.reason for each in built.skipped}


def test_bids_sessions_runs_and_masks(tmp_path):
    touch(
        tmp_path,
        "sub-01/ses-1/anat/sub-01_ses-1_run-1_T1w.nii.gz",
        "sub-01/ses-1/anat/sub-01_ses-1_run-2_T1w.nii.gz",
        "sub-01/ses-2/anat/sub-01_ses-2_T1w.nii",
        "sub-02/anat/sub-02_T1w.nii.gz",
        "sub-02/anat/sub-02_T2w.nii.gz",
        "sub-02/anat/sub-02_desc-brain_mask.nii.gz",
        "sub-03/anat/sub-03_T1w.nii.gz",
        "sub-04/anat/sub-04_T1w.nii.gz",
        "sub-05/anat/sub-05_T1w.nii.gz",
    )
    table(
        tmp_path / "participants.tsv",
        "participant_id\tsex\tage\tsite\thandedness",
        *(
            "sub-01\tF\t60.5\tLeeds\tr",
            "sub-02\tmale\t30\tn/a\tl",
            "sub-04\tF\t89+\tYork\tr",
            "sub-05\tF\tn/a\tYork\tr",
        ),
    )
    table(tmp_path / "sub-01/sub-01_sessions.tsv", "session_id\tage", "ses-1\tn/a", "ses-2\t62.25")
    built = from_bids(tmp_path, runs="all")
    assert list(built.rows.columns) == ["participant_id", "session_id", "image", "age", "sex", "site", "mask"]
    anat = "sub-01/ses-1/anat/sub-01_ses-1_run"
    assert rows(built) == [
        ("sub-01", "ses-1_run-1", f"{anat}-1_T1w.nii.gz", "60.5", "F", "Leeds", ""),
        ("sub-01", "ses-1_run-2", f"{anat}-2_T1w.nii.gz", "60.5", "F", "Leeds", ""),
        ("sub-01", "ses-2", "sub-01/ses-2/anat/sub-01_ses-2_T1w.nii", "62.25", "F", "Leeds", ""),
        ("sub-02", "", "sub-02/anat/sub-02_T1w.nii.gz", "30", "M", "", "sub-02/anat/sub-02_desc-brain_mask.nii.gz"),
    ]
    assert skipped(built) == {
        "sub-03/anat/sub-03_T1w.nii.gz": "participant or session is not in participants.tsv",
        "sub-04/anat/sub-04_T1w.nii.gz": "age is not a number",
        "sub-05/anat/sub-05_T1w.nii.gz": "age is missing",
    }
    assert built.notes == ("2 scans have the age of participants.tsv; other sessions of the person have their own",)
    write_manifest(built, tmp_path / "m.csv")
    scans = read_manifest(tmp_path / "m.csv").scans
    assert [(scan.participant_id, scan.session_id, scan.age) for scan in scans] == [
        (row[0], row[1], float(row[3])) for row in rows(built)
    ]


@pytest.mark.parametrize(("rule", "taken", "left"), [("first", 2, 10), ("last", 10, 2)])
def test_one_run_of_a_session_is_taken_and_the_others_are_told(tmp_path, rule, taken, left):
    """Runs count as numbers; a session without runs and a person without sessions are not touched."""
    anat = "sub-01/ses-1/anat/sub-01_ses-1_run"
    touch(tmp_path, *(f"{anat}-{run}_T1w.nii.gz" for run in (2, 10)))
    touch(tmp_path, "sub-01/ses-2/anat/sub-01_ses-2_T1w.nii.gz")
    touch(tmp_path, *(f"sub-02/anat/sub-02_run-{run}_T1w.nii.gz" for run in (10, 2)))
    table(tmp_path / "participants.tsv", "participant_id\tage", "sub-01\t60.5", "sub-02\t50.5")
    built = from_bids(tmp_path, runs=rule)
    two, other = f"sub-02/anat/sub-02_run-{taken}_T1w.nii.gz", f"sub-02/anat/sub-02_run-{left}_T1w.nii.gz"
    assert set(built.rows["image"]) == {f"{anat}-{taken}_T1w.nii.gz", "sub-01/ses-2/anat/sub-01_ses-2_T1w.nii.gz", two}
    assert skipped(built) == {
        f"{anat}-{left}_T1w.nii.gz": f"another scan of this session was taken, {anat}-{taken}_T1w.nii.gz; "
        "--runs all takes each",
        other: f"another scan of this session was taken, {two}; --runs all takes each",
    }
    assert len(from_bids(tmp_path, runs="all").rows) == 5


def test_bids_ages_may_stand_in_the_sessions_alone(tmp_path):
    touch(tmp_path, *(f"sub-01/ses-{i}/anat/sub-01_ses-{i}_T1w.nii.gz" for i in "123"))
    touch(tmp_path, "sub-02/anat/sub-02_T1w.nii.gz")
    table(tmp_path / "participants.tsv", "participant_id\tsex", "sub-01\tF", "sub-02\tM")
    table(tmp_path / "sub-01/sub-01_sessions.tsv", "session_id\tage", "ses-1\t60.5", "ses-2\tn/a", "ses-3\t64.25")
    built = from_bids(tmp_path)
    assert [(row[1], row[3], row[4]) for row in rows(built)] == [("ses-1", "60.5", "F"), ("ses-3", "64.25", "F")]
    assert skipped(built) == {
        "sub-01/ses-2/anat/sub-01_ses-2_T1w.nii.gz": "age is missing",
        "sub-02/anat/sub-02_T1w.nii.gz": "age is missing",
    }


def test_of_several_versions_the_native_preprocessed_one_is_taken(tmp_path):
    folder = tmp_path / "derivatives" / "prep"
    versions = ("space-MNI_desc-preproc_T1w", "desc-preproc_T1w", "T1w", "space-MNI_T1w")
    touch(folder, *(f"sub-01/anat/sub-01_{version}.nii.gz" for version in versions))
    touch(folder, "sub-01/anat/sub-01_desc-brain_mask.nii.gz", "sub-01/anat/sub-01_space-MNI_desc-brain_mask.nii.gz")
    touch(folder, "sub-02/anat/sub-02_space-MNI_desc-preproc_T1w.nii.gz")
    touch(folder, "sub-02/anat/sub-02_space-MNI_desc-brain_mask.nii.gz", "sub-02/anat/sub-02_desc-brain_mask.nii.gz")
    table(tmp_path / "participants.tsv", "participant_id\tage", "sub-01\t60.5", "sub-02\t61.5")
    built = from_bids(folder)
    image = built.rows["image"].map(lambda name: name.split("/")[-1]).tolist()
    mask = built.rows["mask"].map(lambda name: name.split("/")[-1]).tolist()
    assert image == ["sub-01_desc-preproc_T1w.nii.gz", "sub-02_space-MNI_desc-preproc_T1w.nii.gz"]
    assert mask == ["sub-01_desc-brain_mask.nii.gz", "sub-02_space-MNI_desc-brain_mask.nii.gz"]
    reason = "same participant and session as sub-01/anat/sub-01_desc-preproc_T1w.nii.gz"
    assert set(skipped(built).values()) == {reason}
    assert len(built.skipped) == 3
    assert "1 images are in a template space" in built.notes[0]


def test_bids_with_a_table_of_its_own(tmp_path):
    touch(tmp_path / "bids", *(f"bids/../sub-01/ses-{i}/anat/sub-01_ses-{i}_T1w.nii.gz" for i in "12"))
    ages = table(tmp_path / "ages.csv", "subject_id,session_id,age_years", "01,1,60.5", "01,3,63")
    built = from_bids(tmp_path / "bids", ages)
    assert [row[:2] + row[3:4] for row in rows(built)] == [("sub-01", "ses-1", "60.5")]
    assert list(skipped(built).values()) == ["participant or session is not in ages.csv"]


@pytest.mark.parametrize("unit", ["months", "weeks"])
def test_bids_ages_in_another_unit(tmp_path, unit):
    table(tmp_path / "participants.tsv", "participant_id\tage", "sub-01\t60")
    (tmp_path / "participants.json").write_text(json.dumps({"age": {"Units": unit}}))
    with pytest.raises(DataError, match=f"MAN-UNIT .* '{unit}'"):
        from_bids(tmp_path)
    (tmp_path / "participants.json").write_text(json.dumps({"age": {"Units": "years"}, "sex": "text"}))
    with pytest.raises(DataError, match="MAN-EMPTY"):
        write_manifest(from_bids(tmp_path), tmp_path / "m.csv")
    assert not (tmp_path / "m.csv").exists()


def test_one_age_for_several_sessions_is_noted(tmp_path):
    touch(tmp_path, *(f"sub-01/ses-{i}/anat/sub-01_ses-{i}_T1w.nii.gz" for i in "12"))
    table(tmp_path / "participants.tsv", "participant_id\tage", "sub-01\t60")
    built = from_bids(tmp_path)
    assert [note.split(":")[0] for note in built.notes] == [
        "all ages are whole years",
        "1 participants have several sessions, but one age",
    ]


UKB_FILES = (
    "1000001_20252_2_0/T1/T1_unbiased.nii.gz",
    "1000001_20252_2_0/T1/T1.nii.gz",
    "1000001_20252_2_0/T1/T1_brain_mask.nii.gz",
    "1000001_20252_2_0/T1/T1_brain_to_MNI.nii.gz",
    "1000001_20252_2_0/T1/transforms/T1_to_MNI_linear.mat",
    "1000001_20252_3_0/T1/T1.nii.gz",
    "1000001_20252_3_0/T1/T1_brain_mask.nii.gz",
    "1000002/1000002_20252_2_0/T1/T1.nii.gz",
    "1000002/1000002_20252_2_0/T1/T1_brain.nii.gz",
    "1000002/1000002_20252_2_0/T1/T1_unbiased_brain.nii.gz",
    "1000003_20252_2_0/T1/unusable/T1.nii.gz",
    "1000004_20252_2_0/T1/T1_orig.nii.gz",
    "1000005_20252_2_0/T1/T1_brain.nii.gz",
    "1000006_20252_2_0/T1/T1_brain.nii.gz",
    "10/1000007_20252_2_0.zip",
    "1000008_20252_1_0/T1/T1_brain.nii.gz",
    "1000009_20253_2_0/T2_FLAIR/T2_FLAIR.nii.gz",
)
HEADERS = {
    "converted": "eid,21003-2.0,21003-3.0,31-0.0,54-2.0,54-3.0,9999-0.0",
    "platform": "participant.eid,participant.p21003_i2,p21003_i3,p31,p54_i2,p54_i3,p9999",
    "R": "f.eid,f.21003.2.0,f.21003.3.0,f.31.0.0,f.54.2.0,f.54.3.0,f.9999.0.0",
}


@pytest.mark.parametrize("spelling", HEADERS)
@pytest.mark.parametrize("separator", [",", "\t"])
def test_ukb_layout(tmp_path, spelling, separator):
    bulk = tmp_path / "bulk"
    touch(bulk, *UKB_FILES)
    lines = [
        HEADERS[spelling],
        "1000006,,61,1,11027,11027,x",  # no age at instance 2; order is not that of the folders
        "1000002,70,,1,11026,,x",
        "1000001,60,63,0,11025,11027,x",
        "1000003,50,,0,11025,,x",
    ]
    fields = table(tmp_path / "fields.csv", *(line.replace(",", separator) for line in lines))
    built = from_ukb(bulk, fields)
    assert list(built.rows.columns) == TEMPLATE.read_text().splitlines()[0].split(",")
    first, other = "1000001_20252_2_0/T1/T1", "1000001_20252_3_0/T1/T1"
    brain = "1000002/1000002_20252_2_0/T1/T1_unbiased_brain.nii.gz"
    linear = "1000001_20252_2_0/T1/transforms/T1_to_MNI_linear.mat"
    assert rows(built) == [
        ("1000001", "2", f"{first}_unbiased.nii.gz", "60", "F", "11025", f"{first}_brain_mask.nii.gz", linear),
        ("1000001", "3", f"{other}.nii.gz", "63", "F", "11027", f"{other}_brain_mask.nii.gz", ""),
        ("1000002", "2", brain, "70", "M", "11026", brain, ""),  # above 0 it is its own mask
    ]
    assert skipped(built) == {
        "10/1000007_20252_2_0.zip": "is not a whole zip archive (File is not a zip file)",
        "1000003_20252_2_0": "marked unusable by UK Biobank",
        "1000004_20252_2_0": "no T1 with a brain mask, and no T1_brain",
        "1000005_20252_2_0": "eid is not in fields.csv",
        "1000006_20252_2_0/T1/T1_brain.nii.gz": "age is missing",
        "1000008_20252_1_0": "not a scan of instance 2 or 3",
    }
    assert built.notes[0] == "2 scans lack T1/transforms/T1_to_MNI_linear.mat: then all heads are aligned anew"
    assert built.notes[1].startswith("all ages are whole years")
    write_manifest(built, tmp_path / "m.csv")
    assert len(read_manifest(tmp_path / "m.csv", bulk).scans) == 3


def test_ukb_warped_images_only_on_demand(tmp_path):
    touch(tmp_path, *UKB_FILES)
    fields = table(tmp_path / "fields.csv", "eid,p21003_i2", *(f"100000{i},6{i}" for i in range(1, 9)))
    assert not any("MNI" in row[2] for row in rows(from_ukb(tmp_path, fields)))
    built = from_ukb(tmp_path, fields, warped=True)
    image = "1000001_20252_2_0/T1/T1_brain_to_MNI.nii.gz"
    assert built.rows[["image", "mask", "warped"]].to_numpy().tolist() == [[image, image, "yes"]]
    assert "transform" not in built.rows
    assert built.notes[0].startswith("images are warped nonlinearly")
    assert skipped(built)["1000005_20252_2_0"] == "no T1/T1_brain_to_MNI.nii.gz"


def test_ukb_decimal_age_from_dates(tmp_path):
    touch(tmp_path, *UKB_FILES)
    fields = table(
        tmp_path / "fields.csv",
        "eid,p21003_i2,p21003_i3,p34,p52,p53_i2,p53_i3",
        "1000001,65,67,1950,3,2015-09-15,",  # 65 years and 184 days: 65 + 184 / 365.25 = 65.50
    )
    built = from_ukb(tmp_path, fields)
    assert built.rows["age"].tolist() == ["65.5", "67"]
    assert built.notes[1].startswith("1 scans lack a date that can be read")


def test_ukb_dates_that_cannot_be_read_are_counted(tmp_path):
    touch(tmp_path, *UKB_FILES)
    rows_of = ("1000001,65,67,1950,3,15/09/2015,2017-09-15", "1000002,70,,1950,March,2020-09-15,")
    fields = table(tmp_path / "fields.csv", "eid,p21003_i2,p21003_i3,p34,p52,p53_i2,p53_i3", *rows_of)
    built = from_ukb(tmp_path, fields)
    assert built.rows["age"].tolist() == ["65", "67.5", "70"]
    assert any(note.startswith("2 scans lack a date that can be read") for note in built.notes)


def test_another_instance_is_no_misspelt_column(tmp_path):
    """Ages of the first visit, years before the scan, must not be offered for those at the scan."""
    with pytest.raises(DataError, match="MAN-COLUMN") as caught:
        from_ukb(tmp_path, table(tmp_path / "fields.csv", "eid,21003-0.0", "1000001,55"))
    assert "did you mean" not in str(caught.value)
    assert "write it as '21003-2.0'" in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        (["id,21003-2.0", "1,60"], "MAN-COLUMN"),
        (["eid,31-0.0", "1,0"], "MAN-COLUMN"),
        (["eid,p21003_i2,21003-2.0", "1,60,60"], "MAN-COLUMN"),
        (["eid,p21003_i2", "1,60", "1,60"], "MAN-TWICE"),
        (["eid,p21003_i2", "1,60,7,8"], "MAN-RAGGED"),
        ([""], "MAN-EMPTY"),
        (["eid;p21003_i2", "1;60"], "MAN-DELIMITER"),
    ],
)
def test_field_tables_that_cannot_be_used(tmp_path, lines, code):
    with pytest.raises(DataError, match=code):
        from_ukb(tmp_path, table(tmp_path / "fields.csv", *lines))


def test_what_is_not_there(tmp_path):
    with pytest.raises(DataError, match="MAN-ROOT"):
        from_ukb(tmp_path / "none", tmp_path / "fields.csv")
    with pytest.raises(DataError, match="MAN-FILE"):
        from_ukb(tmp_path, tmp_path / "fields.csv")
    with pytest.raises(DataError, match="give ages by --table"):
        from_bids(tmp_path)


def test_glob_joins_by_id_and_never_by_order(tmp_path):
    touch(tmp_path / "d", "t1/B-2_T1w.nii.gz", "t1/A-1_T1w.nii.gz", "t1/A-1_T2w.nii.gz", "t1/A-10_T1w.nii.gz")
    touch(tmp_path / "d", "t1/C_T1w.nii.gz", "A-1/B-2_again_T1w.nii.gz", "t1/B-2_second_T1w.nii.gz")
    ages = table(
        tmp_path / "a.csv", "subject_id,age,sex,qc_score", "B-2,20.5,f,1", "A,99,f,1", "A-1,10.5,m,", "A-10,30.5,,1"
    )
    built = from_glob(tmp_path / "d", "**/*_T1w.nii.gz", ages)
    assert rows(built) == [
        ("A-10", "", "t1/A-10_T1w.nii.gz", "30.5", "", "", "1"),
        ("A-1", "", "t1/A-1_T1w.nii.gz", "10.5", "M", "", ""),
        ("B-2", "", "t1/B-2_T1w.nii.gz", "20.5", "F", "", "1"),
    ]
    assert skipped(built) == {
        "A-1/B-2_again_T1w.nii.gz": "path names several participants of a.csv",
        "t1/B-2_second_T1w.nii.gz": "same participant and session as t1/B-2_T1w.nii.gz",
        "t1/C_T1w.nii.gz": "path names no participant, or no session, of a.csv",
    }


def test_glob_with_ages_by_session(tmp_path):
    touch(tmp_path, "x1/ses-1/sub-x1_ses-1_T1w.nii", "x1/ses-2/sub-x1_ses-2_T1w.nii")
    ages = table(tmp_path / "a.csv", "participant_id,session_id,age", "x1,2,62.5", "x1,1,60.5")
    assert [row[1:4:2] for row in rows(from_glob(tmp_path, "**/*.nii", ages))] == [("ses-1", "60.5"), ("ses-2", "62.5")]
    ages = table(tmp_path / "a.csv", "participant_id,age", "x1,62.5", "x1,60.5")
    with pytest.raises(DataError, match=r"MAN-TWICE  a\.csv row 3"):
        from_glob(tmp_path, "**/*.nii", ages)


def test_glob_joins_masks_by_participant_and_session(tmp_path):
    images = [f"t1/sub-{i}_ses-{j}_T1w.nii.gz" for i, j in ("11", "12", "21", "31")]
    touch(tmp_path, *images, "masks/sub-1_ses-1_brain.nii.gz", "masks/sub-1_ses-2_brain.nii.gz")
    touch(tmp_path, "masks/sub-3_ses-1_brain.nii.gz", "masks/old/3_brain.nii.gz", "masks/sub-3_ses-1_x_brain.nii.gz")
    ages = table(tmp_path / "a.csv", "participant_id,age", "1,60.5", "2,61.5", "3,62.5")
    built = from_glob(tmp_path, "**/*.nii.gz", ages, "masks/**/*_brain.nii.gz")
    assert list(zip(built.rows["image"], built.rows["mask"], strict=True)) == [
        (images[0], "masks/sub-1_ses-1_brain.nii.gz"),
        (images[1], "masks/sub-1_ses-2_brain.nii.gz"),  # though there is a participant 2
    ]
    assert built.rows["participant_id"].tolist() == ["sub-1", "sub-1"]
    assert skipped(built) == {
        images[2]: "no masks name this participant and session",
        images[3]: "2 masks name this participant and session",
    }


@pytest.mark.parametrize("pattern", ["", "/scans/*.nii.gz"])
def test_what_is_no_pattern(tmp_path, pattern):
    ages = table(tmp_path / "a.csv", "participant_id,age", "1,60.5")
    with pytest.raises(ConfigError, match="CLI-PATTERN"):
        from_glob(tmp_path, pattern, ages)


def test_names_are_quoted_when_written(tmp_path):
    name = 'odd, "name" x1 ü.nii'
    touch(tmp_path, name, "x2.nii")
    ages = table(tmp_path / "a.csv", "participant_id,age", "x1,60.5", "x2,61.5")
    write_manifest(from_glob(tmp_path, "*.nii", ages), tmp_path / "m.csv")
    assert {scan.image for scan in read_manifest(tmp_path / "m.csv").scans} == {tmp_path / name, tmp_path / "x2.nii"}


def test_real_heads_by_glob(real_data, tmp_path):
    source = real_data / "ixi"
    built = from_glob(source, "**/*.nii.gz", source / "participants.csv", "dlmuse/*.nii.gz")
    assert len(built.rows) == 181
    assert [each.reason for each in built.skipped] == ["age is missing"] * 4
    given = pd.read_csv(source / "manifest.csv", dtype=str).set_index("image").sort_index()
    made = built.rows.set_index("image").sort_index()
    assert made["participant_id"].equals(given["participant_id"])
    assert (made["age"].astype(float) == given["age"].astype(float)).all()
    assert made["sex"].equals(given["sex"].fillna(""))
    assert made["mask"].tolist() == given["labels"].tolist()
    write_manifest(built, tmp_path / "m.csv")
    assert all(scan.mask and scan.mask.is_file() for scan in read_manifest(tmp_path / "m.csv", source).scans)
