"""A small task with everything that makes resuming hard: dropout, BatchNorm, augmentation, a routed layer.

Run as a program it trains in a folder, for tests that kill or signal it: `toy_task.py FOLDER [name=value ...]`.
"""

import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from emoe_med.errors import EmoeError
from emoe_med.training.loop import fit
from emoe_med.training.tracking import Tracker


@dataclass(frozen=True)
class ToyOptions:
    epochs: int = 3
    batch_size: int = 4
    accumulate: int = 1
    lr: float = 0.01
    weight_decay: float = 0.05
    schedule: str = "cosine"
    warmup_share: float = 0.1
    final_lr_share: float = 0.0
    clip_norm: float = 1.0
    ema_decay: float | None = 0.9
    precision: str = "fp32"
    channels_last: bool = False
    deterministic: bool = True
    threads: int | None = 1
    workers: int = 0
    checkpoint_minutes: float = 60.0
    skip_nonfinite: int = 0
    select: str = "best"
    seed: int = 7


class Experts(nn.Module):
    """Two stacked linear experts; the sign of the first feature chooses, so that one may stay idle."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, width, width) * 0.1)
        self.frame = nn.Parameter(torch.linalg.qr(torch.randn(width, width)).Q)
        self.register_buffer("load", torch.zeros(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x @ self.frame
        expert = (x[:, 0] > 0).long()
        if self.training:
            with torch.no_grad():
                self.load += torch.bincount(expert, minlength=2)
        both = torch.einsum("nd,edf->nef", x, self.weight)
        return x + both[torch.arange(len(x)), expert]

    def no_weight_decay(self) -> list[nn.Parameter]:
        return [self.frame]

    def expert_parameters(self) -> list[nn.Parameter]:
        return [self.weight]

    def take_idle(self) -> torch.Tensor:
        idle = self.load == 0
        self.load.zero_()
        return idle

    @torch.no_grad()
    def after_step(self) -> None:
        q, r = torch.linalg.qr(self.frame)
        self.frame.copy_(q * r.diagonal().sign())


class ToyNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm3d(6)
        self.experts = Experts(6)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(6, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.conv(image))).mean((2, 3, 4))
        return self.head(self.drop(self.experts(x))).squeeze(1)


class ToyData:
    """Boxes whose mean is the age; `delay` seconds a sample, and `bad` rows hold a NaN."""

    def __init__(self, length: int, start: int, delay: float = 0.0, bad: tuple[int, ...] = ()) -> None:
        self.length, self.start, self.delay, self.bad = length, start, delay, bad

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        time.sleep(self.delay)
        row = self.start + index
        generator = torch.Generator().manual_seed(row)
        age = torch.rand((), generator=generator)
        image = age + 0.1 * torch.randn(1, 4, 4, 4, generator=generator)
        return {"image": image * (float("nan") if row in self.bad else 1.0), "age": age, "row": row}


class ToyTask:
    selection = ("val/mae", "min")
    meta = {"spacing_mm": 4}  # noqa: RUF012

    def __init__(self, samples: int = 18, delay: float = 0.0, bad: tuple[int, ...] = ()) -> None:
        self.train_data = ToyData(samples, 2, delay, bad)
        self.val_data = ToyData(5, 100, delay)
        self.digests = {"config_sha256": "c" * 64, "manifest_sha256": "d" * 64}
        self.seen: list[tuple[int, ...]] = []

    def build_model(self) -> nn.Module:
        return ToyNet()

    def prepare(self, batch: dict, train: bool, keys: torch.Tensor) -> dict:
        if train:
            self.seen.append(tuple(batch["row"].tolist()))
            noise = [torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(int(k))) for k in keys]
            return {**batch, "image": batch["image"] + 0.05 * torch.stack(noise)}
        return batch

    def loss(self, model: nn.Module, batch: dict) -> tuple[torch.Tensor, dict]:
        l1 = (model(batch["image"]) - batch["age"]).abs().mean()
        return l1 + 0.01, {"l1": l1}

    def validate(self, model: nn.Module, batches) -> dict[str, float]:
        torch.rand(3)  # a validation that draws random numbers must not change training
        errors = [(model(batch["image"]) - batch["age"]).abs() for batch in batches]
        return {"val/mae": float(torch.cat(errors).mean())}

    def end_of_epoch(self, model: nn.Module) -> dict[str, float]:
        return {"expert/E00/load": float(model.experts.weight[0].detach().norm())}


class Line(ToyTask):
    """A linear model without anything random: batches and ranks can be cut as one likes."""

    def build_model(self):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 1), nn.Flatten(0))

    def end_of_epoch(self, model):
        return {}


def main(folder: Path, *settings: str) -> int:
    given = {name: json.loads(value) for name, value in (setting.split("=") for setting in settings)}
    delay, resume = given.pop("delay", 0.0), given.pop("resume", False)
    try:
        with Tracker(folder, uri="none", strict=True) as tracker:
            fit(ToyTask(delay=delay), replace(ToyOptions(), **given), folder, tracker, resume)
    except EmoeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
