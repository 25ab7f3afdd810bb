"""What can go wrong, told once: error classes, fault lines and exit codes.

A fault is one line that names the code, the file and row it is in, the reason and what to do about it.
Every command ends with one of the exit codes below; the table stands in docs/reliability.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

EXIT_DONE = 0
EXIT_USAGE = 2  # command line or configuration
EXIT_DATA = 3  # manifest or data refused
EXIT_CHECKPOINT = 4  # missing, damaged, or of another configuration
EXIT_DIVERGED = 5  # loss or gradient not finite
EXIT_STORAGE = 6  # full, read-only or vanished
EXIT_MEMORY = 7  # device or host memory exhausted
EXIT_PARTIAL = 8  # finished, but some rows or runs failed, or a self-test found other numbers
EXIT_SIGINT = 130
EXIT_SIGTERM = 143


@dataclass(frozen=True)
class Fault:
    """One refused thing: code such as ``VOL-CRC``, reason, and where it was found."""

    code: str
    reason: str
    file: str | None = None
    row: int | None = None  # line of the manifest, the header being line 1
    manifest: str | None = None
    hint: str | None = None

    def __str__(self) -> str:
        where = " ".join(part for part in (self.manifest, f"row {self.row}" if self.row is not None else None) if part)
        return "  ".join(part for part in (f"error {self.code}", where, self.file, self.what) if part)

    @property
    def what(self) -> str:
        """Return what is wrong and what to do about it."""
        return self.reason if self.hint is None else f"{self.reason}; {self.hint}"

    @property
    def in_table(self) -> str:
        """Return what stands in a column `reason`, whose row tells the rest."""
        return f"{self.code} {self.what}"


class EmoeError(Exception):
    """Base of all errors that a user can cause. Carries one or more faults and an exit code.

    Attributes:
        told: Another rank of this job says it; this one ends in silence.
        own: This rank met it among others; without it, rank 0 speaks for all.
    """

    exit_code = EXIT_USAGE
    told = own = False

    def __init__(self, *faults: Fault) -> None:
        self.faults: Sequence[Fault] = faults
        super().__init__("\n".join(str(fault) for fault in faults))


class ConfigError(EmoeError):
    """Command line or configuration cannot be used."""


class DataError(EmoeError):
    """Manifest or images are refused."""

    exit_code = EXIT_DATA


class VolumeError(DataError):
    """One image file is refused."""


class CheckpointError(EmoeError):
    """Checkpoint is missing, damaged, or belongs to another configuration."""

    exit_code = EXIT_CHECKPOINT


class DivergedError(EmoeError):
    """Loss or gradient became non-finite; no update was made."""

    exit_code = EXIT_DIVERGED


class StorageError(EmoeError):
    """A write failed: disk full, read-only, or folder gone."""

    exit_code = EXIT_STORAGE


class OutOfMemoryError(EmoeError):
    """Device or host memory is exhausted."""

    exit_code = EXIT_MEMORY


class PartialError(EmoeError):
    """The work was finished, but some rows or runs failed."""

    exit_code = EXIT_PARTIAL


class Interrupted(EmoeError):
    """SIGINT or SIGTERM arrived; the state was saved. ``exit_code`` is 130 or 143."""

    def __init__(self, exit_code: int, *faults: Fault) -> None:
        super().__init__(*faults)
        self.exit_code = exit_code
