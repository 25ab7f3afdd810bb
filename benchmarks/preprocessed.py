"""Judge what `preprocess` wrote for heads with label maps: brain mask and place.

    python -m emoe_med.brainage preprocess --manifest IXI.csv --data-root IXI_FOLDER -o DIR --spacing 2 --steps full
    python benchmarks/preprocessed.py --manifest IXI.csv --data-root IXI_FOLDER --prepared DIR --templates FOLDER

The labels (MUSE codes) are carried by the written affine to the grid of the written volumes. Prints mean, least and
greatest of: Dice of the written brain mask with the labels above 0; soft Dice of the labels' white and grey matter with
the template's, as the head lay in the scanner, with its centre moved onto the template's alone, and after.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from preprocessing import centred, dice, overlap

from emoe_med.data.grid import resample
from emoe_med.data.manifest import read_manifest
from emoe_med.data.prepare import SPACE
from emoe_med.data.volume import Volume, read_volume


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("manifest", "data-root", "prepared", "templates"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    fine = {name: read_volume(options.templates / f"mni2009a_sym_{name}_1mm.nii.gz") for name in ("wm", "gm")}
    tissue: dict[str, Volume] = {}
    written = pd.read_csv(options.prepared / "manifest.csv", dtype=str, keep_default_na=False)
    found = []
    for scan in read_manifest(options.manifest, options.data_root, require_age=False).scans:
        row = written[written["participant_id"] == scan.participant_id].squeeze()
        if row["status"] == "failed":
            print(f"{scan.participant_id}: {row['reason']}")
            continue
        mask = read_volume(options.prepared / row["mask"])
        (file,) = (options.prepared / row["image"]).parent.glob(f"*_to-{SPACE}_mode-image_xfm.txt")
        for name, map_ in fine.items() if not tissue else ():
            carried = resample(map_.voxels, map_.affine, np.eye(4), mask.affine, mask.voxels.shape)
            tissue[name] = Volume(carried, mask.affine, ())
        matrix, labels = np.loadtxt(file), read_volume(scan.labels)
        share = resample((labels.voxels > 0).astype(np.float32), labels.affine, matrix, mask.affine, mask.voxels.shape)
        centre = centred((labels.voxels, labels.affine), labels.voxels > 0)
        record = {"row": scan.row, "mask Dice": dice(share >= 0.5, mask.voxels > 0)}
        for when, used in (("in scanner", np.eye(4)), ("centred", centre), ("after", matrix)):
            white, grey = overlap(labels.voxels, labels.affine, used, tissue)
            record |= {f"white matter {when}": white, f"grey matter {when}": grey}
        found.append(record)
    table = pd.DataFrame(found).set_index("row")
    print(table.agg(["count", "mean", "min", "max"]).T.round(4).to_string())
    print("lowest mask Dice, by manifest row:", table["mask Dice"].nsmallest(5).round(4).to_dict())


if __name__ == "__main__":
    main()
