"""Published layouts give the labels they mean; what is broken is named."""

import io
import os
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from make_images import CLASSES, ORDER, imagenet_layouts, picture, shade, shades, train_files, write
from PIL import Image
from sklearn.datasets import load_digits

from emoe_med.data.image_decode import decode
from emoe_med.data.image_tree import open_tree
from emoe_med.data.images import DATASETS, ImageDataset, list_images, split
from emoe_med.errors import DataError


@pytest.mark.parametrize("layout", ["sorted", "devkit", "kaggle"])
@pytest.mark.parametrize("packed", [False, True])
def test_imagenet_in_each_published_layout(tmp_path, layout, packed):
    files = imagenet_layouts()[layout]
    if packed:
        with zipfile.ZipFile(tmp_path / "imagenet.zip", "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    else:
        write(tmp_path, files)
    listing = list_images("imagenet", tmp_path)
    assert listing.classes == CLASSES
    assert shades(listing, "train") == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert sorted(shades(listing)) == sorted(ORDER)


def test_tiny_imagenet_as_published(tmp_path):
    lines = "".join(f"val_{i}.JPEG\t{CLASSES[c]}\t0\t0\t62\t62\n" for i, c in enumerate(ORDER))
    files = {f"tiny-imagenet-200/{name}": data for name, data in train_files("images/").items()}
    files |= {f"tiny-imagenet-200/val/images/val_{i}.JPEG": picture(shade(c)) for i, c in enumerate(ORDER)}
    files |= {"tiny-imagenet-200/val/val_annotations.txt": lines.encode()}
    files |= {"tiny-imagenet-200/test/images/test_0.JPEG": picture("white")}
    listing = list_images("tiny_imagenet", write(tmp_path, files))
    assert shades(listing) == ORDER
    assert len(listing.train.labels) == 9


def cifar_records(label_bytes, count, seed):
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 10
    pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
    heads = [np.full(count, 7, np.uint8)] * (label_bytes - 1) + [labels.astype(np.uint8)]
    return np.column_stack([*heads, pixels]).astype(np.uint8).tobytes(), labels, pixels.reshape(-1, 3, 32, 32)


@pytest.mark.parametrize("packed", [False, True])
def test_cifar_in_its_binary_version(tmp_path, packed):
    parts = [cifar_records(1, 20, i) for i in range(6)]
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    files = {f"cifar-10-batches-bin/{name}": data for name, (data, _, _) in zip(names, parts, strict=True)}
    files["cifar-10-batches-bin/batches.meta.txt"] = "\n".join(f"thing{i}" for i in range(10)).encode()
    if packed:
        with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as archive:
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    else:
        write(tmp_path, files)
    listing = list_images("cifar10", tmp_path)
    assert listing.classes[3] == "thing3"
    data = ImageDataset(listing.train, 32, 3)
    assert len(data) == 100
    assert data[45]["label"] == parts[2][1][5]
    assert np.array_equal(data[45]["image"].numpy(), parts[2][2][5])
    assert np.array_equal(listing.test.pixels, parts[5][2])


def test_cifar100_has_the_fine_label_second(tmp_path):
    data, labels, _ = cifar_records(2, 30, 0)
    write(tmp_path, {"train.bin": data, "test.bin": data})
    listing = list_images("cifar100", tmp_path)
    assert np.array_equal(listing.test.labels, labels)
    assert len(listing.classes) == 100


def pickled_by_python_2(pixels, labels, keys=("labels",)):
    """Write a batch as the published ones are: protocol 2, byte strings, an array of bytes."""
    text = lambda value: b"T" + len(value).to_bytes(4, "little") + value  # noqa: E731
    number = lambda value: b"J" + int(value).to_bytes(4, "little")  # noqa: E731
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + number(0) + b"\x85" + text(b"b") + b"\x87R"
        b"(" + number(1) + number(len(pixels)) + number(3072) + b"\x86"
        b"cnumpy\ndtype\n" + text(b"u1") + number(0) + number(1) + b"\x87R"
        b"(" + number(3) + text(b"|") + b"NNN" + number(-1 % 2**32) + number(-1 % 2**32) + number(0) + b"tb"
        b"\x89" + text(pixels.tobytes()) + b"tb"
    )
    lists = b"".join(text(key.encode()) + b"](" + b"".join(map(number, labels)) + b"e" for key in keys)
    return b"\x80\x02}(" + text(b"data") + array + lists + b"u."


def python_cifar10(tmp_path, **changed):
    rng = np.random.default_rng(0)
    parts = {
        name: (rng.integers(0, 256, (12, 3072), dtype=np.uint8), rng.integers(0, 10, 12))
        for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    }
    names = pickle.dumps({b"label_names": [b"thing%d" % i for i in range(10)]}, protocol=2)
    files = {name: pickled_by_python_2(*part) for name, part in parts.items()}
    files = {**files, "batches.meta": names, **changed}
    write(tmp_path, {f"cifar-10-batches-py/{name}": data for name, data in files.items()})
    return parts


def test_cifar_in_its_python_version(tmp_path):
    parts = python_cifar10(tmp_path)
    listing = list_images("cifar10", tmp_path)
    assert listing.classes == tuple(f"thing{i}" for i in range(10))
    *train, test = parts.values()
    assert listing.train.labels.tolist() == np.concatenate([labels for _, labels in train]).tolist()
    np.testing.assert_array_equal(
        listing.train.pixels.reshape(60, 3072), np.concatenate([pixels for pixels, _ in train])
    )
    np.testing.assert_array_equal(listing.test.pixels.reshape(12, 3072), test[0])


def test_cifar100_in_its_python_version_has_the_fine_labels(tmp_path):
    pixels, fine = np.zeros((4, 3072), np.uint8), [7, 99, 0, 3]
    batch = pickle.dumps({b"data": pixels, b"coarse_labels": [1] * 4, b"fine_labels": fine}, protocol=2)
    names = pickle.dumps({b"fine_label_names": [b"c%d" % i for i in range(100)]}, protocol=2)
    write(
        tmp_path,
        {f"cifar-100-python/{name}": data for name, data in (("train", batch), ("test", batch), ("meta", names))},
    )
    listing = list_images("cifar100", tmp_path)
    assert listing.train.labels.tolist() == fine
    assert listing.classes[99] == "c99"


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('ran')",))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (pickle.dumps(Evil(), protocol=2), "names builtins.exec|names __builtin__.exec"),
        (pickle.dumps({b"data": Evil()}, protocol=2), "names"),
        (pickle.dumps({b"data": np.zeros((2, 3072)), b"labels": [0, 0]}, protocol=2), "f8"),
        (pickle.dumps({b"data": np.array([None]), b"labels": [0]}, protocol=2), "O8"),
        (pickle.dumps({b"data": np.zeros((2, 9), np.uint8), b"labels": [0, 0]}, protocol=2), "no images"),
        (pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}, protocol=2), "class 10 of 10"),
        (pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [-1]}, protocol=2), "no class numbers"),
        (pickle.dumps([1]), "a list"),
        (pickled_by_python_2(np.zeros((2, 3072), np.uint8), [0, 0])[:-40], "no CIFAR batch"),
        (b"", "no CIFAR batch"),
    ],
)
def test_a_pickle_that_is_no_batch_is_refused_unrun(tmp_path, content, reason):
    python_cifar10(tmp_path, data_batch_3=content)
    with pytest.raises(DataError, match=reason) as caught:
        list_images("cifar10", tmp_path)
    assert "data_batch_3" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda f: f.clear(), r"IMG-LAYOUT.*no train/<class>/"),
        (lambda f: [f.pop(n) for n in list(f) if "val" in n], "neither val/ nor test/"),
        (lambda f: f.update({"train/n09/readme.txt": b"no image"}), r"IMG-EMPTY.*train/n09"),
        (lambda f: f.update({"val/n09/a.JPEG": b""}), r"val/n09 is none of the 3 classes"),
    ],
)
def test_a_wrong_layout_is_one_line(tmp_path, change, told):
    files = imagenet_layouts()["sorted"]
    change(files)
    with pytest.raises(DataError, match=told) as refused:
        list_images("imagenet", write(tmp_path, files))
    assert len(str(refused.value).splitlines()) == 1


def test_ground_truth_that_does_not_fit_is_refused(tmp_path):
    files = imagenet_layouts()["devkit"]
    kit = "ILSVRC2012_devkit_t12/data"
    write(tmp_path / "a", {name: data for name, data in files.items() if "meta" not in name})
    with pytest.raises(DataError, match=r"needs meta\.mat"):
        list_images("imagenet", tmp_path / "a")
    write(tmp_path / "b", {**files, f"{kit}/ILSVRC2012_validation_ground_truth.txt": b"30\n"})
    with pytest.raises(DataError, match="1 lines for 4 images"):
        list_images("imagenet", tmp_path / "b")
    write(tmp_path / "c", {name: data for name, data in files.items() if "devkit" not in name})
    with pytest.raises(DataError, match="no ground truth"):
        list_images("imagenet", tmp_path / "c")


def test_a_missing_root_is_one_line(tmp_path, monkeypatch):
    monkeypatch.delenv("EMOE_MED_DATA_ROOT", raising=False)
    with pytest.raises(DataError, match=r"IMG-ROOT.*give --data-root"):
        list_images("imagenet", None)
    for name in ("imagenet", "cifar10"):
        with pytest.raises(DataError, match=r"IMG-ROOT.*not there"):
            list_images(name, tmp_path / "nowhere")
    monkeypatch.setenv("EMOE_MED_DATA_ROOT", str(write(tmp_path, imagenet_layouts()["sorted"])))
    assert list_images("imagenet", None).classes == CLASSES


@pytest.mark.parametrize(
    ("mode", "kind", "color"),
    [
        ("L", "JPEG", 90),
        ("CMYK", "JPEG", (20, 90, 200, 10)),
        ("RGBA", "PNG", (9, 8, 7, 128)),
        ("P", "GIF", 3),
        ("1", "PNG", 1),
    ],
)
def test_every_colour_model_becomes_rgb(mode, kind, color):
    data = picture(color, mode, kind=kind)
    found = decode(data, "x", 8)
    assert found.shape == (3, 8, 8)
    expected = torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)
    assert (found.float() - expected[:, 2:10, 2:10].float()).abs().max() <= 1
    assert decode(data, "x", 8, channels=1).shape == (1, 8, 8)


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_of_sixteen_bits_keeps_its_shades(channels):
    data = io.BytesIO()
    Image.fromarray(np.array([[0, 300], [20_000, 65_535]], np.uint16)).save(data, "PNG")
    found = decode(data.getvalue(), "x", 2, channels)
    assert found.flatten(1).tolist() == [[0, 1, 78, 255]] * channels


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_pixels_without_a_known_white_are_refused(kind):
    data = io.BytesIO()
    Image.fromarray(np.ones((4, 4), kind)).save(data, "TIFF")
    with pytest.raises(DataError, match=r"IMG-DECODE.*8 or 16 bits"):
        decode(data.getvalue(), "x", 2)


def test_the_middle_square_is_cut():
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 255
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    assert (decode(data.getvalue(), "x", 10) == 255).all()
    smaller = decode(data.getvalue(), "x", 5)
    assert smaller.shape == (3, 5, 5)
    assert (smaller[:, :, 1:-1] > 240).all()


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "header"])
def test_a_broken_picture_is_named(tmp_path, damage):
    whole = picture((1, 2, 3), size=(64, 64))
    data = {"cut": whole[: len(whole) // 2], "text": b"hello", "empty": b"", "header": whole[:30]}[damage]
    files = imagenet_layouts()["sorted"] | {"train/n02123045/broken.JPEG": data}
    listing = list_images("imagenet", write(tmp_path, files))
    where = listing.train.paths.index("train/n02123045/broken.JPEG")
    with pytest.raises(DataError, match=r"error IMG-DECODE .*train/n02123045/broken\.JPEG") as refused:
        ImageDataset(listing.train, 8, 3)[where]
    assert refused.value.exit_code == 3
    assert len(str(refused.value).splitlines()) == 1


def test_a_damaged_or_huge_member_of_a_zip_is_named(tmp_path):
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in imagenet_layouts()["sorted"].items():
            archive.writestr(name, data)
        with archive.open("train/n02123045/bomb.JPEG", "w", force_zip64=True) as file:
            for _ in range(65):
                file.write(b"\0" * 2**20)
    data = bytearray(path.read_bytes())
    data[data.index(picture(shade(0))) + 200] ^= 1
    path.write_bytes(data)
    listing = list_images("imagenet", path)
    images = ImageDataset(listing.train, 8, 3)
    faults = []
    for i in range(len(images)):
        try:
            images[i]
        except DataError as error:
            faults += error.faults
    assert {fault.code for fault in faults} == {"IMG-ZIP", "IMG-SIZE"}
    assert all(fault.file.startswith(str(path)) for fault in faults)


def test_a_zip_serves_forked_processes(tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for name, data in imagenet_layouts()["sorted"].items():
            archive.writestr(name, data)
    listing = list_images("imagenet", tmp_path)
    data = ImageDataset(listing.train, 8, 3)
    data[0]
    handle = listing.train.tree._handle
    listing.train.tree._handle = (os.getpid() + 1, handle[1])  # as a child finds it
    data[1]
    assert listing.train.tree._handle[1] is not handle[1]


def test_what_is_no_file_is_not_opened(tmp_path):
    tree = open_tree(write(tmp_path / "root", {"train/a/x.png": b"1"}))
    assert tree.folders() == ["train"]
    assert tree.files("nowhere") == []
    os.mkfifo(tmp_path / "root" / "train" / "a" / "pipe.png")
    for name, told in (("nowhere", "No such file"), ("train/a/pipe.png", "is no file")):
        with pytest.raises(DataError, match=f"IMG-MISSING.*{told}"):
            tree.read(name)


def test_digits_are_those_of_scikit_learn_and_keep_their_test_set():
    listing = list_images("digits", None)
    again = list_images("digits", None)
    assert listing.contents() == again.contents()
    assert len(listing.train.labels) + len(listing.test.labels) == 1797
    together = np.concatenate([listing.train.pixels, listing.test.pixels]).reshape(1797, 64)
    original = np.round(load_digits().images * 255 / 16).reshape(1797, 64)
    assert np.array_equal(np.sort(together.view("V64"), 0), np.sort(original.astype(np.uint8).view("V64"), 0))
    counts = np.bincount(listing.test.labels) / np.bincount(load_digits().target)
    assert np.abs(counts - 0.2).max() < 0.01
    known, pixels = DATASETS["digits"], listing.train.pixels / 255
    assert known.mean[0] == pytest.approx(pixels.mean(), abs=0.005)
    assert known.std[0] == pytest.approx(pixels.std(), abs=0.005)


def test_the_split_is_stratified_disjoint_and_steady():
    labels = np.repeat(np.arange(4), [100, 50, 20, 5])
    train, val = split(labels, 0.1, None, 0)
    assert sorted([*train, *val]) == list(range(175))
    assert np.bincount(labels[val]).tolist() == [10, 5, 2, 1]  # at least one
    few, same = split(labels, 0.1, 40, 0)
    assert np.array_equal(val, same)
    assert set(few) < set(train)
    assert np.bincount(labels[few]).tolist() == [12, 12, 12, 4]
    assert not np.array_equal(split(labels, 0.1, None, 1)[1], val)
    with pytest.raises(DataError, match="single image"):
        split(np.array([0, 0, 1]), 0.1, None, 0)


def test_real_images_of_the_test_data(real_data):
    cifar = list_images("cifar10", real_data / "cifar10")
    assert (len(cifar.train.labels), len(cifar.test.labels)) == (50_000, 10_000)
    assert cifar.classes[0] == "airplane"
    sample = ImageDataset(cifar.test, 32, 3)[9_999]
    assert sample["label"] == 9
    tiny = list_images("tiny_imagenet", real_data / "tiny_imagenet")
    assert (len(tiny.classes), len(tiny.test.labels)) == (200, 5_000)
    data = ImageDataset(tiny.train, 64, 3)
    assert data[0]["image"].float().std() > 5
