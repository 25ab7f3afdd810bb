"""Records that tell when they were changed: JSON with its own SHA-256, and digests of the files that belong to it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emoe_med.errors import CheckpointError, Fault


def sealed(record: Mapping[str, Any]) -> bytes:
    """Return a record as JSON, with its own SHA-256 in it."""
    plain = json.loads(json.dumps(record, allow_nan=False))
    return json.dumps({**plain, "sha256": _record_digest(plain)}).encode()


def unsealed(path: Path) -> dict[str, Any]:
    """Read a sealed record.

    Raises:
        CheckpointError: Missing, not such a record, or changed since it was sealed.
    """
    try:
        record = json.loads(path.read_bytes())
        whole = record["sha256"] == _record_digest(record)
    except FileNotFoundError as error:
        raise damaged(path, "is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(path, f"cannot be read ({type(error).__name__})") from error
    if not whole:
        raise damaged(path, "SHA-256 differs")
    return record


def file_entry(data: bytes) -> dict[str, Any]:
    """Return what a record keeps of a file: size and SHA-256."""
    return {"size": len(data), "sha256": _digest(data)}


def read_whole(path: Path, entry: Mapping[str, Any]) -> bytes:
    """Read a file that a record describes.

    Raises:
        CheckpointError: Missing, or other bytes than those.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise damaged(path, error.strerror or "cannot be read") from error
    if len(data) != entry["size"]:
        raise damaged(path, f"has {len(data)} bytes instead of {entry['size']}")
    if _digest(data) != entry["sha256"]:
        raise damaged(path, "SHA-256 differs")
    return data


def damaged(path: Path, reason: str) -> CheckpointError:
    """Return the refusal of a file whose content cannot be relied on."""
    return CheckpointError(Fault("CKPT-DAMAGED", reason, file=str(path)))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _record_digest(record: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in record.items() if name != "sha256"}
    return _digest(json.dumps(rest, sort_keys=True).encode())
