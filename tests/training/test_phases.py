"""A single-gated mixture in phases: who learns from what, what stays, and that a stop anywhere changes nothing."""

import os
import signal
from contextlib import suppress

import numpy as np
import pytest
import torch
from phased_toy import OPTIONS, Options, PhasedToy
from toy_task import ToyOptions

from emoe_med.errors import ConfigError, Interrupted
from emoe_med.training.checkpoint import CheckpointFolder
from emoe_med.training.journal import read_journal
from emoe_med.training.loop import fit
from emoe_med.training.parts import ExpertOnBase, PartTask
from emoe_med.training.single_gated import fit_run, noisy
from emoe_med.training.tracking import Tracker

TRAINING = Options(**vars(ToyOptions(epochs=5, batch_size=4, select="last")))  # 2 epochs for the base


class Broken(PhasedToy):
    """Sends a signal, or fails, in the n-th call of `prepare`; -1 never."""

    def __init__(self, call, error=False):
        super().__init__()
        self.calls, self.call, self.error = [0], call, error

    def prepare(self, batch, train, keys):
        self.calls[0] += 1
        if self.calls[0] == self.call:
            if self.error:
                raise SystemError("crash")
            os.kill(os.getpid(), signal.SIGTERM)
        return super().prepare(batch, train, keys)


def train(folder, task=None, options=OPTIONS, training=TRAINING, resume=False):
    with Tracker(folder, uri="none", strict=True) as tracker:
        return fit_run(task or PhasedToy(), training, options, folder, tracker, resume)


def outcome(folder):
    """Weights, position and metrics: all that must be equal."""
    checkpoint = CheckpointFolder(folder).load("best")
    metrics = [
        (event["step"], {name: v for name, v in event["values"].items() if not name.startswith("system/")})
        for _, event in read_journal(folder / "journal.jsonl")
        if event["kind"] == "metrics"
    ]
    return checkpoint.state["files"]["model.safetensors"]["sha256"], checkpoint.state["position"], metrics


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    task = Broken(-1)
    return folder, train(folder, task), task, (list(task.seen), task.calls[0])


def rows_of_experts(result, task):
    """Rows of the training samples by the expert that the trained gate sends them to."""
    images = torch.stack([task.train_data[i]["image"] for i in range(len(task.train_data))])
    with torch.no_grad():
        sent = result.model.gate(result.model.features(images)).argmax(1).numpy()
    return [{task.train_data[i]["row"] for i in np.flatnonzero(sent == k).tolist()} for k in range(2)]


def test_the_run_folder_is_that_of_any_run_and_the_record_tells_the_phases(whole):
    folder, result, *_ = whole
    assert not (folder / "phases").exists()
    assert (folder / "environment.json").is_file()
    names = {name for _, values in outcome(folder)[2] for name in values}
    assert {"train/loss", "val/mae", "train/gate/loss", "val/gate/agreement", "train/E01/l1", "val/E00/mae"} <= names
    assert {"expert/E00/samples", "expert/gate/E01/load", "router/gate/cv"} <= names
    assert result.best["value"] == min(epoch["values"]["val/mae"] for epoch in result.history)
    assert len(result.history) == 2
    assert CheckpointFolder(folder).load("last").state["meta"] == {"spacing_mm": 4}


def test_the_base_is_what_it_would_be_alone_and_does_not_move(whole, tmp_path):
    _, result, task, _ = whole
    with Tracker(tmp_path, uri="none") as tracker:
        alone = fit(task.plain(), TRAINING.model_copy({"epochs": 2}), tmp_path, tracker)
    expected = alone.model.state_dict()
    assert any("num_batches_tracked" in name for name in expected)
    for name, tensor in result.model.base.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert not torch.equal(result.model.experts[0].head.weight, result.model.base.head.weight)
    before = result.model.base.stages[1][1].running_mean
    assert not torch.equal(result.model.experts[0].stages[1][1].running_mean, before)


def test_each_expert_sees_the_samples_that_the_gate_sends_and_no_other(whole):
    _, result, task, (seen, _) = whole
    sent = rows_of_experts(result, task)
    assert sorted(map(len, sent)) != [0, 18]
    batches = seen[4 * 2 + 4 :]  # base: 2 epochs of 4 steps; gate: 1
    steps = [2 * (len(rows) // min(4, len(rows))) for rows in sent]
    assert len(batches) == sum(steps)
    for rows, found in zip(sent, (batches[: steps[0]], batches[steps[0] :]), strict=True):
        assert {row for batch in found for row in batch} <= rows
        assert len(found[0]) == min(4, len(rows))


def test_an_expert_needs_no_other(whole, tmp_path):
    _, result, task, _ = whole
    rows = rows_of_experts(result, task)[1]
    mine = [i for i in range(len(task.train_data)) if task.train_data[i]["row"] in rows]
    part = PartTask(task, lambda: ExpertOnBase(result.model.base, 1), {}, mine)
    changes = {"epochs": 2, "lr": TRAINING.lr * OPTIONS.expert_lr_share, "batch_size": min(4, len(rows))}
    with Tracker(tmp_path, uri="none") as tracker:
        alone = fit(part, TRAINING.model_copy(changes), tmp_path, tracker)
    for name, tensor in alone.model.expert.state_dict().items():
        assert torch.equal(tensor, result.model.experts[1].state_dict()[name]), name


def test_a_stop_anywhere_changes_nothing(whole, tmp_path):
    folder, _, _, (_, calls) = whole
    # base: 2 epochs of 4 training and 2 validation batches; features: 5 and 2; gate: 4 and 2; the rest are the experts'
    for number, call in enumerate((3, 12, 15, 19, 21, 26, calls - 4, calls)):
        here = tmp_path / str(call)
        training = TRAINING.model_copy({"checkpoint_minutes": 60.0 if number % 2 else 0.0})
        with pytest.raises(SystemError if number % 3 else Interrupted):
            train(here, Broken(call, error=number % 3 > 0), training=training)
        assert (here / "phases").is_dir()
        assert not (here / "checkpoints").exists()
        train(here, training=training, resume=True)
        assert outcome(here) == outcome(folder), call


def test_a_finished_run_is_taken_as_it_is(whole):
    folder, result, *_ = whole
    task = Broken(1, error=True)
    again = train(folder, task, resume=True)
    assert (
        again.step
        == result.step
        == 4 * 2 + 4 + sum(2 * (len(r) // min(4, len(r))) for r in rows_of_experts(result, task))
    )
    assert torch.equal(again.model.gate.weight, result.model.gate.weight)


def test_a_run_is_not_started_over(tmp_path):
    with suppress(SystemError):
        train(tmp_path, Broken(3, error=True))
    with pytest.raises(ConfigError, match="RUN-EXISTS"):
        train(tmp_path)


def test_more_experts_than_samples_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="CFG-EXPERTS"):
        train(tmp_path, options=OPTIONS.model_copy(update={"num_experts": 19}))


def test_noise_redraws_its_share_uniformly():
    sent = np.zeros(20_000, int)
    found = noisy(sent, 4, 0.2, seed=3)
    assert np.array_equal(found, noisy(sent, 4, 0.2, seed=3))
    assert not np.array_equal(found, noisy(sent, 4, 0.2, seed=4))
    np.testing.assert_allclose(np.bincount(found) / len(sent), [0.85, 0.05, 0.05, 0.05], atol=0.01)
    assert np.array_equal(noisy(sent, 4, 0.0, seed=3), sent)


def test_an_expert_without_samples_stays_the_copy_that_it_is(tmp_path):
    task = PhasedToy(samples=3)
    training = TRAINING.model_copy({"batch_size": 1})
    result = train(tmp_path, task, training=training)
    sizes = [len(rows) for rows in rows_of_experts(result, task)]
    assert sorted(sizes) == [1, 2]
    lone = result.model.experts[sizes.index(1)].state_dict()
    base = result.model.base.state_dict()
    assert all(torch.equal(tensor, base[name]) for name, tensor in lone.items())
    other = result.model.experts[sizes.index(2)].state_dict()
    assert any(not torch.equal(tensor, base[name]) for name, tensor in other.items())
