import contextlib
import errno
import hashlib
import json
import os
import shutil

import pytest
import torch
from small_disk import small_disk
from torch import nn

from emoe_med import storage
from emoe_med.errors import CheckpointError, StorageError
from emoe_med.training.checkpoint import (
    CheckpointFolder,
    load_checkpoint,
    load_model_state,
    load_model_weights,
)


def content(step, width=4):
    generator = torch.Generator().manual_seed(step)
    model = {"w": torch.randn(width, width, generator=generator), "n": torch.tensor(step)}
    optim = {"w/exp_avg": torch.randn(width, width, generator=generator), "w/step": torch.tensor(float(step))}
    return model, optim, {"step": step, "meta": {"spacing_mm": 2.0}, "best": 0.1 + 0.2}


def save(folder, step, best=False, width=4):
    return folder.save(*content(step, width), best=best)


def same(found, step, width=4):
    model, optim, state = content(step, width)
    assert found.state.items() >= state.items()
    assert all(torch.equal(found.model[name], model[name]) for name in model)
    assert all(torch.equal(found.optim[name], optim[name]) for name in optim)


def names(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_saved_and_loaded_bit_for_bit(tmp_path):
    folder = CheckpointFolder(tmp_path)
    written = save(folder, 1200, best=True)
    assert written == tmp_path / "checkpoints" / "step-00001200"
    for which in ("best", "last"):
        same(folder.load(which), 1200)
    weights, state = load_model_state(written)
    assert torch.equal(weights["w"], content(1200)[0]["w"])
    assert state["meta"] == {"spacing_mm": 2.0}
    for name, entry in state["files"].items():
        data = (written / name).read_bytes()
        assert (entry["size"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())


def test_tied_and_transposed_weights_are_kept(tmp_path):
    weight = torch.randn(3, 5)
    tensors = {"a": weight, "b": weight, "t": weight.T, "v": weight.view(1, 3, 5, 1, 1).contiguous()}
    folder = CheckpointFolder(tmp_path).save(tensors, {}, {"step": 1}, best=False)
    found, _ = load_model_state(folder)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_keeps_the_last_two_and_the_best(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for step in (10, 20, 30, 40, 50):
        save(folder, step, best=step == 20)
    assert names(tmp_path) == ["best", "last", "step-00000020", "step-00000040", "step-00000050"]
    same(folder.load("best"), 20)
    same(folder.load("last"), 50)
    save(folder, 60, best=True)
    assert names(tmp_path) == ["best", "last", "step-00000050", "step-00000060"]


def test_the_same_step_again_replaces_the_position_alone(tmp_path):
    folder = CheckpointFolder(tmp_path)
    save(folder, 10)
    model, optim, state = content(10)
    folder.save(model, optim, {**state, "meta": {"validated": True}}, best=True)
    assert folder.load("best").state["meta"] == {"validated": True}


def damage(name):
    def cut(run, older, newer):
        data = (newer / name).read_bytes()
        (newer / name).write_bytes(data[: len(data) // 2])

    def flip(run, older, newer):
        data = bytearray((newer / name).read_bytes())
        data[len(data) // 2] ^= 4
        (newer / name).write_bytes(data)

    def missing(run, older, newer):
        (newer / name).unlink()

    def swapped(run, older, newer):
        shutil.copyfile(older / name, newer / name)

    def grown(run, older, newer):
        with (newer / name).open("ab") as file:
            file.write(b" ")

    def empty(run, older, newer):
        (newer / name).write_bytes(b"")

    grown_json = () if name == "state.json" else (grown,)  # a blank after JSON changes nothing
    return [
        pytest.param(kind, id=f"{name} {kind.__name__}") for kind in (cut, flip, missing, swapped, empty, *grown_json)
    ]


def pointer(data):
    def write(run, older, newer):
        (run / "checkpoints" / "last").write_bytes(data)

    return pytest.param(write, id=f"pointer {data!r}")


def pointer_is_a_folder(run, older, newer):
    (run / "checkpoints" / "last").unlink()
    (run / "checkpoints" / "last").mkdir()


def edited_state(run, older, newer):
    state = json.loads((newer / "state.json").read_text())
    (newer / "state.json").write_text(json.dumps({**state, "step": 20, "best": 0.5}))


@pytest.mark.parametrize(
    "harm",
    [
        *damage("model.safetensors"),
        *damage("optim.safetensors"),
        *damage("state.json"),
        pointer(b""),
        pointer(b"step-00000099"),
        pointer(b"../../elsewhere"),
        pointer(b"\xff\x00"),
        pointer_is_a_folder,
        edited_state,
    ],
)
def test_damage_is_refused_with_code_4_and_the_file(tmp_path, harm):
    folder = CheckpointFolder(tmp_path)
    older, newer = save(folder, 10), save(folder, 20)
    harm(tmp_path, older, newer)
    with pytest.raises(CheckpointError) as caught:
        folder.load("last")
    fault = caught.value.faults[0]
    assert caught.value.exit_code == 4
    assert fault.code == "CKPT-DAMAGED"
    assert str(tmp_path) in fault.file


def test_the_message_names_a_checkpoint_that_is_whole(tmp_path):
    folder = CheckpointFolder(tmp_path)
    save(folder, 10)
    (save(folder, 20) / "optim.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="step-00000010 is whole: write its name into the file `last`"):
        folder.load("last")
    (tmp_path / "checkpoints" / "last").write_text("step-00000010\n")
    same(folder.load("last"), 10)


def test_every_flipped_bit_is_found(tmp_path):
    folder = CheckpointFolder(tmp_path)
    step = save(folder, 10)
    generator = torch.Generator().manual_seed(0)
    for name in ("model.safetensors", "optim.safetensors", "state.json"):
        whole = (step / name).read_bytes()
        for _ in range(60):
            bit = int(torch.randint(len(whole) * 8, (), generator=generator))
            data = bytearray(whole)
            data[bit // 8] ^= 1 << bit % 8
            (step / name).write_bytes(data)
            try:
                found = load_checkpoint(step)
            except CheckpointError:
                continue
            assert name == "state.json"  # a flip inside a blank: what is read is the same
            same(found, 10)
        (step / name).write_bytes(whole)


def test_weights_of_another_model_are_refused_before_the_model_is_touched(tmp_path):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = {name: tensor + 1 for name, tensor in before.items()}
    weights["0.weight"] = torch.zeros(3, 4)
    weights["extra"] = weights.pop("1.running_mean")
    with pytest.raises(CheckpointError) as caught:
        load_model_weights(model, weights, tmp_path)
    assert [fault.reason for fault in caught.value.faults] == [
        "extra is unknown to this model",
        "0.weight has shape [3, 4], the model has [3, 2]",
        "1.running_mean is missing",
    ]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class Killed(BaseException):
    """As a kill would: nothing of ours may catch it."""


CALLS = ("fsync", "replace", "rename", "mkdir", "open", "unlink", "rmdir")


def dies_at(monkeypatch, number):
    """Let the process 'die' at the given call into the file system; returns the count of calls."""
    count = [0]

    def wrap(function):
        def call(*arguments, **options):
            count[0] += 1
            if count[0] == number:
                raise Killed
            if number and count[0] > number:  # a dead process cleans nothing up
                raise Killed
            return function(*arguments, **options)

        return call

    for name in CALLS:
        monkeypatch.setattr(os, name, wrap(getattr(os, name)))
    return count


def test_killed_at_each_file_system_call_a_valid_checkpoint_is_there(tmp_path, monkeypatch):
    base = CheckpointFolder(tmp_path / "base")
    for step in (10, 20, 30):
        save(base, step, best=step == 10)

    def run(number):
        folder = CheckpointFolder(tmp_path / f"kill-{number}")
        shutil.copytree(base.path, folder.path)
        with monkeypatch.context() as patch:
            count = dies_at(patch, number)
            with contextlib.suppress(Killed):
                save(folder, 40, best=True)
        return folder, count[0]

    _, calls = run(0)
    assert calls > 20
    reached = set()
    for number in range(1, calls + 1):
        folder, _ = run(number)
        found = folder.load("last")
        same(found, found.state["step"])
        reached.add(found.state["step"])
        same(folder.load("best"), folder.load("best").state["step"])
        folder.tidy(found.folder, 40 if found.state["step"] == 40 else 10)
        left = {path.name for path in folder.path.iterdir()}
        assert not any(name.startswith(".tmp") for name in left)
        assert max(name for name in left if name.startswith("step")) == found.folder.name
        best = folder.load("best")
        assert best.state["step"] == (40 if found.state["step"] == 40 else 10)
        save(folder, 50)  # and the run goes on
    assert reached == {30, 40}


def test_killed_while_the_very_first_checkpoint_gets_its_name(tmp_path):
    folder = CheckpointFolder(tmp_path)
    assert folder.load("last") is None
    save(folder, 10)
    (folder.path / "last").unlink()
    same(folder.load("last"), 10)


def test_too_little_space_is_told_before_anything_is_written(tmp_path):
    with small_disk(tmp_path / "disk", 400) as disk:
        folder = CheckpointFolder(disk)
        save(folder, 10)
        with pytest.raises(
            StorageError, match=r"checkpoint could not be written: 0\.8 MiB needed, 0\.4 MiB free"
        ) as caught:
            save(folder, 20, width=300)  # two float32 matrices of 360 kB, times 1.2
        assert caught.value.exit_code == 6
        assert names(disk) == ["last", "step-00000010"]


def test_a_full_disk_leaves_no_stump_and_the_old_checkpoint(tmp_path, monkeypatch):
    with small_disk(tmp_path / "disk", 400) as disk:
        folder = CheckpointFolder(disk)
        save(folder, 10, width=150)  # 180 kB of 400
        before = names(disk)
        # the space check would speak first; others may fill the disk between check and write
        monkeypatch.setattr("emoe_med.training.checkpoint.SPACE_FACTOR", 0.0)
        with pytest.raises(StorageError, match=os.strerror(errno.ENOSPC)):
            save(folder, 20, width=180)
        assert names(disk) == before
        same(folder.load("last"), 10, width=150)


def test_what_reads_back_differently_is_no_checkpoint(tmp_path, monkeypatch):
    folder = CheckpointFolder(tmp_path)
    save(folder, 10)
    honest = storage.write_synced

    def lossy(path, data):
        honest(path, data[:-1] + b"?" if path.name == "model.safetensors" else data)

    monkeypatch.setattr("emoe_med.training.checkpoint.write_synced", lossy)
    with pytest.raises(StorageError, match="read back differently: SHA-256 differs"):
        save(folder, 20)
    assert names(tmp_path) == ["last", "step-00000010"]
