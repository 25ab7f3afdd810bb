"""The model card of a bundle: what is known is filled in, what only its author knows is marked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from emoe_med.brainage.metrics import MIN_PERSONS, in_words
from emoe_med.brainage.predict import Predictor
from emoe_med.brainage.report import METRICS
from emoe_med.brainage.report_page import plain
from emoe_med.data.contract import contract_digest

MUST_COMPLETE = "author must complete"
INTENDED = (
    "Research on groups: brain age of healthy adults from T1-weighted MRI. "
    "Not for diagnosis, nor for decisions on a person."
)
_HIDDEN = "(name not shown)"


def model_card(
    predictor: Predictor, metrics: Mapping[str, Any], trained: Mapping[str, Any], exported: Mapping[str, Any]
) -> str:
    """Write the card as Markdown.

    Args:
        predictor: Model, age bias and interval.
        metrics: From `shared.shareable`: no group of fewer than `MIN_PERSONS` persons.
        trained: Content of the run's environment.json.
        exported: `environment` of the exporting machine.
    """
    contract, config = predictor.model.contract, predictor.model.config
    banner = (
        "**SYNTHETIC: trained on drawn heads. Its ages mean nothing for people.**\n\n" if contract["synthetic"] else ""
    )
    parts = [
        f"# Model card: {config.name}\n\n{banner}{INTENDED}",
        _section("Use", _USE),
        _section(
            "Intended use and users", _rows([["intended use", INTENDED], *_open("intended users", "out of scope")])
        ),
        _section("Training persons", _persons(contract)),
        _section("Contract", _contract(contract)),
        _section("Performance", _performance(metrics)),
        _section("Limits", _limits(contract)),
        _section("Privacy", _privacy(contract)),
        _section("Provenance", _provenance(predictor, trained, exported)),
        _section("Licence", _LICENCE),
    ]
    return "\n\n".join(parts) + "\n"


_USE = """Install `emoe_med` in the version named under Provenance and `fire`; then, in this folder,

```
python -m monai.bundle run --config_file configs/inference.json --input HEAD --output ages.csv
python -m emoe_med.brainage selftest --bundle .
```

`--input` is a scan, a folder or a manifest (CSV with `image`, better also `age`, and `mask` where the limits ask for
it); each scan gets a row with age, interval, verdict (`ok`, `check`, `refused`) and reason. The second command tells
whether this machine gives the numbers of the one that exported the bundle."""

_LICENCE = f"""Code and configuration: Apache-2.0, see LICENSE. Weights: **{MUST_COMPLETE}** (what do the terms of the
training data permit?). Contact: **{MUST_COMPLETE}**. Citation: **{MUST_COMPLETE}**."""


def _persons(contract: Mapping[str, Any]) -> str:
    found, ages = contract.get("persons"), contract["training_ages"]
    rows = [
        ["training scans", str(ages["n"])],
        ["age, years", f"median {ages['median']:.0f}, mean {ages['mean']:.1f}, standard deviation {ages['std']:.1f}"],
        ["range in which no age is flagged", f"{ages['low']:.0f} to {ages['high']:.0f}"],
        *_open(
            "source of the data", "inclusion and exclusion", "ancestry", "scanners and sequences", "consent, ethics"
        ),
    ]
    if found is None:
        return f"{_rows(rows)}\n\nPersons by age, sex and site were not kept by this run: **{MUST_COMPLETE}**."
    counts = [
        _rows(
            [[plain(name, _HIDDEN), f"fewer than {MIN_PERSONS}" if n is None else str(n)] for name, n in group.items()],
            key,
        )
        for key, group in found.items()
    ]
    return "\n\n".join([_rows(rows), "Persons, one scan each:", *counts])


def _contract(contract: Mapping[str, Any]) -> str:
    spread = contract.get("fingerprint") or {}
    strip = contract.get("strip") or {}
    rows = [[name, str(value)] for name, value in contract["chain"].items()]
    rows += [["brain masks came from", plain(strip.get("mask"), _HIDDEN)]] if strip else []
    rows += [[f"preprocessing: {name}", str(value)] for name, value in (strip.get("prepared") or {}).items()]
    rows += [["scans whose figures are kept", str(spread["scans"])]] if spread else []
    rows += [["digest of the contract", contract_digest(contract)]]
    lead = "Raw scans go through this chain by themselves; a scan that looks otherwise is flagged or refused."
    return f"{lead}\n\n{_rows(rows)}"


def _performance(metrics: Mapping[str, Any]) -> str:
    test = metrics["test"]
    text = [
        "Held-out test persons, raw predictions, first session of each; 95 % bootstrap intervals over persons.",
        _rows(
            [
                [f"{label}: {meaning}", in_words(test[name])]
                for name, (label, meaning) in METRICS.items()
                if name in test
            ]
        ),
        f"Mean absolute error by subgroup, years; groups of fewer than {MIN_PERSONS} persons are left out.",
        _rows(
            [
                [f"{key.removeprefix('by_')} {plain(name.replace('_', ' '), _HIDDEN)}", in_words(found["mae"])]
                for key, groups in metrics.items()
                if key.startswith("by_")
                for name, found in groups.items()
            ]
        ),
    ]
    if interval := metrics.get("interval"):
        covered = in_words(interval["coverage"])
        text.append(
            f"Prediction interval: ± {interval['half_width']:.1f} years at {interval['level']:.0%}, calibrated on "
            f"{interval['n']} persons; it covered {covered} of the test persons. {interval['note']}"
        )
    if corrected := metrics.get("corrected"):
        text.append(f"Age-bias correction, beside the raw figures: {corrected['note']}")
    return "\n\n".join(text)


def _limits(contract: Mapping[str, Any]) -> str:
    prepared = (contract.get("strip") or {}).get("prepared") or {}
    if contract["chain"]["mask"] == "head":
        wanted = "whole heads; masks are not used"
    elif prepared.get("Path") == "full":
        wanted = "whole heads, and the extra `preprocess` installed, which strips the skull"
    else:
        wanted = "a brain mask beside each head"
    return "\n".join(
        (
            "- Intervals and error hold for persons like the test persons: not for patients, other scanners, one age.",
            "- It is no age of the brain: it is what a network reads from an image, head size and scanner included.",
            f"- It expects {wanted}.",
            "- Left and right swapped consistently, or a head a tenth too large by a wrong header, pass unseen.",
            f"- Known failures, drift, comparison with clinical measures: **{MUST_COMPLETE}**.",
        )
    )


def _privacy(contract: Mapping[str, Any]) -> str:
    count = len(contract["seen"])
    return (
        "No id, path or image of a person is in this bundle: the head under `selftest` is drawn. It holds SHA-256 "
        f"digests of {count} training and validation volumes, so that a scan that the model knows is told "
        "(`in_training`), percentiles of figures of the training scans, and the lowest and highest training age. "
        "Weights may remember training scans."
    )


def _provenance(predictor: Predictor, trained: Mapping[str, Any], exported: Mapping[str, Any]) -> str:
    config = predictor.model.config
    rows = [
        ["configuration", config.name],
        ["seed", str(config.training.seed)],
        ["fold", f"{trained.get('fold', '?')} of {config.data.folds}"],
        ["checkpoint", f"{config.training.select} of {config.training.epochs} epochs"],
        ["commit of training", str(trained.get("git_commit"))],
        ["commit of export", str(exported["git_commit"])],
        ["hardware of training", str(trained.get("device"))],
        *([name, str(version)] for name, version in exported["versions"].items()),
        *_open("energy"),
    ]
    return _rows(rows)


def _open(*names: str) -> list[list[str]]:
    return [[name, f"**{MUST_COMPLETE}**"] for name in names]


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}"


def _rows(rows: Iterable[Sequence[str]], head: str = "") -> str:
    lines = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return "\n".join([f"| {head} | |", "|---|---|", *lines])
