"""What is known of a model only after training goes into its checkpoint too, beside weights that stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emoe_med.storage import replace_file
from emoe_med.training.checkpoint import load_model_state
from emoe_med.training.seal import sealed


def amend(folder: Path, meta: Mapping[str, Any]) -> None:
    """Add entries to the `meta` of a checkpoint folder; its state is replaced as one.

    Raises:
        CheckpointError: The checkpoint is damaged.
        StorageError: The disk is full, read-only or gone; the checkpoint is as it was.
    """
    _, state = load_model_state(folder)
    replace_file(folder / "state.json", sealed({**state, "meta": {**state["meta"], **meta}}))
