"""Tell what this installation is and what it lacks."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
from pathlib import Path

import torch

from emoe_med.training.run_folder import environment


def diagnose(out: Path) -> tuple[dict[str, object], list[str]]:
    """Return facts of the machine and installation, and what is missing, each with what to do."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts: dict[str, object] = environment(device)
    facts["bfloat16"] = _bfloat16(device)
    facts["free disk, GiB"] = round(shutil.disk_usage(out if out.exists() else Path()).free / 2**30, 1)
    missing = [
        f"package {name} is missing: pip install -r requirements.lock"
        for name in ("monai", "nibabel", "nilearn", "mlflow", "sklearn", "matplotlib")
        if importlib.util.find_spec(name) is None
    ]
    if importlib.util.find_spec("torchvision") is not None:
        try:
            importlib.import_module("torchvision")
        except (ImportError, RuntimeError) as error:
            missing.append(f"torchvision does not import beside this torch and breaks others: uninstall it ({error})")
    return facts, missing


def _bfloat16(device: torch.device) -> str:
    if device.type == "cuda":
        return "yes" if torch.cuda.is_bf16_supported() else "no"
    return "yes, by oneDNN" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "slow: no bfloat16 instructions"
