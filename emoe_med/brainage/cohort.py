"""A manifest's scans in the model's space, checked and split, ready to be learned from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from emoe_med.brainage.metrics import MIN_PERSONS
from emoe_med.brainage.strata import decades, first_sessions, named
from emoe_med.config import BrainAgeConfig
from emoe_med.data.brain import ChainOptions
from emoe_med.data.cache import HeadDataset
from emoe_med.data.manifest import Manifest
from emoe_med.data.readings import Reading
from emoe_med.data.scan import person_key
from emoe_med.data.splits import assign_splits
from emoe_med.errors import DataError, Fault
from emoe_med.training.ranks import ALONE, Machine


@dataclass(frozen=True)
class Cohort:
    """Scans of one manifest, all usable, all in the cache."""

    manifest: Manifest
    heads: HeadDataset
    readings: list[Reading]

    def split(self, config: BrainAgeConfig, fold: int) -> pd.DataFrame:
        """Return columns row, split and fold; persons, families and repeated images stay together."""
        data = config.data
        return assign_splits(
            self.manifest.scans,
            seed=data.split_seed,
            folds=data.folds,
            fold=fold,
            val_share=data.val_share,
        )

    def steps(self) -> dict[str, Any] | None:
        """Return the steps by which `preprocess` made all scans; None where it made none of them.

        Raises:
            DataError: MAN-STEPS, some rows were made otherwise than the first: a model of them could keep no contract.
        """
        made = [sidecar.steps if sidecar else None for sidecar in self.heads.sidecars]
        faults = [
            Fault(
                "MAN-STEPS",
                f"not preprocessed as row {self.manifest.scans[0].row} was",
                str(scan.image),
                scan.row,
                self.manifest.path.name,
                hint="run `preprocess` on all scans, and leave what it wrote as it is",
            )
            for scan, steps in zip(self.manifest.scans, made, strict=True)
            if steps != made[0]
        ]
        if faults:
            raise DataError(*faults)
        return made[0]

    def table(self) -> pd.DataFrame:
        """Return row, participant_id, sex and site of the scans, for scoring.

        A participant goes by the row of their first scan: no id leaves the manifest.
        """
        scans = self.manifest.scans
        first: dict[str, int] = {}
        return pd.DataFrame(
            {
                "row": [scan.row for scan in scans],
                "participant_id": [first.setdefault(person_key(scan.participant_id), scan.row) for scan in scans],
                "sex": [scan.sex for scan in scans],
                "site": [scan.site for scan in scans],
            }
        )

    def describe(self, indices: Sequence[int]) -> dict[str, dict[str, int | None]]:
        """Count the persons of some scans by decade of age, sex and site, as a model card may show them.

        Of groups of fewer than `MIN_PERSONS` the count is None.
        """
        scans = self.table().assign(age=[scan.age for scan in self.manifest.scans])
        first = first_sessions(scans.iloc[list(indices)])
        groups = {"age": decades(first["age"]), "sex": named(first["sex"]), "site": named(first["site"])}
        counts = {key: names.value_counts().sort_index() for key, names in groups.items()}
        return {
            key: {str(name): int(n) if n >= MIN_PERSONS else None for name, n in found.items()}
            for key, found in counts.items()
        }


def chain_options(config: BrainAgeConfig, manifest: Manifest) -> ChainOptions:
    """Settle the chain for a manifest: which mask, and how heads come to the template.

    Linear transforms of the manifest are taken where every row has one.

    Raises:
        DataError: Some rows have a mask or labels and others have none; some are warped and others are not.
    """
    data, scans = config.data, manifest.scans
    mask = data.mask
    if mask == "auto":
        lacking = [scan.row for scan in scans if scan.mask is None and scan.labels is None]
        _refuse_some(manifest, lacking, "MAN-MASK", "no mask or labels while other rows have them")
        mask = "head" if lacking else "brain"
    warped = [scan.row for scan in scans if scan.warped]
    _refuse_some(manifest, warped, "MAN-WARPED", "image is warped nonlinearly while others are not")
    align = data.align
    if warped:
        align = "warped"
    elif mask == "head":
        align = "centred"  # the template is a brain: a whole head has nothing to be aligned with
    elif align == "affine" and all(scan.transform for scan in scans):
        align = "given"
    return ChainOptions(data.spacing_mm / data.oversample, align, mask)


def _refuse_some(manifest: Manifest, rows: list[int], code: str, reason: str) -> None:
    """Refuse rows unless it is none or all of them."""
    if 0 < len(rows) < len(manifest.scans):
        raise DataError(*(Fault(code, reason, row=row, manifest=manifest.path.name) for row in rows))


def prepare_cohort(
    manifest: Manifest,
    options: ChainOptions,
    cache_dir: Path,
    jobs: int = 0,
    progress: Callable[[Collection], Iterator] = iter,
    machine: Machine = ALONE,
) -> Cohort:
    """Read, check and cache every scan before anything is learned from any; several ranks share the work.

    Raises:
        DataError: All scans that cannot be used, each with row, file and reason; or one image in two rows.
    """
    count, name = len(manifest.scans), manifest.path.name
    with machine.together():
        heads = HeadDataset(manifest.scans, options, cache_dir)
        mine = heads.build(jobs, progress, range(machine.rank, count, machine.world_size))
    parts = machine.gather([asdict(reading) for reading in mine]) if machine.world_size > 1 else []
    readings = [Reading.of(parts[row % len(parts)][row // len(parts)]) for row in range(count)] if parts else mine
    heads.digests.recall()  # what the others found
    with machine.together():
        faults = [replace(reading.fault, manifest=name) for reading in readings if reading.fault]
        faults += _repeated_images(manifest, readings)
        if faults:
            raise DataError(*sorted(faults, key=lambda fault: fault.row or 0))
    return Cohort(manifest, heads, readings)


def _repeated_images(manifest: Manifest, readings: list[Reading]) -> list[Fault]:
    """Find rows that hold the same image, also compressed anew or under another mask: equal voxels, or volumes."""
    first: dict[str, int] = {}
    faults = []
    for scan, reading in zip(manifest.scans, readings, strict=True):
        if reading.fault is not None:
            continue
        row = min(first.setdefault(digest, scan.row) for digest in (reading.voxels, reading.content))
        if row != scan.row:
            faults.append(Fault("MAN-IMAGE", f"same image as row {row}", str(scan.image), scan.row, manifest.path.name))
    return faults
