"""ImageNet's photographs in each layout that ImageNet comes in: one classifier, the same predictions."""

import numpy as np
import pandas as pd
import pytest
from command_line import typed
from scipy.io import savemat

from emoe_med.vision.__main__ import app
from emoe_med.vision.run import CONFIGS

run = typed(app)
CLASSES = 8
SHORT = (
    "training.epochs=1",
    "training.batch_size=8",
    "model.depth=2",
    "data.val_share=0.4",
    "tracking.mlflow=false",
    "evaluation.bootstrap=1000",
)
INSIDE = {"sorted": "", "devkit": "", "kaggle": "ILSVRC/Data/CLS-LOC/"}


def link(photograph, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(photograph)


def arranged(root, layout, photographs):
    """Lay out photographs, by class, three times each in train/ and once in val/; returns the class of each in val/.

    `sorted` has class folders in val/. `devkit` and `kaggle` have it flat, in an order that is not that of the
    classes, beside the ground truth of the development kit, whose numbers are in another order again, or a table.
    """
    base = root / INSIDE[layout]
    for wnid, file in photographs.items():
        for i in range(3):
            link(file, base / "train" / wnid / f"{wnid}_{i}.JPEG")
        if layout == "sorted":
            link(file, base / "val" / wnid / "ILSVRC2012_val_00000001.JPEG")
    if layout == "sorted":
        return list(photographs)
    shown = [*reversed(photographs)][1:] + [*reversed(photographs)][:1]
    for i, wnid in enumerate(shown, start=1):
        link(photographs[wnid], base / "val" / f"ILSVRC2012_val_{i:08d}.JPEG")
    if layout == "kaggle":
        rows = [f"ILSVRC2012_val_{i:08d},{wnid} 1 2 3 4" for i, wnid in enumerate(shown, start=1)]
        (root / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows]))
        return shown
    numbers = {wnid: 1 + (5 * i) % CLASSES for i, wnid in enumerate(photographs)}
    table = np.zeros(CLASSES, [("ILSVRC2012_ID", "i4"), ("WNID", "O")])
    table["ILSVRC2012_ID"], table["WNID"] = list(numbers.values()), list(numbers)
    kit = root / "ILSVRC2012_devkit_t12" / "data"
    kit.mkdir(parents=True)
    savemat(kit / "meta.mat", {"synsets": table.reshape(-1, 1)})
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{numbers[wnid]}\n" for wnid in shown))
    return shown


@pytest.fixture(scope="module")
def photographs(real_data):
    folder = real_data / "imagenet_samples"
    index = pd.read_csv(folder / "index.csv")
    kept = index[index["kept"] == 1].iloc[:: 50 // CLASSES][:CLASSES]
    return {wnid: folder / "images" / file for wnid, file in zip(kept["wnid"], kept["file"], strict=True)}


def scored(path, shown):
    """Return what was predicted of each class's photograph, after seeing that its label is its class's place."""
    table = pd.read_csv(path)
    assert table["label"].tolist() == [sorted(shown).index(wnid) for wnid in shown]
    return table.drop(columns="row").set_index("label").sort_index()


def test_every_layout_of_imagenet_gives_the_same_run(tmp_path, photographs):
    short = [part for value in SHORT for part in ("--set", value)]
    preset = ("--config", CONFIGS / "tiny_imagenet_emoe_small.yaml", "--dataset", "imagenet", *short)
    found, runs = {}, {}
    for layout in INSIDE:
        root = tmp_path / layout
        shown = arranged(root, layout, photographs)
        run("train", *preset, "--data-root", root, "--out", tmp_path / f"{layout}_runs")
        runs[layout] = tmp_path / f"{layout}_runs" / "tiny_imagenet_emoe_small" / "seed0"
        found[layout] = scored(runs[layout] / "predictions" / "test.csv", shown)
        run("evaluate", "--run", runs["sorted"], "--data-root", root)
    assert len(found["sorted"]) == CLASSES
    for table in found.values():
        pd.testing.assert_frame_equal(table, found["sorted"], atol=1e-3)
    elsewhere = [pd.read_csv(path).set_index("label") for path in runs["sorted"].glob("evaluations/*/test.csv")]
    assert len(elsewhere) == len(INSIDE)
    for table in elsewhere:
        pd.testing.assert_frame_equal(table.drop(columns="row").sort_index(), found["sorted"], atol=1e-3)
