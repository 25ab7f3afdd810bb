"""Figures of the report, as base64 PNG inside an HTML image."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#5b6875"  # told apart by every kind of colour vision


def predicted_against_age(scored: pd.DataFrame, training_median: float | None) -> str:
    """Draw predicted age over age with the line of perfect prediction."""
    figure, axes = _canvas(4.6, 4.4)
    ages = scored[["age", "predicted_age"]].to_numpy()
    low, high = ages.min() - 2, ages.max() + 2
    axes.plot([low, high], [low, high], color=GREY, lw=1, label="perfect")
    if training_median is not None:
        axes.axhline(training_median, color=ORANGE, lw=1, ls="--", label="training median")
    _points(axes, scored["age"], scored["predicted_age"])
    axes.set(xlabel="age, years", ylabel="predicted age, years", xlim=(low, high), ylim=(low, high), aspect="equal")
    axes.legend(frameon=False, loc="upper left")
    return _image(figure, "Predicted age against age, one point per test scan")


def pad_against_age(scored: pd.DataFrame) -> str:
    """Draw brain_pad over age with its linear trend: the age bias."""
    figure, axes = _canvas(4.6, 4.4)
    pad = scored["predicted_age"] - scored["age"]
    axes.axhline(0, color=GREY, lw=1)
    _points(axes, scored["age"], pad)
    if scored["age"].nunique() > 2:
        slope, intercept = np.polyfit(scored["age"], pad, 1)
        ends = np.array([scored["age"].min(), scored["age"].max()])
        axes.plot(ends, slope * ends + intercept, color=ORANGE, lw=1.6, label=f"trend {slope:+.2f} per year")
        axes.legend(frameon=False, loc="upper right")
    axes.set(xlabel="age, years", ylabel="brain_pad = predicted − age, years")
    return _image(figure, "brain_pad against age with its linear trend")


def expert_loads(load: Sequence[float], layer: str) -> str:
    """Draw the share of tokens that each expert of a layer got."""
    figure, axes = _canvas(7.2, 1.9)
    axes.bar(range(len(load)), load, color=BLUE, width=0.75)
    axes.axhline(1 / len(load), color=ORANGE, lw=1, ls="--", label="equal share")
    axes.set(xlabel=f"expert ({layer})", ylabel="share of tokens", xticks=range(0, len(load), 1 + len(load) // 17))
    axes.legend(frameon=False, loc="upper right")
    axes.margins(y=0.3)
    return _image(figure, f"Share of tokens per expert of {layer}")


def training_curves(curves: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """Draw each named curve over the optimiser step, one beside the other."""
    figure = Figure(figsize=(7.2, 2.5), layout="constrained")
    for axes, (name, points) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        _plain_axes(axes)
        axes.plot(*zip(*points, strict=True), color=BLUE, lw=1.4, marker="o" if len(points) < 30 else "", ms=3)
        axes.set(xlabel="optimiser step", title=name)
    return _image(figure, "Training curves: " + ", ".join(curves))


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    _plain_axes(axes)
    return figure, axes


def _plain_axes(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e3e8ed", lw=0.8)
    axes.set_axisbelow(True)


def _points(axes: Axes, x: pd.Series, y: pd.Series) -> None:
    crowded = len(x) > 1000
    axes.scatter(x, y, s=5 if crowded else 18, alpha=0.3 if crowded else 0.7, color=BLUE, linewidths=0)


def _image(figure: Figure, text: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{escape(text)}" src="data:image/png;base64,{data}">'
