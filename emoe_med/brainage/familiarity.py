"""How far a scan is from those that a network was trained on, as the network sees them.

The distance is Mahalanobis', of the pooled features before the last layer, with a shrunk covariance of the
training scans. What is far is judged on persons held out: a network sees its own training scans too kindly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats
from sklearn.covariance import LedoitWolf

MIN_PERSONS = 5  # held out; fewer do not tell a spread
FAR_PERCENTILE = 99.0


@dataclass(frozen=True)
class Familiarity:
    """Centre and shape of the training features, and the distances of held-out persons.

    Attributes:
        mean: [F] of the training features.
        precision: [F, F] inverse covariance, shrunk (Ledoit and Wolf 2004).
        log_mean: Mean of the log distance over held-out persons.
        log_std: Its standard deviation over them.
        n: Held-out persons.
    """

    mean: Sequence[float]
    precision: Sequence[Sequence[float]]
    log_mean: float
    log_std: float
    n: int

    @classmethod
    def of(cls, train: np.ndarray, held_out: np.ndarray) -> Familiarity | None:
        """Fit on training features [S, F] and on those of held-out persons [P, F], one scan each.

        None where the persons are too few, or the features do not vary.
        """
        if len(held_out) < MIN_PERSONS or len(train) < 2 or not train.var(0).any():
            return None
        shape = LedoitWolf().fit(train)
        found = np.log(np.sqrt(shape.mahalanobis(held_out)))
        if not np.isfinite(found).all() or found.std(ddof=1) == 0:
            return None
        return cls(
            shape.location_.tolist(),
            shape.get_precision().tolist(),
            float(found.mean()),
            float(found.std(ddof=1)),
            len(found),
        )

    @classmethod
    def from_json(cls, stored: Mapping[str, Any] | None) -> Familiarity | None:
        """Take back `to_json`; None where nothing is stored."""
        return cls(**stored) if stored else None

    def to_json(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return asdict(self)

    def score(self, features: np.ndarray) -> np.ndarray:
        """Return the distances [S] of features [S, F], in standard deviations of the training scans."""
        away = np.asarray(features, float) - np.asarray(self.mean)
        return np.sqrt(np.einsum("sf,fg,sg->s", away, np.asarray(self.precision), away))

    def percentile(self, score: np.ndarray) -> np.ndarray:
        """Return how many of 100 new persons like those held out would be nearer, [S] in 0 to 100.

        The predictive distribution of a normal log distance, Student's t: with n persons an empirical rank
        ends at n / (n + 1), which tells nothing of the 99th percentile where n is 15.
        """
        spread = self.log_std * np.sqrt(1 + 1 / self.n)
        with np.errstate(divide="ignore"):
            return 100 * stats.t.cdf((np.log(score) - self.log_mean) / spread, self.n - 1)
