"""The figures of a table: what a metric's name means, and how a run folder gives it, sample by sample."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from emoe_med.brainage.evaluate import read_predictions
from emoe_med.brainage.strata import first_sessions


@dataclass(frozen=True)
class Figure:
    """One metric.

    Attributes:
        task: Whose runs have it; None: any.
        unit: What its values are of. Intervals and paired differences are over seeds and these; a figure of whole
            `runs` has its spread alone.
        better: Which way is better; None where there is no better.
        read: Gives a run's values by unit, and what guessing would get (None where nobody can guess).
    """

    task: Literal["brainage", "vision"] | None
    unit: Literal["persons", "images", "draws", "runs"]
    better: Literal["lower", "higher"] | None
    read: Callable[[Path], tuple[pd.Series, float | None]]


def figure(metric: str) -> Figure:
    """Return what a metric of the schema means."""
    family, *rest = metric.split("/")
    if metric == "test/mae":
        return Figure("brainage", "persons", "lower", _age_errors)
    if family == "test":
        return Figure("vision", "images", "higher", partial(_hits, int(rest[0].removeprefix("top"))))
    if family == "fewshot":
        return Figure("vision", "draws", "higher", partial(_probed, *rest))
    if family == "heatmap":
        return Figure("vision", "runs", None, partial(_mapped, rest[0]))
    return Figure(None, "runs", None, partial(_routed, rest[0]))


def _age_errors(run_dir: Path) -> tuple[pd.Series, float | None]:
    """Absolute error in years of each test person, one scan each; guessing the training median."""
    table = first_sessions(read_predictions(run_dir, "test").dropna(subset=["age", "predicted_age"]))
    error = (table["predicted_age"] - table["age"]).abs().set_axis(table["row"].to_numpy())
    return error, _metrics(run_dir)["test"]["mae_training_median"]["value"]


def _hits(k: int, run_dir: Path) -> tuple[pd.Series, float | None]:
    """100 for each test image whose label is among the first k outputs, else 0; guessing the k commonest labels."""
    table = pd.read_csv(run_dir / "predictions" / "test.csv")
    shares = table["label"].value_counts(normalize=True)
    return 100.0 * (table["rank"] < k).set_axis(table["row"].to_numpy()), 100.0 * float(shares.head(k).sum())


def _probed(dataset: str, shots: str, feature: str, probe: str, run_dir: Path) -> tuple[pd.Series, float | None]:
    """Accuracy in percent of a probe, by draw; `mean` where there is no such feature; nothing before the step."""
    path = run_dir / "fewshot" / f"{dataset}.json"
    report = json.loads(path.read_text()).get(shots) if path.is_file() else None
    if report is None:
        return pd.Series(dtype=float), None
    found = report.get(feature, report["mean"])[probe]
    return pd.Series(found["by_draw"]), 100.0 / found["classes"]


def _mapped(name: str, run_dir: Path) -> tuple[pd.Series, float | None]:
    """A figure of the expert-class map, its mean over layers; nothing where nothing is routed."""
    path = run_dir / "expert_maps" / "expert_class.json"
    return _one(json.loads(path.read_text())["mean"][name]) if path.is_file() else pd.Series(dtype=float), None


def _routed(name: str, run_dir: Path) -> tuple[pd.Series, float | None]:
    """A figure of the routed layers, averaged over them; nothing where a run has none of it."""
    layers = _metrics(run_dir).get("routing", {}).values()
    values = [
        layer[name]["value"] if isinstance(layer[name], dict) else layer[name] for layer in layers if name in layer
    ]
    return _one(float(np.mean(values))) if values else pd.Series(dtype=float), None


def _one(value: float) -> pd.Series:
    return pd.Series([float(value)])


def _metrics(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "metrics.json").read_text())
