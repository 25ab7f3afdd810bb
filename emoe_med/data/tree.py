"""Recognise the heads, and the brain masks that belong to them, in a folder that another tool has filled."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from emoe_med.data.files import DICOM_HINT
from emoe_med.data.scan import Scan, identity_from_path, is_warped
from emoe_med.errors import DataError, Fault

LOG = logging.getLogger("emoe_med")

_VOLUME = re.compile(r"\.(nii|nii\.gz|mgz|mgh)$", re.IGNORECASE)
_NO_HEAD = re.compile(r"(mask|dseg|probseg|labels?|seg|aseg|aparc.*|brain)\.(nii|nii\.gz|mgz|mgh)$", re.IGNORECASE)


def scans_in(folder: Path, out: Path | None = None) -> list[Scan]:
    """List the T1 heads of a folder, each once, with the brain mask beside it where there is one.

    Recognised: a FreeSurfer subjects folder (`*/mri/T1.mgz`, else `orig.mgz`, with `brainmask.mgz`), fMRIPrep
    (`*_desc-preproc_T1w` in native space with `*_desc-brain_mask`), deepmriprep (`brain<scan>` with `mask<scan>`),
    raw BIDS (`sub-*_T1w`); else every volume whose name is not that of a mask. What lies in a folder `derivatives`
    was made of the heads beside it, and counts where these are missing. How many heads were found is told.

    Args:
        folder: To look through, with all folders in it.
        out: Folder of results: what lies there, from a run before, is no head to work on.

    Raises:
        DataError: PREP-MIXED, heads of two layouts, which may be the same persons; PREP-NONE, with the line to run
            where the folder holds DICOM files.
    """

    def heads(find: Callable[[Path], Pairs]) -> list[tuple[Path, Path | None]]:
        return sorted(pair for pair in find(folder) if not _lies_in(pair[0], out))

    found = {layout: heads(find) for layout, find in _LAYOUTS.items()}
    own = {layout: [pair for pair in pairs if not _is_derived(pair[0], folder)] for layout, pairs in found.items()}
    found = {layout: pairs for layout, pairs in (own if any(own.values()) else found).items() if pairs}
    if len(found) > 1:
        what = " and ".join(f"{len(pairs)} {layout}" for layout, pairs in found.items())
        hint = "give the folder of one of them, or a manifest"
        raise DataError(Fault("PREP-MIXED", f"holds {what}", file=str(folder), hint=hint))
    ((layout, pairs),) = found.items() or [("heads", heads(_any_volume))]
    if pairs:
        LOG.warning("note: %s: %d %s", folder.name, len(pairs), layout)
        return [_scan(folder, row, image, mask) for row, (image, mask) in enumerate(pairs, start=1)]
    if any(_is_dicom(file) for file in sorted(folder.rglob("*"))[:1000]):
        raise DataError(Fault("PREP-NONE", "holds DICOM files", file=str(folder), hint=DICOM_HINT))
    raise DataError(Fault("PREP-NONE", "holds no .nii, .nii.gz or .mgz head", file=str(folder)))


Pairs = Iterator[tuple[Path, Path | None]]


def _freesurfer(folder: Path) -> Pairs:
    """Of the longitudinal stream each visit once: neither the template of a person nor a second copy of a visit."""
    mris = [*folder.glob("mri"), *folder.glob("*/mri")]
    names = {mri.parent.name for mri in mris}
    copies = [name.split(".long.", 1) for name in names if ".long." in name]
    passed_over = names & {part for visit, base in copies for part in (base, f"{visit}.long.{base}" * (visit in names))}
    if passed_over:
        LOG.warning("note: %d templates and second copies of a longitudinal stream are left out", len(passed_over))
    for mri in mris:
        images = [mri / name for name in ("T1.mgz", "orig.mgz") if (mri / name).is_file()]
        if images and mri.parent.name not in {"fsaverage", "fsaverage5", "fsaverage6", *passed_over}:
            yield images[0], _there(mri / "brainmask.mgz")


def _fmriprep(folder: Path) -> Pairs:
    for image in folder.rglob("*_desc-preproc_T1w.nii*"):
        if "_space-" not in image.name:
            yield image, _there(image.with_name(image.name.replace("_desc-preproc_T1w", "_desc-brain_mask")))


def _deepmriprep(folder: Path) -> Pairs:
    for image in folder.rglob("brain*.nii*"):
        if mask := _there(image.with_name("mask" + image.name.removeprefix("brain"))):
            yield image, mask


def _bids(folder: Path) -> Pairs:
    for image in folder.rglob("sub-*_T1w.nii*"):
        if not _is_derived(image, folder) and "_desc-" not in image.name:
            yield image, _there(image.with_name(image.name.replace("_T1w", "_desc-brain_mask")))


_LAYOUTS = {
    "heads of FreeSurfer": _freesurfer,
    "heads of fMRIPrep": _fmriprep,
    "brains of deepmriprep": _deepmriprep,
    "raw heads in BIDS": _bids,
}


def _any_volume(folder: Path) -> Pairs:
    for image in folder.rglob("*"):
        if _VOLUME.search(image.name) and not _NO_HEAD.search(image.name):
            yield image, mask_beside(image)


def mask_beside(image: Path) -> Path | None:
    """Return the brain mask that lies beside a head under one of the usual names.

    They are `*_desc-brain_mask`, `<head>_mask`, `<head>_brain_mask`, `T1_brain_mask` and `brainmask`. UK Biobank's
    warped brain is its own mask: what lies beside it is on the native grid.
    """
    if image.name.startswith("T1_brain_to_MNI."):
        return image
    stem = _VOLUME.sub("", image.name)
    bids = re.sub(r"(_desc-[^_]+)?_T1w$", "", stem)
    names = (f"{bids}_desc-brain_mask", f"{stem}_mask", f"{stem}_brain_mask", "T1_brain_mask", "brainmask")
    places = (image.with_name(name + ending) for name in names for ending in (".nii.gz", ".nii", ".mgz", ".mgh"))
    return next((place for place in places if place.is_file()), None)


def _is_derived(image: Path, folder: Path) -> bool:
    return "derivatives" in image.relative_to(folder).parts


def _lies_in(image: Path, out: Path | None) -> bool:
    return out is not None and image.resolve().is_relative_to(out.resolve())


def _there(path: Path) -> Path | None:
    return path if path.is_file() else None


def _scan(folder: Path, row: int, image: Path, mask: Path | None) -> Scan:
    place = image.relative_to(folder)
    participant, session = identity_from_path(place.as_posix())
    if participant is None and image.parent.name == "mri":  # FreeSurfer names the subject's folder
        participant = (image.parent.parent if place.parts[0] != "mri" else folder).name
    name = participant or _VOLUME.sub("", image.name)
    return Scan(
        row=row, image=image, age=None, participant_id=name, session_id=session, mask=mask, warped=is_warped(image.name)
    )


def _is_dicom(file: Path) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as content:
        return content.read(132)[128:] == b"DICM"
