"""Fault tests of manifests: B1 to B8 of the list in docs/reliability.md, but for B3: tests/data/test_splits.py."""

import contextlib
import csv
import gzip
import os
import resource
import socket
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_volumes import flip_bit, nifti, oblique_affine, packed, phantom

from emoe_med.brainage.check import check_manifest, look_through
from emoe_med.data.manifest import inspect_manifest, read_manifest
from emoe_med.data.paths import check_path, find_data_root
from emoe_med.errors import EXIT_DATA, DataError

COLUMNS = ("participant_id", "session_id", "image", "age", "sex", "site", "mask", "labels", "split", "weight")
COLUMNS += ("qc_score", "sha256", "age_unit")
SMALL = (8, 9, 10)


@pytest.fixture(autouse=True)
def _no_root(monkeypatch):
    monkeypatch.delenv("EMOE_MED_DATA_ROOT", raising=False)


def head(seed: int, shape=SMALL, dtype: str = "i2", **fields) -> bytes:
    return packed(nifti(phantom(shape, seed, dtype), **fields))


def write_table(path: Path, rows: list[dict[str, str]], columns=COLUMNS) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns, lineterminator="\n", restval="", quoting=csv.QUOTE_ALL)
        table.writeheader()
        table.writerows(rows)
    return path


def found(path: Path, **options) -> list[tuple[int | None, str]]:
    """Row and code of each fault, the file being no table included."""
    try:
        return [(fault.row, fault.code) for fault in inspect_manifest(path, **options)[1]]
    except DataError as error:
        return [(fault.row, fault.code) for fault in error.faults]


# --- B1: one manifest of 200 rows, more than 60 planted faults of more than 30 kinds, one run -------------------


def good_row(root: Path, row: int) -> dict[str, str]:
    (root / f"h{row}.nii.gz").write_bytes(head(row))
    split = ("train", "val", "test")[row % 3]
    place = {"participant_id": f"p{row}", "session_id": "1", "image": f"h{row}.nii.gz", "split": split}
    return place | {"age": f"{20 + row / 4}", "sex": "FM"[row % 2], "age_unit": "years", "weight": "1"}


def cell(column: str, text: str) -> Callable:
    return lambda root, row, rows: rows[row].update({column: text})


def volume(content: bytes, column: str = "image") -> Callable:
    def plant(root: Path, row: int, rows: dict[int, dict[str, str]]) -> None:
        name = f"{column}{row}.nii.gz"
        (root / name).write_bytes(content)
        rows[row][column] = name

    return plant


def made(make: Callable[[Path], object]) -> Callable:
    """Put something else in the place of the image."""

    def plant(root: Path, row: int, rows: dict[int, dict[str, str]]) -> None:
        path = root / rows[row]["image"]
        path.unlink()
        make(path)

    return plant


def same(make: Callable[[Path, Path], object]) -> Callable:
    """Give the image of the row above a second name."""

    def plant(root: Path, row: int, rows: dict[int, dict[str, str]]) -> None:
        name = f"second{row}.nii.gz"
        make(root / rows[row - 1]["image"], root / name)
        rows[row] |= {"image": name, "split": rows[row - 1]["split"]}

    return plant


def same_person(root: Path, row: int, rows: dict[int, dict[str, str]]) -> None:
    rows[row] |= {"participant_id": rows[row - 1]["participant_id"], "split": rows[row - 1]["split"]}


def same_image(root: Path, row: int, rows: dict[int, dict[str, str]]) -> None:
    rows[row] |= {"image": f"./{rows[row - 1]['image']}", "split": rows[row - 1]["split"]}


def other_case(root: Path, row: int, rows: dict[int, dict[str, str]]) -> None:
    name = rows[row - 1]["image"].upper()
    (root / name).write_bytes(head(1000 + row))
    rows[row] |= {"image": name}


def recompress(source: Path, target: Path) -> None:
    target.write_bytes(gzip.compress(gzip.decompress(source.read_bytes()), 1))


def shifted(shape=SMALL) -> np.ndarray:
    affine = oblique_affine(shape)
    affine[:3, 3] += 3
    return affine


KINDS: dict[str, tuple[Callable, str]] = {
    "age missing": (cell("age", ""), "MAN-AGE"),
    "age not available": (cell("age", "n/a"), "MAN-AGE"),
    "age in words": (cell("age", "sixty"), "MAN-AGE"),
    "age with comma": (cell("age", "67,5"), "MAN-AGE"),
    "age infinite": (cell("age", "1e999"), "MAN-AGE"),
    "age negative": (cell("age", "-1"), "MAN-AGE"),
    "age in months": (cell("age", "804"), "MAN-AGE"),
    "unit not years": (cell("age_unit", "months"), "MAN-UNIT"),
    "sex unknown": (cell("sex", "2"), "MAN-SEX"),
    "split unknown": (cell("split", "training"), "MAN-SPLIT"),
    "weight zero": (cell("weight", "0"), "MAN-WEIGHT"),
    "body weight": (cell("weight", "72.5"), "MAN-WEIGHT"),
    "weight in words": (cell("weight", "heavy"), "MAN-WEIGHT"),
    "quality in words": (cell("qc_score", "good"), "MAN-QC"),
    "digest cut": (cell("sha256", "ab12"), "MAN-SHA256"),
    "digest of another file": (cell("sha256", "0" * 64), "VOL-DIGEST"),
    "no participant": (cell("participant_id", ""), "MAN-ID"),
    "same participant and session": (same_person, "MAN-TWICE"),
    "same image": (same_image, "MAN-IMAGE"),
    "same image but for case": (other_case, "MAN-IMAGE"),
    "hard link": (same(lambda source, target: target.hardlink_to(source)), "MAN-IMAGE"),
    "link": (same(lambda source, target: target.symlink_to(source)), "MAN-IMAGE"),
    "copy": (same(lambda source, target: target.write_bytes(source.read_bytes())), "MAN-IMAGE"),
    "compressed anew": (same(recompress), "MAN-IMAGE"),
    "no image": (cell("image", ""), "MAN-PATH"),
    "parent folder": (cell("image", "../outside.nii.gz"), "MAN-PATH"),
    "absolute": (cell("image", "/dev/zero"), "MAN-PATH"),
    "URL": (cell("image", "https://example.org/a.nii.gz"), "MAN-PATH"),
    "tab": (cell("image", "a\tb.nii.gz"), "MAN-PATH"),
    "mask outside": (cell("mask", "../outside.nii.gz"), "MAN-PATH"),
    "link out": (made(lambda path: path.symlink_to("/etc/hostname")), "MAN-PATH"),
    "loop": (made(lambda path: path.symlink_to(path.name)), "MAN-PATH"),
    "file missing": (made(lambda path: None), "VOL-MISSING"),
    "mask missing": (cell("mask", "none.nii.gz"), "VOL-MISSING"),
    "folder": (made(lambda path: path.mkdir()), "VOL-KIND"),
    "FIFO": (made(os.mkfifo), "VOL-KIND"),
    "file empty": (made(lambda path: path.touch()), "VOL-EMPTY"),
    "text": (volume(b"no volume" * 99), "VOL-FORMAT"),
    "cut": (volume(head(1001)[:-40]), "VOL-TRUNC"),
    "last bytes lost": (volume(head(1002)[:-3]), "VOL-TRUNC"),
    "bit flipped in the checksum": (volume(flip_bit(head(1003), 8 * (len(head(1003)) - 6))), "VOL-CRC"),
    "bytes behind": (volume(head(1004) + b"tail"), "VOL-TRAIL"),
    "bomb": (volume(head(1005, dim=[3, 2048, 1024, 1024, 1, 1, 1, 1])), "VOL-SIZE"),
    "two volumes": (volume(packed(nifti(phantom(), dim=[4, 24, 26, 14, 2, 1, 1, 1]))), "VOL-DIM"),
    "complex": (volume(head(1006, datatype=32, bitpix=64)), "VOL-DTYPE"),
    "slope negative": (volume(head(1007, scl_slope=-1, scl_inter=0)), "VOL-SCALE"),
    "NaN": (volume(packed(nifti(np.where(phantom(SMALL) > 70, np.nan, 1.0)))), "VOL-NONFINITE"),
    "constant": (volume(packed(nifti(np.full(SMALL, 7, "i2")))), "VOL-CONST"),
    "no affine": (volume(head(1008, sform_code=0, qform_code=0)), "VOL-AFFINE"),
    "unit metre": (volume(head(1009, xyzt_units=1)), "VOL-SPACING"),
    "mask damaged": (volume(head(1010)[:-40], "mask"), "VOL-TRUNC"),
    "mask of another size": (volume(head(1011, (8, 9, 11)), "mask"), "VOL-GRID"),
    "labels elsewhere": (volume(packed(nifti(phantom(SMALL), shifted())), "labels"), "VOL-GRID"),
    "labels in halves": (volume(packed(nifti(phantom(SMALL, dtype="f4") + 0.5)), "labels"), "VOL-LABELS"),
}  # fmt: skip


def test_b1_every_fault_of_200_rows_in_one_run(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    (tmp_path / "outside.nii.gz").write_bytes(head(9999))
    rows = {row: good_row(root, row) for row in range(2, 202)}
    # every third row, so that a row and the one above it may differ; the first kinds come twice
    kinds = [*KINDS, *list(KINDS)[: 64 - len(KINDS)]]
    planted = {3 * i + 4: kind for i, kind in enumerate(kinds)}
    for row, kind in planted.items():
        KINDS[kind][0](root, row, rows)
    manifest = write_table(root / "m.csv", list(rows.values()))
    lines = manifest.read_text().splitlines()
    for row, text in {198: "p198,1", 199: lines[198] + ",surplus", 200: f'"p"x{lines[199]}'}.items():
        lines[row - 1] = text
    manifest.write_text("\n".join(lines) + "\n")
    expected = Counter((row, KINDS[kind][1]) for row, kind in planted.items())
    expected += Counter([(198, "MAN-RAGGED"), (199, "MAN-RAGGED"), (200, "MAN-QUOTE")])
    before = set(tmp_path.rglob("*"))

    with pytest.raises(DataError) as caught:
        check_manifest(manifest, out=tmp_path / "check", jobs=2)

    told = Counter((fault.row, fault.code) for fault in caught.value.faults)
    assert told == expected
    assert (told.total(), len(KINDS) + 2) == (67, 56)
    assert caught.value.exit_code == EXIT_DATA
    for fault, line in zip(caught.value.faults, str(caught.value).splitlines(), strict=True):
        assert line.startswith(f"error {fault.code}  m.csv row {fault.row}  ")
        assert fault.code.startswith("MAN-") or fault.file
    made_files = {path.relative_to(tmp_path).as_posix() for path in set(tmp_path.rglob("*")) - before}
    assert made_files == {"check", "check/check.csv", "check/check.html", "check/scans.html"}
    written = (tmp_path / "check" / "check.csv").read_text()
    assert len(written.splitlines()) == 201
    assert ".nii" not in written


# --- B2: ages ----------------------------------------------------------------------------------------------------

READ = {"67": 67, " 67.5 ": 67.5, "+67": 67, "1e2": 100, "067": 67, "0": 0, "120": 120, "67.": 67, ".5": 0.5}
REFUSED = (
    "",
    "NA",
    "-1",
    "804",
    "67,5",
    "NaN",
    "120.01",
    "inf",
    "67y",
    "67 5",
    "0x43",
    "6_7",
    "1e999",
    "٦٧",
    "67-68",
    "=67",
)


def test_b2_ages(tmp_path):
    texts = [*READ, *REFUSED]
    assert len(texts) == 25
    rows = [{"participant_id": f"p{i}", "image": f"{i}.nii", "age": text} for i, text in enumerate(texts)]
    path = write_table(tmp_path / "m.csv", rows, ("participant_id", "image", "age"))
    manifest, faults = inspect_manifest(path, check_files=False)
    assert [(fault.row, fault.code) for fault in faults] == [(2 + i, "MAN-AGE") for i in range(len(READ), 25)]
    assert [scan.age for scan in manifest.scans[: len(READ)]] == list(READ.values())
    months = faults[REFUSED.index("804")]
    assert "months" in str(months)
    assert "67.0 years" in str(months)


# --- B4: one image under two names -------------------------------------------------------------------------------

WAYS: dict[str, Callable[[Path, Path], object]] = {
    "byte copy": lambda source, target: target.write_bytes(source.read_bytes()),
    "compressed anew": recompress,
    "not compressed": lambda source, target: target.with_suffix("").write_bytes(gzip.decompress(source.read_bytes())),
    "other affine": lambda source, target: target.write_bytes(head(int(source.name[1]), affine=shifted())),
    "link": lambda source, target: target.symlink_to(source.name),
    "hard link": lambda source, target: target.hardlink_to(source),
    "turned": lambda source, target: target.write_bytes(turned(int(source.name[1]))),
    "float": lambda source, target: target.write_bytes(packed(nifti(phantom(SMALL, int(source.name[1])).astype("f4")))),
}


def turned(seed: int) -> bytes:
    """The same head with its first axis stored the other way round."""
    flip = np.diag([-1.0, 1, 1, 1])
    flip[0, 3] = SMALL[0] - 1
    return packed(nifti(phantom(SMALL, seed)[::-1], oblique_affine(SMALL) @ flip))


@pytest.mark.parametrize("way", WAYS)
def test_b4_one_image_under_two_names(tmp_path, way):
    rows = []
    for i in range(5):
        source, target = tmp_path / f"h{i}.nii.gz", tmp_path / f"other{i}.nii.gz"
        source.write_bytes(head(i))
        WAYS[way](source, target)
        name = target.name if os.path.lexists(target) else target.with_suffix("").name
        rows += [
            {"participant_id": f"a{i}", "image": source.name, "age": f"5{i}.5"},
            {"participant_id": f"b{i}", "image": name, "age": f"6{i}.5"},
        ]
    path = write_table(tmp_path / "m.csv", rows, ("participant_id", "image", "age"))
    faults = look_through(path).faults
    assert [(fault.row, fault.code) for fault in faults] == [(3 + 2 * i, "MAN-IMAGE") for i in range(5)]


# --- B5: paths that lead elsewhere -------------------------------------------------------------------------------

opened: list[str] = []
recording = False


def _audit(event: str, arguments: tuple) -> None:
    if recording and event in ("open", "os.open", "socket.connect", "subprocess.Popen", "os.listdir", "os.scandir"):
        opened.append(str(arguments[0]))


sys.addaudithook(_audit)


@contextlib.contextmanager
def audit():
    """Record what is opened; a hook cannot be removed, so it is switched."""
    global recording
    opened.clear()
    recording = True
    try:
        yield opened
    finally:
        recording = False


ATTACKS = [
    *("../secret.nii", "a/../../secret.nii", "..", "a\\..\\..\\secret.nii", "./../secret.nii", "sub/../a.nii"),
    *("{outside}", "/etc/passwd", "/dev/zero", "/dev/stdin", "/proc/self/mem", "//server/share/a.nii"),
    *("\\\\server\\share\\a.nii", "C:\\a.nii", "file:///etc/passwd", "file:a.nii", "http://x.org/a.nii"),
    *("s3://bucket/a.nii", "data:text/plain,a", "~", "~/a.nii", "~root/a.nii", "$HOME/a.nii", "${HOME}/a.nii"),
    *("%HOME%/a.nii", "a%00.nii", "a%2e%2e%2fb.nii", "a\0.nii", "a\nb.nii", "a\r.nii", "a\x1b[2Jb.nii", "a\u2028b.nii"),
    *("a\u202egz.nii", "link-out", "link-to-outside-folder/secret.nii", "chain", "loop", "loop-a", "fifo", "socket"),
    *("folder", "a.nii/b.nii", "x" * 300, "x/" * 3000),
]


def test_b5_path_attacks_are_refused_unopened(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "secret.nii"
    (root / "folder").mkdir(parents=True)
    outside.write_bytes(head(1))
    (root / "a.nii").write_bytes(b"x")
    (root / "link-out").symlink_to(outside)
    (root / "link-to-outside-folder").symlink_to(tmp_path)
    (root / "chain").symlink_to("link-out")
    (root / "loop").symlink_to("loop")
    (root / "loop-a").symlink_to("loop-b")
    (root / "loop-b").symlink_to("loop-a")
    os.mkfifo(root / "fifo")
    with contextlib.chdir(root), socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
    for attack in ATTACKS:
        text = attack.replace("{outside}", str(outside))
        rows = [{"image": "a.nii", "age": "50.5"}, {"image": text, "age": "60.5"}]
        path = write_table(root / "m.csv", rows, ("image", "age"))
        start = time.monotonic()
        with audit() as files:
            manifest, faults = inspect_manifest(path)
        assert time.monotonic() - start < 1, attack
        assert files == [str(path)], attack
        (fault,) = faults
        assert (fault.row, fault.code[:4]) in [(3, "MAN-"), (3, "VOL-")], attack
        assert fault.code in ("MAN-PATH", "VOL-KIND", "VOL-MISSING"), attack
        assert str(fault).isprintable(), attack
        assert [scan.row for scan in manifest.scans] == [2]
    assert len(ATTACKS) >= 30


def test_b5_text_alone_gives_them_away(tmp_path):
    """Where nobody looks for files, what is absolute, climbs, or is no plain path is still refused."""
    attacks = [text for text in ATTACKS[: ATTACKS.index("link-out")] if text != "{outside}"]
    rows = [{"image": text, "age": f"{20 + i}"} for i, text in enumerate([*attacks, str(tmp_path) + "x/a.nii"])]
    path = write_table(tmp_path / "m.csv", rows, ("image", "age"))
    assert found(path, check_files=False) == [(fault.row, "MAN-PATH") for fault in inspect_manifest(path)[1]]
    assert Counter(found(path, check_files=False)).total() == len(rows)


def test_b5_links_inside_the_root_are_followed(tmp_path):
    root = tmp_path / "root"
    (root / "store").mkdir(parents=True)
    (root / "store" / "x.nii").write_bytes(b"x")
    (root / "y.nii").write_bytes(b"y")
    (root / "link.nii").symlink_to("store/x.nii")
    (tmp_path / "elsewhere").symlink_to(root)
    rows = [{"image": "link.nii", "age": "50.5"}, {"image": str(root / "y.nii"), "age": "60.5"}]
    path = write_table(tmp_path / "m.csv", rows, ("image", "age"))
    for data_root in (root, tmp_path / "elsewhere"):
        assert [scan.image.name for scan in read_manifest(path, data_root).scans] == ["link.nii", "y.nii"]


@settings(max_examples=300, deadline=None)
@given(st.text(st.one_of(st.sampled_from("./a\\~$\0"), st.characters(codec="utf-8")), min_size=1))
def test_b5_no_text_leaves_the_root(text):
    root = find_data_root(Path("/some/root/m.csv"), None)
    with contextlib.suppress(DataError):
        check_path(text, root)
        assert os.path.normpath(root.folder / text).startswith(("/some/root/", "/some/root"))
        assert text.isprintable() or not set(text) & set("\0\n\r\x1b")


# --- B6: names of people and places ------------------------------------------------------------------------------

SCRIPTS = (
    "Łódź",
    "naïve",
    "Ελλάδα",
    "Москва",
    "עברית",
    "العربية",
    "हिन्दी",
    "ไทย",
    "中文",
    "日本語",
    "한국어",
    "ქართული",
)
NAMES = [
    *(f"{name}.nii.gz" for name in SCRIPTS),
    *(unicodedata.normalize("NFD", f"d-{name}.nii.gz") for name in SCRIPTS),
    *("a b.nii.gz", "inner  two.nii.gz", "it's.nii.gz", 'say "hi".nii.gz', "a,b.nii.gz", "a;b.nii.gz", "🧠.nii.gz"),
    *("-rf.nii.gz", "--help.nii.gz", "a$b.nii.gz", "100%.nii.gz", "a&b.nii.gz", "a#b.nii.gz", "a:b.nii.gz"),
    *("(a)[b]{c}.nii.gz", "a@b.nii.gz", "a=b.nii.gz"),
    *("x" * 248 + ".nii.gz", "é" * 124 + ".nii.gz", "a..b.nii.gz", "...nii.gz"),
]  # fmt: skip


def test_b6_names_are_read_whatever_the_script(tmp_path):
    assert len(set(NAMES)) >= 40
    rows = []
    for i, name in enumerate(NAMES):
        (tmp_path / name).write_bytes(head(i))
        rows.append({"participant_id": f"Jürgen-{i}", "image": name, "age": f"{20 + i / 4}", "site": "Zürich"})
    path = write_table(tmp_path / "m.csv", rows, ("participant_id", "image", "age", "site"))
    check = look_through(path)
    assert [str(fault) for fault in check.faults] == []
    assert [scan.image.name for scan in check.accepted().scans] == NAMES


# --- B7: encodings and dialects ----------------------------------------------------------------------------------

GOOD = "image,age,site\na.nii,50.5,Zürich\nb.nii,60.5,York\n"
DIALECTS: dict[str, tuple[bytes, list[tuple[int | None, str]]]] = {
    "plain": (GOOD.encode(), []),
    "BOM": (GOOD.encode("utf-8-sig"), []),
    "CRLF": (GOOD.replace("\n", "\r\n").encode(), []),
    "CR": (GOOD.replace("\n", "\r").encode(), []),
    "tabs": (GOOD.replace(",", "\t").encode(), []),
    "blank lines": (("\n\n" + GOOD.replace("\n", "\n\n")).encode(), []),
    "only commas": ((GOOD + ",,\n").encode(), []),
    "no last line end": (GOOD.rstrip().encode(), []),
    "quoted": (b'"image","age","site"\n"a.nii","50.5","Z"\n"b.nii","60.5","Y"\n', []),
    "semicolons": (GOOD.replace(",", ";").encode(), [(1, "MAN-DELIMITER")]),
    "Latin-1": (GOOD.encode("latin-1"), [(2, "MAN-ENCODING")]),
    "UTF-16": (GOOD.encode("utf-16"), [(1, "MAN-ENCODING")]),
    "UTF-16 without BOM": (GOOD.encode("utf-16-le"), [(2, "MAN-ENCODING")]),
    "short row": ((GOOD + "c.nii,70.5\n").encode(), [(4, "MAN-RAGGED")]),
    "long row": ((GOOD + "c.nii,70.5,x,y\n").encode(), [(4, "MAN-RAGGED")]),
    "decimal commas": (GOOD.replace(".5", ",5").encode(), [(2, "MAN-RAGGED"), (3, "MAN-RAGGED")]),
    "open quote": ((GOOD + '"c.nii,70.5,x\n').encode(), [(4, "MAN-QUOTE")]),
    "text behind a quote": ((GOOD + '"c"d.nii,70.5,x\nc.nii,old,x\n').encode(), [(4, "MAN-QUOTE"), (5, "MAN-AGE")]),
    "cell of 1 MB": ((GOOD + f"{'c' * 2**20},70.5,x\n").encode(), [(4, "MAN-QUOTE")]),
    "empty": (b"", [(None, "MAN-EMPTY")]),
    "header alone": (b"image,age,site\n", [(None, "MAN-EMPTY")]),
    "binary": (head(0), [(1, "MAN-ENCODING")]),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_b7_encodings_and_dialects(tmp_path, dialect):
    content, faults = DIALECTS[dialect]
    for name in ("a.nii", "b.nii", "c.nii"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "m.csv").write_bytes(content)
    assert found(tmp_path / "m.csv") == faults
    if not faults:
        assert [scan.age for scan in read_manifest(tmp_path / "m.csv").scans] == [50.5, 60.5]


def test_b7_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "fifo.csv")
    with (tmp_path / "huge.csv").open("wb") as file:
        file.truncate(201 * 2**20)
    for name in ("none.csv", "fifo.csv", "huge.csv", "."):
        assert found(tmp_path / name) == [(None, "MAN-FILE")]


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=400), st.text('image,ge\n"\t;05.-\x00é ', max_size=200).map(str.encode)))
def test_b7_any_bytes_give_scans_or_faults(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes(content)
    assert all(code.startswith("MAN-") for _, code in found(path, check_files=False))


# --- B8: size ----------------------------------------------------------------------------------------------------


@pytest.mark.faults
def test_b8_a_million_rows(tmp_path):
    path = tmp_path / "m.csv"
    with path.open("w") as file:
        file.write("participant_id,session_id,image,mask,age,sex,site\n")
        for eid in range(1_000_000, 2_000_000):
            folder = f"{eid}_20252_2_0/T1"
            file.write(f"{eid},2,{folder}/T1.nii.gz,{folder}/mask.nii.gz,{45 + eid % 4000 / 100},F,11025\n")
    code = (
        "import sys; from pathlib import Path; from emoe_med.data.manifest import read_manifest;"
        "print(len(read_manifest(Path(sys.argv[1]), check_files=False).scans))"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime  # of the children of other tests
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=280)
    assert done.stdout.strip() == "1000000", done.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 2 * 2**20  # kB
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 60
