"""Where vision runs are described: the shipped files, and how one is read."""

from __future__ import annotations

from pathlib import Path

from emoe_med.config import read_run
from emoe_med.vision.config import VisionConfig

CONFIGS = Path(__file__).parent.parent.parent / "configs" / "vision"
DEFAULTS = {
    "digits": "digits_emoe",
    "cifar10": "cifar10_emoe_small",
    "cifar100": "cifar100_emoe_small",
    "tiny_imagenet": "tiny_imagenet_emoe_small",
    "imagenet": "emoe_vit_b",
}


def load_vision(path: Path, assignments: list[str] | None = None) -> VisionConfig:
    """Read a vision run file and apply `--set` assignments; see `config.read_run`."""
    return read_run(VisionConfig, path, assignments)


def chosen_run(config: Path | None, dataset: str | None, assignments: list[str] | None = None) -> VisionConfig:
    """Read the given run file, or the default one of a data set; a data set named beside a file replaces its own."""
    if config is None:
        return load_vision(CONFIGS / f"{DEFAULTS[dataset or 'digits']}.yaml", assignments)
    named = [f"data.dataset={dataset}"] if dataset else []
    return load_vision(config, [*named, *(assignments or [])])
