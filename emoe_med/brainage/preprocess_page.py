"""Pictures for quality control: one per scan, and one page on which 200 of them can be skimmed."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from scipy import ndimage

from emoe_med.data.grid import resample, template
from emoe_med.data.prepare import Prepared

TILE = 176  # pixels
_RED, _CYAN = (255, 70, 60), (40, 220, 230)
_THUMBNAIL = 420  # pixels wide on the page
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Preprocessing: quality control</title><style>
body {{ font: 14px/1.4 system-ui, sans-serif; color: #1c2733; margin: 1rem auto; max-width: 1400px; padding: 0 1rem }}
.scans {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: .8rem }}
figure {{ margin: 0; border: 1px solid #d5dce3; border-top: 4px solid #3a9d5d; padding: .4rem }}
figure.check {{ border-top-color: #d99000 }} figure.failed {{ border-top-color: #c0392b }}
img {{ width: 100%; display: block; background: #000 }}
figcaption {{ overflow-wrap: anywhere; font-variant-numeric: tabular-nums }}
.why {{ color: #a33 }} small {{ color: #5b6875 }}
table {{ border-collapse: collapse }} td {{ padding: .1rem 1rem .1rem 0; vertical-align: top }}
</style></head><body>
<h1>Preprocessing: {counts}</h1>
<p>Upper row: the head as read; the red line is its brain mask, and should follow the brain's surface. Lower row: the
result; the cyan line is the brain of the template, and both should have one shape and one place. Failed scans come
first, then those to look at, each from the lowest similarity with the template.</p>
<details><summary>Steps and scale of the figures</summary><table>{steps}</table></details>
<div class="scans">{scans}</div></body></html>
"""


def picture(prepared: Prepared) -> bytes:
    """Draw the head with its mask and the result with the template's outline, three cuts each, as PNG."""
    head = prepared.head.voxels
    top = np.percentile(head[prepared.native_mask], 99.5)
    zooms = np.linalg.norm(prepared.head.affine[:3, :3], axis=0)
    where = np.rint(ndimage.center_of_mass(prepared.native_mask)).astype(int)
    upper = list(_cuts(head / max(top, 1e-6), prepared.native_mask, where, zooms, _RED))
    box_zooms = np.linalg.norm(prepared.affine[:3, :3], axis=0)
    fixed, fixed_affine = template(2.0)
    outline = resample(fixed, fixed_affine, np.eye(4), prepared.affine, prepared.voxels.shape) > 0.1
    where = np.rint(ndimage.center_of_mass(outline)).astype(int)
    lower = list(_cuts(prepared.voxels / 1600, outline, where, box_zooms, _CYAN))
    sheet = np.vstack([np.hstack(upper), np.hstack(lower)])
    content = io.BytesIO()
    Image.fromarray(sheet).save(content, "PNG", optimize=True)
    return content.getvalue()


def _cuts(
    voxels: np.ndarray, mask: np.ndarray, where: np.ndarray, zooms: np.ndarray, colour: tuple[int, int, int]
) -> Iterator[np.ndarray]:
    """Yield a sagittal, a coronal and an axial cut [TILE, TILE, 3]; left is left, front (or top) is up."""
    for axis in range(3):
        across, up = [a for a in range(3) if a != axis]
        plane, edge = np.take(voxels, where[axis], axis), np.take(mask, where[axis], axis)
        size = [plane.shape[i] * zooms[a] for i, a in enumerate((across, up))]
        scale = TILE / max(size)
        shape = [max(1, round(s * scale)) for s in size]
        grey = np.asarray(Image.fromarray(_bytes(plane)).resize(shape[::-1], Image.Resampling.BILINEAR))
        inside = np.asarray(Image.fromarray(edge.astype(np.uint8) * 255).resize(shape[::-1], Image.Resampling.BILINEAR))
        inside = inside > 127
        rgb = np.repeat(grey[..., None], 3, axis=-1)
        rgb[inside & ~ndimage.binary_erosion(inside)] = colour
        tile = np.zeros((TILE, TILE, 3), np.uint8)
        left, low = (TILE - shape[0]) // 2, (TILE - shape[1]) // 2
        tile[left : left + shape[0], low : low + shape[1]] = rgb
        yield np.ascontiguousarray(tile.transpose(1, 0, 2)[::-1])


def _bytes(plane: np.ndarray) -> np.ndarray:
    return (np.clip(plane, 0, 1) * 255).astype(np.uint8)


def page(table: pd.DataFrame, pictures: Sequence[Path | None], steps: Mapping[str, Any]) -> bytes:
    """Lay out one self-contained page.

    Args:
        table: qc.tsv: row, participant_id, session_id, status, reason, and figures.
        pictures: PNG of each row, None where a scan failed.
        steps: What all scans went through.
    """
    rank = table["status"].map({"failed": 0, "check": 1, "ok": 2})
    order = table.assign(rank=rank).reset_index().sort_values(["rank", "similarity", "row"], kind="stable")["index"]
    rows = table.to_dict("records")
    counts = ", ".join(f"{n} {status}" for status, n in table["status"].value_counts().items())
    lines = "".join(f"<tr><td>{escape(str(k))}</td><td>{escape(str(v))}</td></tr>" for k, v in steps.items())
    scans = "\n".join(_figure(rows[i], pictures[i]) for i in order)
    return _PAGE.format(counts=escape(counts), steps=lines, scans=scans).encode()


def _figure(row: dict[str, Any], file: Path | None) -> str:
    name = " ".join(str(row[key]) for key in ("participant_id", "session_id") if row[key])
    image = f'<img loading="lazy" alt="cuts of row {row["row"]}" src="{_thumbnail(file)}">' if file else ""
    why = f'<div class="why">{escape(row["reason"])}</div>' if row["reason"] else ""
    figures = (
        f"similarity {row['similarity']:.3f}, brain {row['brain_ml']:.0f} ml, scale {row['scale_x']:.2f} "
        f"{row['scale_y']:.2f} {row['scale_z']:.2f}, field {row['field_range']:.2f}, SNR {row['snr']:.0f}"
        if file
        else ""
    )
    caption = f"<b>{escape(row['status'])}</b> row {row['row']} {escape(name)}{why}<br><small>{figures}</small>"
    return f'<figure class="{row["status"]}">{image}<figcaption>{caption}</figcaption></figure>'


def _thumbnail(file: Path) -> str:
    with Image.open(file) as sheet:
        height = round(sheet.height * _THUMBNAIL / sheet.width)
        small = sheet.convert("RGB").resize((_THUMBNAIL, height), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    small.save(content, "JPEG", quality=72)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()
