"""What a preprocessed volume states beside itself, and that nothing else of the file is taken."""

import json
from pathlib import Path

import pytest

from emoe_med.data.manifest import Scan
from emoe_med.data.sidecar import statement, strip_statement

STATED = {
    "SkullStripped": True,
    "Steps": {"SkullStrip": "deepbet 1.0.2", "Template": "MNI152NLin2009aSym"},
    "GeneratedBy": [{"Name": "deepbet", "Version": "1.0.2", "Container": {"URI": "/home/secret"}}],
    "PatientName": "secret",
}


def write(folder: Path, name: str, content) -> Path:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / f"{name}.json").write_text(text)
    return folder / f"{name}.nii.gz"


def test_steps_and_programs_are_taken_and_persons_are_not(tmp_path):
    assert json.loads(statement(write(tmp_path, "a", STATED))) == STATED["Steps"]
    assert statement(tmp_path / "a.nii") == statement(tmp_path / "a.nii.gz")
    bids = {key: value for key, value in STATED.items() if key != "Steps"}
    assert json.loads(statement(write(tmp_path, "b", bids))) == {
        "SkullStripped": True,
        "GeneratedBy": [{"Name": "deepbet", "Version": "1.0.2"}],
    }


@pytest.mark.parametrize("content", [{"EchoTime": 0.004}, "no json", [1, 2], "\xff", "[" * 100_000])
def test_what_states_nothing_is_empty(tmp_path, content):
    assert statement(write(tmp_path, "a", content)) == ""
    assert statement(tmp_path / "nowhere.nii.gz") == ""


def test_a_training_set_is_told_as_a_whole(tmp_path):
    stated = write(tmp_path, "a", STATED)
    scans = [
        Scan(row=i, image=image, age=50.0, participant_id=str(i), session_id="", mask=mask, labels=tmp_path / "labels")
        for i, (image, mask) in enumerate([(stated, tmp_path / "m"), (stated, None), (tmp_path / "raw.nii", None)])
    ]
    found = strip_statement(scans, "brain")
    assert found == {"mask": ["labels", "mask"], "stated": {statement(stated): 2, "": 1}}
    assert strip_statement(scans, "head")["mask"] == ["none: whole head"]
