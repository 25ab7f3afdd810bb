"""Files written whole or not at all, and kept through a crash."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from emoe_med.errors import Fault, StorageError


def storage_error(error: OSError, path: Path, what: str) -> StorageError:
    """Tell what could not be written, where, and what the system said."""
    return StorageError(Fault("STORE-WRITE", f"{what}: {error.strerror or error}", file=str(path)))


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the names in a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file in one step: a reader sees the old or the new content, also after a crash.

    Raises:
        StorageError: The disk is full, read-only or gone; an earlier file stays as it was.
    """
    aside = path.with_name(f".tmp-{os.getpid()}-{secrets.token_hex(4)}")  # a longer name might not fit
    try:
        write_synced(aside, content)
        aside.replace(path)
    except OSError as error:
        raise storage_error(error, path, "cannot be written") from error
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
    with suppress(OSError):  # the file is in place; some network drives cannot sync a folder
        sync_folder(path.parent)
