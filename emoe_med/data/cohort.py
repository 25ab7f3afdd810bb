"""A synthetic cohort with known answers, in BIDS form: drawn heads of two sites, some scanned twice.

The anatomy follows age (``phantom``); pose, storage orientation, shading and noise do not. Everything written
says that it is synthetic.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.spatial.transform import Rotation

from emoe_med.data.phantom import (
    LABELS,
    OLDEST,
    PLANTED_CENTRE_MM,
    PLANTED_RADII_MM,
    YOUNGEST,
    Head,
    draw_head,
)
from emoe_med.data.volume import write_volume
from emoe_med.errors import DataError, Fault

DERIVATIVES = Path("derivatives", "phantom")
_GOLDEN_RATIO = (5**0.5 - 1) / 2
_TISSUE_SPREAD = (8.0, 8.0, 4.0)  # years that a tissue is ahead of the calendar: standard deviations
_FIELD_MM, _FIELD_CENTRE_MM = (200.0, 240.0, 220.0), (0.0, -15.0, -5.0)


@dataclass(frozen=True)
class Site:
    """A scanner: how it shows one and the same head."""

    name: str
    gain: float  # intensity of white matter
    noise: float  # standard deviation, share of white matter
    shading: float  # strength of the bias field, share
    stretch: tuple[float, float, float]  # voxel size, in units of the size asked for


SITES = (
    Site("A", gain=180.0, noise=0.02, shading=0.10, stretch=(1.0, 1.0, 1.0)),
    Site("B", gain=420.0, noise=0.04, shading=0.20, stretch=(1.05, 1.05, 1.15)),
)


@dataclass(frozen=True)
class Person:
    """One synthetic person: what stays the same from session to session."""

    participant_id: str
    ages: tuple[float, ...]  # years, one per session
    sex: str
    site: Site
    ahead: np.ndarray  # [3] years that ventricles, cortex and planted region are ahead of the calendar
    size: np.ndarray  # [3] head size, in units of the template
    folding: np.ndarray  # [3] phase of the gyri, radians


def write_cohort(
    out: Path,
    persons: int,
    seed: int,
    *,
    planted_region: bool = True,
    others_age: bool = True,
    repeat_share: float = 0.25,
    spacing_mm: float = 3.5,
) -> Path:
    """Write a synthetic cohort of T1-like heads as a BIDS dataset with derivatives.

    The first n persons of a seed are the same, byte for byte, whatever the size of the cohort.

    Args:
        out: New or empty folder.
        persons: Number of persons, aged 20 to 85 years, alternating between two sites.
        seed: Everything random follows from it.
        planted_region: Whether the planted region fades with age. Without (the negative control) it is white
            matter, and only its label is there.
        others_age: Whether ventricles and cortex follow age too. Without, they are in all persons as in the middle of
            life, give or take what a person is ahead.
        repeat_share: Share of persons scanned again one to three years later.
        spacing_mm: Voxel size of site A; site B has 1.05 x 1.05 x 1.15 of it.

    Returns:
        ``manifest.csv``: participant_id, session_id, image, age, sex, site, mask, labels; paths relative to
        ``out``. Beside it the BIDS tables and heads; under derivatives/phantom brain masks, label maps with
        ``dseg.tsv``, and ``truth.json``: the planted region in template RAS mm, and the pose of each head.

    Raises:
        DataError: ``out`` holds files (COH-EXISTS).
    """
    if out.exists() and any(out.iterdir()):
        raise DataError(Fault("COH-EXISTS", "folder is not empty", file=str(out), hint="name a new one"))
    rows, poses = [], {}
    for index in range(persons):
        person = draw_person(index, seed, repeat_share)
        for session, age in enumerate(person.ages, start=1):
            rng = np.random.default_rng([seed, index, session])
            pose, affine, head = scan_person(
                person, age, rng, planted=planted_region, others_age=others_age, spacing_mm=spacing_mm
            )
            session_id = f"ses-{session:02d}"
            files = _write_scan(out, Path(person.participant_id, session_id, "anat"), affine, head)
            poses[f"{person.participant_id}_{session_id}"] = pose.tolist()
            rows.append(
                {
                    "participant_id": person.participant_id,
                    "session_id": session_id,
                    "image": files["image"],
                    "age": round(age, 2),
                    "sex": person.sex,
                    "site": person.site.name,
                    "mask": files["mask"],
                    "labels": files["labels"],
                }
            )
    _write_tables(out, pd.DataFrame(rows))
    _write_descriptions(out, {"seed": seed, "planted_region_fades": planted_region, "pose": poses})
    return out / "manifest.csv"


def draw_person(index: int, seed: int, repeat_share: float = 0.25) -> Person:
    """Draw person number ``index``, counted from 0; ages fill their range evenly at any cohort size."""
    start = np.random.default_rng(seed).random()
    rng = np.random.default_rng([seed, index])
    age = YOUNGEST + (OLDEST - YOUNGEST) * ((start + index * _GOLDEN_RATIO) % 1)
    is_repeated, interval = rng.random() < repeat_share, rng.uniform(1, 3)
    sex = "FM"[rng.integers(2)]
    return Person(
        participant_id=f"sub-{index + 1:04d}",
        ages=(age, age + interval) if is_repeated else (age,),
        sex=sex,
        site=SITES[index % len(SITES)],
        ahead=rng.normal(0, _TISSUE_SPREAD),
        size=(1.02 if sex == "M" else 0.98) * rng.normal(1, 0.03, 3),
        folding=rng.uniform(0, 2 * np.pi, 3),
    )


def scan_person(
    person: Person, age: float, rng: np.random.Generator, *, planted: bool, spacing_mm: float, others_age: bool = True
) -> tuple[np.ndarray, np.ndarray, Head]:
    """Scan a person: random pose and storage orientation, shading and noise of the site.

    Returns:
        Pose [4, 4], template RAS mm to scan RAS mm; affine [4, 4], voxel index to scan RAS mm; the head, its
        image as int16 in scanner units.
    """
    pose = np.eye(4)
    pose[:3, :3] = Rotation.from_euler("xyz", rng.uniform(-8, 8, 3), degrees=True).as_matrix() * person.size
    pose[:3, 3] = rng.uniform(-8, 8, 3)
    affine, shape = _storage(spacing_mm * np.asarray(person.site.stretch), rng)
    scan_mm = affine[:3, :3] @ np.indices(shape).reshape(3, -1) + affine[:3, 3:]
    to_template = np.linalg.inv(pose)
    template_mm = to_template[:3, :3] @ scan_mm + to_template[:3, 3:]
    head = draw_head(
        template_mm.astype(np.float32).reshape(3, *shape),
        np.where((others_age, others_age, True), age, (YOUNGEST + OLDEST) / 2) + person.ahead,
        person.folding,
        planted=planted,
        edge_mm=spacing_mm,
    )
    x, y, z = (scan_mm / 100).astype(np.float32).reshape(3, *shape)
    field = np.tensordot(rng.uniform(-1, 1, 6).astype(np.float32), [x, y, z, x * y, y * z, z * x], 1)
    noise = person.site.noise * rng.standard_normal((2, *shape), dtype=np.float32)
    magnitude = np.hypot(head.image * np.exp(person.site.shading * field) + noise[0], noise[1])  # Rician
    image = np.rint(person.site.gain * magnitude).astype(np.int16)
    return pose, affine, Head(image, head.labels, head.brain)


def _storage(spacing_mm: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, tuple[int, ...]]:
    """Store the field of view in one of the 48 orientations: affine [4, 4] and shape."""
    axes, sign = rng.permutation(3), rng.choice((-1.0, 1.0), 3)
    shape = np.ceil(np.asarray(_FIELD_MM) / spacing_mm).astype(int)[axes]
    affine = np.eye(4)
    affine[:3, :3] = np.diag(spacing_mm * sign)[:, axes]
    affine[:3, 3] = np.asarray(_FIELD_CENTRE_MM) - affine[:3, :3] @ ((shape - 1) / 2)
    return affine, tuple(shape.tolist())


def _write_scan(out: Path, folder: Path, affine: np.ndarray, head: Head) -> dict[str, str]:
    """Write image, mask and labels under their BIDS names; the paths, relative to ``out``."""
    name = "_".join(folder.parts[:2])
    files = {
        "image": (folder / f"{name}_T1w.nii.gz", head.image),
        "mask": (DERIVATIVES / folder / f"{name}_desc-brain_mask.nii.gz", head.brain),
        "labels": (DERIVATIVES / folder / f"{name}_dseg.nii.gz", head.labels),
    }
    for path, voxels in files.values():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        write_volume(out / path, voxels, affine, form_code=1)
    return {kind: path.as_posix() for kind, (path, _) in files.items()}


def _write_tables(out: Path, scans: pd.DataFrame) -> None:
    scans.to_csv(out / "manifest.csv", index=False, lineterminator="\n")
    people = scans.drop_duplicates("participant_id")[["participant_id", "age", "sex", "site"]]
    tables = {
        Path("participants.tsv"): people,
        DERIVATIVES / "dseg.tsv": pd.DataFrame({"index": range(len(LABELS)), "name": LABELS}),
    }
    for person, sessions in scans.groupby("participant_id"):
        tables[Path(str(person), f"{person}_sessions.tsv")] = sessions[["session_id", "age"]]
    for path, table in tables.items():
        table.to_csv(out / path, sep="\t", index=False, lineterminator="\n")


def _write_descriptions(out: Path, truth: dict[str, object]) -> None:
    name = "SYNTHETIC heads: drawn, not scanned"
    planted = {"label": LABELS[-1], "centre_mm": PLANTED_CENTRE_MM, "radii_mm": PLANTED_RADII_MM}
    documents = {
        Path("dataset_description.json"): {"Name": name, "BIDSVersion": "1.10.0", "DatasetType": "raw"},
        Path("participants.json"): {
            "age": {"Description": "age at the first session", "Units": "years"},
            "sex": {"Levels": {"F": "female", "M": "male"}},
            "site": {"Levels": {site.name: f"synthetic scanner {site.name}" for site in SITES}},
        },
        DERIVATIVES / "dataset_description.json": {
            "Name": f"{name}; true masks, labels and poses",
            "BIDSVersion": "1.10.0",
            "DatasetType": "derivative",
            "GeneratedBy": [{"Name": "emoe_med.data.cohort"}],
        },
        DERIVATIVES / "truth.json": {"synthetic": True, "planted_region": planted} | truth,
    }
    for path, document in documents.items():
        (out / path).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
