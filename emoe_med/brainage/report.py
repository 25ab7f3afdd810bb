"""One self-contained HTML page of what a run found, made from its run folder alone.

Nothing is loaded from elsewhere: style is inline and figures are base64. No person, path or file name of a scan
is on the page; text that others wrote is escaped and shown only where it looks like a plain word.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from emoe_med.brainage import report_figures as figures
from emoe_med.brainage.metrics import MIN_PERSONS
from emoe_med.brainage.report_contract import interval_section, refused_section
from emoe_med.brainage.report_page import (
    cell,
    facts,
    interval,
    note,
    number,
    page,
    plain,
    section,
    table,
)
from emoe_med.brainage.shared import shareable
from emoe_med.config import read_yaml
from emoe_med.errors import DataError, Fault
from emoe_med.storage import replace_file
from emoe_med.training.journal import read_journal

METRICS = {  # name in metrics.json: label, what it tells
    "mae": ("MAE", "mean absolute error, years"),
    "rmse": ("RMSE", "root mean square error, years"),
    "mean_error": ("Mean error", "mean of brain_pad, years"),
    "mae_training_median": ("MAE of the training median", "guessing one age for everyone, years"),
    "skill": ("Skill", "share of that error which the model removes"),
    "pearson_r": ("Pearson r", "predicted age with age"),
    "spearman_r": ("Spearman ρ", "predicted age with age"),
    "r2": ("R²", "1 − SS_res / SS_tot; may be negative"),
    "slope": ("Slope", "of predicted age on age; 1 is unbiased"),
    "r_pad_age": ("r(brain_pad, age)", "age bias; 0 is unbiased"),
    "spearman_pad_age": ("ρ(brain_pad, age)", "age bias; 0 is unbiased"),
    "mae_over_range": ("MAE / age range", "error relative to the span of ages"),
}
ROUTING = {
    "cv": "load CV (0 balanced)",
    "entropy": "load entropy (1 balanced)",
    "dead": "experts without a tenth of their share",
    "dropped": "dropped slots, share",
    "margin": "margin of first over second expert",
    "token_entropy": "entropy of one token's choice, nats",
    "captured_variance": "variance captured by the basis (1 is the best of its rank)",
    "subspace_overlap": "overlap with the exact subspace (1 is equal)",
    "orthonormality_error": "orthonormality error of the basis",
    "branch_over_stream": "size of the branch, share of the stream",
    "output_cosine": "cosine of two experts' outputs (1 is equal)",
    "output_cka": "similarity of two experts' outputs, CKA (1 is equal)",
}
# gains in mean absolute error, years, each with its interval
ROUTING_VALUE = {
    "mae_without_branch": "error gained without the branch, years",
    "mae_permuted_routing": "error gained when tokens swap their experts, years",
}


def write_report(run_dir: Path, shared: bool = False) -> Path:
    """Write ``report/report.html`` of an evaluated run, or the page that may be shared.

    The shared page, ``report/shared/report.html``, has no point per person and no group of fewer persons than an
    interval needs.

    Args:
        shared: Write the page for the tracking server.
        run_dir: Run folder. ``metrics.json`` and ``predictions/test.csv`` must be there; what else is missing
            (config.yaml, environment.json, splits.csv, predictions/val.csv, journal.jsonl) leaves its part out.

    Returns:
        Path of the page.

    Raises:
        DataError: The run was not evaluated (RUN-METRICS).
    """
    needed = [run_dir / "metrics.json", run_dir / "predictions" / "test.csv"]
    missing = [path for path in needed if not path.is_file()]
    if missing:
        hint = "evaluate the run first"
        raise DataError(*(Fault("RUN-METRICS", "is missing", file=str(path), hint=hint) for path in missing))
    metrics = json.loads(needed[0].read_text("utf-8"))
    metrics = shareable(metrics) if shared else metrics
    environment = _read_json(run_dir / "environment.json")
    config = read_yaml(run_dir / "config.yaml") if (run_dir / "config.yaml").is_file() else {}
    paths = {split: run_dir / "predictions" / f"{split}.csv" for split in ("test", "val")}
    predictions = {split: _read_predictions(path) for split, path in paths.items() if path.is_file()}
    sections = [
        _headline(metrics),
        "" if shared else _figures(predictions["test"], metrics),
        _strata(metrics, shared),
        interval_section(metrics),
        _corrected(metrics),
        _routing(metrics),
        _training(run_dir),
        _data(run_dir, metrics, config, predictions),
        refused_section(predictions),
        _environment(environment, config),
    ]
    is_synthetic = any(source.get("synthetic") for source in (environment, metrics, metrics.get("data") or {}))
    name = plain(config.get("name"), "(name not shown)") if config else "run"
    html = page(f"Brain age: {name}", "\n".join(sections), is_synthetic=is_synthetic)
    path = run_dir / "report" / ("shared" if shared else "") / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, html.encode("utf-8"))
    return path


def _headline(metrics: Mapping[str, Any]) -> str:
    test, counts = metrics["test"], metrics.get("counts", {}).get("test", {})
    ages = f", aged {counts['age_low']:.0f} to {counts['age_high']:.0f}" if counts else ""
    lead = (
        f"<p class=lead><b>{number(test['mae']['value'])} years</b> mean absolute error {interval(test['mae'])}"
        f"<br>on {test['mae']['n']} held-out persons{ages}; raw predictions, first session of each.</p>"
    )
    columns = {"test": test} | {name: metrics[name] for name in ("val",) if name in metrics}
    sessions = metrics.get("all_sessions", {}).get("test")
    if sessions and metrics.get("counts", {}).get("test", {}).get("scans") != test["mae"]["n"]:
        columns["test, all sessions"] = sessions
    rows = [
        [f"{escape(label)}<small>{escape(meaning)}</small>"] + [cell(found.get(name)) for found in columns.values()]
        for name, (label, meaning) in METRICS.items()
        if name in test
    ]
    persons = [f"{name}<small>{found['mae']['n']} persons</small>" for name, found in columns.items()]
    return lead + _skill(test, metrics) + section("Accuracy", table(["", *persons], rows) + _method(metrics))


def _skill(test: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    skill, null = test.get("skill"), test.get("mae_training_median")
    if not skill or not null or skill["value"] is None:
        return ""
    median = metrics.get("training_median_age")
    guess = "the training median" + (f" ({median:.1f})" if median is not None else "")
    text = (
        f"Guessing {guess} for everyone is off by {number(null['value'])} years; the model removes "
        f"{skill['value']:.0%} of that error {interval(skill, percent=True)}."
    )
    if skill["low"] is not None and skill["low"] <= 0:
        return f"<p class=warn>{text} <b>Zero is in reach: the model is not shown to be better than the guess.</b></p>"
    return f"<p>{text}</p>"


def _method(metrics: Mapping[str, Any]) -> str:
    bootstrap = metrics.get("bootstrap")
    if not bootstrap:
        return ""
    return note(
        f"Brackets: {bootstrap['level']:.0%} interval, percentile bootstrap over persons "
        f"({bootstrap['draws']} draws, seed {bootstrap['seed']}). brain_pad is predicted minus chronological age."
    )


def _figures(test: pd.DataFrame, metrics: Mapping[str, Any]) -> str:
    scored = test.dropna(subset=["age", "predicted_age"])
    scatter = figures.predicted_against_age(scored, metrics.get("training_median_age"))
    pad = figures.pad_against_age(scored)
    return section("Predictions", f"<div class=pair>{scatter}{pad}</div>" + note("One point per test scan."))


def _strata(metrics: Mapping[str, Any], shared: bool) -> str:
    parts = []
    covered = ["Coverage"] if metrics.get("interval") else []

    def covers(found: Mapping[str, Any]) -> list[str]:
        return [cell(found.get("coverage")) for _ in covered]

    for key, title in (("by_age", "Age"), ("by_sex", "Sex"), ("by_site", "Site")):
        strata = metrics.get(key)
        if strata:
            names = sorted((name for name in strata if name != "macro_mean"), key=_natural)
            rows = [[plain(name, "(name not shown)"), *_stratum(strata[name]), *covers(strata[name])] for name in names]
            rows += [["mean of rows", *_stratum(strata["macro_mean"]), *covers({})]] if "macro_mean" in strata else []
            parts.append(table([title, "n", "MAE, years", "Mean error, years", *covered], rows, kind="strata"))
    if shared and any(key.startswith("by_") for key in metrics):
        text = f"Groups of fewer than {MIN_PERSONS} persons are left out, and a table whose rows would give one back."
        parts.append(note(text))
    return section("By age, sex and site", "".join(parts)) if parts else ""


def _stratum(found: Mapping[str, Any]) -> list[str]:
    return [str(found["mae"]["n"]), cell(found["mae"]), cell(found.get("mean_error"))]


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name) if part]


def _corrected(metrics: Mapping[str, Any]) -> str:
    corrected = metrics.get("corrected")
    if not corrected:
        return section("Age-bias correction", note("None was fitted."))
    names = ("mae", "pearson_r", "r2", "slope", "r_pad_age")
    rows = [
        [escape(METRICS[name][0]), cell(metrics["test"].get(name)), cell(corrected["test"].get(name))] for name in names
    ]
    bias = corrected["bias"]
    fit = (
        f"Method {escape(bias['method'])}: brain_pad = {number(bias['alpha'], 3)} × age + {number(bias['beta'])}, "
        f"fitted on the validation predictions of {bias['n']} persons aged {bias['age_low']:.0f} to "
        f"{bias['age_high']:.0f}."
    )
    box = f"<p><b>Not the accuracy of the model.</b> {escape(corrected['note'])}</p>"
    return f"<div class=box><h2>Age-bias correction</h2>{box}{table(['', 'raw', 'corrected'], rows)}{note(fit)}</div>"


def _routing(metrics: Mapping[str, Any]) -> str:
    routing = metrics.get("routing")
    if not routing:
        return ""
    layers = routing if all(isinstance(found, dict) for found in routing.values()) else {"layer": routing}
    loads = {layer: _loads(found) for layer, found in layers.items()}
    rows = [
        [escape(label), *(f"{found[name]:.3g}" if name in found else "–" for found in layers.values())]
        for name, label in ROUTING.items()
        if any(name in found for found in layers.values())
    ]
    rows += [
        [escape(label), *(cell(found.get(name)) for found in layers.values())]
        for name, label in ROUTING_VALUE.items()
        if any(name in found for found in layers.values())
    ]
    bars = "".join(figures.expert_loads(load, plain(layer, "layer")) for layer, load in loads.items() if load)
    heads = [f"{plain(layer, 'layer')}<small>{len(load)} experts</small>" for layer, load in loads.items()]
    return section("Routing", table(["", *heads], rows) + bars)


def _loads(found: Mapping[str, Any]) -> list[float]:
    listed = found.get("load")
    return list(listed) if listed else [found[name] for name in sorted(found) if name.startswith("load/")]


def _training(run_dir: Path) -> str:
    curves: dict[str, list[tuple[int, float]]] = {"train/loss": [], "val/mae": []}
    for _, event in read_journal(run_dir / "journal.jsonl"):
        values = event["values"] if event["kind"] == "metrics" and not event.get("whole") else {}
        for name, points in curves.items():
            if values.get(name) is not None:
                points.append((event["step"], values[name]))
    curves = {name: points for name, points in curves.items() if points}
    return section("Training", figures.training_curves(curves)) if curves else ""


def _data(
    run_dir: Path, metrics: Mapping[str, Any], config: Mapping[str, Any], predictions: Mapping[str, pd.DataFrame]
) -> str:
    path = run_dir / "splits.csv"
    in_split = pd.read_csv(path)["split"].value_counts() if path.is_file() else pd.Series(dtype=int)
    counts, rows = metrics.get("counts", {}), []
    for split in ("train", "val", "test"):
        found = counts.get(split, {})
        ages = f"{found['age_low']:.1f} to {found['age_high']:.1f}" if found else ""
        scans = in_split.get(split, len(predictions[split]) if split in predictions else None)
        if scans is not None:
            rows.append([split, str(scans), *(str(found.get(name, "")) for name in ("persons", "not_scored")), ages])
    counted = table(["Split", "scans", "persons scored", "scans not scored", "ages scored"], rows)
    contract = {"contract": metrics["contract"]} if "contract" in metrics else {}
    return section("Data", counted + facts({**(config.get("data") or {}), **(metrics.get("data") or {}), **contract}))


def _environment(environment: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    parts = [facts(environment) if environment else note("environment.json is missing.")]
    if config:
        parts.append(f"<details><summary>Complete configuration</summary>{facts(config)}</details>")
    return section("Environment", "".join(parts))


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def _read_predictions(path: Path) -> pd.DataFrame:
    # a column without any reason would be read as numbers
    return pd.read_csv(path, dtype={"status": "str", "reason": "str"})
