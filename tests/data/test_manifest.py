"""What a manifest means, column by column. Faults in bulk are in tests/faults/test_manifests.py."""

import hashlib
import unicodedata
from pathlib import Path

import pytest

from emoe_med.data.manifest import inspect_manifest, person_key, read_manifest
from emoe_med.data.scan import identity_from_path, parse_age
from emoe_med.errors import EXIT_DATA, DataError

TEMPLATE = Path(__file__).parents[2] / "data_manifests" / "ukb.csv"


@pytest.fixture(autouse=True)
def _no_root(monkeypatch):
    monkeypatch.delenv("EMOE_MED_DATA_ROOT", raising=False)


def write(folder: Path, text: str | bytes, name: str = "m.csv", images: tuple[str, ...] = ()) -> Path:
    """A manifest, and a file of one byte for each image: nothing opens them here."""
    for image in images:
        (folder / image).parent.mkdir(parents=True, exist_ok=True)
        (folder / image).write_bytes(b"x")
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def faults(path: Path, **options) -> list[tuple[int | None, str]]:
    return [(fault.row, fault.code) for fault in inspect_manifest(path, **options)[1]]


FULL = """participant_id,session_id,image,age,sex,site,mask,labels,family_id,split,weight,qc_score,diagnosis,sha256
s1,2,a.nii.gz,67.25,female,Leeds,m.nii.gz,l.nii.gz,f9,train,0.5,3.25,HC,{digest}
s2,,b.nii.gz,30,M,n/a,,,,test,,,,
"""


def test_every_column_is_read(tmp_path):
    digest = "AB" * 32
    path = write(tmp_path, FULL.format(digest=digest), images=("a.nii.gz", "b.nii.gz", "m.nii.gz", "l.nii.gz"))
    manifest = read_manifest(path)
    first, second = manifest.scans
    assert (first.row, first.participant_id, first.session_id, first.age) == (2, "s1", "2", 67.25)
    assert (first.image, first.mask, first.labels) == tuple(tmp_path / f"{x}.nii.gz" for x in "aml")
    assert (first.sex, first.site, first.family_id, first.split) == ("F", "Leeds", "f9", "train")
    assert (first.weight, first.qc_score, first.diagnosis, first.sha256) == (0.5, 3.25, "HC", digest.lower())
    assert (second.row, second.session_id, second.sex, second.site, second.weight) == (3, "", "M", None, 1.0)
    assert (second.mask, second.labels, second.family_id, second.qc_score) == (None,) * 4
    assert manifest.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert manifest.notes == ()


@pytest.mark.parametrize(
    "header",
    ["subject_id,path,age_years", "eid,image,age", " Participant_ID ,IMAGE,Age", "participant_id\tpath\tage"],
)
def test_names_that_mean_the_same(tmp_path, header):
    row = "\n1,a.nii,50.5\n2,b.nii,60\n"
    text = header + (row.replace(",", "\t") if "\t" in header else row)
    scans = read_manifest(write(tmp_path, text, images=("a.nii", "b.nii"))).scans
    assert [(scan.participant_id, scan.age) for scan in scans] == [("1", 50.5), ("2", 60.0)]


@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_bom_line_ends_and_blank_lines(tmp_path, start, end):
    lines = ["", "image,age,note", "a.nii,50.5,x", "", ",,", "b.nii,60,y", ""]
    path = write(tmp_path, start + end.join(lines), images=("a.nii", "b.nii"))
    assert [(scan.row, scan.age) for scan in read_manifest(path).scans] == [(3, 50.5), (6, 60)]


def test_quoted_cells_keep_line_numbers(tmp_path):
    text = 'image,age,note\n"a, b.nii",50.5,"two\nlines"\n"say ""x"".nii",sixty,\n'
    path = write(tmp_path, text, images=("a, b.nii", 'say "x".nii'))
    manifest, found = inspect_manifest(path)
    assert [scan.image.name for scan in manifest.scans] == ["a, b.nii", 'say "x".nii']
    assert [(fault.row, fault.code) for fault in found] == [(4, "MAN-AGE")]


@pytest.mark.parametrize(
    ("header", "code", "hint"),
    [
        ("imge,age", "MAN-COLUMN", "did you mean 'imge'?"),
        ("image,aeg", "MAN-COLUMN", "did you mean 'aeg'?"),
        ("image,years_old", "MAN-COLUMN", "write it as 'age' or 'age_years'"),
        ("image,age,Splitt", "MAN-COLUMN", "did you mean 'split'?"),
        ("image,age,session", "MAN-COLUMN", "did you mean 'session_id'?"),
        ("image,age,family-id", "MAN-COLUMN", "did you mean 'family_id'?"),
        ("image,age,age", "MAN-COLUMN", "keep one of them"),
        ("image,age,path", "MAN-COLUMN", "keep one of them"),
        ("image,age,eid,subject_id", "MAN-COLUMN", "keep one of them"),
    ],
)
def test_columns_missing_misspelt_or_doubled(tmp_path, header, code, hint):
    cells = {"image": "{}.nii", "imge": "{}.nii", "path": "{}.nii", "age": "5{}", "aeg": "5{}", "split": "train"}
    rows = [",".join(cells.get(name.lower(), "x{}").format(i) for name in header.split(",")) for i in (1, 2)]
    path = write(tmp_path, "\n".join([header, *rows]), images=("1.nii", "2.nii"))
    found = inspect_manifest(path)[1]
    assert [(fault.row, fault.code, fault.hint) for fault in found] == [(1, code, hint)]


@pytest.mark.parametrize("extra", ["weight_kg", "scanner", "field_strength", "education", "age_at_death", "bmi"])
def test_other_columns_are_ignored(tmp_path, extra):
    path = write(tmp_path, f"image,age,{extra}\na.nii,50.5,1\nb.nii,60,2\n", images=("a.nii", "b.nii"))
    assert len(read_manifest(path).scans) == 2


def test_participant_and_session_come_from_the_path(tmp_path):
    images = ("sub-01/ses-a/anat/sub-01_ses-a_run-2_T1w.nii.gz", "1000002_20252_3_0/T1/T1.nii.gz")
    manifest = read_manifest(write(tmp_path, f"image,age\n{images[0]},50.5\n{images[1]},60\n", images=images))
    assert [(s.participant_id, s.session_id) for s in manifest.scans] == [("sub-01", "ses-a_run-2"), ("1000002", "3")]
    assert manifest.notes == ("participant_id of 2 rows was read from the path",)


def test_paths_without_a_name_are_persons_of_their_own(tmp_path):
    path = write(tmp_path, "image,age\nx/a.nii,50.5\ny/a.nii,60\n", images=("x/a.nii", "y/a.nii"))
    manifest = read_manifest(path)
    assert [scan.participant_id for scan in manifest.scans] == ["x/a.nii", "y/a.nii"]
    assert manifest.notes == ("2 rows name no participant: each file counts as its own person",)


@pytest.mark.parametrize(
    ("path", "identity"),
    [
        ("sub-7/anat/sub-7_T1w.nii.gz", ("sub-7", "")),
        (
            "d/sub-7/ses-b/anat/sub-7_ses-b_acq-x_rec-y_run-1_desc-preproc_T1w.nii.gz",
            ("sub-7", "ses-b_acq-x_rec-y_run-1"),
        ),
        ("sub-7/anat/sub-8_T1w.nii.gz", (None, "")),
        ("1234567/1234567_20252_2_0/T1/T1.nii.gz", ("1234567", "2")),
        ("1234567.nii.gz", ("1234567", "")),
        ("1234567/7654321.nii.gz", (None, "")),
        ("12345678/T1.nii.gz", (None, "")),
        ("subject-7/T1.nii.gz", (None, "")),
        ("", (None, "")),
    ],
)
def test_identity_from_path(path, identity):
    assert identity_from_path(path) == identity


def test_spellings_of_one_person():
    assert person_key("sub-Zoë") == person_key(unicodedata.normalize("NFD", "ZOË"))
    assert person_key("01") != person_key("1")


@pytest.mark.parametrize(
    ("text", "age"),
    [
        ("67", 67),
        (" 67.5 ", 67.5),
        ("+67", 67),
        ("1e2", 100),
        ("067", 67),
        (".5", 0.5),
        ("67.", 67),
        ("0", 0),
        ("120", 120),
    ],
)
def test_ages_that_are_read(text, age):
    assert parse_age(text) == (age, "", "")


@pytest.mark.parametrize(
    "text", ["67,5", "67 years", "sixty", "89+", "6_7", "0x43", "६७", "1e999", "inf", "67;5", "--"]
)
def test_ages_that_are_no_number(text):
    age, reason, hint = parse_age(text)
    assert age is None
    assert "not a number" in reason
    assert "decimal years" in hint


@pytest.mark.parametrize("text", ["", " ", "NA", "n/a", "NaN", "nan", "null", "None"])
def test_ages_that_are_missing(text):
    assert parse_age(text)[1] == "age is missing"


def test_months_are_hinted_at_and_never_converted():
    assert parse_age("804") == (None, "age '804' is outside 0 to 120 years", "if it is in months, write 67.0 years")
    assert parse_age("24500")[2] == "write decimal years, such as 67.4"
    assert parse_age("-1")[:2] == (None, "age '-1' is outside 0 to 120 years")


def test_a_long_cell_is_not_quoted():
    """A shifted column would otherwise print who it is."""
    assert parse_age("IXI012-HH-1211")[1] == "age is not a number"
    assert parse_age("1000001")[1] == "age is outside 0 to 120 years"


def test_age_may_be_missing_where_none_is_required(tmp_path):
    path = write(tmp_path, "image,age\na.nii,\nb.nii,60.5\n", images=("a.nii", "b.nii"))
    assert [scan.age for scan in read_manifest(path, require_age=False).scans] == [None, 60.5]
    assert faults(path) == [(2, "MAN-AGE")]
    path = write(tmp_path, "image\na.nii\n")
    assert [scan.age for scan in read_manifest(path, require_age=False).scans] == [None]
    wrong = write(tmp_path, "image,age\na.nii,old\n")
    assert faults(wrong, require_age=False) == [(2, "MAN-AGE")]


def test_units_are_never_guessed(tmp_path):
    text = "image,age,age_unit\na.nii,50.5,years\nb.nii,60,Months\nc.nii,61,\n"
    path = write(tmp_path, text, images=("a.nii", "b.nii", "c.nii"))
    assert faults(path) == [(3, "MAN-UNIT"), (4, "MAN-UNIT")]


@pytest.mark.parametrize(
    ("rows", "code"),
    [
        ("s1,1,a.nii,50.5\ns1,2,b.nii,52", "MAN-COHORT"),
        ("s1,1,a.nii,50.5\nsub-S1,2,b.nii,52", "MAN-COHORT"),
        ("s1,1,a.nii,50.5\ns2,1,b.nii,50.5", "MAN-COHORT"),
        ("", "MAN-EMPTY"),
    ],
)
def test_cohorts_that_cannot_be_learned_from(tmp_path, rows, code):
    path = write(tmp_path, "participant_id,session_id,image,age\n" + rows, images=("a.nii", "b.nii"))
    assert faults(path) == [(None, code)]


def test_half_given_splits(tmp_path):
    text = "image,age,split\na.nii,50.5,train\nb.nii,60,\nc.nii,61,test\n"
    assert faults(write(tmp_path, text, images=("a.nii", "b.nii", "c.nii"))) == [(3, "MAN-SPLIT")]


def test_whole_years_are_noted(tmp_path):
    path = write(tmp_path, "eid,image,age\n1,a.nii,50\n2,b.nii,60\n", images=("a.nii", "b.nii"))
    assert read_manifest(path).notes[0].startswith("all ages are whole years")


@pytest.mark.parametrize(("stored", "written"), [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
def test_accents_composed_or_not(tmp_path, stored, written):
    name = "Zoë/Ångström.nii"
    image = unicodedata.normalize(stored, name)
    text = f"image,age\n{unicodedata.normalize(written, name)},50.5\nb.nii,60\n"
    manifest = read_manifest(write(tmp_path, text, images=(image, "b.nii")))
    assert manifest.scans[0].image == tmp_path / image


def test_names_equal_but_for_case_or_accents_are_told(tmp_path):
    names = ["Å.nii", unicodedata.normalize("NFD", "Å.nii"), "å.nii"]
    text = "image,age\n" + "".join(f"{name},5{i}.5\n" for i, name in enumerate(names))
    assert faults(write(tmp_path, text, images=tuple(names))) == [(3, "MAN-IMAGE"), (4, "MAN-IMAGE")]


def test_a_second_name_of_one_file_is_told_unread(tmp_path):
    write(tmp_path, "", images=("a.nii", "b.nii"))
    (tmp_path / "link.nii").symlink_to("a.nii")
    (tmp_path / "hard.nii").hardlink_to(tmp_path / "b.nii")
    path = write(tmp_path, "image,age\na.nii,50.5\nb.nii,60\nlink.nii,61\nhard.nii,62\n./a.nii,63\n")
    assert faults(path) == [(4, "MAN-IMAGE"), (5, "MAN-IMAGE"), (6, "MAN-IMAGE")]


def test_data_root_is_argument_then_environment_then_folder(tmp_path, monkeypatch):
    text = "image,age\na.nii,50.5\nb.nii,60\n"
    for name in ("argument", "environment", "folder"):
        path = write(tmp_path / name, text, images=("a.nii", "b.nii"))
    assert read_manifest(path).scans[0].image.parent == tmp_path / "folder"
    monkeypatch.setenv("EMOE_MED_DATA_ROOT", str(tmp_path / "environment"))
    assert read_manifest(path).scans[0].image.parent == tmp_path / "environment"
    assert read_manifest(path, tmp_path / "argument").scans[0].image.parent == tmp_path / "argument"


def test_the_template_says_in_one_message_what_is_missing(monkeypatch):
    with pytest.raises(DataError) as caught:
        read_manifest(TEMPLATE)
    (fault,) = caught.value.faults
    assert caught.value.exit_code == EXIT_DATA
    assert fault.code == "MAN-ROOT"
    for part in (
        "ukb.csv",
        str(TEMPLATE.parent),
        "assumed",
        "none of the 6 images",
        "--data-root",
        "EMOE_MED_DATA_ROOT",
    ):
        assert part in str(fault)
    assert "python -m emoe_med.brainage manifest ukb --bulk DIR --table FIELDS.csv -o FILE" in str(fault)
    monkeypatch.setenv("EMOE_MED_DATA_ROOT", "/no/such/folder")
    (fault,) = inspect_manifest(TEMPLATE)[1]
    assert "/no/such/folder  this data root (from EMOE_MED_DATA_ROOT) does not exist" in str(fault)


def test_another_manifest_without_images_gets_no_biobank_advice(tmp_path):
    (fault,) = inspect_manifest(write(tmp_path, "image,age\na.nii,50.5\nb.nii,60\n"))[1]
    assert (fault.code, fault.file) == ("MAN-ROOT", str(tmp_path))
    assert "ukb" not in str(fault)


def test_one_image_of_two_missing_is_a_fault_of_its_row(tmp_path):
    path = write(tmp_path, "image,age\na.nii,50.5\nb.nii,60\n", images=("a.nii",))
    (fault,) = inspect_manifest(path)[1]
    assert str(fault) == "error VOL-MISSING  m.csv row 3  b.nii  file does not exist"
    assert [scan.row for scan in read_manifest(path, check_files=False).scans] == [2, 3]


def test_the_template_is_well_formed_but_for_its_images():
    manifest = read_manifest(TEMPLATE, check_files=False)
    assert len({(scan.participant_id, scan.session_id) for scan in manifest.scans}) == len(manifest.scans) == 6
    for scan in manifest.scans:
        folder = f"{scan.participant_id}_20252_{scan.session_id}_0"
        assert scan.image.relative_to(TEMPLATE.parent).as_posix() == f"{folder}/T1/T1_unbiased_brain.nii.gz"
        assert identity_from_path(str(scan.image)) == (scan.participant_id, scan.session_id)


def test_real_heads(real_data):
    manifest = read_manifest(real_data / "ixi" / "manifest.csv")
    assert len(manifest.scans) == 181
    assert {scan.labels.parent.name for scan in manifest.scans} == {"dlmuse"}
    path = real_data / "ixi" / "participants.csv"
    assert faults(path) == [(row, "MAN-AGE") for row in (182, 183, 184, 186)]
