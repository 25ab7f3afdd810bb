"""A trained run as a MONAI bundle, as `export` writes it: what is in it, how it is read, how MONAI runs it.

<bundle>/
  configs/metadata.json       MONAI's description
          inference.json      what `python -m monai.bundle run` executes: `run` below
          contract.json       configuration, contract, interval and age bias of the run, expected self-test figures,
                              size and SHA-256 of the files below; sealed by its own
  models/model.safetensors    weights
  selftest/                   a drawn head with its mask, and what the exporting machine made of it
  docs/README.md  LICENSE     model card; it is for its author to complete, so no digest binds it

The network, the reader and the chain are those of the installed package. Nothing is pickled.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import typer
from pydantic import ValidationError
from torch import Tensor, nn

from emoe_med.brainage.bias import AgeBias
from emoe_med.brainage.conformal import Interval
from emoe_med.brainage.inference import TrainedModel
from emoe_med.brainage.predict import Predictor, finish, predict
from emoe_med.config import BrainAgeConfig
from emoe_med.errors import CheckpointError, Fault
from emoe_med.training.checkpoint import parse
from emoe_med.training.cli import verb
from emoe_med.training.seal import damaged, read_whole, unsealed

FORMAT = 1
METADATA, INFERENCE, CONTRACT = "configs/metadata.json", "configs/inference.json", "configs/contract.json"
WEIGHTS, CARD, LICENCE = "models/model.safetensors", "docs/README.md", "LICENSE"
HEAD, MASK, VECTORS = "selftest/head_T1w.nii.gz", "selftest/head_mask.nii.gz", "selftest/vectors.safetensors"
BOUND = (WEIGHTS, HEAD, MASK, VECTORS)  # by digests in the contract


@dataclass(frozen=True)
class Bundle:
    """A bundle, read and verified.

    Attributes:
        record: Content of configs/contract.json.
        vectors: What the exporting machine made of the drawn head; see `selftest.py`.
    """

    folder: Path
    record: dict[str, Any]
    predictor: Predictor
    vectors: dict[str, Tensor]


def load_bundle(folder: Path) -> Bundle:
    """Read a bundle, every byte that predictions depend on checked.

    Raises:
        CheckpointError: A file is missing or changed, or this version of the package prepares scans otherwise.
    """
    record = unsealed(folder / CONTRACT)
    if record.get("format") != FORMAT or set(record.get("files", ())) != set(BOUND):
        raise damaged(folder / CONTRACT, f"format {record.get('format')} is unknown to this version")
    contents = {name: read_whole(folder / name, record["files"][name]) for name in BOUND}
    try:
        config = BrainAgeConfig.model_validate(record["config"])
    except ValidationError as error:
        raise _other_version(folder, record, f"{error.error_count()} unknown settings of the run") from error
    weights = parse(folder / WEIGHTS, contents[WEIGHTS])
    model = TrainedModel.of(config, record["meta"], weights, folder / WEIGHTS)
    try:
        model.chain()
    except CheckpointError as error:
        raise _other_version(folder, record, error.faults[0].reason) from error
    bias = AgeBias(**record["bias"]) if record["bias"] else None
    interval = Interval(**record["interval"]) if record["interval"] else None
    return Bundle(folder, record, Predictor(model, bias, interval), parse(folder / VECTORS, contents[VECTORS]))


def _other_version(folder: Path, record: dict[str, Any], reason: str) -> CheckpointError:
    wanted = record["environment"]["versions"]["emoe-med"]
    commit = record["environment"]["git_commit"]
    hint = f"it was exported by emoe-med {wanted}" + (f", commit {commit}" if commit else "")
    return CheckpointError(Fault("BUN-VERSION", reason, str(folder), hint=hint))


class AgeNetwork(nn.Module):
    """The network of a bundle on its own: images on the model's grid to ages; `network_def` of the bundle.

    `predict` also averages over the views that the run asks for, and judges the scan.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.net = load_bundle(Path(folder)).predictor.model.net

    def forward(self, image: Tensor) -> Tensor:
        """Map images [B, 1, X, Y, Z] to ages [B, 1] in years, float32."""
        return self.net.ages(image)[0].float()[:, None]


def run(bundle_root: str, input: str, output: str, data_root: str | None = None, cache: str | None = None) -> None:
    """Do for a bundle what the verb `predict` does for a run: the same rows, verdicts and exit codes.

    Args:
        bundle_root: Folder of the bundle.
        input: Scan, folder of scans, or manifest.
        output: CSV to write.
        data_root: Folder of the manifest's paths.
        cache: Folder that keeps volumes in the model's space; without, they go when it ends.

    Raises:
        SystemExit: One line for each fault is on stderr; the code is the documented one.
    """

    @verb
    def work() -> None:
        predictor = load_bundle(Path(bundle_root)).predictor
        with TemporaryDirectory() as temporary:
            # MONAI's command line reads 7 as a number
            source, target, kept = (Path(str(path)) for path in (input, output, cache or temporary))
            table = predict(predictor, source, target, kept, None if data_root is None else Path(str(data_root)))
        finish(table, target)

    try:
        work()
    except typer.Exit as end:  # to MONAI an error of the configuration, which it would wrap and trace back
        raise SystemExit(end.exit_code) from None
