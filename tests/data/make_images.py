"""Small pictures in the published layouts, of a colour that tells their class."""

import io

import numpy as np
import torch
from PIL import Image
from scipy.io import savemat

from emoe_med.data.images import ImageDataset

CLASSES = ("n01440764", "n02123045", "n03481172")


def picture(shade, mode="RGB", size=(20, 16), kind="JPEG"):
    image = Image.new(mode, size, shade)
    data = io.BytesIO()
    image.save(data, kind)
    return data.getvalue()


def shade(label):
    return (40 + 60 * label, 10, 200 - 60 * label)


def write(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def train_files(inside="", images=3):
    names = [(label, f"{c}/{inside}{c}_{i}.JPEG") for label, c in enumerate(CLASSES) for i in range(images)]
    return {f"train/{name}": picture(shade(label)) for label, name in names}


def shades(listing, part="test"):
    """Check by colour that every image has its class's label."""
    data = ImageDataset(getattr(listing, part), 8, 3)
    for sample in (data[i] for i in range(len(data))):
        found = sample["image"].float().mean((1, 2))
        assert (found - torch.tensor(shade(sample["label"])).float()).abs().max() < 4
    return [int(label) for label in getattr(listing, part).labels]


ORDER = [2, 0, 1, 2]  # classes of the flat validation files
FLAT = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": picture(shade(c)) for i, c in enumerate(ORDER)}


def devkit():
    """Numbers that are not in the order of names, as in the real development kit."""
    numbers = [30, 10, 20]
    table = np.zeros(3, [("ILSVRC2012_ID", "i4"), ("WNID", "O"), ("words", "O")])
    for row, number, wnid in zip(table, numbers, CLASSES, strict=True):
        row["ILSVRC2012_ID"], row["WNID"], row["words"] = number, wnid, "thing"
    data = io.BytesIO()
    savemat(data, {"synsets": table.reshape(-1, 1)})
    return data.getvalue(), "".join(f"{numbers[c]}\n" for c in ORDER).encode()


def imagenet_layouts():
    train, (meta, numbers) = train_files(), devkit()
    flat = {f"val/{name}": data for name, data in FLAT.items()}
    solution = "ImageId,PredictionString\n" + "".join(
        f"{name[:-5]},{CLASSES[c]} 1 2 3 4\n" for name, c in zip(FLAT, ORDER, strict=True)
    )
    kit = {"ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": numbers,
           "ILSVRC2012_devkit_t12/data/meta.mat": meta}  # fmt: skip
    sorted_val = {f"val/{CLASSES[c]}/{name}": data for (name, data), c in zip(FLAT.items(), ORDER, strict=True)}
    moved = {f"ILSVRC/Data/CLS-LOC/{name}": data for name, data in {**train, **flat}.items()}
    return {
        "sorted": {**train, **sorted_val},
        "devkit": {**train, **flat, **kit},
        "kaggle": {**moved, "LOC_val_solution.csv": solution.encode()},
    }
