"""Checkpoints that are whole or not there: safetensors and JSON, digests, and a rename as the last word.

checkpoints/
  step-00001200/model.safetensors    the weights that predict (their moving average, where there is one)
                optim.safetensors    `<parameter>/<slot>`, and `<name>/online` beside a moving average
                state.json           position, history, random state, digests, size and SHA-256 of both
  best, last                         pointer files that hold a folder's name, replaced last
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from emoe_med.errors import CheckpointError
from emoe_med.models.state import check_tensors
from emoe_med.storage import replace_file, storage_error, sync_folder, write_synced
from emoe_med.training.seal import damaged, file_entry, read_whole, sealed, unsealed

LOG = logging.getLogger("emoe_med")
Which = Literal["best", "last"]
Tensors = Mapping[str, Tensor]
FORMAT = 1
MODEL_FILE, OPTIM_FILE = "model.safetensors", "optim.safetensors"
KEEP_LAST = 2
SPACE_FACTOR = 1.2  # free space asked for before writing, over the size of the checkpoint


@dataclass(frozen=True)
class Checkpoint:
    """What one checkpoint folder holds, verified against its digests."""

    folder: Path
    model: dict[str, Tensor]
    optim: dict[str, Tensor]
    state: dict[str, Any]


class CheckpointFolder:
    """Write, find and prune the checkpoints of one run."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "checkpoints"

    def pointed(self, which: Which) -> Path | None:
        """Return the folder that a pointer names; None where there is no such pointer."""
        try:
            name = (self.path / which).read_bytes().decode("ascii", "replace").strip()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise damaged(self.path / which, error.strerror or "cannot be read") from error
        if re.fullmatch(r"step-\d{8}", name) is None:
            raise damaged(self.path / which, "does not name a checkpoint")
        return self.path / name

    def find(self, which: Which) -> Path | None:
        """Return the folder that a pointer names; without a `best`, the last; without that, the newest that is whole.

        There is no best where no validation was ever a number. A run killed while its very first checkpoint got its
        name has a folder and no pointer.
        """
        folder = self.pointed(which)
        if folder is None and which == "best":
            LOG.warning("no best checkpoint is kept in %s: the last weights are used", self.path)
            folder = self.pointed("last")
        return self._newest_whole() if folder is None else folder

    def tidy(self, last: Path | None = None, best_step: int | None = None) -> None:
        """Remove temporary folders; on resume from `last` also later steps, and set both pointers right."""
        for path in self.path.iterdir() if self.path.is_dir() else ():
            if path.name.startswith(".tmp-"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            elif last is not None and path.name.startswith("step-") and path.name > last.name:
                shutil.rmtree(path)
        if last is not None:
            self._point("last", last.name)
            if best_step is not None and (self.path / _name(best_step)).is_dir():
                self._point("best", _name(best_step))
            else:
                (self.path / "best").unlink(missing_ok=True)

    def _point(self, which: Which, name: str) -> None:
        replace_file(self.path / which, f"{name}\n".encode())

    def save(self, model: Tensors, optim: Tensors, state: Mapping[str, Any], best: bool) -> Path:
        """Write one checkpoint, verify it by reading it back, and let the pointers name it.

        Args:
            model: Weights and buffers by name.
            optim: Optimiser tensors by name.
            state: JSON-able; has an int `step`.
            best: Whether `best` shall name it too.

        Raises:
            StorageError: Too little space, or a write failed. Older checkpoints are as they were.
        """
        target = self.path / _name(state["step"])
        temporary = self.path / f".tmp-{os.getpid()}"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)  # of a killed process that had our number
            self._write(temporary, model, optim, state)
            self._rename(temporary, target)
            if best:
                self._point("best", target.name)
            self._point("last", target.name)
            self._prune()
        except OSError as error:
            raise storage_error(error, self.path, "checkpoint could not be written") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return target

    def _write(self, folder: Path, model: Tensors, optim: Tensors, state: Mapping[str, Any]) -> None:
        contents = {MODEL_FILE: serialise(model), OPTIM_FILE: serialise(optim)}
        size = sum(map(len, contents.values()))
        free = shutil.disk_usage(self.path).free
        if free < SPACE_FACTOR * size:
            reason = f"{SPACE_FACTOR * size / 2**20:.1f} MiB needed, {free / 2**20:.1f} MiB free"
            raise OSError(errno.ENOSPC, reason)
        folder.mkdir()
        files = {name: file_entry(data) for name, data in contents.items()}
        for name, data in contents.items():
            write_synced(folder / name, data)
        write_synced(folder / "state.json", sealed({**state, "format": FORMAT, "files": files}))
        sync_folder(folder)
        try:
            _verify(folder)
        except CheckpointError as error:
            raise OSError(errno.EIO, f"read back differently: {error.faults[0].reason}") from error

    def _rename(self, temporary: Path, target: Path) -> None:
        if target.exists() and _same_tensors(temporary, target):
            # saved before and after validation: the tensors are in place, the position alone is replaced
            os.replace(temporary / "state.json", target / "state.json")
            sync_folder(target)
        else:
            if target.exists():  # damaged: were it whole, it would hold these very tensors
                shutil.rmtree(target)
            os.rename(temporary, target)
            sync_folder(self.path)

    def _prune(self) -> None:
        kept = {folder.name for which in ("best", "last") if (folder := self.pointed(which))}
        steps = sorted(folder.name for folder in self.path.glob("step-*"))
        for name in set(steps) - kept - set(steps[-KEEP_LAST:]):
            shutil.rmtree(self.path / name)

    def load(self, which: Which) -> Checkpoint | None:
        """Load the checkpoint that a pointer names; None where there is none.

        Raises:
            CheckpointError: Damaged; the hint names another one that is whole.
        """
        folder = self.find(which)
        if folder is None:
            return None
        try:
            return load_checkpoint(folder)
        except CheckpointError as error:
            other = self._newest_whole()
            if other is None:
                raise
            hint = f"{other.name} is whole: write its name into the file `{which}` to go on from there"
            raise CheckpointError(replace(error.faults[0], hint=hint)) from error

    def _newest_whole(self) -> Path | None:
        for folder in sorted(self.path.glob("step-*"), reverse=True):
            with suppress(CheckpointError):
                _verify(folder)
                return folder
        return None


def load_checkpoint(folder: Path) -> Checkpoint:
    """Load one checkpoint folder, every byte checked against `state.json`.

    Raises:
        CheckpointError: A file is missing, cut, changed or of another step.
    """
    state, tensors = _load(folder, MODEL_FILE, OPTIM_FILE)
    return Checkpoint(folder, tensors[MODEL_FILE], tensors[OPTIM_FILE], state)


def load_model_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load the weights of a checkpoint folder and its state (`meta` is the preprocessing contract).

    Raises:
        CheckpointError: A file is missing, cut, changed or of another step.
    """
    state, tensors = _load(folder, MODEL_FILE)
    return tensors[MODEL_FILE], state


def load_model_weights(model: nn.Module, weights: Tensors, folder: Path) -> None:
    """Load weights into a model, names and shapes checked first."""
    check_tensors(weights, {name: t.shape for name, t in model.state_dict().items()}, folder)
    model.load_state_dict(dict(weights))


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _load(folder: Path, *names: str) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    state, contents = _verify(folder, *names)
    return state, {name: parse(folder / name, data) for name, data in contents.items()}


def parse(path: Path, data: bytes) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file by name, from its bytes.

    Raises:
        CheckpointError: Not such a file.
    """
    try:
        return parse_safetensors(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise damaged(path, f"not a safetensors file ({error})") from error


def serialise(tensors: Tensors) -> bytes:
    """Return tensors by name as the bytes of a safetensors file."""
    # clones: safetensors refuses tied weights, and the model goes on changing
    copies = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    return to_safetensors(copies)


def _verify(folder: Path, *names: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Read the state and the named tensor files (all, if none is named), every byte checked."""
    state = unsealed(folder / "state.json")
    try:
        files, step_name = dict(state["files"]), _name(state["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(folder / "state.json", f"cannot be read ({type(error).__name__})") from error
    if state["format"] != FORMAT or set(files) != {MODEL_FILE, OPTIM_FILE}:
        raise damaged(folder / "state.json", f"format {state['format']} is unknown to this version")
    if not folder.name.startswith(".tmp-") and folder.name != step_name:
        raise damaged(folder / "state.json", f"belongs to {step_name}")
    return state, {name: read_whole(folder / name, files[name]) for name in names or files}


def _same_tensors(one: Path, other: Path) -> bool:
    with suppress(CheckpointError):
        return _verify(one)[0]["files"] == _verify(other)[0]["files"]
    return False
