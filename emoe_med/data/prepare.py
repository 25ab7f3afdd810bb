"""One raw head to the model's space: brain mask, bias field, affine to MNI152, area resampling, and its figures.

`brain.py` does the same for the network alone; here every result is kept, for a person to look at and to reuse.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy import ndimage

from emoe_med.data import bias_field
from emoe_med.data.brain import one_thread
from emoe_med.data.files import refuse
from emoe_med.data.grid import BOX_MM, box_grid, resample
from emoe_med.data.register import align_affine
from emoe_med.data.sidecar import steps_digest
from emoe_med.data.strip import brain_mask
from emoe_med.data.volume import Volume, read_volume
from emoe_med.errors import ConfigError, Fault

PREPARE_VERSION = 1  # part of the chain's hash: raise it when a step changes what it gives
SPACE = "MNI152NLin2009aSym"
UNIT = 1000  # stored value of the mean inside the brain
EXTRA = ("deepbet", "SimpleITK")
INSTALL = 'pip install "emoe-med[preprocess]", or make preprocess-extra'
_LEAST_AROUND = 0.1  # of the brain's volume: scalp, skull and neck are several times that
# outside, a person should look; the heads of docs/preprocessing.md lie inside. Not calibrated on heads that failed
_EXPECTED = {
    "brain_ml": (900, 2100),
    "similarity": (0.6, 1.0),
    "scale_x": (0.7, 1.2),
    "scale_y": (0.7, 1.2),
    "scale_z": (0.7, 1.2),
    "cut_share": (0, 0.002),
}


@dataclass(frozen=True)
class Prepared:
    """A head in the model's space, and what it came from.

    Attributes:
        head: As read, RAS.
        native_mask: Brain of the head, on its grid.
        voxels: [X, Y, Z] int16 in the model box, `UNIT` being the mean inside the brain, 0 outside.
        mask: [X, Y, Z], true inside.
        affine: Voxel of the box -> MNI RAS mm [4, 4].
        matrix: MNI RAS mm -> scanner RAS mm [4, 4].
        figures: Numbers for quality control, by column of qc.tsv.
    """

    head: Volume
    native_mask: np.ndarray
    voxels: np.ndarray
    mask: np.ndarray
    affine: np.ndarray
    matrix: np.ndarray
    figures: dict[str, float]


@dataclass(frozen=True)
class Preparation:
    """Which steps a head goes through.

    Attributes:
        spacing_mm: Voxel edge; it divides the box of 160 x 192 x 160 mm.
        path: `full` strips the skull and flattens the bias field; `light` takes the brain mask it is given and
            leaves the field.
    """

    spacing_mm: float = 1.0
    path: Literal["full", "light"] = "full"

    def __post_init__(self) -> None:
        box_grid(self.spacing_mm)

    def steps(self) -> dict[str, Any]:
        """Return what every head went through, alike for all of them: tools, versions, settings."""
        full = self.path == "full"
        return {
            "Path": self.path,
            "Reader": "strict, reoriented to RAS",
            "SkullStrip": _tool("deepbet") if full else "none: mask as given",
            "BiasField": (
                f"{_tool('SimpleITK')} N4, every {bias_field.SPACING_MM:g} mm, iterations "
                f"{'x'.join(map(str, bias_field.ITERATIONS))}"
                if full
                else "none"
            ),
            "Registration": "emoe_med affine, 12 degrees of freedom, local correlation at 8 and 4 mm",
            "Template": f"{SPACE} as nilearn ships it",
            "Space": SPACE,
            "Orientation": "RAS",
            "SpacingMm": float(self.spacing_mm),
            "BoxMm": list(BOX_MM),
            "Resampling": "area-weighted mean inside the mask",
            "Intensity": f"{UNIT} * x / mean inside the brain, 0 outside, int16",
            "Version": PREPARE_VERSION,
        }

    @classmethod
    def of(cls, steps: Mapping[str, Any]) -> Preparation:
        """Return the preparation whose steps these are, as far as the installed versions give them."""
        return cls(steps["SpacingMm"], steps["Path"])

    def digest(self) -> str:
        """Return the hash of all steps."""
        return steps_digest(self.steps())


def odd(figures: Mapping[str, float]) -> str:
    """Tell which figures of a head a person should look at; empty where there is none."""
    return "; ".join(
        f"{name} {figures[name]:.3g} is outside {low:g} to {high:g}"
        for name, (low, high) in _EXPECTED.items()
        if not low <= figures[name] <= high
    )


def missing_extra() -> list[str]:
    """Return the packages of the full path that are not installed."""
    return [name for name in EXTRA if importlib.util.find_spec(name) is None]


def require_extra() -> None:
    """Refuse the full path where its packages are not installed.

    Raises:
        ConfigError: PREP-EXTRA, with the command that installs them.
    """
    if missing_extra():
        raise ConfigError(lacking_extra())


def lacking_extra(file: str | None = None, row: int | None = None) -> Fault:
    """Return what to say where the packages of the full path are missing."""
    return Fault("PREP-EXTRA", f"{' and '.join(missing_extra())} not installed", file, row, hint=INSTALL)


def prepare_head(image: Path, mask: Path | None, preparation: Preparation) -> Prepared:
    """Take one head through all steps. Deterministic.

    Args:
        image: Whole head, any format the strict reader reads.
        mask: Brain mask or label map (above 0 is brain) for the light path, on any grid of the same scanner space.
        preparation: Which steps.

    Raises:
        VolumeError: The scan cannot be used; the fault names the step.
    """
    head = read_volume(image)
    if preparation.path == "full":
        inside = brain_mask(head.voxels)
        _check_whole(head.voxels, inside)
        flat = bias_field.flatten(head.voxels, head.affine, inside)
    else:
        inside, flat = _given(mask, head), head.voxels
    with one_thread():
        found = align_affine(flat, head.affine, inside)
        shape, affine = box_grid(preparation.spacing_mm)
        brain = resample(np.where(inside, flat, 0), head.affine, found.matrix, affine, shape)
        share = resample(inside.astype(np.float32), head.affine, found.matrix, affine, shape)
    mean = float(flat[inside].mean())
    box_mask = share >= 0.5
    # a voxel on the edge is the mean of what lies inside the brain, not of brain and nothing
    voxels = np.where(box_mask, UNIT * brain / (np.maximum(share, 0.5) * mean), 0)
    figures = {
        "brain_ml": _volume_ml(inside, head.affine),
        "similarity": found.similarity,
        **dict(zip(("scale_x", "scale_y", "scale_z"), np.linalg.norm(found.matrix[:3, :3], axis=0), strict=True)),
        "cut_share": cut_share(head.voxels, inside),
        "clipped_share": float((flat[inside] > 1.75 * mean).mean()),
        "field_range": _field_range(head.voxels, flat, inside),
        "snr": _snr(flat, inside),
    }
    return Prepared(
        head=head,
        native_mask=inside,
        voxels=np.rint(np.clip(voxels, -32000, 32000)).astype(np.int16),
        mask=box_mask,
        affine=affine,
        matrix=found.matrix,
        figures={name: float(value) for name, value in figures.items()},
    )


def version(package: str) -> str:
    """Return the version of a package, `unknown` where it runs from a source tree that was never installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _tool(package: str) -> str:
    return f"{package} {version(package)}"


def _check_whole(voxels: np.ndarray, inside: np.ndarray) -> None:
    """Refuse a head that was stripped before: another tool's mask would stand in for the one of the contract."""
    if not _has_surroundings(voxels, inside):
        refuse("VOL-STRIPPED", "nothing around the brain", "give the whole head, or its mask and --steps light")


def _has_surroundings(voxels: np.ndarray, inside: np.ndarray) -> bool:
    around = (voxels > 0.1 * voxels[inside].mean()) & ~inside
    return bool(around.sum() >= _LEAST_AROUND * inside.sum())


def _given(mask: Path | None, head: Volume) -> np.ndarray:
    if mask is None:
        refuse("VOL-MASK", "no mask or labels for the light path")
    given = read_volume(mask)
    inside = given.voxels > 0
    if inside.shape != head.voxels.shape or not np.allclose(given.affine, head.affine, atol=1e-3):
        inside = resample(inside, given.affine, np.eye(4), head.affine, head.voxels.shape, order=0)
    if not inside.any():
        refuse("VOL-MASK", "mask is empty, or lies outside the image")
    return inside


def _volume_ml(mask: np.ndarray, affine: np.ndarray) -> float:
    return float(mask.sum() * abs(np.linalg.det(affine[:3, :3])) / 1000)


def cut_share(voxels: np.ndarray, mask: np.ndarray) -> float:
    """Return the share of the brain that lies on a face of the field of view or beyond: above 0 it may be cut.

    Outer slices of one value are padding, not field of view, unless the head was stripped: there they are air.
    """
    inner = np.zeros(mask.shape, bool)
    seen = [(0, n - 1) for n in mask.shape]
    if _has_surroundings(voxels, mask):
        varied = (np.flatnonzero(np.ptp(voxels, axis=tuple({0, 1, 2} - {axis}))) for axis in range(3))
        seen = [(int(slices[0]), int(slices[-1])) for slices in varied]
    inner[tuple(slice(first + 1, last) for first, last in seen)] = True
    return float(mask[~inner].sum() / mask.sum())


def _field_range(raw: np.ndarray, flat: np.ndarray, mask: np.ndarray) -> float:
    """Return how many times brighter the 99th than the 1st percentile of the bias field is; 1 without correction."""
    usable = mask & (flat > 0)
    low, high = np.percentile(raw[usable] / flat[usable], (1, 99))
    return float(high / low)


def _snr(voxels: np.ndarray, mask: np.ndarray) -> float:
    """Return median over noise inside the brain, noise being the robust spread of second differences."""
    inner = ndimage.binary_erosion(mask, iterations=2)
    if not inner.any():
        return float("nan")
    rough = ndimage.convolve1d(voxels, [1.0, -2.0, 1.0], axis=0)[inner]
    noise = 1.4826 * np.median(np.abs(rough - np.median(rough))) / np.sqrt(6)
    return float(np.median(voxels[inner]) / noise) if noise > 0 else float("inf")
