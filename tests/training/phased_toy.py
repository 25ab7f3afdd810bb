"""The toy as a single-gated mixture in phases, for tests in one process and on two ranks."""

import copy
from types import SimpleNamespace

import torch
from torch import nn
from toy_task import ToyTask

from emoe_med.model_config import SingleGatedConfig
from emoe_med.models.output import ModelOutput
from emoe_med.models.single_gated import SingleGated

OPTIONS = SingleGatedConfig(num_experts=2, stages=1, gate_epochs=1, expert_epochs=2, noise=0.0)


class Options(SimpleNamespace):
    """`ToyOptions` that can be changed as a configuration is."""

    def model_copy(self, update):
        return Options(**{**vars(self), **update})


class StagedNet(nn.Module):
    """Two stages with BatchNorm and dropout, or neither, and an answer."""

    num_features = 5

    def __init__(self, norm=nn.BatchNorm3d, dropout=0.2):
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv3d(a, b, 3, padding=1), norm(b), nn.ReLU(), nn.Dropout(dropout))
            for a, b in ((1, 4), (4, 5))
        )
        self.head = nn.Linear(5, 1)

    def until(self, image, stages):
        return nn.Sequential(*self.stages[:stages])(image)

    def beyond(self, x, stages):
        return nn.Sequential(*self.stages[stages:])(x).mean((2, 3, 4))

    def answer(self, features):
        return self.head(features)

    def tail(self, stages):
        other = copy.deepcopy(self)
        for number in range(stages):
            other.stages[number] = nn.Identity()
        return other

    def forward(self, image):
        return ModelOutput(self.answer(self.beyond(image, 0)), image.new_zeros(()), {}, {})


class Mean:
    has_confidence = False

    def confidence(self, output):
        return output.new_zeros(len(output))

    def join(self, outputs, weights):
        return (weights.unsqueeze(-1) * outputs).sum(1)


class PhasedToy(ToyTask):
    """The toy as `fit_run` wants it; `seen` has the rows of each training batch, in all phases."""

    gated = OPTIONS
    net = StagedNet

    def plain(self):
        task = copy.copy(self)  # and the same list of what was seen
        task.gated = None
        return task

    def inside(self, model):
        return model

    def around(self, network):
        return network

    def build_model(self):
        base = self.net()
        return base if self.gated is None else SingleGated(base, self.gated.num_experts, 1, Mean())

    def loss(self, model, batch):
        l1 = (model(batch["image"]).output.squeeze(1) - batch["age"]).abs().mean()
        return l1, {"l1": l1}

    def validate(self, model, batches):
        errors = [(model(batch["image"]).output.squeeze(1) - batch["age"]).abs() for batch in batches]
        return {"val/mae": float(torch.cat(errors).mean())}

    def end_of_epoch(self, model):
        return {}
