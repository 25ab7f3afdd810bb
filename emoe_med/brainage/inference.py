"""Apply a trained network: predicted ages of scans."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from emoe_med.brainage.net import BrainAgeNet
from emoe_med.config import BrainAgeConfig, load_run
from emoe_med.data.augment import phases, to_model_grid
from emoe_med.data.brain import ChainOptions
from emoe_med.data.cache import HeadDataset
from emoe_med.errors import CheckpointError, Fault, VolumeError
from emoe_med.models.heads import TrainingAges
from emoe_med.training.checkpoint import CheckpointFolder, load_model_weights


@dataclass
class TrainedModel:
    """A network with its configuration and the contract that its scans must have met."""

    net: BrainAgeNet
    config: BrainAgeConfig
    contract: dict[str, Any]

    @classmethod
    def load(cls, run_dir: Path) -> TrainedModel:
        """Load the selected checkpoint of a run folder.

        Raises:
            CheckpointError: Missing, damaged, or weights of another shape.
        """
        config = load_run(run_dir / "config.yaml")
        checkpoint = CheckpointFolder(run_dir).load(config.training.select)
        if checkpoint is None:
            raise CheckpointError(Fault("CKPT-NONE", "this run has no checkpoint", str(run_dir)))
        contract = checkpoint.state["meta"]
        net = BrainAgeNet(config.model, TrainingAges(**contract["training_ages"]))
        load_model_weights(net, checkpoint.model, checkpoint.folder)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        net = net.eval().to(device).to(memory_format=torch.channels_last_3d)  # ty: ignore[no-matching-overload]
        return cls(net, config, contract)

    def chain(self) -> ChainOptions:
        """Return the chain that made the training volumes."""
        data = self.contract["chain"]
        names = ChainOptions.__dataclass_fields__
        return ChainOptions(**{name: data[name] for name in names})

    @torch.no_grad()
    def age(self, image: Tensor, average: bool) -> float:
        """Predict the age in years from one cached volume [1, kX, kY, kZ].

        Args:
            image: Volume.
            average: Average as the run says, over mirror image and grid phases, or look at it as it is.
        """
        evaluation, oversample = self.config.evaluation, self.config.data.oversample
        device = next(self.net.parameters()).device
        image = image.to(device)
        if average and evaluation.average_phases:
            views = phases(image, oversample)
        else:
            views = to_model_grid(image[None].float(), oversample)
        views = views.to(memory_format=torch.channels_last_3d)
        low = self.config.training.precision == "bf16"
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            ages, _ = self.net.ages(views, average and evaluation.flip_average)
        return float(ages.mean())


def predict_scans(
    model: TrainedModel,
    heads: HeadDataset,
    indices: Sequence[int],
    average: bool = True,
    progress: Callable[[Sequence[int]], Iterator[int]] = iter,
) -> pd.DataFrame:
    """Predict the age of each scan; a scan that cannot be used gets a row with its reason.

    Args:
        model: Trained network.
        heads: Scans in the model's space.
        indices: Which of them, in the order of the result.
        average: Average over mirror image and grid phases, as the run says.
        progress: Wraps the indices, e.g. for a progress bar.

    Returns:
        Columns row, age, predicted_age (years), similarity, status (`ok` or `refused`) and reason.
    """
    rows = []
    for index in progress(indices):
        scan = heads.scans[index]
        row = {"row": scan.row, "age": scan.age, "predicted_age": None, "similarity": None}
        try:
            item = heads[index]
        except VolumeError as error:
            rows.append({**row, "status": "refused", "reason": _reason(error)})
            continue
        row |= {
            "predicted_age": model.age(item["image"], average),
            "similarity": float(item["similarity"]),
        }
        rows.append({**row, "status": "ok", "reason": ""})
    columns = ["row", "age", "predicted_age", "similarity", "status", "reason"]
    return pd.DataFrame(rows, columns=columns).astype({"age": float, "predicted_age": float})


def _reason(error: VolumeError) -> str:
    return "; ".join(f"{fault.code} {fault.reason}" for fault in error.faults)
