"""The expert x class heat map as one self-contained page: choose layer and quantity, read any cell by mouse or keys."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from matplotlib import colormaps

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Experts and classes</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 1.2rem; color: #222; max-width: 1500px }}
label {{ margin-right: 1.2rem; white-space: nowrap }} select {{ font: inherit }}
#scroll {{ overflow-x: auto; margin: .8rem 0 }}
canvas {{ display: block; image-rendering: pixelated; outline-offset: 3px }}
#cell {{ min-height: 1.5em; font-variant-numeric: tabular-nums }}
#scale {{ display: inline-block; width: 160px; height: 12px; vertical-align: middle }}
table {{ border-collapse: collapse; margin-top: 1rem }} td, th {{ padding: .15rem .7rem; text-align: right }}
th:first-child, td:first-child {{ text-align: left }} small {{ color: #5b6875 }}
</style>
<h1>Which expert serves which class</h1>
<p>{title}. Counted on the test images, in evaluation mode; no expert was ever told a class.</p>
<p>
<label>layer <select id="layer"></select></label>
<label>quantity <select id="quantity">
<option value="patches">patches of an image</option>
<option value="given_class">p(expert | class)</option>
<option value="given_expert">p(class | expert)</option></select></label>
<label>classes <select id="order"><option value="name">as listed</option>
<option value="expert">by their main expert</option></select></label>
<span style="white-space: nowrap">0 <canvas id="scale" width="256" height="1"></canvas> <span id="most"></span></span>
</p>
<div id="scroll"><canvas id="map" tabindex="0" role="img"
 aria-label="heat map of experts by classes; arrow keys move over its cells"></canvas></div>
<p id="cell" aria-live="polite">Point at a cell, or focus the map and use the arrow keys.</p>
<table id="figures"><thead><tr><th>layer</th><th>NMI of expert and class</th><th>entropy of p(expert | class)</th>
<th>load CV</th></tr></thead><tbody></tbody></table>
<p><small>NMI: 0 knows nothing of the class, 1 names it. Entropy is over ln of the number of experts: 1 where every
class uses all experts alike. Load CV: 0 where all experts serve as many patches. The figures of the mean are
those of the layers, averaged. Its map joins experts of different layers, which have nothing but their number in
common: it looks more even than any layer.</small></p>
<script>
const DATA = {data};
const byId = (id) => document.getElementById(id);
const map = byId("map"), pen = map.getContext("2d");
const TOP = 14 + 7.5 * Math.min(15, Math.max(...DATA.classes.map((name) => name.length))), LEFT = 46;
let at = null;

for (const name of Object.keys(DATA.maps)) byId("layer").add(new Option(name, name));
for (const [name, f] of Object.entries(DATA.figures)) {{
  const row = byId("figures").tBodies[0].insertRow();
  for (const text of [name, f.nmi.toFixed(3), f.entropy_given_class.toFixed(3), f.load_cv.toFixed(2)])
    row.insertCell().textContent = text;
}}
const bar = byId("scale").getContext("2d");
DATA.colours.forEach((colour, i) => {{ bar.fillStyle = colour; bar.fillRect(i, 0, 1, 1); }});

function values() {{
  const patches = DATA.maps[byId("layer").value], quantity = byId("quantity").value;
  if (quantity === "patches") return patches;
  const ofClass = DATA.classes.map((_, c) => patches.reduce((sum, row) => sum + row[c], 0));
  return patches.map((row) => {{
    const ofExpert = row.reduce((a, b) => a + b, 0);
    return row.map((v, c) => v / ((quantity === "given_class" ? ofClass[c] : ofExpert) || 1));
  }});
}}

function order() {{
  const patches = DATA.maps[byId("layer").value], all = DATA.classes.map((_, c) => c);
  if (byId("order").value === "name") return all;
  const main = all.map((c) => patches.reduce((best, row, e) => (row[c] > patches[best][c] ? e : best), 0));
  return all.sort((a, b) => main[a] - main[b] || patches[main[b]][b] - patches[main[a]][a]);
}}

function draw() {{
  const found = values(), columns = order(), experts = found.length;
  const width = Math.max(3, Math.min(40, Math.floor((map.parentNode.clientWidth - LEFT) / columns.length)));
  const most = Math.max(...found.map((row) => Math.max(...row))) || 1, height = 26;
  map.width = LEFT + columns.length * width;
  map.height = TOP + experts * height;
  pen.font = "13px system-ui, sans-serif";
  found.forEach((row, e) => {{
    pen.fillStyle = "#222";
    pen.fillText("E" + String(e).padStart(2, "0"), 4, TOP + e * height + 18);
    columns.forEach((c, i) => {{
      pen.fillStyle = DATA.colours[Math.round((255 * row[c]) / most)];
      pen.fillRect(LEFT + i * width, TOP + e * height, width, height);
    }});
  }});
  if (width >= 13) columns.forEach((c, i) => {{
    pen.save();
    pen.translate(LEFT + i * width + width / 2 + 4, TOP - 6);
    pen.rotate(-Math.PI / 2);
    pen.fillStyle = "#222";
    pen.fillText(DATA.classes[c].slice(0, 15), 0, 0);
    pen.restore();
  }});
  byId("most").textContent = most.toPrecision(3);
  if (at) {{
    const [e, i] = at;
    pen.strokeStyle = "#e4572e";
    pen.lineWidth = 2;
    pen.strokeRect(LEFT + i * width + 1, TOP + e * height + 1, width - 2, height - 2);
    const c = columns[i], name = byId("quantity").selectedOptions[0].text, expert = String(e).padStart(2, "0");
    byId("cell").textContent = `E${{expert}}, class ${{DATA.classes[c]}}: ${{found[e][c].toPrecision(3)}} (${{name}})`;
  }}
  map.dataset.cell = width + "," + height;
}}

function move(e, i) {{
  const experts = DATA.maps[byId("layer").value].length;
  at = [Math.min(experts - 1, Math.max(0, e)), Math.min(DATA.classes.length - 1, Math.max(0, i))];
  draw();
}}

map.addEventListener("mousemove", (event) => {{
  const [width, height] = map.dataset.cell.split(",").map(Number);
  if (event.offsetX >= LEFT && event.offsetY >= TOP)
    move(Math.floor((event.offsetY - TOP) / height), Math.floor((event.offsetX - LEFT) / width));
}});
map.addEventListener("keydown", (event) => {{
  const step = {{ ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }}[event.key];
  if (!step) return;
  event.preventDefault();
  move(at ? at[0] + step[0] : 0, at ? at[1] + step[1] : 0);
}});
for (const id of ["layer", "quantity", "order"]) byId(id).addEventListener("change", draw);
addEventListener("resize", draw);
byId("layer").value = Object.keys(DATA.maps).at(-2);  // the last layer; the mean stands behind it
draw();
</script>
</html>
"""


def heatmap_page(
    title: str, maps: Mapping[str, np.ndarray], classes: Sequence[str], figures: Mapping[str, Mapping[str, float]]
) -> str:
    """Return the page.

    Args:
        title: What was trained on what.
        maps: Mean patches of an image [E, C] by layer; one is called `mean`.
        classes: C names.
        figures: nmi, entropy_given_class and load_cv by layer.
    """
    colours = [f"rgb({r},{g},{b})" for r, g, b, _ in colormaps["viridis"](np.arange(256), bytes=True)]
    data = {
        "maps": {name: np.round(counts, 4).tolist() for name, counts in maps.items()},
        "classes": list(classes),
        "figures": figures,
        "colours": colours,
    }
    # a name of a class must not end the script
    return _PAGE.format(title=escape(title), data=json.dumps(data).replace("<", "\\u003c"))
