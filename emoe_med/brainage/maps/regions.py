"""Parcel by expert: how often, how much, more than by chance, on which side, and with which age."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse, stats

from emoe_med.brainage.maps.cells import CellGrid
from emoe_med.brainage.maps.measured import Measured
from emoe_med.brainage.maps.nulls import family_p, fdr, parcel_means, rotations, shuffles, upper_p
from emoe_med.brainage.maps.parcels import ParcelCounts
from emoe_med.brainage.maps.routes import Routes
from emoe_med.brainage.metrics import DEFAULT_BOOTSTRAP, MIN_PERSONS

DRAWS = 1000  # null maps
NULL_HEADS = 60  # heads, evenly spread, whose mean is held against null maps; more of them change little


class RegionStatistics:
    """What the tables are made of, per head and parcel.

    Args:
        routes: N heads.
        counts: Their parcels, in the same order.
        grid: Cells.
        seed: Of the null maps.
        draws: Null maps of each kind.
        least: Persons; what fewer have, a cell, a parcel or a figure of it, is left out: it could show one of them.
    """

    def __init__(
        self, routes: Routes, counts: ParcelCounts, grid: CellGrid, seed: int = 0, draws: int = DRAWS, least: int = 1
    ) -> None:
        self.routes, self.counts, self.grid, self.draws, self.least = routes, counts, grid, draws, least
        self.labels = counts.labels()
        num_cells = routes.expert.shape[1]
        self.weights = [counts.matrix(head, self.labels, num_cells) for head in range(len(routes))]
        self.inside = routes.inside(least)
        self.voxels = np.stack([w.sum(1) for w in self.weights])  # [N, P] brain voxels in cells
        self.totals = np.stack([counts.total(head, self.labels) for head in range(len(routes))])
        self.seed = seed

    def regions(self) -> pd.DataFrame:
        """Return one row per parcel and expert; the columns stand in docs/expert_maps.md."""
        routes, served, occupancy = self.routes, self._served, self._occupancy
        by_person = self._persons(occupancy, routes.age, np.arange(len(routes)))[0]
        signed = self._means(routes.contribution, routes.contribution_of)
        p_random, p_rotated, p_family = self._enrichment_p(served, occupancy)
        slope = self._age_slope(occupancy)
        p = np.maximum(p_random, p_rotated)
        contribution = self._persons(signed, routes.age, routes.contribution_of)[0]
        contribution = np.where(np.isfinite(contribution).sum(0) >= self.least, contribution, np.nan)
        with np.errstate(divide="ignore", invalid="ignore"):
            enrichment = _mean(by_person) / routes.load()
        columns: dict[str, np.ndarray] = {
            **_with_interval("occupancy", by_person),
            "share_of_mass": self._share_of_mass(served),
            **_with_interval("contribution", contribution),
            "enrichment": enrichment,
            **{"p_random": p_random, "p_rotated": p_rotated, "p": p, "q": fdr(p), "p_family": p_family},
            "laterality": self._laterality(),
            **{f"slope_{name}": value for name, value in slope.items()},
            "slope_q": fdr(slope["p"]),
        }
        experts = routes.num_experts
        table = self._parcel_columns()
        table = table.loc[table.index.repeat(experts)].reset_index(drop=True)
        table.insert(2, "expert", [f"E{e:02d}" for e in range(experts)] * len(self.labels))
        for place, (name, value) in enumerate(columns.items(), start=3):
            table.insert(place, name, np.broadcast_to(value, (len(self.labels), experts)).ravel())
        return table[table["n_subjects"] >= self.least].reset_index(drop=True)

    def parcels(self) -> pd.DataFrame:
        """Return one row per parcel: how many years hang on it, and who serves it."""
        routes = self.routes
        columns: dict[str, np.ndarray] = {}
        for name, found in routes.influence().items():
            columns |= self._measured(name, found) if len(found) else {}
        occupancy = _mean(self._occupancy)
        top = np.nan_to_num(occupancy).argmax(1)
        entropy = stats.entropy(np.nan_to_num(occupancy) + 1e-12, axis=1) / np.log(routes.num_experts)
        columns |= {"top_expert": np.array([f"E{e:02d}" for e in top]), "top_occupancy": occupancy.max(1)}
        columns["entropy"] = np.where(np.isfinite(occupancy[:, 0]), entropy, np.nan)
        table = self._parcel_columns()
        for place, (name, value) in enumerate(columns.items(), start=2):
            table.insert(place, name, value)
        return table[table["n_subjects"] >= self.least].reset_index(drop=True)

    def common(self) -> dict[int, str]:
        """Return number and name of the parcels that the tables tell of."""
        table = self._parcel_columns()
        table = table[table["n_subjects"] >= self.least]
        return dict(zip(table["parcel"].tolist(), table["name"], strict=True))

    @cached_property
    def _served(self) -> list[np.ndarray]:
        return [self.routes.served(head) for head in range(len(self.routes))]

    @cached_property
    def _occupancy(self) -> np.ndarray:
        """Mean occupancy in each head's parcels, [N, P, E]."""
        return self._means(self._served, range(len(self.routes)))

    def _parcel_columns(self) -> pd.DataFrame:
        present = self.totals > 0
        total = np.maximum(self.totals.sum(0), 1)
        return pd.DataFrame(
            {
                "parcel": self.labels,
                "name": [self.counts.parcels.name_of(int(label)) for label in self.labels],
                "n_voxels": np.rint(self.totals.sum(0) / np.maximum(present.sum(0), 1)).astype(int),
                "covered": self._routed.sum(0) / total,
                "n_subjects": self._persons_with(np.arange(len(self.routes))),
            }
        )

    @cached_property
    def _routed(self) -> np.ndarray:
        """Voxels of each head's parcels that lie in routed cells, [N, P]."""
        return np.stack([w @ r for w, r in zip(self.weights, self.routes.routed.astype(np.float32), strict=True)])

    def _persons_with(self, heads: np.ndarray, inside: np.ndarray | None = None) -> np.ndarray:
        """Count the persons of some heads in whom a parcel was routed, in some cells or in any, [P]."""
        person, routed = self.routes.person[heads], self._routed[heads]
        if inside is not None:
            routed = np.stack([self.weights[head] @ (self.routes.routed[head] & inside) for head in heads])
        return np.array([len(np.unique(person[seen])) for seen in (routed > 0).T])

    def _means(self, maps: Any, heads: Any) -> np.ndarray:
        """Average the map [C, V] of each head over its parcels, [n, P, V]."""
        same = np.arange(self.routes.expert.shape[1])[None]
        found = [
            parcel_means(self.weights[head], values, self.routes.routed[head], same)[0]
            for values, head in zip(maps, heads, strict=True)
        ]
        width = maps[0].shape[-1] if len(found) else self.routes.num_experts
        return np.stack(found) if found else np.full((0, len(self.labels), width), np.nan)

    def _persons(self, values: np.ndarray, age: np.ndarray, heads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Average [n, P, V] over the scans of each person; returns [persons, P, V] and their mean ages."""
        person = self.routes.person[heads]
        frame = pd.DataFrame(_flat(values)).assign(age=age[heads]).groupby(person).mean()
        means = frame.drop(columns="age").to_numpy()
        return means.reshape(len(frame), *values.shape[1:]), frame["age"].to_numpy()

    @cached_property
    def _turned(self) -> np.ndarray:
        return rotations(self.grid.centres_mm, self.inside, self.draws, np.random.default_rng(self.seed))

    def _null(self, maps: Any, heads: Any, index: np.ndarray | None) -> np.ndarray:
        """Mean over heads of parcel means after moving the cells, [B, P, V]; None shuffles each head anew."""
        rng = np.random.default_rng(self.seed + 1)
        total, number = np.zeros(1), np.zeros(1)
        for values, head in zip(maps, heads, strict=True):
            routed = self.routes.routed[head]
            moved = shuffles(routed, self.draws, rng) if index is None else index
            found = parcel_means(self.weights[head], values, routed, moved)
            total, number = total + np.nan_to_num(found), number + np.isfinite(found)
        return np.where(number > 0, total / np.maximum(number, 1), np.nan)

    def _enrichment_p(self, served: list[np.ndarray], occupancy: np.ndarray) -> list[np.ndarray]:
        heads = np.unique(np.linspace(0, len(served) - 1, NULL_HEADS).astype(int))
        maps, observed = [served[head] for head in heads], _mean(occupancy[heads])
        observed[self._persons_with(heads) < self.least] = np.nan
        by_lot, turned = (self._null(maps, heads, index) for index in (None, self._turned))
        return [upper_p(observed, by_lot), upper_p(observed, turned), family_p(observed, turned)]

    def _age_slope(self, occupancy: np.ndarray) -> dict[str, np.ndarray]:
        """Fit occupancy [N, P, E] on age over persons, both less the mean of their run: runs route differently."""
        routes = self.routes
        values, age = occupancy.copy(), routes.age.astype(float)
        for run in np.unique(routes.run):
            mine = routes.run == run
            values[mine] -= _mean(values[mine])
            known = mine & np.isfinite(age)
            age[known] -= age[known].sum() / max(known.sum(), 1)
        by_person, age = self._persons(values, age, np.arange(len(routes)))
        seen_by = {tuple(np.unique(routes.run[routes.person == person])) for person in np.unique(routes.person)}
        return age_slope(by_person, age, max(MIN_PERSONS, self.least), means=len(seen_by))

    def _share_of_mass(self, served: list[np.ndarray]) -> np.ndarray:
        """Share of each expert's brain voxels that lie in each parcel, [P, E]."""
        cell_voxels = (self.grid.edge * self.grid.oversample) ** 3
        inside = sum(w @ s for w, s in zip(self.weights, served, strict=True))
        whole = sum(cell_voxels * b @ s for b, s in zip(self.routes.brain, served, strict=True))
        return inside / np.maximum(whole, 1e-12)

    def _measured(self, name: str, found: Measured) -> dict[str, np.ndarray]:
        """Years that differ between heads through each parcel, and those that go with age, against turned parcels."""
        weights = sparse.csr_array(sum(self.weights[head] for head in found.heads))
        inside = self.inside & self.routes.inside(self.least, found.heads)
        brain = self.routes.brain[found.heads].mean(0) * inside
        few = self._persons_with(found.heads, inside) < self.least
        turned = rotations(self.grid.centres_mm, inside, self.draws, np.random.default_rng(self.seed))
        counts = list(DEFAULT_BOOTSTRAP.counts(self.routes.person[found.heads]))

        def over_parcels(maps: np.ndarray, index: np.ndarray) -> np.ndarray:
            return parcel_means(weights, maps, inside, index)

        columns: dict[str, np.ndarray] = {}
        for title, statistic in ((name, found.deviation), (f"{name}_per_decade", found.per_decade)):
            cells = statistic()
            same = np.arange(len(cells))[None]
            value = np.where(few, np.nan, over_parcels(cells[:, None], same)[0, :, 0])
            drawn = over_parcels(np.concatenate([statistic(count) for count in counts]).T, same)[0]
            low, high = np.quantile(np.where(np.isfinite(value)[:, None], drawn, np.nan), [0.025, 0.975], axis=1)
            null = over_parcels(cells[:, None], turned)[..., 0]
            p = upper_p(value, null)
            columns |= {title: value, f"{title}_low": low, f"{title}_high": high}
            if title == name:
                columns[f"{title}_ratio"] = value / max(float(brain @ cells / max(brain.sum(), 1e-12)), 1e-12)
            columns |= {f"{title}_p": p, f"{title}_q": fdr(p), f"{title}_p_family": family_p(value, null)}
        return columns

    def _laterality(self) -> np.ndarray:
        """(L - R) / (L + R) of the mean occupancy left and right, of the parcel with its mirror image, [P, E]."""
        weight = sparse.csr_array(sum(self.weights)).toarray()
        weight = (weight + weight[:, self.grid.mirror]) * (self.inside & self.inside[self.grid.mirror])
        x = self.grid.centres_mm[:, 0]
        occupancy = self.routes.occupancy()
        return laterality(weight * (x < -1e-6) @ occupancy, weight * (x > 1e-6) @ occupancy)


def laterality(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return (L - R) / (L + R), 1 all left and -1 all right; NaN where both are 0."""
    total = left + right
    return np.where(total > 0, (left - right) / np.where(total > 0, total, 1), np.nan)


def age_slope(values: np.ndarray, age: np.ndarray, least: int = MIN_PERSONS, means: int = 1) -> dict[str, np.ndarray]:
    """Fit each column of values [N, ...] on age [N] by least squares, NaN rows of a column left out.

    Args:
        values: To be told by age.
        age: Years.
        least: Persons.
        means: Means that were taken off beforehand, or are here: each costs a degree of freedom.

    Returns:
        per_decade, low and high (95 % t interval) and two-sided p, [...]; NaN from fewer persons than ``least``, or
        from one age.
    """
    flat = _flat(values)
    known = np.isfinite(flat) & np.isfinite(age)[:, None]
    n = known.sum(0)
    free = n - 1 - means
    years = np.where(known, age[:, None] / 10, 0)
    y = np.where(known, flat, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        x_gap = np.where(known, years - years.sum(0) / n, 0)
        y_gap = np.where(known, y - y.sum(0) / n, 0)
        sxx, sxy, syy = (x_gap**2).sum(0), (x_gap * y_gap).sum(0), (y_gap**2).sum(0)
        slope = sxy / sxx
        error = np.sqrt(np.maximum(syy - slope * sxy, 0) / free / sxx)
        p = np.where(error > 0, 2 * stats.t.sf(np.abs(slope / error), free), np.where(slope == 0, 1.0, 0.0))
        half = stats.t.ppf(0.975, free) * error
    enough = (n >= least) & (free > 0) & (sxx > 1e-9)
    found = {"per_decade": slope, "low": slope - half, "high": slope + half, "p": p}
    return {name: np.where(enough, value, np.nan).reshape(values.shape[1:]) for name, value in found.items()}


def _flat(values: np.ndarray) -> np.ndarray:
    """Join all axes after the first, also where it is empty."""
    return values.reshape(len(values), int(np.prod(values.shape[1:])))


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis, NaN left out, without a warning where nothing is there."""
    known = np.isfinite(values)
    return np.where(known.any(0), np.where(known, values, 0).sum(0) / np.maximum(known.sum(0), 1), np.nan)


def _with_interval(name: str, values: np.ndarray) -> dict[str, np.ndarray]:
    """Mean of [persons, ...] and its 95 % bootstrap interval over persons."""
    flat = _flat(values)
    mean = _mean(values)
    low = high = np.full(mean.shape, np.nan)
    if len(flat) >= MIN_PERSONS:
        known = np.isfinite(flat)
        filled = np.where(known, flat, 0)
        draws = []
        for counts in DEFAULT_BOOTSTRAP.counts(np.arange(len(flat))):
            with np.errstate(divide="ignore", invalid="ignore"):
                draws.append((counts @ filled / (counts @ known)).astype(np.float32))
        drawn = np.concatenate(draws)
        drawn = np.where(np.isfinite(drawn), drawn, _mean(flat))  # a draw without any head that has the parcel
        low, high = (np.quantile(drawn, q, axis=0).reshape(mean.shape) for q in (0.025, 0.975))
    return {name: mean, f"{name}_low": low, f"{name}_high": high}
