"""Where the experts stand while a run trains: the first choice of each routing cell, over one group of heads.

A small picture for every epoch, so that specialisation can be watched as it forms; the maps proper come after it.
"""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.colors import to_rgb
from PIL import Image, ImageDraw
from torch import Tensor

from emoe_med.brainage.maps.write import MIN_MARGIN, colours
from emoe_med.data.grid import BOX_MM
from emoe_med.data.scan import Scan, person_key
from emoe_med.training.allow_list import MIN_PERSONS

LOG = logging.getLogger("emoe_med")
_EDGE = 10  # pixels of a cell
_COLUMNS = 5  # slices in a line
_AIR, _UNCLEAR, _TEXT = (0, 0, 0), (64, 70, 78), (255, 255, 255)


def missing_heads(scans: Sequence[Scan], val: Sequence[int], train: Sequence[int]) -> tuple[list[int], float]:
    """Choose which training heads must join those of validation, which are looked at anyway, to make a group.

    Returns:
        Numbers in `scans`, one of each person, and how many persons the group is: 0 where all are too few, which is
        told and leaves the pictures out.
    """
    key = [person_key(scan.participant_id) for scan in scans]
    persons = {key[index] for index in val}
    missing = []
    for index in train:
        if len(persons) >= MIN_PERSONS:
            break
        if key[index] not in persons:
            persons.add(key[index])
            missing.append(index)
    if len(persons) < MIN_PERSONS:
        LOG.info("no picture of the experts at each epoch: %d persons, %d are needed", len(persons), MIN_PERSONS)
        return [], 0
    return missing, len(persons)


class FirstChoices:
    """How often each expert was the first choice in each cell.

    Args:
        cells: Tokens of a head, T.
        experts: E.
    """

    def __init__(self, cells: int, experts: int) -> None:
        self.counts = np.zeros((cells, experts))
        edge = (math.prod(BOX_MM) / cells) ** (1 / 3)
        shape = tuple(round(extent / edge) for extent in BOX_MM)
        # a layer whose tokens do not fill the model's box with cubes has no cells to show, one expert no choice
        self.shape = shape if math.prod(shape) == cells and experts > 1 else None

    def add(self, expert: Tensor, mask: Tensor) -> None:
        """Count a batch of heads.

        Args:
            expert: First choice of each routed token, [N]; -1 where no expert took it.
            mask: Which tokens were routed, [B, T] with N true.
        """
        cell, chosen = mask.cpu().numpy().nonzero()[1], expert.cpu().numpy()
        np.add.at(self.counts, (cell[chosen >= 0], chosen[chosen >= 0]), 1)

    def draw(self) -> bytes:
        """Draw all axial layers of cells from below, the left of the head on the left, as PNG."""
        if self.shape is None:
            raise ValueError("these tokens are no cells of the model's box")
        routed = self.counts.sum(1)
        share = np.sort(self.counts, axis=1) / np.maximum(routed, 1)[:, None]
        palette = (255 * np.array([to_rgb(colour) for colour in colours(self.counts.shape[1])])).round()
        picture = palette[self.counts.argmax(1)]
        picture[share[:, -1] - share[:, -2] < MIN_MARGIN] = _UNCLEAR
        picture[routed == 0] = _AIR
        layers = picture.reshape(*self.shape, 3).transpose(2, 1, 0, 3)[:, ::-1].astype(np.uint8)  # [Z, Y from front, X]
        height, width = (n * _EDGE for n in layers.shape[1:3])
        lines = -(-len(layers) // _COLUMNS)
        sheet = Image.new("RGB", (_COLUMNS * (width + _EDGE) + _EDGE, lines * (height + _EDGE) + 3 * _EDGE), _AIR)
        for number, layer in enumerate(layers):
            place = (_EDGE + number % _COLUMNS * (width + _EDGE), number // _COLUMNS * (height + _EDGE) + _EDGE)
            sheet.paste(Image.fromarray(layer).resize((width, height), Image.Resampling.NEAREST), place)
        self._legend(ImageDraw.Draw(sheet), palette, sheet.height - 2 * _EDGE)
        content = io.BytesIO()
        sheet.save(content, "PNG", optimize=True)
        return content.getvalue()

    def _legend(self, pen: ImageDraw.ImageDraw, palette: np.ndarray, top: int) -> None:
        pen.text((2, 2), "L", fill=_TEXT)
        for number, colour in enumerate([*palette, _UNCLEAR]):
            left = _EDGE + number * 55
            pen.rectangle((left, top, left + 12, top + 12), fill=tuple(int(part) for part in colour))
            pen.text((left + 17, top), f"E{number:02d}" if number < len(palette) else "none clear", fill=_TEXT)
