"""Pieces of a self-contained HTML page: figures with intervals, tables, and the filter for text of others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

# configuration keys that hold places or names, whatever their value looks like
_PLACES = re.compile(r"(.*_)?(path|paths|root|dir|folder|file|files|manifest|out|output|uri|host|hostname|user|id)")
_PLAIN = re.compile(r"(?!.*(sub-|\.(nii|mgz|csv|tsv|json|gz)\b))[\w .,+()%-]{1,80}")
_PATHLIKE = re.compile(r"\S*([/\\]|sub-|\.(nii|mgz|csv|tsv)\b)")

SYNTHETIC = (
    "<p class=banner>SYNTHETIC DATA. These heads were drawn, not scanned: the figures show that the software "
    "works, and say nothing about people.</p>"
)
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1c2733; background: #fff; margin: 0 auto; padding: 1em 1.2em;
  max-width: 860px; }}
h1 {{ font-size: 1.5em; margin: .2em 0 .6em; }}
h2 {{ font-size: 1.1em; margin: 0 0 .5em; }}
section, .box {{ margin: 1.8em 0; }}
.lead {{ margin: 0 0 .6em; }}
.lead b {{ font-size: 1.7em; }}
.banner {{ background: #ffe08a; border: 2px solid #b58900; padding: .5em .8em; font-weight: 600; }}
.warn {{ background: #fdecea; border-left: 4px solid #c0392b; padding: .5em .8em; }}
.box {{ border: 1px dashed #8a97a5; background: #f6f8fa; padding: .8em 1em; }}
.ci, .why, small, .note {{ color: #5b6875; }}
.why {{ font-size: .88em; }}
.ci {{ white-space: nowrap; }}
small {{ display: block; font-size: .82em; line-height: 1.25; font-weight: 400; }}
.note {{ font-size: .88em; margin: .4em 0 0; }}
.scroll {{ overflow-x: auto; margin-bottom: .8em; }}
table {{ border-collapse: collapse; width: 100%; font-size: .93em; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; vertical-align: top; padding: .3em .7em .3em 0; border-bottom: 1px solid #e3e8ed; }}
th {{ border-bottom: 2px solid #c3ccd5; }}
.facts td:first-child {{ color: #5b6875; width: 40%; }}
.facts td {{ overflow-wrap: anywhere; }}
.figures td:not(:first-child):not(:last-child) {{ white-space: nowrap; }}
.strata {{ table-layout: fixed; }}
.strata th:nth-child(1) {{ width: 22%; }}
.strata th:nth-child(2) {{ width: 9%; }}
.pair {{ display: flex; flex-wrap: wrap; gap: 1em; }}
.pair img {{ flex: 1 1 340px; min-width: 0; }}
img {{ width: 100%; max-width: 100%; height: auto; align-self: flex-start; }}
summary {{ cursor: pointer; margin: .8em 0 .4em; }}
footer {{ border-top: 1px solid #e3e8ed; margin-top: 2em; padding-top: .6em; }}
</style></head><body>
<h1>{title}</h1>
{banner}
{body}
<footer class=note>Made by emoe_med from the run folder. For research only: not for diagnosis.</footer>
</body></html>
"""


def page(title: str, body: str, *, is_synthetic: bool) -> str:
    """Return the whole page, with a banner where the data are synthetic."""
    return _PAGE.format(title=title, banner=SYNTHETIC if is_synthetic else "", body=body)


def facts(values: Mapping[str, Any]) -> str:
    """Return a two-column table of nested settings; what may name a place or a person is not shown."""
    rows = [
        [escape(name.replace("_", " ")), plain(value, "(not shown)")]
        for name, value in _flat(values)
        if _PLACES.fullmatch(name.rpartition(".")[2]) is None
    ]
    return table(["", ""], rows, kind="facts") if rows else ""


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def plain(value: Any, otherwise: str) -> str:
    """Return numbers and plain words as HTML, and ``otherwise`` for text that may be a path or a subject."""
    if isinstance(value, list | tuple):
        return ", ".join(plain(item, otherwise) for item in value)
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, float):
        return f"{value:.6g}"
    return escape(str(value)) if _PLAIN.fullmatch(str(value)) else otherwise


def safe_reason(text: str) -> str:
    """Cut a reason before the first word that may be a path or a subject."""
    found = _PATHLIKE.search(text)
    return (text[: found.start()].rstrip() + " …") if found else text or "no reason given"


def number(value: float | None, digits: int = 2) -> str:
    """Return a number with a true minus sign, or a dash."""
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")


def interval(estimate: Mapping[str, Any], *, percent: bool = False) -> str:
    """Return the interval of an estimate in brackets, or why there is none."""
    if estimate["low"] is None:
        return f"<span class=why>({escape(estimate.get('reason', 'no interval'))})</span>"
    ends = (estimate["low"], estimate["high"])
    low, high = ((f"{end:.0%}" if percent else f"{end:.2f}").replace("-", "−") for end in ends)
    return f"<span class=ci>[{low}, {high}]</span>"


def cell(estimate: Mapping[str, Any] | None) -> str:
    """Return an estimate with its interval, as the content of a table cell."""
    if not estimate:
        return "–"
    if estimate["value"] is None:
        return f"– <span class=why>({escape(estimate.get('reason', 'undefined'))})</span>"
    return f"{number(estimate['value'])} {interval(estimate)}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """Return a table of HTML cells; an empty head is left out."""
    titles = "<tr>" + "".join(f"<th>{title}</th>" for title in head) + "</tr>" if any(head) else ""
    body = "".join("<tr>" + "".join(f"<td>{content}</td>" for content in row) + "</tr>" for row in rows)
    return f'<div class=scroll><table class="{kind}">{titles}{body}</table></div>'


def section(title: str, body: str) -> str:
    """Return a section under its heading."""
    return f"<section><h2>{title}</h2>{body}</section>"


def note(text: str) -> str:
    """Return a remark in small grey type."""
    return f"<p class=note>{text}</p>"
