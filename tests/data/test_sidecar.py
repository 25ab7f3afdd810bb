"""What a preprocessed volume states beside itself: believed where its bytes are as written."""

import json
from pathlib import Path

import numpy as np
import pytest

from emoe_med.data.manifest import Scan
from emoe_med.data.sidecar import other_steps, statement, steps_digest, strip_statement, vouching

OTHERS = {
    "SkullStripped": True,
    "GeneratedBy": [{"Name": "deepbet", "Version": "1.0.2", "Container": {"URI": "/home/secret"}}],
    "PatientName": "secret",
}
STEPS = {"Path": "full", "SkullStrip": "deepbet 1.0.2", "Template": "MNI152NLin2009aSym"}


def own(**changes) -> dict:
    """What `preprocess` writes, for an image whose digest is `i` and a mask whose digest is `m`."""
    return {
        **OTHERS,
        "Steps": STEPS,
        "ChainHash": steps_digest(STEPS),
        "Matrix": np.diag([1.1, 1.0, 0.9, 1.0]).tolist(),
        "QualityControl": {"brain_ml": 1400},
        "OutputSha256": {"image": "i", "mask": "m"},
        **changes,
    }


def write(folder: Path, name: str, content) -> Path:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / f"{name}.json").write_text(text)
    return folder / f"{name}.nii.gz"


def digest(path: Path) -> str:
    return {"a": "i", "mask": "m"}.get(path.name.split(".")[0], "x")


def test_of_other_tools_programs_are_taken_and_persons_are_not(tmp_path):
    assert json.loads(statement(write(tmp_path, "a", OTHERS))) == {
        "SkullStripped": True,
        "GeneratedBy": [{"Name": "deepbet", "Version": "1.0.2"}],
    }
    assert statement(tmp_path / "a.nii") == statement(tmp_path / "a.nii.gz")


@pytest.mark.parametrize("content", [{"EchoTime": 0.004}, "no json", [1, 2], "\xff", "[" * 100_000])
def test_what_states_nothing_is_empty(tmp_path, content):
    image = write(tmp_path, "a", content)
    assert statement(image) == ""
    assert statement(tmp_path / "nowhere.nii.gz") == ""
    assert vouching(image, tmp_path / "mask.nii.gz", digest) is None


def test_a_sidecar_vouches_for_image_and_mask_as_they_were_written(tmp_path):
    image, mask = write(tmp_path, "a", own()), tmp_path / "mask.nii.gz"
    found = vouching(image, mask, digest)
    assert found.steps == STEPS
    assert found.figures == {"brain_ml": 1400.0}
    np.testing.assert_array_equal(found.matrix, np.diag([1.1, 1.0, 0.9, 1.0]))
    assert json.loads(found.statement()) == STEPS
    assert vouching(image, None, digest) is None
    assert vouching(image, tmp_path / "other.nii.gz", digest) is None
    assert vouching(write(tmp_path, "b", own()), mask, digest) is None  # another image
    for changes in (
        {"Steps": {**STEPS, "SkullStrip": "by hand"}},
        {"Matrix": [1, 2]},
        {"OutputSha256": {}},
        {"QualityControl": None},
    ):
        assert vouching(write(tmp_path, "a", own(**changes)), mask, digest) is None, changes


def test_a_training_set_is_told_as_a_whole(tmp_path):
    scans = [
        Scan(
            row=i,
            image=Path("x"),
            age=50.0,
            participant_id=str(i),
            session_id="",
            mask=mask,
            labels=tmp_path / "labels",
        )
        for i, mask in enumerate([tmp_path / "m", None, None])
    ]
    found = strip_statement(scans, ["stated", "stated", ""], "brain")
    assert found == {"mask": ["labels", "mask"], "stated": {"stated": 2, "": 1}}
    assert strip_statement(scans, ["", "", ""], "head")["mask"] == ["none: whole head"]


def test_steps_that_differ_are_named():
    usual = [json.dumps(STEPS, sort_keys=True)]
    assert other_steps(usual[0], usual) == ""
    newer = json.dumps({**STEPS, "SkullStrip": "deepbet 9"}, sort_keys=True)
    assert other_steps(newer, usual) == "SkullStrip is deepbet 9, in training deepbet 1.0.2"
    assert "states none" in other_steps("", usual)
    assert "other steps" in other_steps(json.dumps({"SkullStripped": True}), usual)
    assert "other steps" in other_steps(newer, [""])
