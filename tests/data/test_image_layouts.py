"""What lies beside the images, parts that are there or not, and what tells one folder from another."""

import zipfile

import numpy as np
import pytest
from make_images import CLASSES, FLAT, ORDER, imagenet_layouts, picture, shade, shades, train_files, write

from emoe_med.data.image_layouts import contents
from emoe_med.data.images import list_images, list_test, split
from emoe_med.errors import DataError

SORTED = imagenet_layouts()["sorted"]
TEST = {f"test/{c}/t.JPEG": picture(shade(label)) for label, c in enumerate(CLASSES)}


def packed(path, files):
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def digest(root):
    return list_images("imagenet", root).contents()


@pytest.mark.parametrize("name", ["train/n02123045/n02123045_1.JPEG", f"val/{CLASSES[2]}/ILSVRC2012_val_00000001.JPEG"])
def test_other_pictures_under_the_same_names_are_other_contents(tmp_path, name):
    other = {**SORTED, name: picture("white", size=(24, 16))}
    assert len(other[name]) != len(SORTED[name])
    first, same, changed = (
        digest(write(tmp_path / place, files)) for place, files in (("a", SORTED), ("b", SORTED), ("c", other))
    )
    assert first == same
    assert changed != first
    equally_long = bytes(reversed(SORTED[name]))
    whole, zipped = (
        digest(packed(tmp_path / f"{n}.zip", {**SORTED, name: data}))
        for n, data in enumerate((SORTED[name], equally_long))
    )
    assert whole != zipped  # the archive's checksums tell what sizes do not


def test_contents_of_images_in_memory_are_their_pixels():
    listing = list_images("digits", None)
    before = contents(listing.test)
    listing.test.pixels[7, 0, 3, 3] ^= 1
    assert contents(listing.test) != before


def test_an_embedded_set_takes_no_root(tmp_path, monkeypatch):
    for refused in (lambda: list_images("digits", tmp_path), lambda: list_test("digits", tmp_path, "0123456789")):
        with pytest.raises(DataError, match=r"IMG-ROOT.*digits ships with a library.*--data-root"):
            refused()
    monkeypatch.setenv("EMOE_MED_DATA_ROOT", str(tmp_path))  # for all sets, so it may stand
    assert len(list_images("digits", None).classes) == 10


def test_val_is_to_select_on_where_test_has_classes(tmp_path):
    listing = list_images("imagenet", write(tmp_path, {**SORTED, **TEST}))
    assert shades(listing) == [0, 1, 2]
    assert all(path.startswith("test/") for path in listing.test.paths)
    labels = np.array(shades(listing, "train"))
    train, val = split(labels, 0.4, 6, 0, listing.held)
    assert [listing.train.paths[i][:4] for i in val] == ["val/"] * 4
    assert sorted(labels[val]) == sorted(ORDER)
    assert all(listing.train.paths[i].startswith("train/") for i in train)
    assert np.bincount(labels[train]).tolist() == [2, 2, 2]


@pytest.mark.parametrize("layout", ["sorted", "devkit", "kaggle"])
def test_unlabelled_test_images_disturb_nothing(tmp_path, layout):
    files = imagenet_layouts()[layout]
    base = "ILSVRC/Data/CLS-LOC/" if layout == "kaggle" else ""
    listing = list_images("imagenet", write(tmp_path, {**files, f"{base}test/ILSVRC2012_test_1.JPEG": b"x"}))
    assert sorted(shades(listing)) == sorted(ORDER)
    assert listing.held == 0


@pytest.mark.parametrize("layout", ["sorted", "devkit"])
def test_a_class_that_is_not_in_val_is_told_as_an_empty_one(tmp_path, layout):
    files = {**imagenet_layouts()[layout], **{f"train/n09/{i}.JPEG": picture("white") for i in range(2)}}
    with pytest.raises(DataError, match=r"IMG-EMPTY.*val/n09  this class has no image") as refused:
        list_images("imagenet", write(tmp_path, files))
    assert len(refused.value.faults) == 1


def test_what_systems_leave_beside_the_files_counts_for_nothing(tmp_path):
    files = {f"good/{name}": data for name, data in SORTED.items()}
    litter = {f"__MACOSX/good/{name.replace('/n', '/._n')}": b"x" for name in SORTED}
    litter |= {"good/train/.ipynb_checkpoints/a.JPEG": b"x", "good/val/.DS_Store": b"x"}
    litter |= {f"good/train/{CLASSES[0]}/._n01.JPEG": b"x"}
    for root in (packed(tmp_path / "mac.zip", {**files, **litter}), write(tmp_path / "mac", {**files, **litter})):
        listing = list_images("imagenet", root)
        assert listing.classes == CLASSES
        assert shades(listing, "train") == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("prefix", ["val/", "test/", "", "imagenetv2/", "ILSVRC/Data/CLS-LOC/val/"])
@pytest.mark.parametrize("zipped", [False, True])
def test_images_to_score_need_no_train_folder(tmp_path, prefix, zipped):
    files = {f"{prefix}{CLASSES[c]}/{i}.JPEG": picture(shade(c)) for i, c in enumerate(ORDER)}
    root = packed(tmp_path / "v2.zip", files) if zipped else write(tmp_path / "v2", files)
    classes = ["n00", *CLASSES]  # labels are those of the run, whatever is there
    assert list_test("imagenet", root, classes).labels.tolist() == [1, 2, 3, 3]
    with pytest.raises(DataError, match=r"IMG-LAYOUT.*n03481172 is none of the 2 classes"):
        list_test("imagenet", root, CLASSES[:2])


def test_flat_images_to_score_are_labelled_by_their_ground_truth(tmp_path):
    files = imagenet_layouts()["devkit"]
    root = write(tmp_path, {name: data for name, data in files.items() if not name.startswith("train")})
    assert list_test("imagenet", root, CLASSES).labels.tolist() == ORDER


def test_an_empty_test_folder_does_not_hide_the_images_of_val(tmp_path):
    files = {f"val/{CLASSES[1]}/0.JPEG": picture(shade(1)), f"test/{CLASSES[1]}/0.avif": b"x"}
    assert list_test("imagenet", write(tmp_path, files), CLASSES).labels.tolist() == [1]


UNREAD = {f"val/{CLASSES[0]}/0.avif": b"x", f"test/{CLASSES[1]}/0.npy": b"x"}


@pytest.mark.parametrize(
    "files", [{}, {"a.txt": b""}, FLAT, train_files(), UNREAD], ids=["none", "text", "flat", "train", "unread"]
)
def test_nothing_to_score_is_one_line(tmp_path, files):
    with pytest.raises(DataError, match=r"IMG-LAYOUT.*neither val/ nor test/") as refused:
        list_test("imagenet", write(tmp_path, files), CLASSES)
    assert len(str(refused.value).splitlines()) == 1
