"""What cells do to the ages of a group: how much it differs between heads, and how much of that goes with their age.

Both are taken within runs. What a cell adds to all heads alike tells no age, and what one run adds more than another
tells of training.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Measured:
    """Years that hang on each cell of some heads, less the mean of their run.

    Attributes:
        heads: [n], which of all heads; those that are the only one of their run are left out.
        values: [n, C] years.
        age: [n] years, less the mean of the run; 0 where unknown.
        freedom: Degrees of freedom, n less the number of runs.
    """

    heads: np.ndarray
    values: np.ndarray
    age: np.ndarray
    freedom: int

    @classmethod
    def of(cls, values: np.ndarray, heads: np.ndarray, age: np.ndarray, run: np.ndarray) -> Measured:
        """Take years [n, C] of heads [n] with ages [n] (NaN where unknown) and runs [n]."""
        _, number, count = np.unique(run, return_inverse=True, return_counts=True)
        several = count[number] > 1
        values, age, number = values[several].astype(np.float64), age[several].astype(float), number[several]
        runs = np.unique(number)
        for one in runs:
            mine = number == one
            values[mine] -= values[mine].mean(0)
            known = mine & np.isfinite(age)
            age[known] -= np.sum(age[known]) / max(known.sum(), 1)
        return cls(heads[several], values, np.nan_to_num(age), len(values) - len(runs))

    def __len__(self) -> int:
        return len(self.heads)

    def deviation(self, weight: np.ndarray | None = None) -> np.ndarray:
        """Return the standard deviation over heads, years, [C]; [B, C] of heads weighted by [B, n]."""
        share = np.full(len(self), 1 / len(self)) if weight is None else weight / weight.sum(-1, keepdims=True)
        return np.sqrt(share @ self.values**2 * len(self) / self.freedom)

    def per_decade(self, weight: np.ndarray | None = None) -> np.ndarray:
        """Return the least-squares slope on age, years per decade of age, [C]; [B, C] of heads weighted by [B, n].

        NaN where all heads of a run are of one age.
        """
        weight = np.ones(len(self)) if weight is None else weight
        with np.errstate(divide="ignore", invalid="ignore"):
            return 10 * ((weight * self.age) @ self.values) / (weight @ self.age**2)[..., None]
