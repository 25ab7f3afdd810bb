"""Whether this machine gives the numbers of the machine that exported a bundle, stage by stage.

A drawn head, no person's, goes from its file through reader and chain to a volume, and from there through the
network to an age. The network is tried on the stored volume too, so that a difference shows where it arises.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emoe_med.brainage.bundle import HEAD, MASK, Bundle
from emoe_med.brainage.inference import TrainedModel, predict_scans
from emoe_med.brainage.prepared import prepared_like
from emoe_med.data.brain import box_centre_mm
from emoe_med.data.cache import HeadDataset
from emoe_med.data.cohort import draw_person, scan_person
from emoe_med.data.grid import BOX_MM
from emoe_med.data.prepare import Preparation
from emoe_med.data.scan import Scan
from emoe_med.data.sidecar import other_steps
from emoe_med.data.volume import write_volume
from emoe_med.errors import VolumeError
from emoe_med.training.run_folder import environment

AGE = 50.0  # years, of the drawn head
SPACING_MM = 3.5
# what may differ between machines; docs/export.md tells what was seen
PLACE_MM = 0.1
VOXELS = 0.01  # mean over the volume; one voxel at the edge of the mask may fall on the other side of it
NETWORK_YEARS = {"fp32": 0.01, "bf16": 0.1}
YEARS = 0.1  # of the whole way: a head placed a hair otherwise is another image


@dataclass(frozen=True)
class Stage:
    """One figure of the self-test: stored, found here, how far apart, and how far apart they may be."""

    name: str
    stored: float | str
    here: float | str
    difference: float
    allowed: float
    unit: str

    @property
    def same(self) -> bool:
        """Whether the machines agree; what is not a number never does."""
        return self.difference <= self.allowed

    def __str__(self) -> str:
        word = "same" if self.same else "DIFFERS"
        shown = [f"{value:.4f}" if isinstance(value, float) else value for value in (self.stored, self.here)]
        apart = f"{self.difference:.2g} {self.unit} apart, {self.allowed:g} allowed" if self.unit else ""
        return f"{word:8}{self.name:22} stored {shown[0]}, here {shown[1]}  {apart}".rstrip()


def draw_scan(folder: Path) -> Scan:
    """Write the drawn head and its brain mask into a bundle."""
    person = draw_person(0, seed=0, repeat_share=0)
    _, affine, head = scan_person(person, AGE, np.random.default_rng(0), planted=True, spacing_mm=SPACING_MM)
    scan = drawn_scan(folder)
    scan.image.parent.mkdir(parents=True, exist_ok=True)
    write_volume(scan.image, head.image, affine, form_code=1)
    write_volume(folder / MASK, head.brain, affine, form_code=1)
    return scan


def drawn_scan(folder: Path) -> Scan:
    """Return the drawn head of a bundle."""
    return Scan(row=1, image=folder / HEAD, age=AGE, participant_id="drawn", session_id="", mask=folder / MASK)


def measure(model: TrainedModel, scan: Scan) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Take the drawn head through all stages, as `predict` takes a raw one.

    Returns:
        Tensors `volume` [1, kX, kY, kZ] float16 and `matrix` [4, 4] (template RAS mm -> scanner RAS mm), and the
        figures `years` and `status`.

    Raises:
        ConfigError: The model wants its scans preprocessed, and packages of that are missing.
        VolumeError: A step refuses the head.
    """
    with TemporaryDirectory() as cache:
        scans, faults = prepared_like(model.contract, [scan], Path(cache))
        if faults:
            raise VolumeError(*faults)
        heads = HeadDataset(scans, model.chain(), Path(cache))
        entry, sidecar = heads.entry(0), heads.sidecars[0]
        status = predict_scans(model, heads, [0])["status"].iloc[0]
    matrix = torch.from_numpy(sidecar.matrix) if sidecar else entry["matrix"]
    years = model.age(entry["image"], average=True)
    return {"volume": entry["image"], "matrix": matrix}, {"years": years, "status": status}


def selftest(bundle: Bundle) -> list[Stage]:
    """Compare what this machine makes of the drawn head with what the exporting machine did."""
    model, stored, vectors = bundle.predictor.model, bundle.record["selftest"], bundle.vectors
    tensors, found = measure(model, drawn_scan(bundle.folder))
    alone = model.age(vectors["volume"], average=True)
    exact = NETWORK_YEARS[model.config.training.precision]
    volumes = [v["volume"].float() for v in (vectors, tensors)]
    status = stored["status"], found["status"]
    return [
        Stage("chain, placement", *_places(vectors, tensors), _moved_mm(vectors, tensors), PLACE_MM, "mm"),
        Stage("chain, volume", *(float(v.abs().mean()) for v in volumes), _apart(*volumes), VOXELS, "on average"),
        Stage("network", stored["years"], alone, abs(stored["years"] - alone), exact, "years"),
        Stage("scan to age", stored["years"], found["years"], abs(stored["years"] - found["years"]), YEARS, "years"),
        Stage("verdict", *status, float(status[0] != status[1]), 0.0, ""),
    ]


def _places(*tensors: dict[str, Tensor]) -> list[float]:
    """Return how far each places the middle of the template's box from the scanner's origin, mm."""
    return [float(each["matrix"][:3, 3].norm()) for each in tensors]


def _moved_mm(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Return the largest distance, in mm, between the two places of a corner of the template's box."""
    corners = (
        np.array(np.meshgrid(*([-edge / 2, edge / 2] for edge in BOX_MM))).reshape(3, 8) + box_centre_mm()[:, None]
    )
    moved = (one["matrix"] - other["matrix"]).double().numpy()
    return float(np.linalg.norm(moved[:3, :3] @ corners + moved[:3, 3:], axis=0).max())


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().mean()) if one.shape == other.shape else float("inf")


def other_versions(bundle: Bundle) -> list[str]:
    """Name what numbers depend on and is another here: versions, device, threads, commit."""
    here = environment(next(bundle.predictor.model.net.parameters()).device)
    there = bundle.record["environment"]
    pairs = {name: (there.get(name), here[name]) for name in here if name != "versions"}
    pairs |= {name: (there["versions"].get(name), version) for name, version in here["versions"].items()}
    found = [f"{name}: {before} there, {now} here" for name, (before, now) in pairs.items() if before != now]
    if prepared := bundle.predictor.model.contract.get("strip", {}).get("prepared"):
        stated, training = (json.dumps(steps) for steps in (Preparation.of(prepared).steps(), prepared))
        found += [f"preprocessing: {other}"] if (other := other_steps(stated, [training])) else []
    return found
