"""A router that knows the place alone: it sends a cell where most other persons send it, whatever the head shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from emoe_med.brainage.metrics import DEFAULT_BOOTSTRAP


def by_place(expert: np.ndarray, person: np.ndarray, num_experts: int) -> np.ndarray:
    """Return the expert that each cell of a head has most often in the heads of other persons.

    Args:
        expert: [N, C], first choice of each cell; -1 where it was not routed.
        person: [N], equal for all scans of a person.
        num_experts: E.

    Returns:
        [N, C]; -1 where no other person's cell was routed. Of equally frequent experts the first is taken.
    """

    def count(heads: np.ndarray) -> np.ndarray:
        total = np.zeros((heads.shape[1], num_experts), np.int32)
        head, cell = np.nonzero(heads >= 0)
        np.add.at(total, (cell, heads[head, cell]), 1)
        return total

    everyone, found = count(expert), np.empty(expert.shape, np.int16)
    for own in pd.Series(np.arange(len(person))).groupby(np.asarray(person)).indices.values():
        others = everyone - count(expert[own])
        found[own] = np.where(others.sum(1) > 0, others.argmax(1), -1)
    return found


def share_of_same(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the share of cells with the same expert among those that have one in both, [N, C] to [N]; NaN of none."""
    both = (a >= 0) & (b >= 0)
    same = (both & (a == b)).sum(1)
    return np.where(both.any(1), same / np.maximum(both.sum(1), 1), np.nan)


def beyond_place(
    pairs: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]],
) -> dict[str, Any]:
    """Tell whether two runs send the cells of one head to the same experts more often than their places alone would.

    Args:
        pairs: For each pair of runs, of the heads that both looked at: [N, C] experts of both, by the names of the
            first; what `by_place` gives for each; [N] persons.

    Returns:
        `same_expert`, `by_place` (the mean over either run being replaced by its router of place alone) and their
        `difference`, each with its interval over persons.
    """
    same = np.concatenate([share_of_same(a, b) for a, b, _, _, _ in pairs])
    place = np.concatenate(
        [(share_of_same(place_a, b) + share_of_same(a, place_b)) / 2 for a, b, place_a, place_b, _ in pairs]
    )
    person = np.concatenate([persons for *_, persons in pairs])
    known = np.isfinite(same) & np.isfinite(place)
    values = np.stack([same, place, same - place], 1)[known]
    drawn = [c @ values / c.sum(1, keepdims=True) for c in DEFAULT_BOOTSTRAP.counts(person[known])]
    low, high = np.quantile(np.concatenate(drawn), [0.025, 0.975], axis=0)
    names = ("same_expert", "by_place", "difference")
    return {
        name: {"value": float(v), "low": float(lo), "high": float(hi)}
        for name, v, lo, hi in zip(names, values.mean(0), low, high, strict=True)
    } | {"heads": len(values)}
