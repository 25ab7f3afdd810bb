import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy_task import Line, ToyOptions, ToyTask

from emoe_med.errors import (
    CheckpointError,
    ConfigError,
    DivergedError,
    Interrupted,
    OutOfMemoryError,
    StorageError,
)
from emoe_med.training.checkpoint import CheckpointFolder
from emoe_med.training.journal import read_journal
from emoe_med.training.loader import derived_seed
from emoe_med.training.loop import fit
from emoe_med.training.tracking import Tracker

OPTIONS = ToyOptions()  # 18 samples, batches of 4: 4 steps an epoch, 3 epochs


def train(folder, task=None, options=OPTIONS, resume=False):
    with Tracker(folder, uri="none", strict=True) as tracker:
        return fit(task or ToyTask(), options, folder, tracker, resume)


def outcome(folder):
    """Everything that must be equal: weights, moments, random state, position, pointers, journal."""
    last, best = (CheckpointFolder(folder).load(which).state for which in ("last", "best"))
    metrics = [
        (event["step"], {name: v for name, v in event["values"].items() if not name.startswith("system/")})
        for _, event in read_journal(folder / "journal.jsonl")
        if event["kind"] == "metrics"
    ]
    return last["files"], last["random"], last["position"], best["files"], best["step"], metrics


class Signalled(ToyTask):
    """Sends its own process a signal in the n-th call of `prepare`."""

    def __init__(self, call, number=signal.SIGTERM, **options):
        super().__init__(**options)
        self.call, self.number = call, number

    def prepare(self, batch, train, keys):
        self.call -= 1
        if self.call == 0:
            os.kill(os.getpid(), self.number)
        return super().prepare(batch, train, keys)


class Crashed(ToyTask):
    """Fails in the n-th call of `prepare`."""

    def __init__(self, call):
        super().__init__()
        self.call = call

    def prepare(self, batch, train, keys):
        self.call -= 1
        if self.call == 0:
            raise SystemError("crash")
        return super().prepare(batch, train, keys)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    task = ToyTask()
    train(folder, task)
    return outcome(folder), task.seen


# 3 epochs of 4 training and 2 validation batches: calls 1-4 and 5-6, 7-10 and 11-12, 13-16 and 17-18
@pytest.mark.parametrize("call", [1, 2, 4, 5, 6, 7, 9, 12, 13, 16, 17])
def test_stopped_anywhere_and_resumed_all_is_equal_to_the_bit(tmp_path, uninterrupted, call):
    first, second = Signalled(call), ToyTask()
    with pytest.raises(Interrupted) as caught:
        train(tmp_path, first)
    assert caught.value.exit_code == 143
    assert "resume to go on" in str(caught.value)
    train(tmp_path, second, resume=True)
    assert first.seen + second.seen == uninterrupted[1]
    assert outcome(tmp_path) == uninterrupted[0]
    assert [path.name for path in tmp_path.glob("**/.tmp*")] == []


@pytest.mark.parametrize("call", [1, 3, 8, 15])
def test_crashed_anywhere_and_resumed_all_is_equal_to_the_bit(tmp_path, uninterrupted, call):
    options = replace(OPTIONS, checkpoint_minutes=0.0 if call % 2 else 60.0)
    with pytest.raises(SystemError):
        train(tmp_path, Crashed(call), options)
    train(tmp_path, options=options, resume=True)
    assert outcome(tmp_path) == uninterrupted[0]


VARIANTS = {
    "no average": replace(OPTIONS, ema_decay=None),
    "one cycle, two micro-batches": replace(OPTIONS, schedule="one_cycle", batch_size=2, accumulate=2),
    "bfloat16": replace(OPTIONS, precision="bf16"),
    "channels last": replace(OPTIONS, channels_last=True),
    "workers": replace(OPTIONS, workers=2),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_resume_to_the_bit_too(tmp_path, name):
    options = VARIANTS[name]
    train(tmp_path / "whole", options=options)
    calls = 7 * options.accumulate
    for part in (calls, calls):
        with pytest.raises(Interrupted):
            train(tmp_path / "parts", Signalled(part), options, resume=True)
    train(tmp_path / "parts", options=options, resume=True)
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("workers", [(1, 0), (0, 2)])
def test_the_number_of_workers_changes_nothing(tmp_path, uninterrupted, workers):
    with pytest.raises(Interrupted):
        train(tmp_path, Signalled(8), replace(OPTIONS, workers=workers[0]))
    train(tmp_path, options=replace(OPTIONS, workers=workers[1]), resume=True)
    assert outcome(tmp_path) == uninterrupted[0]


def test_a_finished_run_resumes_to_its_result(tmp_path):
    first = train(tmp_path)
    before = outcome(tmp_path)
    again = train(tmp_path, resume=True)
    assert outcome(tmp_path) == before
    assert (again.step, again.best, again.history) == (first.step, first.best, first.history)
    pairs = zip(first.model.state_dict().values(), again.model.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_a_task_learns_and_the_result_is_the_best_weights(tmp_path):
    result = train(tmp_path, options=replace(OPTIONS, epochs=12, ema_decay=None, lr=0.03))
    errors = [epoch["values"]["val/mae"] for epoch in result.history]
    assert errors[-1] < errors[0] / 2
    assert result.best["value"] == min(errors)
    assert not result.model.training
    assert result.checkpoint == CheckpointFolder(tmp_path).pointed("best")
    task = ToyTask()
    batch = torch.utils.data.default_collate([task.val_data[i] for i in range(5)])
    with torch.no_grad():
        error = float((result.model(batch["image"]) - batch["age"]).abs().mean())
    assert error == pytest.approx(result.best["value"], abs=1e-5)


def test_the_last_weights_when_asked(tmp_path):
    result = train(tmp_path, options=replace(OPTIONS, epochs=5, select="last", lr=0.3, ema_decay=None))
    assert result.checkpoint == CheckpointFolder(tmp_path).pointed("last")
    assert CheckpointFolder(tmp_path).load("best").state["step"] == result.best["step"]


def test_the_checkpoint_carries_the_task_s_meta_and_digests(tmp_path):
    train(tmp_path)
    state = CheckpointFolder(tmp_path).load("best").state
    assert state["meta"] == {"spacing_mm": 4}
    assert state["digests"] == {"config_sha256": "c" * 64, "manifest_sha256": "d" * 64, "world_size": 1}


# --- options, against references ---


PLAIN = replace(OPTIONS, ema_decay=None, clip_norm=1e9, warmup_share=0.0)


def test_two_micro_batches_are_one_batch(tmp_path):
    whole = train(tmp_path / "one", Line(), PLAIN)
    halves = train(tmp_path / "two", Line(), replace(PLAIN, batch_size=2, accumulate=2))
    for one, other in zip(whole.model.parameters(), halves.model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    assert whole.history[-1]["values"]["train/l1"] == pytest.approx(halves.history[-1]["values"]["train/l1"], rel=1e-5)


def test_training_equals_a_loop_written_by_hand(tmp_path):
    task = Line()
    result = train(tmp_path, task, replace(PLAIN, epochs=2, select="last"))
    torch.manual_seed(OPTIONS.seed)
    model = task.build_model()
    groups = [{"params": [model[1].weight], "weight_decay": 0.05}, {"params": [model[1].bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    for step, rows in enumerate(task.seen):
        for group in optimizer.param_groups:
            group["lr"] = 0.005 * (1 + math.cos(math.pi * step / 8))
        samples = [task.train_data[row - 2] for row in rows]
        keys = [derived_seed(OPTIONS.seed, step // 4, row) for row in rows]
        noise = [torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(key)) for key in keys]
        image = torch.stack([sample["image"] for sample in samples]) + 0.05 * torch.stack(noise)
        loss = (model(image) - torch.stack([sample["age"] for sample in samples])).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert len(task.seen) == 8
    for one, other in zip(result.model.parameters(), model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-7)


def test_the_moving_average_is_what_is_validated_and_kept(tmp_path):
    decay = 0.8
    weights = []

    class Watched(Line):
        def loss(self, model, batch):
            weights.append(model[1].weight.detach().clone())
            return super().loss(model, batch)

    options = replace(PLAIN, ema_decay=decay, epochs=1)
    result = train(tmp_path, Watched(), options)
    online = CheckpointFolder(tmp_path).load("last").optim["1.weight/online"]
    average = weights[1]  # after the first step
    for weight in [*weights[2:], online]:
        average = decay * average + (1 - decay) * weight
    assert torch.allclose(result.model[1].weight, average, atol=1e-7)
    assert not torch.allclose(online, average)


def test_frames_stay_orthonormal_in_the_average(tmp_path):
    model = train(tmp_path, options=replace(OPTIONS, lr=0.1)).model
    frame = model.experts.frame
    assert (frame.T @ frame - torch.eye(6)).abs().max() < 1e-5


def test_channels_last_changes_the_layout_and_not_the_result(tmp_path):
    class Seen(ToyTask):
        def loss(self, model, batch):
            self.layout = batch["image"].is_contiguous(memory_format=torch.channels_last_3d)
            return super().loss(model, batch)

    task = Seen()
    last = train(tmp_path / "last", task, replace(OPTIONS, channels_last=True))
    plain = train(tmp_path / "plain")
    assert task.layout
    assert last.model.conv.weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert last.history[-1]["values"]["val/mae"] == pytest.approx(plain.history[-1]["values"]["val/mae"], rel=1e-2)


# --- what can go wrong ---


class Broken(ToyTask):
    """Not finite from step n on: in the loss, in a part of it, or in the gradient alone."""

    def __init__(self, step, kind, value=math.nan):
        super().__init__()
        self.step, self.kind, self.value = step, kind, value

    def loss(self, model, batch):
        loss, parts = super().loss(model, batch)
        self.step -= 1
        if self.step == 0:
            self.before = {n: t.clone() for n, t in model.state_dict().items()}
            self.model = model
            if self.kind == "loss":
                loss = loss * self.value
            elif self.kind == "part":
                parts = {"l1": parts["l1"] * self.value}
            else:
                loss = loss + (0 * loss).sqrt()  # 0, with an infinite slope
        return loss, parts


@pytest.mark.parametrize("kind", ["loss", "part", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite_means_no_update_and_rows_named(tmp_path, kind, value):
    task = Broken(6, kind, value)
    with pytest.raises(DivergedError) as caught:
        train(tmp_path, task)
    rows = ", ".join(map(str, sorted(task.seen[-1])))
    assert caught.value.exit_code == 5
    assert f"step 6 (epoch 2), rows {rows}; no update was made" in str(caught.value)
    weights = {name for name, _ in task.model.named_parameters()}
    assert all(torch.equal(task.before[name], task.model.state_dict()[name]) for name in weights)
    events = [event for _, event in read_journal(tmp_path / "journal.jsonl") if event["kind"] == "nonfinite"]
    assert [(event["step"], event["rows"]) for event in events] == [(6, sorted(task.seen[-1]))]
    assert rows in (tmp_path / "local.log").read_text()
    assert CheckpointFolder(tmp_path).load("last").state["step"] == 4


def test_a_bad_voxel_is_found_by_its_row(tmp_path):
    with pytest.raises(DivergedError, match=r"rows .*\b9\b"):
        train(tmp_path, ToyTask(bad=(9,)))


def test_a_permitted_number_of_steps_is_left_out_without_a_trace(tmp_path):
    options = replace(OPTIONS, skip_nonfinite=3)
    result = train(tmp_path / "three", ToyTask(bad=(9,)), options)
    assert all(torch.isfinite(tensor).all() for tensor in result.model.state_dict().values())
    assert CheckpointFolder(tmp_path / "three").load("last").state["position"]["left_out"] == 3
    assert all(math.isfinite(epoch["values"]["train/loss"]) for epoch in result.history)
    with pytest.raises(DivergedError, match="epoch 3"):
        train(tmp_path / "two", ToyTask(bad=(9,)), replace(options, skip_nonfinite=2))


def test_exhausted_memory_is_code_7_with_batch_and_shapes(tmp_path):
    class Greedy(ToyTask):
        def loss(self, model, batch):
            return torch.zeros(2**60).sum(), {}

    with pytest.raises(OutOfMemoryError) as caught:
        train(tmp_path, Greedy())
    assert "batch_size 4, accumulate 1, last batch image [4, 1, 4, 4, 4]" in str(caught.value)


def test_a_loader_worker_that_is_killed_is_code_7(tmp_path):
    class Killed(type(ToyTask().train_data)):
        def __getitem__(self, index):
            if index == 5:
                os.kill(os.getpid(), signal.SIGKILL)  # as the system does when memory ends
            return super().__getitem__(index)

    task = ToyTask()
    task.train_data = Killed(18, 2)
    with pytest.raises(OutOfMemoryError, match="MEM-WORKER"):
        train(tmp_path, task, replace(OPTIONS, workers=1))


@pytest.mark.parametrize("epoch", [2, 3])
def test_a_signal_while_an_epoch_ends_is_not_lost(tmp_path, uninterrupted, epoch):
    class Late(ToyTask):
        ends = 0

        def end_of_epoch(self, model):
            self.ends += 1
            if self.ends == epoch:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().end_of_epoch(model)

    with pytest.raises(Interrupted):
        train(tmp_path, Late())
    assert CheckpointFolder(tmp_path).load("last").state["position"]["epoch"] == epoch
    train(tmp_path, resume=True)
    assert outcome(tmp_path) == uninterrupted[0]


def test_a_validation_that_is_no_number_is_never_best(tmp_path):
    class Blind(ToyTask):
        epoch = 0

        def validate(self, model, batches):
            self.epoch += 1
            return {"val/mae": math.nan if self.epoch != 2 else super().validate(model, batches)["val/mae"]}

    result = train(tmp_path / "once", Blind())
    assert result.best["epoch"] == 2
    assert [epoch["values"]["val/mae"] is None for epoch in result.history] == [True, False, True]

    class Never(ToyTask):
        def validate(self, model, batches):
            return {"val/mae": math.nan}

    result = train(tmp_path / "never", Never())
    assert result.best is None
    assert result.checkpoint == CheckpointFolder(tmp_path / "never").pointed("last")
    found = CheckpointFolder(tmp_path / "never").load("best")  # what evaluation asks for
    assert found.folder == result.checkpoint


def test_what_layers_tell_of_themselves_is_not_rounded_to_the_precision_of_the_run(tmp_path):
    seen = []

    class Told(ToyTask):
        def validate(self, model, batches):
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().validate(model, batches)

        def end_of_epoch(self, model):
            seen.append(torch.is_autocast_enabled("cpu"))
            return {}

    train(tmp_path, Told(), replace(OPTIONS, epochs=1, precision="bf16"))
    assert seen == [True, False]


def test_larger_can_be_better(tmp_path):
    class Score(ToyTask):
        selection = ("val/score", "max")

        def validate(self, model, batches):
            return {"val/score": -super().validate(model, batches)["val/mae"]}

    result = train(tmp_path, Score())
    assert result.best["value"] == max(epoch["values"]["val/score"] for epoch in result.history)


def test_a_run_is_not_begun_where_one_is(tmp_path):
    with pytest.raises(SystemError):  # no checkpoint yet, but metrics
        train(tmp_path, Crashed(2))
    with pytest.raises(ConfigError, match="this folder holds a run"):
        train(tmp_path)
    train(tmp_path, resume=True)
    (tmp_path / "journal.jsonl").unlink()
    with pytest.raises(ConfigError, match="resume it, or choose another folder"):
        train(tmp_path)


def test_another_configuration_is_refused_with_the_difference(tmp_path):
    with pytest.raises(Interrupted):
        train(tmp_path, Signalled(2))
    other = ToyTask()
    other.digests = {**other.digests, "manifest_sha256": "e" * 64}
    with pytest.raises(CheckpointError) as caught:
        train(tmp_path, other, resume=True)
    (fault,) = caught.value.faults
    assert caught.value.exit_code == 4
    assert f"manifest_sha256 was {'d' * 64} when this checkpoint was written and is {'e' * 64} now" in fault.reason


def test_a_checkpoint_of_another_model_is_refused_whole(tmp_path):
    with pytest.raises(Interrupted):
        train(tmp_path, Signalled(2))
    with pytest.raises(CheckpointError, match=r"conv\.weight is unknown to this model"):
        train(tmp_path, Line(), resume=True)
    with pytest.raises(CheckpointError, match="online is unknown"):
        train(tmp_path, options=replace(OPTIONS, ema_decay=None), resume=True)


def test_a_pointer_that_cannot_be_set_right_is_code_6(tmp_path):
    with pytest.raises(Interrupted):
        train(tmp_path, Signalled(2))
    (tmp_path / "checkpoints" / "best").mkdir()
    with pytest.raises(StorageError, match="checkpoints could not be tidied") as caught:
        train(tmp_path, resume=True)
    assert caught.value.exit_code == 6


def test_a_folder_removed_in_mid_run_is_code_6(tmp_path):
    class Gone(ToyTask):
        def end_of_epoch(self, model):
            shutil.rmtree(tmp_path / "run")
            (tmp_path / "run").write_text("a file in its place")
            return {}

    with pytest.raises(StorageError) as caught:
        train(tmp_path / "run", Gone())
    assert caught.value.exit_code == 6


# --- processes ---

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
PROGRAM = [sys.executable, str(Path(__file__).with_name("toy_task.py"))]


def test_sigterm_ends_the_program_with_143_and_it_resumes_to_the_same(tmp_path):
    settings = ["workers=1", "delay=0.02"]
    child = subprocess.Popen([*PROGRAM, str(tmp_path), *settings], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    line = child.stderr.readline()
    assert line.startswith("epoch 1/3  step 4  train/loss")  # one plain line an epoch, no terminal here
    child.send_signal(signal.SIGTERM)
    _, message = child.communicate(timeout=60)
    assert child.returncode == 143
    assert "error RUN-STOPPED" in message
    assert "Traceback" not in message
    statuses = [event["status"] for _, event in read_journal(tmp_path / "journal.jsonl") if event["kind"] == "status"]
    assert statuses == ["RUNNING", "KILLED"]
    train(tmp_path, resume=True)
    train(tmp_path.parent / f"{tmp_path.name}-whole")
    assert outcome(tmp_path) == outcome(tmp_path.parent / f"{tmp_path.name}-whole")


RANKS = """
import json, sys
sys.path.insert(0, {here!r})
from pathlib import Path
from test_loop import Line, PLAIN, Signalled, fit, replace, Tracker
from emoe_med.errors import Interrupted
class Stopped(Line, Signalled):
    pass
folder, stop = Path(sys.argv[1]), int(sys.argv[2])
task = Stopped(stop) if stop else Line()
try:
    with Tracker(folder, uri="none", strict=True) as tracker:
        fit(task, replace(PLAIN, batch_size=2), folder, tracker, resume=True)
except Interrupted as error:
    sys.exit(error.exit_code)
"""


def on_two_ranks(folder, stops=(0, 0)):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = RANKS.format(here=str(Path(__file__).parent))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(folder), str(stop)],
            env={
                **ENVIRONMENT,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
        )
        for rank, stop in enumerate(stops)
    ]
    return [rank.wait(120) for rank in ranks]


def test_two_ranks_do_what_one_does(tmp_path):
    whole = train(tmp_path / "one", Line(), PLAIN)
    assert on_two_ranks(tmp_path / "two") == [0, 0]
    found = CheckpointFolder(tmp_path / "two").load("best")
    for name, tensor in whole.model.state_dict().items():
        assert torch.allclose(found.model[name], tensor, atol=1e-6)
    ours, theirs = (CheckpointFolder(tmp_path / name).load("last").state for name in ("one", "two"))
    assert (theirs["digests"]["world_size"], len(theirs["random"])) == (2, 2)
    for one, two in zip(ours["position"]["history"], theirs["position"]["history"], strict=True):
        assert one["values"] == pytest.approx(two["values"], rel=1e-4)
    lines = (tmp_path / "two" / "journal.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "val/mae" in line] == [4, 8, 12]
    with pytest.raises(CheckpointError, match="world_size was 2 when this checkpoint was written and is 1 now"):
        train(tmp_path / "two", Line(), replace(PLAIN, batch_size=2), resume=True)


@pytest.mark.faults
def test_two_ranks_stop_together_and_resume(tmp_path):
    assert on_two_ranks(tmp_path / "whole") == [0, 0]
    # the signal reaches one rank alone
    assert on_two_ranks(tmp_path / "parts", stops=(0, 2)) == [143, 143]
    assert CheckpointFolder(tmp_path / "parts").load("last").state["step"] == 2
    assert on_two_ranks(tmp_path / "parts", stops=(7, 0)) == [143, 143]
    assert on_two_ranks(tmp_path / "parts") == [0, 0]
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")
