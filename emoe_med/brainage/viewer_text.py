"""What the viewer says in words: what each map is, and whether any of it may be believed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from emoe_med.brainage.report_page import SYNTHETIC, interval, number

SIGNIFICANT = 0.05  # after correction for all parcels and experts
# (quantity of maps.json, whether one map per expert): what the page calls it
QUANTITIES: dict[tuple[str, bool], dict[str, Any]] = {
    ("topexpert", False): {
        "label": "Top expert",
        "unit": "",
        "digits": 0,
        "note": "The expert that serves the cell in most heads; none where the second is within a tenth.",
    },
    ("occupancy", True): {
        "label": "Occupancy",
        "unit": "of heads",
        "digits": 2,
        "note": "Share of heads in which the expert serves the cell. The threshold starts at chance: one over the "
        "number of experts.",
    },
    ("gate", True): {
        "label": "Gate",
        "unit": "weight",
        "digits": 2,
        "note": "Mean weight that the expert's output is given; 0 in heads where it does not serve the cell.",
    },
    ("contribution", True): {
        "label": "Contribution of an expert",
        "unit": "years",
        "digits": 3,
        "note": "Mean change of the predicted age that the expert makes in the cell, against the mean of all experts; "
        "0 in heads where it does not serve the cell, which count. Red: heads look older for it. Blue: younger.",
    },
    ("contribution", False): {
        "label": "Contribution of the layer",
        "unit": "years",
        "digits": 3,
        "note": "How much that change differs between heads (standard deviation), whichever expert serves the cell: "
        "what is added to all heads alike tells no age.",
    },
    ("contributionage", False): {
        "label": "Contribution that goes with age",
        "unit": "years per decade",
        "digits": 3,
        "note": "How much that change grows with the age of the head. Red: what tells old heads from young ones in the "
        "right direction. Blue: in the wrong one.",
    },
    ("occlusion", False): {
        "label": "Occlusion",
        "unit": "years",
        "digits": 3,
        "note": "How much the change of the predicted age differs between heads (standard deviation) when the cell is "
        "painted grey in the scan: a check that asks no expert.",
    },
    ("occlusionage", False): {
        "label": "Occlusion that goes with age",
        "unit": "years per decade",
        "digits": 3,
        "note": "How much that change grows with the age of the head.",
    },
    ("entropy", False): {
        "label": "Entropy",
        "unit": "",
        "digits": 2,
        "note": "0: one expert serves the cell in every head. 1: all share it evenly.",
    },
    ("margin", False): {
        "label": "Margin",
        "unit": "of heads",
        "digits": 2,
        "note": "Occupancy of the first expert less that of the second.",
    },
}


def warning(index: Mapping[str, Any]) -> str:
    """Return the words that stand in every picture of maps not shown to mean anything; empty for stable ones."""
    verdict = str(index["verdict"])
    if verdict == "stable":
        return ""
    return verdict if verdict.startswith("unstable") else "stability not tested"


def facts_html(index: Mapping[str, Any]) -> str:
    """Return whose maps these are, and in which grain."""
    subjects, runs = index["subjects"], index["runs"]
    measured = [(name, index.get(f"subjects_{name}")) for name in ("contribution", "occlusion")]
    fewer = ", ".join(f"{name} over {count} of them" for name, count in measured if count)
    scope = "; intervals are over persons, with these runs as they are" if len(runs) > 1 else ""
    heads = "drawn heads" if index["synthetic"] else "heads"
    seen = "held out of the training of their run" if index["held_out"] else "some of which the run was trained on"
    grain = f"One cell is <b>{index['cell_mm']:g} mm</b> wide"
    if field := index.get("receptive_field_mm"):
        grain += f" and sees about {field:g} mm"
    lines = [
        f"Mean over <b>{subjects} {heads}</b>, {seen}{' (' + fewer + ')' if fewer else ''}; "
        f"{len(runs)} run{'s' if len(runs) > 1 else ''}, layer "
        f"{escape(str(index['layer']))}, {len(index['experts'])} experts{scope}.",
        f"{grain}: finer detail is not in these maps. Space {escape(index['space'])}, millimetres, RAS; left is left.",
    ]
    return (SYNTHETIC if index["synthetic"] else "") + "".join(f"<p>{line}</p>" for line in lines)


def verdict_html(stability: Mapping[str, Any]) -> str:
    """Return the verdict on stability, with the figures that it rests on."""
    kind = {True: "good", False: "bad", None: "open"}[stability["stable"]]
    title = escape(str(stability["verdict"]))
    head = f"<b>{title[:1].upper() + title[1:]}.</b> {escape(_sentence(stability['reason']))}"
    figures = [
        f"{label} {number(found['value'])} {interval(found)}"
        for label, found in (("matched r", stability.get("matched_r")), ("Dice", stability.get("dice")))
        if found
    ]
    for name, label in (("turned_patches", "patches at random places"), ("random_router", "random router")):
        if found := stability.get(name):
            figures.append(f"{label} {number(found['matched_r']['value'])} {interval(found['matched_r'])}")
    if place := stability.get("position_only"):
        same, alone = place["same_expert"], place["by_place"]
        figures.append(
            f"in one and the same head, share of cells with the same expert {number(same['value'])} {interval(same)}, "
            f"with one of the runs replaced by a router that knows the place alone {number(alone['value'])} "
            f"{interval(alone)}"
        )
    kinds = [
        f"{kind} {number(found['matched_r'])} ({found['pairs']} pairs)"
        for kind, found in (stability.get("by_kind") or {}).items()
    ]
    if kinds:
        figures.append(f"matched r by kind of pair: {', '.join(kinds)}")
    if (own := stability.get("reliability")) is not None:
        figures.append(f"a run with itself, over halves of its persons, {number(own)}: the most that noise allows")
    told = f"<br><small>Agreement of runs, 1 being the same map: {'; '.join(figures)}.</small>" if figures else ""
    return f'<div class="verdict {kind}" role="alert"><p>{head}{told}</p></div>'


def checks_html(checks: Sequence[Mapping[str, Any]]) -> str:
    """Return every sanity check; those that failed come first, and are named where the rest is folded away."""
    order = {False: 0, True: 1, None: 2}
    ranked = sorted(checks, key=lambda check: order[check["passed"]])
    failed = [escape(check["title"]) for check in checks if check["passed"] is False]
    judged = sum(check["passed"] is not None for check in checks)
    title = f"Sanity: {judged - len(failed)} of {judged} checks passed"
    title += f"<span class=no> ✗ {'; '.join(failed)}</span>" if failed else ""
    rows = "".join(_check(check) for check in ranked)
    return f"<details><summary>{title}</summary><table class=checks>{rows}</table></details>"


def _check(check: Mapping[str, Any]) -> str:
    mark = {True: "<b class=yes>✓ passed</b>", False: "<b class=no>✗ failed</b>", None: "told"}[check["passed"]]
    value = check["value"]
    figure = "–" if value is None else number(value, 0 if isinstance(value, int) else 2)
    if check.get("low") is not None:
        figure += f" {interval(check)}"
    wanted = str(check.get("threshold") or "").replace(">=", "≥").replace("<=", "≤")
    wanted = f"<small>wanted {escape(wanted)}</small>" if wanted and check["passed"] is not None else ""
    text = f"{escape(check['title'])}<small>{escape(_sentence(check['text']))}</small>"
    return f"<tr><td>{mark}</td><td>{text}</td><td>{figure}{wanted}</td></tr>"


def remark(expert: str, regions: Sequence[Mapping[str, Any]], doubted: bool) -> str:
    """Return where an expert serves clearly more than elsewhere, in a sentence that claims no more.

    Args:
        expert: Such as E03.
        regions: Rows of regions.csv.
        doubted: Whether the maps were not shown to be stable.
    """
    clear = [
        row
        for row in regions
        if row["expert"] == expert and (row["p_family"] or 1) < SIGNIFICANT and (row["enrichment"] or 0) > 1
    ]
    if not clear:
        return f"{expert}: enriched in no parcel (p < {SIGNIFICANT}, corrected for all parcels and experts)"
    first = sorted(clear, key=lambda row: -row["enrichment"])[:3]
    told = ", ".join(f"×{row['enrichment']:.1f} in {row['name']} (p {_small(row['p_family'])})" for row in first)
    more = f" and {len(clear) - len(first)} more" if len(clear) > len(first) else ""
    return f"{expert}: enriched {told}{more}{'; not shown to be stable' if doubted else ''}"


def _small(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _sentence(text: str) -> str:
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")
