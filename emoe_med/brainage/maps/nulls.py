"""What maps look like by chance: tokens dealt out anew, and patterns turned about the middle of the brain."""

from __future__ import annotations

import numpy as np
from scipy import sparse, stats
from scipy.spatial import KDTree
from scipy.spatial.transform import Rotation


def rotations(centres_mm: np.ndarray, inside: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Draw where each cell takes its value from when the pattern in the brain is turned at random.

    The brain is first stretched to a ball (its coordinates are whitened), so that a turned brain lies on itself; each
    cell then takes the value of the nearest cell. Size, smoothness and shape of the patches stay about as they were
    and only their place is lost: the volume's counterpart of the spin test (Alexander-Bloch et al. 2018).

    Args:
        centres_mm: [C, 3].
        inside: [C] bool, cells of the brain; the others keep their value.
        draws: B.
        rng: Source of chance.

    Returns:
        [B, C] int64, source cell of each cell.
    """
    cells = np.flatnonzero(inside)
    index = np.tile(np.arange(len(centres_mm)), (draws, 1))
    if len(cells) < 4:  # no body to be turned
        return index
    points = centres_mm[cells] - centres_mm[cells].mean(0)
    spread, axes = np.linalg.eigh(np.cov(points.T))
    ball = points @ axes / np.sqrt(np.maximum(spread, 1e-9))
    tree = KDTree(ball)
    for row, turn in zip(index, Rotation.random(draws, rng=rng), strict=True):
        row[cells] = cells[tree.query(turn.apply(ball))[1]]
    return index


def shuffles(routed: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Draw [B, C] source cells that deal the routed cells of one head out anew: a random router of equal load."""
    cells = np.flatnonzero(routed)
    index = np.tile(np.arange(len(routed)), (draws, 1))
    index[:, cells] = rng.permuted(np.tile(cells, (draws, 1)), axis=1)
    return index


def parcel_means(weights: sparse.csr_array, values: np.ndarray, routed: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Average a map over parcels after its cells were moved.

    Args:
        weights: [P, C] voxels of each parcel in each cell.
        values: [C, V].
        routed: [C] bool; other cells have no value.
        index: [B, C] source cell of each cell.

    Returns:
        [B, P, V] float32, NaN where no routed cell is left in the parcel.
    """
    cells = np.flatnonzero(routed)
    kept, source = weights[:, cells], index[:, cells].T
    moved = np.where(routed[source][..., None], values[source], 0).astype(np.float32)  # [c, B, V]
    total = (kept @ moved.reshape(len(cells), moved.shape[1] * moved.shape[2])).reshape(kept.shape[0], *moved.shape[1:])
    weight = kept @ routed[source].astype(np.float32)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (total / weight[..., None]).transpose(1, 0, 2)


def upper_p(observed: np.ndarray, null: np.ndarray) -> np.ndarray:
    """Return the one-sided p of observed [...] among null draws [B, ...]; never 0, NaN where undefined."""
    beaten = (null >= observed - 1e-9).sum(0)  # what is equal up to rounding counts against the finding
    return np.where(np.isfinite(observed), (1 + beaten) / (1 + len(null)), np.nan)


def family_p(observed: np.ndarray, null: np.ndarray) -> np.ndarray:
    """Return p of observed [...] against the largest entry of each null draw [B, ...]: for one finding among many.

    Every entry is measured in units of its own null's spread. However many entries there are, the smallest p is
    1 / (1 + B); a false discovery rate of a lone finding cannot fall below their number times that. Source: Westfall
    and Young 1993.
    """
    known = np.isfinite(null)
    number = np.maximum(known.sum(0), 1)
    centre = np.where(known, null, 0).sum(0) / number
    spread = np.sqrt((np.where(known, null - centre, 0) ** 2).sum(0) / number)
    with np.errstate(divide="ignore", invalid="ignore"):
        height, drawn = (observed - centre) / spread, (null - centre) / spread
    usable = np.isfinite(observed) & (spread > 1e-9)
    largest = np.where(known & usable, drawn, -np.inf).reshape(len(null), -1).max(1)
    beaten = (largest.reshape(-1, *[1] * observed.ndim) >= height - 1e-9).sum(0)
    return np.where(usable, (1 + beaten) / (1 + len(null)), np.nan)


def fdr(p: np.ndarray) -> np.ndarray:
    """Correct p values [...] for their number, NaN left out. Source: Benjamini and Hochberg 1995."""
    q = np.full(p.shape, np.nan)
    defined = np.isfinite(p)
    if defined.any():
        q[defined] = stats.false_discovery_control(p[defined])
    return q
