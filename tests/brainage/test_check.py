"""One look at a small cohort. Faults in bulk are in tests/faults/test_manifests.py."""

import io
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from emoe_med.brainage.check import COLUMNS, check_manifest, look_through
from emoe_med.brainage.check_page import TILE, thumbnail
from emoe_med.data.volume import Volume, file_digest, read_volume, voxel_digest, write_volume
from emoe_med.errors import DataError, StorageError

AFFINE = np.diag([2.0, 2.0, 2.5, 1.0])


def head(seed: int, shape=(12, 14, 10)) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 200, shape).astype("i2")


@pytest.fixture
def cohort(tmp_path) -> Path:
    """Three good heads with masks and labels, and their manifest."""
    lines = ["participant_id,session_id,image,age,mask,labels,sha256"]
    for i in range(3):
        write_volume(tmp_path / f"secret{i}.nii.gz", head(i), AFFINE)
        write_volume(tmp_path / f"mask{i}.nii.gz", head(i) > 100, AFFINE)
        write_volume(tmp_path / f"labels{i}.nii.gz", head(i) // 50, AFFINE)
        digest = file_digest(tmp_path / f"secret{i}.nii.gz")
        lines.append(f"secret{i},1,secret{i}.nii.gz,5{i}.5,mask{i}.nii.gz,labels{i}.nii.gz,{digest}")
    (tmp_path / "m.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "m.csv"


def rewrite(manifest: Path, old: str, new: str) -> None:
    text = manifest.read_text()
    assert old in text
    manifest.write_text(text.replace(old, new))


def found(manifest: Path, **options) -> list[tuple[int | None, str, str]]:
    check = look_through(manifest, **options)
    return [(fault.row, fault.code, fault.reason.split(":")[0]) for fault in check.faults]


@pytest.mark.parametrize("jobs", [0, 3])
def test_a_good_cohort(cohort, jobs):
    lengths = []
    check = look_through(cohort, jobs=jobs, progress=lambda scans: lengths.append(len(scans)) or iter(scans))
    assert lengths == [3]
    assert check.accepted().scans[0].participant_id == "secret0"
    assert list(check.table.columns) == list(COLUMNS)
    assert list(check.table["status"]) == ["ok"] * 3
    first = check.table.iloc[0]
    image = cohort.parent / "secret0.nii.gz"
    assert (first["row"], first["shape"], first["spacing_mm"]) == ("2", "12x14x10", "2x2x2.5")
    assert first["file_sha256"] == file_digest(image)
    assert first["voxel_sha256"] == voxel_digest(read_volume(image))


def test_mask_and_labels_must_fit(cohort):
    folder = cohort.parent
    write_volume(folder / "mask0.nii.gz", head(0, (12, 14, 11)) > 100, AFFINE)
    shifted = AFFINE.copy()
    shifted[0, 3] = 0.2
    write_volume(folder / "mask1.nii.gz", head(1) > 100, shifted)
    write_volume(folder / "labels1.nii.gz", head(1) / np.float32(8), AFFINE)
    write_volume(folder / "labels2.nii.gz", np.ones((12, 14, 10), "u1"), AFFINE)
    assert found(cohort) == [
        (2, "VOL-GRID", "mask"),
        (3, "VOL-GRID", "mask"),
        (3, "VOL-LABELS", "labels"),
        (4, "VOL-CONST", "labels"),
    ]


def test_a_grid_may_differ_by_rounding(cohort):
    nearly = AFFINE + np.float64(1e-5)
    nearly[3] = [0, 0, 0, 1]
    write_volume(cohort.parent / "mask0.nii.gz", head(0) > 100, nearly)
    assert found(cohort) == []


def test_mask_is_read_though_the_image_is_damaged(cohort):
    image, mask = cohort.parent / "secret1.nii.gz", cohort.parent / "mask1.nii.gz"
    for path in (image, mask):
        path.write_bytes(path.read_bytes()[:-20])
    assert found(cohort) == [(3, "VOL-TRUNC", "gzip stream ends early"), (3, "VOL-TRUNC", "mask")]


def test_a_changed_file_and_a_second_name(cohort):
    folder = cohort.parent
    digest = file_digest(folder / "secret2.nii.gz")
    write_volume(folder / "secret2.nii.gz", head(0), AFFINE @ np.diag([1, 1, 1.1, 1]))  # voxels of the first
    assert (3, "VOL-DIGEST", "sha256 differs from the manifest's") not in found(cohort)
    check = look_through(cohort)
    assert check.duplicates == ((2, 4),)
    codes = [(fault.row, fault.code) for fault in check.faults]
    assert codes == [(4, "VOL-DIGEST"), (4, "VOL-GRID"), (4, "VOL-GRID"), (4, "MAN-IMAGE")]
    rewrite(cohort, digest, "")
    assert (4, "VOL-DIGEST") not in [(fault.row, fault.code) for fault in look_through(cohort).faults]


def test_a_person_divided_by_a_second_name(cohort):
    folder = cohort.parent
    lines = ["participant_id,image,age,split"]
    lines += [f"p{i},secret{i}.nii.gz,5{i}.5,{split}" for i, split in enumerate(["train", "test", "val"])]
    lines += ["p3,copy.nii.gz,60.5,test"]
    (folder / "copy.nii.gz").write_bytes((folder / "secret0.nii.gz").read_bytes())
    cohort.write_text("\n".join(lines))
    assert found(cohort) == [
        (2, "MAN-SPLIT", "person is in train and in test (row 5)"),
        (5, "MAN-IMAGE", "same voxels as row 2"),
        (5, "MAN-SPLIT", "person is in test and in train (row 2)"),
    ]


def test_faults_of_the_table_do_not_hide_those_of_the_files(cohort):
    rewrite(cohort, ",51.5,", ",old,")
    (cohort.parent / "secret1.nii.gz").write_text("no volume")
    (cohort.parent / "secret2.nii.gz").unlink()
    with pytest.raises(DataError) as caught:
        look_through(cohort).accepted()
    assert [(fault.row, fault.code) for fault in caught.value.faults] == [
        (3, "MAN-AGE"),
        (3, "VOL-FORMAT"),
        (4, "VOL-MISSING"),
    ]
    assert all(fault.manifest == "m.csv" for fault in caught.value.faults)


@pytest.mark.parametrize("text", ["", "image;age\n1;2\n", None])
def test_what_is_no_table_is_a_check_too(tmp_path, text):
    if text is not None:
        (tmp_path / "m.csv").write_text(text)
    check = look_through(tmp_path / "m.csv")
    assert len(check.faults) == 1
    assert list(check.table["status"]) == ["refused"]
    with pytest.raises(DataError, match="MAN-"):
        check.accepted()


def test_written_files_name_rows_and_no_person(cohort):
    """The canary: participant, file name and folder contain 'secret'; a shifted column holds it as well."""
    folder = cohort.parent
    rewrite(cohort, "51.5", "secret1")
    (folder / "secret2.nii.gz").write_bytes(b"x")
    check = look_through(cohort, data_root=folder)
    assert any("secret" in str(fault) for fault in check.faults)  # the terminal may tell
    out = folder / "run" / "check"
    check.write(out)
    assert sorted(path.name for path in out.iterdir()) == ["check.csv", "check.html"]
    for path in out.iterdir():
        assert "secret" not in path.read_text()
        assert str(folder) not in path.read_text()
    table = pd.read_csv(out / "check.csv", dtype=str, keep_default_na=False)
    assert list(table["row"]) == ["2", "3", "4"]
    assert list(table["code"]) == ["", "MAN-AGE", "VOL-FORMAT"]
    page = (out / "check.html").read_text()
    assert "<h1>Refused</h1>" in page
    assert "VOL-FORMAT" in page
    assert not re.search(r"https?://|<script|<link|<img", page)


def test_the_missing_root_is_not_written(tmp_path):
    (tmp_path / "m.csv").write_text("image,age\na.nii,50.5\nb.nii,60\n")
    check = look_through(tmp_path / "m.csv", data_root=tmp_path / "secret")
    assert [fault.code for fault in check.faults] == ["MAN-ROOT"]
    assert "secret" not in check.table.to_csv()


def test_the_findings_are_written_before_the_refusal(cohort):
    out = cohort.parent / "out"
    assert list(check_manifest(cohort, out=out)["status"]) == ["ok"] * 3
    rewrite(cohort, "51.5", "old")
    with pytest.raises(DataError, match="MAN-AGE"):
        check_manifest(cohort, None, out, 2)
    assert "MAN-AGE" in (out / "check.csv").read_text()


def test_an_interrupt_does_not_wait_for_the_rest(tmp_path):
    lines = ["image,age"]
    for i in range(40):
        write_volume(tmp_path / f"{i}.nii.gz", head(i, (40, 40, 40)), AFFINE)
        lines.append(f"{i}.nii.gz,{20 + i}.5")
    (tmp_path / "m.csv").write_text("\n".join(lines))
    pending = []

    def interrupted(scans):
        pending.extend(scans)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        look_through(tmp_path / "m.csv", progress=interrupted)
    assert sum(scan.cancelled() for scan in pending) > 20


def test_a_page_that_cannot_be_written(cohort):
    with pytest.raises(StorageError):
        look_through(cohort).write(cohort / "below a file")


def test_notes_are_no_faults(cohort):
    faint = np.zeros((12, 14, 10), "i2")
    faint[:2, :2, :2] = 100
    write_volume(cohort.parent / "secret0.nii.gz", faint, AFFINE)
    rewrite(cohort, cohort.read_text().splitlines()[1].split(",")[-1], "")
    check = look_through(cohort)
    check.accepted()
    assert list(check.table["status"]) == ["note", "ok", "ok"]
    assert "voxels" in check.table["reason"][0]


def test_real_heads(real_data):
    source = real_data / "ixi" / "manifest.csv"
    check = look_through(source, jobs=2)
    assert len(check.accepted().scans) == len(check.table) == 181
    assert set(check.table["shape"]) == {"90x120x120"}
    assert set(check.table["spacing_mm"]) == {"2x2x2"}
    assert check.table["voxel_sha256"].is_unique


def test_a_page_of_thumbnails_shows_faulty_scans_first_and_names_no_one(cohort):
    folder = cohort.parent
    bytes_of = (folder / "secret1.nii.gz").read_bytes()
    (folder / "secret1.nii.gz").write_bytes(bytes_of[:-20])
    write_volume(folder / "mask2.nii.gz", head(2, (12, 14, 11)) > 100, AFFINE)  # of another size
    with pytest.raises(DataError):
        check_manifest(cohort, out=folder / "out")
    page = (folder / "out" / "scans.html").read_text()
    assert "secret" not in page
    assert str(folder) not in page
    assert not re.search(r"https?://|<script|<link", page)
    cards = re.findall(r'<figure class="(\w+)">(.*?)</figure>', page, flags=re.S)
    assert [kind for kind, _ in cards] == ["refused", "refused", "ok"]
    assert ["data:image/jpeg" in card for _, card in cards] == [False, True, True]
    assert "VOL-TRUNC" in cards[0][1]
    assert page.startswith("<!doctype html>")
    assert "3 scans: 2 refused, 1 ok" in page


def test_a_thumbnail_is_upright_and_outlines_the_mask():
    voxels = np.zeros((40, 50, 30), np.float32)
    voxels[5:35, 5:45, 3:27] = 1
    voxels[5:35, 5:45, 20:27] = 3  # bright at the top
    mask = np.zeros(voxels.shape, bool)
    mask[10:30, 10:40, 8:22] = True

    def drawn(mask):
        jpeg = thumbnail(Volume(voxels, np.diag([2.0, 2, 3, 1]), ()), mask)
        return imread(io.BytesIO(jpeg), format="jpg").astype(float)

    picture, bare = drawn(mask), drawn(None)
    assert picture.shape == (TILE, 3 * TILE, 3)
    side = picture[:, :TILE].mean(-1)
    rows = np.flatnonzero(side.max(1) > 40)
    assert side[rows[:6]].mean() > 1.5 * side[rows[-6:]].mean()
    orange = picture[..., 0] - picture[..., 2] > 60
    assert all(orange[:, start : start + TILE].sum() > 40 for start in (0, TILE, 2 * TILE))
    assert np.abs(bare - bare.mean(-1, keepdims=True)).max() < 25


def test_flat_volumes_have_a_thumbnail_too():
    assert thumbnail(Volume(np.full((4, 5, 6), 7.0, np.float32), np.eye(4), ()), np.zeros((4, 5, 6), bool))
