"""Names of labels: BIDS tables, the plain lists that atlases come with, and nilearn's atlases by name."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np

from emoe_med.data.table import read_table
from emoe_med.errors import ConfigError, DataError, Fault

_INDEX = ("index", "label", "id", "code", "value", "roi_index", "roi")
_NAME = ("name", "label name", "region", "roi_name", "label_name", "structure", "fullname")
_SIDES = {"rh label": "right", "lh label": "left", "lh labels": "left", "rh labels": "right"}
_PLAIN = re.compile(r"\s*(\d+)[\s,;]+([^\s,;]+)")


def read_labels(path: Path) -> dict[int, str]:
    """Read the names of a label volume's numbers.

    Accepted: CSV or TSV with a header that has `index` and `name` (BIDS `dseg.tsv`); one with a name and a number for
    each side (CerebrA); lines `number name ...` without a header (AAL). 0 is background and left out.

    Raises:
        DataError: There is none, or it is none of these (MAPS-LABELS).
    """
    text = read_table(path).decode("utf-8-sig")
    head = text.partition("\n")[0]
    dialect = csv.excel_tab if "\t" in head else csv.excel
    rows = list(csv.reader(io.StringIO(text), dialect=dialect))
    header = [cell.strip().casefold() for cell in rows[0]] if rows else []
    name = next((header.index(word) for word in _NAME if word in header), None)
    number = next((header.index(word) for word in _INDEX if word in header), None)
    sides = {column: side for column, word in enumerate(header) if (side := _SIDES.get(word))}
    columns = sides or ({} if number is None else {number: ""})
    found: dict[int, str] = {}
    if name is not None and columns:
        for row in rows[1:]:
            for column, side in columns.items():
                if len(row) > max(name, column) and row[column].strip().isdigit():
                    found[int(row[column])] = f"{side} {row[name].strip()}".strip()
    else:
        lines = (_PLAIN.match(line) for line in text.splitlines())
        found = {int(line[1]): line[2] for line in lines if line}
    found.pop(0, None)
    if not found:
        hint = "a header with index and name, or lines of a number and a name"
        raise DataError(Fault("MAPS-LABELS", "no table of label names", str(path), hint=hint))
    return found


def names_of(volume: Path) -> dict[int, str]:
    """Find the names of a label volume's numbers; empty where none are known.

    They stand in `dseg.tsv` in the folder of the volume or above it, as BIDS derivatives keep it; those of MUSE and
    DLMUSE are known, and such a volume is called after them.
    """
    beside = next((f for folder in list(volume.parents)[:5] if (f := folder / "dseg.tsv").is_file()), None)
    if beside is None and "muse" in volume.name.casefold():
        with as_file(files("emoe_med.brainage.maps") / "muse_dseg.tsv") as table:
            return read_labels(table)
    return read_labels(beside) if beside else {}


def _harvard_oxford(part: str) -> Callable[[], Any]:
    return lambda: _nilearn().fetch_atlas_harvard_oxford(f"{part}-maxprob-thr25-1mm")


ATLASES: dict[str, Callable[[], Any]] = {  # fetched by nilearn when first asked for, and kept in its data folder
    "aal": lambda: _nilearn().fetch_atlas_aal(),
    "destrieux": lambda: _nilearn().fetch_atlas_destrieux_2009(),
    "harvard-oxford-cortical": _harvard_oxford("cort"),
    "harvard-oxford-subcortical": _harvard_oxford("sub"),
    "juelich": lambda: _nilearn().fetch_atlas_juelich("maxprob-thr25-1mm"),
    "schaefer": lambda: _nilearn().fetch_atlas_schaefer_2018(n_rois=100),
}


def fetch_atlas(name: str) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Return voxels [X, Y, Z], affine and names of one of nilearn's atlases.

    Raises:
        ConfigError: The name is not known (MAPS-ATLAS), or it could not be fetched (MAPS-FETCH).
    """
    if name not in ATLASES:
        hint = f"known names: {', '.join(ATLASES)}; or name a file, and its table by --labels"
        raise ConfigError(Fault("MAPS-ATLAS", f"no atlas {name!r}", hint=hint))
    try:
        atlas = ATLASES[name]()
    except Exception as error:  # of whatever the network or the archive is made of
        hint = "give the atlas as a file, and its names by --labels"
        raise ConfigError(
            Fault("MAPS-FETCH", f"atlas {name} cannot be fetched: {type(error).__name__}", hint=hint)
        ) from error
    from nilearn.image import load_img

    image: Any = load_img(atlas.maps)
    table = atlas.lut
    names = {int(i): str(n) for i, n in zip(table["index"], table["name"], strict=True) if int(i)}
    return np.asarray(image.dataobj).astype(np.int32), image.affine, names


def _nilearn() -> Any:
    from nilearn import datasets  # seconds to import

    return datasets
