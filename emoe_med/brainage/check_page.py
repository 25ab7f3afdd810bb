"""A page of thumbnails that a person can skim: faulty scans first, three slices each, the mask outlined.

It shows single heads, so it is for the person who asked alone: nothing here is tracked or sent.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from html import escape

import numpy as np
import pandas as pd
from matplotlib.image import imsave
from scipy import ndimage

from emoe_med.data.volume import Volume

TILE = 104  # pixels, edge of one slice
OUTLINE = (255, 140, 0)
ORDER = ("refused", "check", "note", "ok")

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Scans</title>
<style>
body {{ font: 14px/1.4 system-ui, sans-serif; margin: 1.5rem; color: #222 }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: .8rem }}
figure {{ margin: 0; padding: .5rem; border: 2px solid #ddd; border-radius: 6px }}
figure.refused {{ border-color: #c0392b }} figure.check {{ border-color: #e67e22 }}
figure.note {{ border-color: #b0a000 }}
img {{ width: 100%; background: #000; image-rendering: auto }}
figcaption {{ font-size: .92em; overflow-wrap: anywhere }} small {{ color: #5b6875; display: block }}
</style>
<h1>{title}</h1>
<p>A row is a line of the manifest, its header being line 1. Slices: left-right, back-front, bottom-top through the
middle of the mask, which is outlined. Not for sharing: single heads can be recognised.</p>
<main>
{cards}
</main>
</html>
"""


def thumbnail(volume: Volume, mask: np.ndarray | None) -> bytes:
    """Draw three slices of a scan through the middle of its mask, else of its signal, as one JPEG.

    Args:
        volume: The scan, RAS.
        mask: [X, Y, Z] true inside, on the same grid; outlined.
    """
    voxels = volume.voxels
    low, high = np.percentile(voxels[::2, ::2, ::2], (1, 99.5))
    shown = np.clip((voxels - low) / max(float(high - low), 1e-9), 0, 1)
    seen = shown > 0.2 if mask is None or not mask.any() else mask
    centre = np.argwhere(seen).mean(0) if seen.any() else np.asarray(voxels.shape) / 2
    edges = np.linalg.norm(volume.affine[:3, :3], axis=0)
    scale = TILE / (edges * voxels.shape).max()  # pixels per mm
    tiles = []
    for axis, middle in enumerate(
        centre.round().astype(int) if np.isfinite(centre).all() else np.array(voxels.shape) // 2
    ):
        zoom = scale * np.delete(edges, axis)
        grey = np.rint(255 * ndimage.zoom(shown.take(middle, axis), zoom, order=1)).clip(0, 255)
        tile = np.repeat(grey[..., None], 3, axis=2)
        if mask is not None:
            inside = ndimage.zoom(mask.take(middle, axis).astype(np.uint8), zoom, order=0) > 0
            tile[inside & ~ndimage.binary_erosion(inside)] = OUTLINE
        tile = tile.transpose(1, 0, 2)[::-1]  # up is up
        pad = [((TILE - n) // 2, TILE - n - (TILE - n) // 2) for n in tile.shape[:2]]
        tiles.append(np.pad(tile[:TILE, :TILE], [*(tuple(max(p, 0) for p in side) for side in pad), (0, 0)]))
    picture = io.BytesIO()
    imsave(picture, np.hstack(tiles).astype(np.uint8), format="jpg", pil_kwargs={"quality": 70})
    return picture.getvalue()


def scans_page(table: pd.DataFrame, thumbnails: Mapping[str, bytes], figures: Mapping[str, str]) -> str:
    """Lay the scans out as one self-contained page, faulty ones first.

    Args:
        table: Columns row, status, code, reason, shape, spacing_mm (text), one line a row.
        thumbnails: JPEG by row; a row without one is told in words.
        figures: What was measured, by row, as text.
    """
    place = table["status"].map({status: index for index, status in enumerate(ORDER)})
    ordered = table.assign(place=place).sort_values("place", kind="stable")
    counts = table["status"].value_counts()
    title = f"{len(table)} scans: " + ", ".join(f"{counts[status]} {status}" for status in ORDER if status in counts)
    cards = [_card(line, thumbnails.get(line["row"]), figures.get(line["row"], "")) for _, line in ordered.iterrows()]
    return _PAGE.format(title=escape(title), cards="\n".join(cards))


def _card(line: pd.Series, picture: bytes | None, figures: str) -> str:
    image = ""
    if picture is not None:
        data = base64.b64encode(picture).decode()
        image = (
            f'<img alt="three slices of row {escape(line["row"])}" loading="lazy" src="data:image/jpeg;base64,{data}">'
        )
    grid = f"{line['shape']} voxels of {line['spacing_mm']} mm" if line["shape"] else ""
    why = " ".join(part for part in (line["code"], line["reason"]) if part)
    told = "".join(f"<small>{escape(text)}</small>" for text in (grid, figures) if text)
    head = f"<b>row {escape(line['row'])}: {escape(line['status'])}</b> {escape(why)}"
    return f'<figure class="{escape(line["status"])}">{image}<figcaption>{head}{told}</figcaption></figure>'
