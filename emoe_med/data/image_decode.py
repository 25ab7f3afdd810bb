"""From the bytes of a picture to a square of 8-bit pixels, whatever its colour model."""

from __future__ import annotations

import io
import warnings

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from emoe_med.errors import DataError, Fault

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
MAX_PIXELS = 100_000_000  # the largest picture of ImageNet has 14 million


def decode(data: bytes, where: str, size: int, channels: int = 3) -> Tensor:
    """Decode a picture, bring its shorter edge to `size`, and cut the square from its middle.

    Args:
        data: The file.
        where: Named in a refusal.
        size: Edge S of the result.
        channels: 3 for RGB, from grey (of 16 bits too), palette and CMYK pictures; 1 for grey.

    Returns:
        [C, S, S] uint8.

    Raises:
        DataError: IMG-DECODE, no whole picture, or pixels of 32 bits, whose white nobody knows; IMG-SIZE, too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata; and the limit on pixels is our own
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise DataError(Fault("IMG-SIZE", f"is {width} x {height} pixels", where))
                # a JPEG far larger than needed is decoded at half or less, to at least twice the size
                image.draft(None, (2 * size, 2 * size))
                return to_square(_eight_bits(image).convert("RGB" if channels == 3 else "L"), size)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        reason = "is no picture" if isinstance(error, Image.UnidentifiedImageError) else f"is damaged ({error})"
        raise DataError(Fault("IMG-DECODE", reason, where, hint="copy it again, or leave it out")) from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return a picture of 16-bit grey in 8 bits; Pillow's own conversion would cut all above 255 off."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image, np.uint16) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode}: save it with 8 or 16 bits")
    return image


def to_square(image: Image.Image, size: int) -> Tensor:
    """Bring the shorter edge to `size` (bicubic, anti-aliased) and cut the middle: [C, S, S] uint8."""
    width, height = image.size
    if (width, height) != (size, size):
        edge = min(width, height)
        left, top = (width - edge) / 2, (height - edge) / 2
        image = image.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + edge, top + edge))
    pixels = torch.from_numpy(np.array(image, np.uint8))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()
