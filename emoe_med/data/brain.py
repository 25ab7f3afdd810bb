"""From a scan on disk to the tensor that a network sees: the deterministic chain.

strict read -> RAS -> brain mask -> affine to the template (or centring) -> area resampling -> intensity.
A volume that `preprocess` wrote is in the model's space already and is not aligned again. Nothing random happens here.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, LoadImaged, MapTransform, Transform
from scipy import ndimage

from emoe_med.data import flirt
from emoe_med.data.fingerprint import FINGERPRINT_VERSION, fingerprint
from emoe_med.data.grid import box_grid, resample
from emoe_med.data.register import align_affine, similarity_of
from emoe_med.data.sidecar import Sidecar
from emoe_med.data.volume import StrictReader, Volume, voxel_digest
from emoe_med.errors import Fault, VolumeError

LOG = logging.getLogger("emoe_med")

# part of every cache key: raise it when a step below changes what it gives
CHAIN_VERSION = 2


@dataclass(frozen=True)
class ChainOptions:
    """Options of the deterministic chain.

    Attributes:
        spacing_mm: voxel edge of the cached volumes; it divides the box of 160 x 192 x 160 mm.
        align: `affine` takes each head to the MNI152 template by 12 degrees of freedom; `given` takes it there by
            the manifest's linear transform; `warped` leaves it, because a nonlinear warp brought it there before;
            `centred` only moves its centre there, and MNI atlases then do not apply.
        mask: `brain` keeps the voxels of the manifest's mask (or labels > 0); `head` keeps the whole head.
    """

    spacing_mm: float = 1.0
    align: Literal["affine", "given", "warped", "centred"] = "affine"
    mask: Literal["brain", "head"] = "brain"

    @property
    def space(self) -> str:
        """Name of the space that the volumes are in, for file names and reports."""
        return {"affine": "MNI152NLin2009aSym", "centred": "centred"}.get(self.align, flirt.SPACE)

    def contract(self) -> dict[str, Any]:
        """Tell what a scan went through; a model is applied only to scans that went the same way."""
        return {
            **asdict(self),
            "orientation": "RAS",
            "space": self.space,
            "box_mm": [160, 192, 160],
            "intensity": "clip((x / mean inside the mask - 1) / 0.25, -4, 3), background 0",
            "chain_version": CHAIN_VERSION,
            "digest": self.digest(),
        }

    def digest(self) -> str:
        """Return what the cache key says of the chain."""
        text = json.dumps([float(self.spacing_mm), self.align, self.mask, CHAIN_VERSION])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class ReadGiven(Transform):
    """Put the matrix of a given linear transform, template RAS mm -> subject RAS mm, in the place of its path."""

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Return the item, its `transform` [4, 4] where it has one."""
        if "transform" not in data:
            return dict(data)
        return {**data, "transform": flirt.given_matrix(Path(data["transform"]), Path(data["image"]))}


class BrainToBoxd(MapTransform):
    """Mask, align, resample and normalise `image` [1, X, Y, Z] into the model's box.

    Adds `similarity` [] (local correlation with the template; NaN where nothing was aligned), `matrix` [4, 4]
    (template RAS mm -> subject RAS mm), `fingerprint` (see `fingerprint.py`) and `voxels`, the digest of the
    image as read. Drops the mask.
    """

    def __init__(self, options: ChainOptions) -> None:
        super().__init__(keys=["image"])
        self.options = options

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Return image [1, X, Y, Z] float32 on the grid of the cache, exactly 0 outside the mask."""
        with one_thread():
            return self._to_box(data)

    def _to_box(self, data: Mapping[str, Any]) -> dict[str, Any]:
        image = data["image"]
        voxels, affine = np.asarray(image[0]), np.asarray(image.affine)
        mask = self._mask(voxels, affine, data.get("mask"))
        written = Sidecar.read(Path(data["sidecar"])) if "sidecar" in data else None
        matrix, similarity = self._matrix(voxels, affine, mask, written, data.get("transform"))
        shape, grid = box_grid(self.options.spacing_mm)
        brain = resample(np.where(mask, voxels, 0), affine, matrix, grid, shape)
        share = resample(mask.astype(np.float32), affine, matrix, grid, shape)
        # a voxel on the edge is the mean of what lies inside: averaged with the zeros outside it would look like CSF
        mean = brain / (np.maximum(share, 0.5) * voxels[mask].mean())
        normal = np.where(share >= 0.5, np.clip((mean - 1) / 0.25, -4, 3), 0)
        normal = normal.astype(np.float32)
        to_scanner = written.matrix if written else matrix
        measured = fingerprint(voxels, affine, mask, to_scanner, similarity, normal, self.options.spacing_mm)
        return {
            "image": torch.from_numpy(normal)[None],
            "similarity": torch.tensor(similarity),
            "matrix": torch.from_numpy(matrix),
            "fingerprint": torch.from_numpy(measured),
            "voxels": voxel_digest(Volume(voxels, affine, ())),
        }

    def _mask(self, voxels: np.ndarray, affine: np.ndarray, given: MetaTensor | None) -> np.ndarray:
        if self.options.mask == "head":
            # the mean of a head in air lies between the two; what the scalp encloses is head, dark or not
            mask = ndimage.binary_fill_holes(voxels > voxels.mean())
        elif given is None:
            hint = "give a manifest with a mask or labels column, or put <name>_mask.nii.gz beside the head"
            raise VolumeError(Fault("VOL-MASK", "no mask or labels for a model of masked brains", hint=hint))
        else:
            mask_affine = np.asarray(given.affine)
            same_grid = given.shape[1:] == voxels.shape and np.allclose(mask_affine, affine, atol=1e-3)
            mask = np.asarray(given[0]) > 0
            if not same_grid:
                mask = resample(mask, mask_affine, np.eye(4), affine, voxels.shape, order=0)
        if mask.mean() < 1e-3 or voxels[mask].mean() <= 0:
            raise VolumeError(Fault("VOL-MASK", "mask covers no signal of the image"))
        return mask

    def _matrix(
        self,
        voxels: np.ndarray,
        affine: np.ndarray,
        mask: np.ndarray,
        written: Sidecar | None,
        given: np.ndarray | None,
    ) -> tuple[np.ndarray, float]:
        if written:
            shape, grid = box_grid(written.steps["SpacingMm"])
            if shape != voxels.shape or not np.allclose(grid, affine, atol=1e-3):
                raise VolumeError(Fault("VOL-SPACE", "the sidecar names the model's space, the grid is another"))
        if written or self.options.align == "warped":
            given = np.eye(4)
        if given is not None:
            return given, similarity_of(voxels, affine, mask, given)
        if self.options.align == "affine":
            alignment = align_affine(voxels, affine, mask)
            return alignment.matrix, alignment.similarity
        matrix = np.eye(4)
        matrix[:3, 3] = np.argwhere(mask).mean(0) @ affine[:3, :3].T + affine[:3, 3] - box_centre_mm()
        return matrix, float("nan")


@contextmanager
def one_thread() -> Generator[None]:
    """Work with one thread of torch: the same bits on every machine, and no waiting for each other.

    The products of one head are small; scans are read side by side by processes instead.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def box_centre_mm() -> np.ndarray:
    """Return the world coordinates [3] of the middle of the model's box."""
    shape, affine = box_grid(4.0)
    return affine[:3, :3] @ ((np.asarray(shape) - 1) / 2) + affine[:3, 3]


class ToCacheEntry(Transform):
    """Store the image as float16, and the digest of everything beside it."""

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Return what goes to disk."""
        entry = {**data, "image": data["image"].half()}
        entry["digest"] = entry_digest(entry)
        return {**entry, "seal": entry_seal(entry)}


def entry_digest(entry: Mapping[str, Any]) -> str:
    """Return the SHA-256 of what a network sees of a cache entry: equal for one image under two names."""
    digest = hashlib.sha256()
    for name in ("image", "similarity", "matrix"):
        digest.update(entry[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def entry_seal(entry: Mapping[str, Any]) -> str:
    """Return the SHA-256 of what was measured beside it; an entry measured by another version has another seal."""
    measured = entry["fingerprint"].contiguous().numpy().tobytes()
    return hashlib.sha256(f"{FINGERPRINT_VERSION} {entry['voxels']} ".encode() + measured).hexdigest()


def make_chain(options: ChainOptions) -> Compose:
    """Compose the deterministic chain for items {"image": path}, with "mask", "sidecar", "transform" where they are."""
    load = LoadImaged(keys=["image", "mask"], reader=StrictReader, ensure_channel_first=True, allow_missing_keys=True)
    return Compose([ReadGiven(), load, BrainToBoxd(options), ToCacheEntry()])
