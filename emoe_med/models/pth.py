"""Tensors out of a foreign `.pth` file: loaded in a child process that may build tensors and nothing else."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from emoe_med.errors import CheckpointError, Fault

MAX_BYTES = 16 << 30
SECONDS = 600
WRAPPERS = ("model", "state_dict", "model_state_dict")  # keys that training scripts put weights under


def read_pth(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a state dict saved by torch.

    Raises:
        CheckpointError: WGT-PTH, too large, or not a plain dict of tensors (whatever it is, it is not run).
    """
    if path.stat().st_size > MAX_BYTES:
        raise CheckpointError(Fault("WGT-PTH", f"is larger than {MAX_BYTES >> 30} GiB", str(path)))
    with tempfile.TemporaryDirectory() as folder:
        safe = Path(folder, "weights.safetensors")
        command = [sys.executable, "-m", "emoe_med.models.pth", str(path.resolve()), str(safe)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        except subprocess.TimeoutExpired as error:
            raise CheckpointError(Fault("WGT-PTH", f"could not be read in {SECONDS} s", str(path))) from error
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["the child process died"])[-1]
            raise CheckpointError(Fault("WGT-PTH", f"holds no plain state dict ({reason[:200]})", str(path)))
        return load_file(safe)


def _convert(source: Path, target: Path) -> None:
    try:
        content = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # whose message may be advice on how to run it nevertheless
        kind = type(error).__name__
        raise SystemExit(f"it is none of torch's files, is damaged, or holds more than tensors: {kind}") from None
    for name in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict):
        raise SystemExit("it is no mapping of names to tensors")
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise SystemExit("it holds no tensor")
    save_file({str(name): value.detach().clone().contiguous() for name, value in tensors.items()}, target)


if __name__ == "__main__":
    _convert(Path(sys.argv[1]), Path(sys.argv[2]))
