"""Apply a trained network: predicted ages of scans."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from emoe_med.brainage.familiarity import FAR_PERCENTILE, Familiarity
from emoe_med.brainage.net import BrainAgeNet
from emoe_med.config import BrainAgeConfig, load_run
from emoe_med.data.augment import phases, to_model_grid
from emoe_med.data.brain import ChainOptions
from emoe_med.data.cache import HeadDataset
from emoe_med.data.contract import Spread, told
from emoe_med.data.prepare import odd
from emoe_med.data.sidecar import other_steps
from emoe_med.errors import CheckpointError, Fault, VolumeError
from emoe_med.models.heads import TrainingAges
from emoe_med.training.checkpoint import CheckpointFolder, load_model_weights
from emoe_med.training.loader import make_loader, read_batches
from emoe_med.training.task import Batch, MapDataset

SEEN = "the run was trained or selected on this image"


@dataclass
class TrainedModel:
    """A network with its configuration and the contract that its scans must have met.

    Attributes:
        contract: `meta` of the checkpoint.
        folder: Of the checkpoint.
        spread: Fingerprints of the training scans; None in a checkpoint that has none.
        familiarity: What the network finds usual; None before the first evaluation.
    """

    net: BrainAgeNet
    config: BrainAgeConfig
    contract: dict[str, Any]
    folder: Path | None = None
    spread: Spread | None = None
    familiarity: Familiarity | None = None

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
        return cls.of(config, checkpoint.state["meta"], checkpoint.model, checkpoint.folder)

    @classmethod
    def of(
        cls, config: BrainAgeConfig, contract: dict[str, Any], weights: Mapping[str, Tensor], folder: Path
    ) -> TrainedModel:
        """Put weights and contract together; ``folder`` is where they lie.

        Raises:
            CheckpointError: Weights of another shape.
        """
        net = BrainAgeNet(config.model, TrainingAges(**contract["training_ages"]))
        load_model_weights(net, weights, folder)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        net = net.eval().to(device).to(memory_format=torch.channels_last_3d)  # ty: ignore[no-matching-overload]
        spread = Spread.from_json(contract.get("fingerprint"))
        familiarity = Familiarity.from_json(contract.get("familiarity"))
        return cls(net, config, contract, folder, spread, familiarity)

    def chain(self) -> ChainOptions:
        """Return the chain that made the training volumes.

        Raises:
            CheckpointError: This version of the package prepares scans otherwise, whatever the options (CKPT-CHAIN).
        """
        data = self.contract["chain"]
        names = ChainOptions.__dataclass_fields__
        chain = ChainOptions(**{name: data[name] for name in names})
        if data.get("digest", chain.digest()) != chain.digest():
            reason = f"scans go through chain {chain.digest()} here, {data['digest']} in training"
            hint = "predict with the version that trained it, or train anew"
            raise CheckpointError(Fault("CKPT-CHAIN", reason, str(self.folder), hint=hint))
        return chain

    def age(self, image: Tensor, average: bool) -> float:
        """Predict the age in years from one cached volume; see `look`."""
        return self.look(image, average)[0]

    @torch.no_grad()
    def look(self, image: Tensor, average: bool) -> tuple[float, np.ndarray]:
        """Predict the age in years, and return the pooled features [F] that it was read from.

        Args:
            image: Cached volume [1, kX, kY, kZ].
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
        with pooled_features(self.net) as features, self.autocast():
            ages, _ = self.net.ages(views, average and evaluation.flip_average)
        return float(ages.mean()), torch.cat(features).mean(0).cpu().numpy()

    def autocast(self) -> torch.autocast:
        """Return the precision that the run was trained in, as a context."""
        low = self.config.training.precision == "bf16"
        return torch.autocast(next(self.net.parameters()).device.type, torch.bfloat16, enabled=low)

    def inputs(self, scans: MapDataset) -> Iterator[tuple[Batch, Tensor]]:
        """Yield collated batches of scans with the images [B, 1, X, Y, Z] that the network sees, as they are."""
        device = next(self.net.parameters()).device
        for batch in read_batches(make_loader(scans, self.config.training.batch_size, workers=0)):
            image = to_model_grid(batch["image"].to(device).float(), self.config.data.oversample)
            yield batch, image.to(memory_format=torch.channels_last_3d)

    def other_preprocessing(self, stated: str, figures: Mapping[str, float]) -> list[str]:
        """Tell what sets a scan's preprocessing apart: steps that the training scans do not state, odd figures."""
        other = other_steps(stated, list(self.contract["strip"]["stated"])) if "strip" in self.contract else ""
        return [f"preprocessing: {reason}" for reason in (other, odd(figures) if figures else "") if reason]

    def other_ages(self, ages: Mapping[str, float | None]) -> list[str]:
        """Tell which ages, by what they are, lie outside those of the training scans; unknown ones do not."""
        low, high = (self.contract["training_ages"][end] for end in ("low", "high"))
        outside = [name for name, age in ages.items() if age is not None and not low <= age <= high]
        return [f"{name} outside the training ages {low:.0f}-{high:.0f}" for name in outside]

    @cached_property
    def seen(self) -> frozenset[str]:
        """Digests of the files, and of the voxels, of the images that the run was trained or selected on."""
        return frozenset({*self.contract.get("seen", ()), *self.contract.get("seen_voxels", ())})

    def lacking(self) -> list[str]:
        """Tell which checks the checkpoint does not allow."""
        parts = []
        if self.spread is None:
            parts.append("no spread of training scans in this checkpoint: only the fit to the template is checked")
        if self.familiarity is None:
            parts.append("no features of training scans in this checkpoint: no ood_score")
        return parts

    def find_familiar(self, heads: HeadDataset, train: Sequence[int], held_out: Sequence[int]) -> None:
        """Learn what is usual from the features of training scans and of held-out persons, one scan each."""
        train_features, other = (
            np.stack([self.look(heads.entry(index)["image"], average=True)[1] for index in indices])
            for indices in (train, held_out)
        )
        self.familiarity = Familiarity.of(train_features, other)


def predict_scans(
    model: TrainedModel,
    heads: HeadDataset,
    indices: Sequence[int],
    average: bool = True,
    progress: Callable[[Sequence[int]], Iterator[int]] = iter,
    own: bool = False,
) -> pd.DataFrame:
    """Predict the age of each scan; a scan that cannot be used gets a row with its reason.

    Args:
        model: Trained network.
        heads: Scans in the model's space.
        indices: Which of them, in the order of the result.
        average: Average over mirror image and grid phases, as the run says.
        progress: Wraps the indices, e.g. for a progress bar.
        own: These are the run's own held-out scans: to refuse some would flatter the run, so they are flagged; that
            it was selected on some of them is known.

    Returns:
        Columns row, age, predicted_age (years), similarity, ood_score, ood_percentile (`Familiarity`; missing
        where the checkpoint has none), in_training (of this very image), status (`ok`; `check`: a person should
        look; `refused`: no age is given) and reason, which names the step that a scan broke.
    """
    rows = []
    for index in progress(indices):
        scan = heads.scans[index]
        row: dict[str, Any] = {"row": scan.row, "age": scan.age, "predicted_age": None, "similarity": None}
        try:
            entry = heads.entry(index)
        except VolumeError as error:
            rows.append({**row, "status": "refused", "reason": _reason(error)})
            continue
        age, features = model.look(entry["image"], average)
        row |= {"predicted_age": age, "similarity": float(entry["similarity"])}
        row["in_training"] = not model.seen.isdisjoint((entry["voxels"], entry["digest"]))
        sidecar = heads.sidecars[index]
        figures = sidecar.figures if sidecar else {}
        row |= _verdict(model, row, entry["fingerprint"].tolist(), features, heads.stated(index), figures)
        if row["in_training"] and not own:
            row["reason"] = "; ".join(filter(None, (SEEN, row["reason"])))
            row["status"] = "check" if row["status"] == "ok" else row["status"]
        if row["status"] == "refused" and own:
            row["status"] = "check"
        if row["status"] == "refused":
            row["predicted_age"] = None
        rows.append(row)
    columns = ["row", "age", "predicted_age", "similarity", "ood_score", "ood_percentile", "in_training"]
    numbers = dict.fromkeys(("age", "predicted_age", "similarity", "ood_score", "ood_percentile"), float)
    return pd.DataFrame(rows, columns=[*columns, "status", "reason"]).astype(numbers)


def _verdict(
    model: TrainedModel,
    row: dict[str, Any],
    fingerprint: Sequence[float],
    features: np.ndarray,
    stated: str,
    figures: Mapping[str, float],
) -> dict[str, Any]:
    """Judge one scan by the contract of a model: ood_score, ood_percentile, status and reason."""
    found: dict[str, Any] = {}
    reasons, refused = [], False
    if model.spread is not None:
        breaches = model.spread.breaches(fingerprint)
        refused = any(breach.refuses for breach in breaches)
        reasons += [told(breaches)] if breaches else []
    elif (lowest := model.contract["similarity"]["low"]) is not None and row["similarity"] < lowest:
        reasons.append("head fits the template worse than any training head")
    reasons += model.other_preprocessing(stated, figures)
    if model.familiarity is not None:
        score = model.familiarity.score(features[None])
        found |= {"ood_score": float(score[0]), "ood_percentile": float(model.familiarity.percentile(score)[0])}
        if not found["ood_percentile"] <= FAR_PERCENTILE:
            reasons.append(f"looks unlike the training scans to the network: percentile {found['ood_percentile']:.1f}")
    reasons += model.other_ages({"age": row["age"], "predicted age": row["predicted_age"]})
    status = "refused" if refused else "check" if reasons else "ok"
    return found | {"status": status, "reason": "; ".join(reasons)}


def _reason(error: VolumeError) -> str:
    return "; ".join(fault.in_table for fault in error.faults)


@contextmanager
def pooled_features(net: BrainAgeNet):
    """Collect the features [B, F] before the last layer of every forward pass."""
    seen: list[Tensor] = []
    handle = net.last.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(1).float()))
    try:
        yield seen
    finally:
        handle.remove()
