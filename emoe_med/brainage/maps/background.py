"""The group's mean head and mean brain, as running sums: what maps are drawn on, and where they end."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from emoe_med.data.grid import box_grid

_SCALE, _HIGH = 0.25, 3  # of the chain's intensity: clip((x / mean - 1) / 0.25, -4, 3)


class Background:
    """Sums over heads on the grid of the cache; memory does not grow with their number.

    Args:
        spacing_mm: Of that grid.
        with_labels: Keep the label that most heads agree on, too.
        least: Persons that a voxel must have brain in, to be shown.

    One head of each person is taken, the first.
    """

    def __init__(self, spacing_mm: float, with_labels: bool, least: int = 1) -> None:
        self.shape, self.affine = box_grid(spacing_mm)
        self.least = least
        self.persons: set[Hashable] = set()
        self.intensity = np.zeros(self.shape, np.float32)
        self.inside = np.zeros(self.shape, np.float32)
        self.label = np.zeros(self.shape if with_labels else 0, np.int32)
        self.votes = np.zeros_like(self.label)

    def add(self, person: Hashable, head: np.ndarray, labels: np.ndarray | None = None) -> None:
        """Add one head [X, Y, Z] of the cache, exactly 0 outside, and its labels [X, Y, Z]."""
        if person in self.persons:
            return
        inside = head != 0
        self.persons.add(person)
        self.inside += inside
        self.intensity += np.where(inside, 1 + _SCALE * head, 0)
        if labels is not None and self.label.size:
            self._vote(labels)

    def _vote(self, labels: np.ndarray) -> None:
        """Keep a label per voxel in constant memory: that of more than half of the heads, where there is one.

        Elsewhere it is one of the common ones, not always the commonest (Boyer and Moore 1991).
        """
        same, empty = labels == self.label, self.votes == 0
        self.label = np.where(empty, labels, self.label)
        self.votes += np.where(same | empty, 1, -1)

    def brain(self) -> np.ndarray:
        """Voxels that are brain in half of the persons or more, and in the least number, [X, Y, Z] bool."""
        return self.inside >= self.needed

    @property
    def needed(self) -> float:
        """Persons that a voxel must have brain in."""
        return max(0.5 * len(self.persons), self.least)

    def mean(self) -> np.ndarray:
        """Mean intensity of the heads where they are brain, [X, Y, Z] in 0 to 1, 0 outside the group's brain."""
        brightest = 1 + _SCALE * _HIGH
        return np.where(self.brain(), self.intensity / np.maximum(self.inside, 1) / brightest, 0).astype(np.float32)

    def majority(self) -> np.ndarray:
        """Label of more than half of the heads, else a common one, [X, Y, Z] int32, 0 outside the group's brain."""
        return np.where(self.brain(), self.label, 0)
