"""A finished run stands for the data and weights that it was made from alone."""

import hashlib
import json

import pytest

from emoe_med.data.images import list_images
from emoe_med.errors import DataError
from emoe_med.pipeline.plan import Places, plan, read_pipeline
from emoe_med.pipeline.sources import check_sources

FILE = """
name: some
data: {brainage: manifest.csv}
runs:
  - {config: configs/brainage/cnn3d_4mm.yaml, folds: [0, 1]}
  - {config: configs/vision/digits_dense.yaml}
steps: [{verb: fewshot, dataset: digits, shots: [1]}]
table:
  paired_with: cnn3d_4mm
  columns: [{name: "MAE, years", metric: test/mae}]
"""


def finish(folder, **sources):
    folder.mkdir(parents=True)
    (folder / "environment.json").write_text(json.dumps(sources))
    (folder / "metrics.json").write_text("{}")
    (folder / "journal.jsonl").write_text(json.dumps({"kind": "status", "time": 1, "status": "FINISHED"}) + "\n")


def test_runs_of_other_data_are_named_before_anything_runs(tmp_path):
    (tmp_path / "some.yaml").write_text(FILE)
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("path,age\na.nii.gz,50\nb.nii.gz,60\n")
    pipeline = read_pipeline(tmp_path / "some.yaml")
    jobs, places, out = plan(pipeline, tmp_path / "some.yaml"), Places(pipeline, tmp_path), tmp_path / "out"
    first, digits = (next(job for job in jobs if job.arm.task == task) for task in ("brainage", "vision"))
    finish(out / first.folder, manifest=hashlib.sha256(manifest.read_bytes()).hexdigest())
    listing = list_images("digits", None)
    finish(out / digits.folder, contents=listing.contents())
    probes = out / digits.folder / "fewshot" / "digits.json"
    probes.parent.mkdir()
    probes.write_text(json.dumps({"contents": listing.contents()}))
    check_sources(jobs, out, places)
    probes.write_text(json.dumps({"contents": "other"}))
    with pytest.raises(DataError, match="digits_dense/seed0 was probed on other images of digits"):
        check_sources(jobs, out, places)
    probes.unlink()
    manifest.write_text("path,age\na.nii.gz,50\nb.nii.gz,61\n")
    with pytest.raises(DataError, match="cnn3d_4mm/seed0-fold0 was made from other manifest") as refused:
        check_sources(jobs, out, places)
    assert len(refused.value.faults) == 1
