import pytest
import torch

from emoe_med.errors import CheckpointError
from emoe_med.training.amend import amend
from emoe_med.training.checkpoint import CheckpointFolder


def test_meta_grows_and_weights_stay(tmp_path):
    folder = CheckpointFolder(tmp_path)
    weights = {"w": torch.randn(3)}
    written = folder.save(weights, {"w/step": torch.ones(1)}, {"step": 5, "meta": {"a": 1}, "loss": 0.1 + 0.2}, True)
    before = (written / "model.safetensors").read_bytes()
    amend(written, {"b": [1.5, 2.5]})
    amend(written, {"a": 2})
    found = folder.load("best")
    assert found.state["meta"] == {"a": 2, "b": [1.5, 2.5]}
    assert found.state["loss"] == 0.1 + 0.2
    assert torch.equal(found.model["w"], weights["w"])
    assert (written / "model.safetensors").read_bytes() == before


def test_a_damaged_checkpoint_is_not_amended(tmp_path):
    written = CheckpointFolder(tmp_path).save({"w": torch.randn(3)}, {}, {"step": 5, "meta": {}}, True)
    file = written / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    before = (written / "state.json").read_bytes()
    with pytest.raises(CheckpointError):
        amend(written, {"b": 1})
    assert (written / "state.json").read_bytes() == before
