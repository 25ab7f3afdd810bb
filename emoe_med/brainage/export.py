"""Write a trained run as a MONAI bundle; `bundle.py` tells what is in one."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from emoe_med.brainage.bundle import (
    BOUND,
    CARD,
    CONTRACT,
    FORMAT,
    INFERENCE,
    LICENCE,
    METADATA,
    VECTORS,
    WEIGHTS,
    Bundle,
    load_bundle,
)
from emoe_med.brainage.model_card import INTENDED, MUST_COMPLETE, model_card
from emoe_med.brainage.predict import Predictor
from emoe_med.brainage.selftest import draw_scan, measure, selftest
from emoe_med.brainage.shared import shareable
from emoe_med.data.grid import box_grid
from emoe_med.data.prepare import EXTRA, version
from emoe_med.errors import CheckpointError, ConfigError, DataError, Fault
from emoe_med.storage import storage_error, write_synced
from emoe_med.training.checkpoint import serialise
from emoe_med.training.run_folder import environment
from emoe_med.training.seal import file_entry, sealed

SCHEMA = "https://project-monai.github.io/schema/meta_schema_20240725.json"
REQUIRED = ("emoe-med", "nibabel", "nilearn", "safetensors")
VERSION = "0.1.0"  # of the bundle; the author raises it in configs/metadata.json


def export(run_dir: Path, out: Path) -> Bundle:
    """Write a run as a bundle, read it back and try it; the folder appears as a whole or not at all.

    Nobody is named in it: neither ids nor paths, and the head that tries it is drawn. What the checkpoint keeps of
    training scans goes along: digests, percentiles of their figures, the ends of their ages.

    Args:
        run_dir: Folder of one fold and seed.
        out: New or empty folder.

    Raises:
        CheckpointError: The run has no usable checkpoint.
        ConfigError: ``out`` holds files.
        DataError: The run was not evaluated to its end.
        StorageError: The disk is full, read-only or gone.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(Fault("BUN-EXISTS", "folder is not empty", str(out), hint="name a new one"))
    if not (run_dir / "metrics.json").is_file():
        hint = "finish the run by `train --resume`"
        raise DataError(Fault("RUN-METRICS", "this run was not evaluated to its end", str(run_dir), hint=hint))
    predictor = Predictor.of_run(run_dir)
    temporary = out.with_name(f".tmp-{os.getpid()}-{out.name}")
    try:
        _write(predictor, run_dir, temporary)
        _try(temporary)
        os.rename(temporary, out)
    except OSError as error:
        raise storage_error(error, out, "bundle could not be written") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return load_bundle(out)


def _try(folder: Path) -> None:
    if differing := [stage for stage in selftest(load_bundle(folder)) if not stage.same]:
        raise CheckpointError(*(Fault("BUN-SELFTEST", str(stage)) for stage in differing))


def _write(predictor: Predictor, run_dir: Path, folder: Path) -> None:
    for name in (CONTRACT, WEIGHTS, CARD, VECTORS):
        (folder / name).parent.mkdir(parents=True)
    model = predictor.model
    tensors, figures = measure(model, draw_scan(folder))
    write_synced(folder / WEIGHTS, serialise(model.net.state_dict()))
    write_synced(folder / VECTORS, serialise(tensors))
    here = environment(next(model.net.parameters()).device)
    record = {
        "format": FORMAT,
        "config": model.config.model_dump(mode="json"),
        "meta": {name: value for name, value in model.contract.items() if name != "persons"},
        "bias": asdict(predictor.bias) if predictor.bias else None,
        "interval": asdict(predictor.interval) if predictor.interval else None,
        "selftest": figures,
        "environment": here,
        "files": {name: file_entry((folder / name).read_bytes()) for name in BOUND},
    }
    write_synced(folder / CONTRACT, sealed(record))
    metrics = shareable(json.loads((run_dir / "metrics.json").read_text("utf-8")))
    path = run_dir / "environment.json"
    trained = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    write_synced(folder / CARD, model_card(predictor, metrics, trained, here).encode())
    write_synced(folder / METADATA, _json(_metadata(predictor, metrics, here)))
    write_synced(folder / INFERENCE, _json(_inference()))
    write_synced(folder / LICENCE, _licence())


def _licence() -> bytes:
    """Return this package's licence, from its installation or its source tree."""
    with suppress(importlib.metadata.PackageNotFoundError):
        if text := importlib.metadata.distribution("emoe-med").read_text("licenses/LICENSE"):
            return text.encode()
    return (Path(__file__).parents[2] / "LICENSE").read_bytes()


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def _inference() -> dict[str, Any]:
    """Return what MONAI executes: one call, no expression to evaluate; its command line may give every value."""
    module = "emoe_med.brainage.bundle"
    arguments = {
        "bundle_root": ".",
        "input": "head_T1w.nii.gz",
        "output": "ages.csv",
        "data_root": None,
        "cache": None,
    }
    return {
        **arguments,
        "network_def": {"_target_": f"{module}.AgeNetwork", "folder": "@bundle_root"},
        "run": [{"_target_": f"{module}.run"} | {name: f"@{name}" for name in arguments}],
    }


def _metadata(predictor: Predictor, metrics: dict[str, Any], here: dict[str, Any]) -> dict[str, Any]:
    """Return MONAI's description of the bundle, by its published schema."""
    config, versions = predictor.model.config, here["versions"]
    mae = metrics["test"]["mae"]
    image = {
        "type": "image",
        "format": "magnitude",
        "modality": "MR",
        "num_channels": 1,
        "spatial_shape": list(box_grid(config.data.spacing_mm)[0]),
        "dtype": "float32",
        "value_range": [-4, 3],
        "is_patch_data": False,
        "channel_def": {"0": "T1-weighted head in the model's space"},
    }
    age = {
        "type": "regression",
        "format": "years",
        "num_channels": 1,
        "spatial_shape": [],
        "dtype": "float32",
        "value_range": [],
        "is_patch_data": False,
        "channel_def": {"0": "age in years"},
    }
    synthetic = "SYNTHETIC heads: drawn, not scanned. " if predictor.model.contract["synthetic"] else ""
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "changelog": {VERSION: f"exported from {config.name}, commit {here['git_commit']}"},
        "monai_version": versions["monai"],
        "pytorch_version": versions["torch"],
        "numpy_version": versions["numpy"],
        "required_packages_version": {name: versions[name] for name in REQUIRED} | _of_preprocessing(predictor),
        "name": config.name,
        "task": "Brain age from a T1-weighted head",
        "description": (
            f"{synthetic}A scan in, an age in years with interval and verdict out. Network, reader and chain are those "
            "of the package emoe_med, which must be installed; weights, contract and settings are here."
        ),
        "authors": MUST_COMPLETE,
        "copyright": MUST_COMPLETE,
        "data_source": MUST_COMPLETE,
        "data_type": "nibabel",
        "image_classes": "one channel: T1-weighted intensity over its mean inside the brain mask, 0 outside",
        "label_classes": "chronological age in years, known or not",
        "pred_classes": "age in years",
        "eval_metrics": {
            "test_mae_years": mae["value"],
            "test_mae_years_low": mae["low"],
            "test_mae_years_high": mae["high"],
            "test_persons": mae["n"],
        },
        "intended_use": INTENDED,
        "references": [MUST_COMPLETE],
        "network_data_format": {"inputs": {"image": image}, "outputs": {"pred": age}},
    }


def _of_preprocessing(predictor: Predictor) -> dict[str, str]:
    """Return the versions of the packages without which raw heads cannot be prepared for this model."""
    prepared = predictor.model.contract.get("strip", {}).get("prepared") or {}
    return {name: version(name) for name in EXTRA} if prepared.get("Path") == "full" else {}
