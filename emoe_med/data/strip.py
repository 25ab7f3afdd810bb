"""Find the brain in a whole head: deepbet, whose weights ship in its wheel."""

from __future__ import annotations

import warnings
from functools import lru_cache
from importlib import import_module
from typing import Any

import numpy as np

from emoe_med.data.brain import one_thread
from emoe_med.data.files import refuse


def brain_mask(voxels: np.ndarray) -> np.ndarray:
    """Return the brain of a head, true inside, [X, Y, Z].

    Args:
        voxels: Head [X, Y, Z] in RAS order: the network knows which way is up.

    Raises:
        VolumeError: VOL-STRIP, no brain was found.

    Source: Fisch et al. 2024 (deepbet).
    """
    tool = _tool()
    try:
        with one_thread():
            mask = tool.run_model(voxels.astype(np.float32)) > 0.5  # copied: the tool writes into its input
            mask = tool.postprocess(mask) > 0
    except (AssertionError, ValueError, RuntimeError, IndexError):  # what its steps raise on an empty mask
        refuse("VOL-STRIP", "deepbet found no brain", "is it a T1-weighted head?")
    if not mask.any():
        refuse("VOL-STRIP", "deepbet found no brain", "is it a T1-weighted head?")
    return mask


@lru_cache(maxsize=1)
def _tool() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit.load, in which its weights are stored
        return import_module("deepbet").BrainExtraction(no_gpu=True)  # equal masks on every machine
