"""What trains in stages gives on two ranks what one process gives that accumulates the same half-batches."""

import os
import socket
from dataclasses import replace
from functools import partial

import pytest
import torch
from phased_toy import OPTIONS, Options, PhasedToy, StagedNet
from torch import nn
from toy_task import ToyOptions, ToyTask

from emoe_med.models.deep_moe import DeepMoE, DeepMoEOptions
from emoe_med.models.sfcn import SFCN, SFCNOptions
from emoe_med.training.checkpoint import CheckpointFolder
from emoe_med.training.journal import read_journal
from emoe_med.training.ranks import joined
from emoe_med.training.single_gated import fit_run
from emoe_med.training.tracking import Tracker


class Mixture(PhasedToy):
    """Without what differs from rank to rank: batch statistics and dropout."""

    net = staticmethod(partial(StagedNet, norm=partial(nn.GroupNorm, 1), dropout=0.0))


class Gated(ToyTask):
    """A DeepMoE whose gating stands still after the first epoch."""

    def build_model(self):
        net = SFCN(1, SFCNOptions(channels=(4, 4), pooled=0, neck=4, dropout=0.0))
        model = DeepMoE(net, 3, 1, 1, DeepMoEOptions((4, 4)))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm3d):
                module.momentum = 0.0  # its running statistics are those of a rank, and the second stage looks at them
        return model

    def begin_epoch(self, model, epoch):
        model.hold_gating(epoch > 0)

    def loss(self, model, batch):
        out = model(batch["image"])
        answers = [out.output, *([] if out.side_output is None else [out.side_output])]
        return sum((answer.squeeze(1) - batch["age"]).square().mean() for answer in answers) + out.aux_loss, {}

    def validate(self, model, batches):
        return {"val/mae": float(sum((model(b["image"]).output.squeeze(1) - b["age"]).abs().sum() for b in batches))}

    def end_of_epoch(self, model):
        return {}


RUNS = {"mixture": (Mixture, OPTIONS.model_copy(update={"gate_epochs": 2}), 6), "gated": (Gated, None, 3)}


def train(folder, kind, accumulate):
    task, options, epochs = RUNS[kind]
    training = replace(ToyOptions(), epochs=epochs, batch_size=2, accumulate=accumulate, select="last", ema_decay=None)
    folder = folder / kind
    with Tracker(folder, uri="none", strict=True) as tracker:
        fit_run(task(), Options(**vars(training)), options, folder, tracker)


def _rank(rank, folder, port):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with joined():
        for kind in RUNS:
            train(folder, kind, 1)


@pytest.mark.timeout(600)
def test_two_ranks_train_in_stages_what_one_process_does(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (tmp_path / "ranks", port), nprocs=2)
    for kind in RUNS:
        train(tmp_path / "alone", kind, 2)
        one, two = (found(tmp_path / place / kind) for place in ("alone", "ranks"))
        assert one[0].keys() == two[0].keys()
        for name, losses in one[0].items():
            assert len(losses) > 1, name
            assert two[0][name] == pytest.approx(losses, abs=1e-5), (kind, name)
        for name, value in one[1].items():
            if "num_batches" not in name:  # of each rank
                torch.testing.assert_close(two[1][name], value, atol=1e-5, rtol=1e-4, msg=f"{kind} {name}")


def found(folder):
    """Losses of every phase by step, and the weights at the end."""
    losses = {}
    for _, event in read_journal(folder / "journal.jsonl"):
        for name, value in event.get("values", {}).items():
            if name.endswith("loss"):
                losses.setdefault(name, []).append(value)
    return losses, CheckpointFolder(folder).load("last").model
