"""What preprocessing writes for one scan: names as BIDS derivatives have them, each file whole, the sidecar last.

The sidecar holds the digests of the others and of the input, so that it vouches for all of them: a scan is done
when its sidecar is there and every digest holds.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from emoe_med.brainage.preprocess_page import picture
from emoe_med.data.prepare import EXTRA, SPACE, Preparation, Prepared, version
from emoe_med.data.scan import Scan, person_key
from emoe_med.data.volume import file_digest, write_volume
from emoe_med.errors import VolumeError
from emoe_med.storage import replace_file, storage_error

_ENTITY = re.compile(r"(ses|acq|rec|run)-(.+)")
_MNI_FORM = 4  # NIfTI's code for MNI space
_DIRECTION = (
    "The text file holds the 4 x 4 matrix from MNI RAS mm to scanner RAS mm, which resampling the T1w image needs "
    "(points move the other way round than the image); invert it to carry points from the scanner to MNI."
)


class Outputs:
    """Paths of the files of one scan, relative to the output folder."""

    def __init__(self, stem: str, spacing_mm: float) -> None:
        resolution = f"{spacing_mm:g}".replace(".", "p")
        space = f"{stem}_space-{SPACE}_res-{resolution}"
        self.image = Path(f"{space}_desc-preproc_T1w.nii.gz")
        self.mask = Path(f"{space}_desc-brain_mask.nii.gz")
        self.picture = Path(f"{space}_desc-preproc_T1w.png")
        self.sidecar = Path(f"{space}_desc-preproc_T1w.json")
        self.matrix = Path(f"{stem}_from-T1w_to-{SPACE}_mode-image_xfm.txt")

    def guarded(self) -> dict[str, Path]:
        """Return the files that the sidecar vouches for."""
        return {"image": self.image, "mask": self.mask, "picture": self.picture, "matrix": self.matrix}


def stems(scans: Iterable[Scan]) -> list[str]:
    """Name each scan `sub-X[/ses-Y]/anat/sub-X[_ses-Y][_run-Z]`, with letters and digits alone, no name twice.

    Every person has one `sub-X` of their own: two ids may have the same letters.
    """
    taken: dict[str, int] = {}
    subjects: dict[str, str] = {}
    names = []
    for scan in scans:
        person = person_key(scan.participant_id)
        if person not in subjects:
            subjects[person] = _subject(scan, {name.casefold() for name in subjects.values()})
        parts = [subjects[person], *_entities(scan.session_id)]
        stem = "_".join(parts)
        if taken.setdefault(stem.casefold(), scan.row) != scan.row:
            parts.append(f"acq-row{scan.row}")
            stem = "_".join(parts)
        folder = [parts[0], *(part for part in parts[1:2] if part.startswith("ses-")), "anat"]
        names.append("/".join([*folder, stem]))
    return names


def _subject(scan: Scan, taken: Collection[str]) -> str:
    person = scan.participant_id.removeprefix("sub-")
    if "/" in person:  # a nameless row goes by its path
        person = Path(person).name.split(".")[0]
    name = f"sub-{_letters(person) or 'x'}"
    while name.casefold() in taken:
        name += f"row{scan.row}"
    return name


def _entities(session: str) -> Iterable[str]:
    for part in filter(None, session.split("_")):
        found = _ENTITY.fullmatch(part)
        key, value = found.groups() if found else ("ses", part)
        if letters := _letters(value):
            yield f"{key}-{letters}"


def _letters(text: str) -> str:
    return re.sub(r"[^0-9A-Za-z]", "", text)


def input_digests(scan: Scan, preparation: Preparation) -> dict[str, str]:
    """Return the SHA-256 of the files that a scan is made from."""
    digests = {"image": file_digest(scan.image)}
    if preparation.path == "light" and (mask := scan.mask or scan.labels):
        digests["mask"] = file_digest(mask)
    return digests


def finished(
    out: Path, outputs: Outputs, inputs: Mapping[str, str], preparation: Preparation
) -> tuple[dict[str, float], str] | None:
    """Return figures and volume digest of a scan that is done: same input, same chain, every file as it was written."""
    try:
        sidecar = json.loads((out / outputs.sidecar).read_text("utf-8"))
        same = sidecar["ChainHash"] == preparation.digest() and sidecar["InputSha256"] == dict(inputs)
        if same and sidecar["OutputSha256"] == _digests(out, outputs):
            figures = {name: float(value) for name, value in sidecar["QualityControl"].items()}
            return figures, sidecar["OutputSha256"]["image"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, VolumeError):
        pass  # not there, cut short or altered: made anew
    return None


def write_outputs(
    out: Path, outputs: Outputs, prepared: Prepared, preparation: Preparation, inputs: Mapping[str, str]
) -> str:
    """Write all files of one scan, the sidecar last; return the SHA-256 of the volume.

    Raises:
        StorageError: The disk is full, read-only or gone.
    """
    try:
        (out / outputs.image).parent.mkdir(parents=True, exist_ok=True)
        (out / outputs.sidecar).unlink(missing_ok=True)  # it no longer vouches
    except OSError as error:
        raise storage_error(error, out, "output folder cannot be made") from error
    write_volume(out / outputs.image, prepared.voxels, prepared.affine, form_code=_MNI_FORM)
    write_volume(out / outputs.mask, prepared.mask, prepared.affine, form_code=_MNI_FORM)
    text = io.StringIO()
    np.savetxt(text, prepared.matrix, fmt="%.10f")
    replace_file(out / outputs.matrix, text.getvalue().encode())
    replace_file(out / outputs.picture, picture(prepared))
    sidecar = {**_statement(preparation), "Matrix": prepared.matrix.tolist(), "QualityControl": prepared.figures}
    sidecar["InputSha256"] = dict(inputs)
    sidecar["OutputSha256"] = _digests(out, outputs)
    replace_file(out / outputs.sidecar, json.dumps(sidecar, indent=1).encode())
    return sidecar["OutputSha256"]["image"]


def _statement(preparation: Preparation) -> dict[str, Any]:
    """Return what is alike for all scans of a chain; `Steps` is what a model's contract is held against."""
    tools = ["emoe-med", *(EXTRA if preparation.path == "full" else ())]
    return {
        "SkullStripped": True,
        "GeneratedBy": [{"Name": name, "Version": version(name)} for name in tools],
        "Steps": preparation.steps(),
        "ChainHash": preparation.digest(),
        "Transform": _DIRECTION,
    }


def _digests(out: Path, outputs: Outputs) -> dict[str, str]:
    return {name: file_digest(out / path) for name, path in outputs.guarded().items()}


def description() -> bytes:
    """Return `dataset_description.json` of the output folder."""
    content = {
        "Name": "T1w heads in MNI space",
        "BIDSVersion": "1.10.0",
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "emoe-med", "Version": version("emoe-med")}],
    }
    return json.dumps(content, indent=1).encode()
