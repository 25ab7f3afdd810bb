"""A run folder has one owner at a time, and is proved writable before work starts."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch

from emoe_med.errors import ConfigError, Fault
from emoe_med.storage import replace_file, storage_error

LOG = logging.getLogger("emoe_med")
PACKAGES = ("emoe-med", "torch", "monai", "numpy", "pandas", "nibabel", "nilearn", "safetensors", "mlflow")
_HELD: set[Path] = set()  # lock files of this process


@contextmanager
def claim(run_dir: Path) -> Generator[None]:
    """Own a run folder: create it, prove that it takes writes, lock it, and keep `local.log` in it.

    Raises:
        StorageError: The folder cannot be made or written.
        ConfigError: Another process owns it; the message names process, host and start.
    """
    probe(run_dir)
    with _locked(run_dir / "run.lock"):
        handler = logging.FileHandler(run_dir / "local.log", encoding="utf-8", delay=True)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        LOG.addHandler(handler)
        try:
            yield
        finally:
            LOG.removeHandler(handler)
            handler.close()


def is_claimed(run_dir: Path) -> bool:
    """Whether a process owns the run folder now; looks without touching the lock.

    Of a process of another machine nothing can be known: it counts as alive.
    """
    try:
        with (run_dir / "run.lock").open(encoding="utf-8") as file:
            owner = _owner(file)
        if owner is None or owner["host"] != socket.gethostname():
            return owner is not None
        os.kill(owner["pid"], 0)
    except PermissionError:
        return True  # somebody else's process
    except OSError:
        return False
    return True


def wait_until_free(run_dir: Path) -> None:
    """Wait for the process that owns a run folder, and say so once."""
    if not is_claimed(run_dir) or _is_stale(run_dir / "run.lock"):
        return
    LOG.warning("%s is in use: waiting; delete its run.lock if what it names is dead on another host", run_dir)
    while is_claimed(run_dir):
        time.sleep(0.2)


def _is_stale(path: Path) -> bool:
    """Whether the process that a lock file names is dead and another one of this host has its number: nobody locks."""
    if path.resolve() in _HELD:
        return False  # to open and close the file would give up the lock
    try:
        with path.open("r+", encoding="utf-8") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            owner = _owner(file)
            return owner is None or owner["host"] == socket.gethostname()
    except FileNotFoundError:
        return True
    except OSError:
        return False


def probe(folder: Path) -> None:
    """Write and remove a small file, so that a full or read-only disk shows before the first epoch.

    Raises:
        StorageError: With the folder and what the system said.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"probe\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise storage_error(error, folder, "output folder cannot be written") from error


@contextmanager
def _locked(path: Path) -> Generator[None]:
    """Hold the lock file; the kernel drops the lock of a process that died, whatever the file says.

    A record lock, because loader workers, which outlive a killed parent by seconds, do not inherit it. Such a
    lock does not bind its own process, hence `_HELD`.
    """
    if path.resolve() in _HELD:
        _refuse(path, None, "it is this process")
    file = _open_lock(path)
    _HELD.add(path.resolve())
    try:
        owner = _owner(file)
        if owner and owner["host"] != socket.gethostname():
            # a lock taken on another machine may not reach us through a network drive
            _refuse(path, owner, "delete the lock file if that run is dead")
        if owner:
            LOG.warning("took over the run folder of process %s, which is dead", owner["pid"])
        file.truncate(0)
        start = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        json.dump({"pid": os.getpid(), "host": socket.gethostname(), "start": start}, file)
        file.flush()
        yield
        with suppress(OSError):  # the folder may be gone
            path.unlink()  # while the lock is held
    finally:
        _HELD.discard(path.resolve())
        file.close()


def _open_lock(path: Path) -> TextIO:
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            with file:
                _refuse(path, _owner(file), "wait for it or choose another folder")
        # the last owner may have removed the file between our open and our lock
        if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
            return file
        file.close()


def _owner(file: TextIO) -> dict[str, Any] | None:
    file.seek(0)
    try:
        owner = json.loads(file.read())
        return {"pid": owner["pid"], "host": owner["host"], "start": owner["start"]}
    except (ValueError, KeyError, TypeError):
        return None


def _refuse(path: Path, owner: dict[str, Any] | None, hint: str) -> NoReturn:
    who = "process {pid} on {host} since {start}".format(**owner) if owner else "another process"
    raise ConfigError(Fault("RUN-LOCKED", f"run folder is in use by {who}", file=str(path), hint=hint))


def write_environment(run_dir: Path, device: torch.device, facts: Mapping[str, Any]) -> None:
    """Write `environment.json`: versions, device, commit and facts of the run; no host and no user name.

    A resumed run keeps the first file; what differs from it is logged.
    """
    path = run_dir / "environment.json"
    now = json.loads(json.dumps({**environment(device), **facts}))
    if not path.exists():
        replace_file(path, (json.dumps(now, indent=1) + "\n").encode())
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            LOG.warning("resumed under another %s: %s, was %s", name, now.get(name), before.get(name))


def environment(device: torch.device) -> dict[str, Any]:
    """Tell what numbers depend on: versions, device, threads, commit."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    on_cuda = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "device": torch.cuda.get_device_name(device) if on_cuda else "cpu",
        "cuda": torch.version.cuda if on_cuda else None,
        "threads": torch.get_num_threads(),
        "git_commit": git_commit(),
    }


def git_commit() -> str | None:
    """Return the commit of this package's source, with `+` where files were changed; None outside git."""
    here = Path(__file__).parent

    def git(*command: str) -> str:
        found = subprocess.run(
            ["git", "-C", str(here), *command], capture_output=True, text=True, timeout=10, check=True
        )
        return found.stdout.strip()

    if shutil.which("git") is None:
        return None
    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # an environment inside someone's own repository
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", "..") else "")
    except (subprocess.SubprocessError, OSError):
        return None
