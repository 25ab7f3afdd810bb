"""Pictures of a run's epochs: what a task draws, and the files that MLflow's pages expect of it."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

FOLDER = "images"  # where the pages look for them
TAG = {"mlflow.loggedImages": "True"}  # and the tag that makes them look
_PREVIEW = 256  # pixels, longest edge


@dataclass(frozen=True)
class Picture:
    """What a task draws at the end of an epoch.

    Attributes:
        key: Name made like a metric's, such as `map/top_expert`.
        png: The picture.
        persons: How many are behind it; infinite where nobody is.
    """

    key: str
    png: bytes
    persons: float


def picture_files(path: Path, key: str, step: int, run_key: str, created: int, folder: Path) -> list[Path]:
    """Write a picture and its preview under the names that `MlflowClient.log_image` gives, and return them.

    That call would name the file of a repeated attempt anew, and the slider would show it twice; here the name
    follows from run, key and step.

    Args:
        path: PNG.
        key: Name of the series, such as `map/top_expert`.
        step: Optimiser step.
        run_key: Our own name of the run.
        created: When it was made, ms.
        folder: Where to write.
    """
    name = uuid.uuid5(uuid.NAMESPACE_OID, f"{run_key} {key} {step}")
    stem = f"{key.replace('/', '~')}+step+{step}+timestamp+{created}+{name}"
    full, preview = folder / f"{stem}.png", folder / f"{stem}+compressed.webp"
    full.write_bytes(path.read_bytes())
    with Image.open(path) as picture:
        small = picture.convert("RGB")
        small.thumbnail((_PREVIEW, _PREVIEW))
        small.save(preview)
    return [full, preview]
