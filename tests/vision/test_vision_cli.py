"""The vision command line as a person uses it: real digits through every verb, and what goes wrong."""

import io
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from command_line import typed
from PIL import Image
from safetensors.torch import save_file

from emoe_med.data.images import list_images
from emoe_med.models.vit import ViT, ViTOptions
from emoe_med.vision.__main__ import app

TINY = """
name: {name}
data: {{dataset: {dataset}, resize: 8, val_share: 0.2, train_images: {images}}}
augment: {{crop: pad, pad: 1, mixup: 0.2}}
loss: {{label_smoothing: 0.1}}
model: {{image_size: 8, patch_size: 4, width: 12, depth: 3, heads: 2{moe}}}
training: {{epochs: 2, batch_size: {batch}, lr: 3e-3, threads: 1, ema_decay: 0.9, accumulate: 2, precision: bf16}}
evaluation: {{bootstrap: 1000, routing_images: 50}}
tracking: {{mlflow: false}}
"""
LAYER = ", moe: {blocks: [0, 1], num_experts: 3, router: {kind: eigen, rank: 3}, experts: {kind: mlp, hidden: 4}}"


run = typed(app)


def errors(result):
    return [line for line in result.output.splitlines() if line.startswith("error")]


def write_config(folder: Path, name: str, moe: str = "", dataset="digits", images=120, batch=20) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(TINY.format(name=name, moe=moe, dataset=dataset, images=images, batch=batch))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    run("train", "--config", write_config(out, "tiny_emoe", LAYER), "--out", out, "--seeds", "0,1")
    return out


def test_help_has_examples():
    for verb in ("train", "evaluate", "fewshot", "heatmap", "import-weights", "ui"):
        assert "Example" in run(verb, "--help").output


def test_training_leaves_the_run_folder_of_the_design(trained):
    run_dir = trained / "tiny_emoe" / "seed0"
    for name in ("config.yaml", "environment.json", "splits.csv", "journal.jsonl", "metrics.json"):
        assert (run_dir / name).is_file(), name
    metrics = json.loads((run_dir / "metrics.json").read_text())
    test = pd.read_csv(run_dir / "predictions" / "test.csv")
    assert list(test.columns) == ["row", "label", "predicted", "p", "rank"]
    listing = list_images("digits", None)
    assert np.array_equal(test["label"], listing.test.labels)
    assert metrics["test"]["top1"]["value"] == pytest.approx(100 * (test["label"] == test["predicted"]).mean())
    assert metrics["test"]["top5"]["value"] == pytest.approx(100 * (test["rank"] < 5).mean())
    assert ((test["rank"] == 0) == (test["label"] == test["predicted"])).all()
    assert test["p"].between(0.1, 1).all()
    assert metrics["images_per_second"]["training"] > 0
    assert set(metrics["routing"]) == {"block0", "block1"}
    layer = metrics["routing"]["block1"]
    assert {"cv", "dead", "output_cosine", "error_permuted_routing", "error_without_branch", "alpha"} <= set(layer)
    assert layer["tokens"] == 50 * 4
    assert layer["error_without_branch"]["n"] == 50
    summary = json.loads((trained / "tiny_emoe" / "summary.json").read_text())
    tops = [json.loads(p.read_text())["test"]["top1"]["value"] for p in trained.glob("tiny_emoe/seed*/metrics.json")]
    assert len(tops) == 2
    assert summary["mean"]["test/top1"] == pytest.approx(np.mean(tops))
    tracked = (trained / "tiny_emoe" / "seed0" / "journal.jsonl").read_text()
    for name in ("val/top1", "expert/block0/E02/load", "router/block1/captured_variance", "test/top1"):
        assert f'"{name}"' in tracked, name
    assert "not on the allow-list" not in (run_dir / "local.log").read_text()


def test_parts_are_disjoint_stratified_and_the_same_for_every_seed(trained):
    one, other = (pd.read_csv(trained / "tiny_emoe" / f"seed{seed}" / "splits.csv") for seed in (0, 1))
    pd.testing.assert_frame_equal(one, other)
    assert one["split"].value_counts().to_dict() == {"val": 287, "train": 120}
    labels = list_images("digits", None).train.labels
    assert np.bincount(labels[one["split"] == "train"]).tolist() == [12] * 10


def test_a_second_start_is_refused_and_resume_skips_what_is_done(trained):
    again = ("train", "--config", trained / "tiny_emoe.yaml", "--out", trained)
    assert "RUN-EXISTS" in run(*again, code=2).output
    assert "RUN-OTHER" in run(*again, "--resume", "--set", "training.epochs=9", code=2).output
    before = (trained / "tiny_emoe" / "seed0" / "metrics.json").stat().st_mtime_ns
    run(*again, "--resume")
    assert (trained / "tiny_emoe" / "seed0" / "metrics.json").stat().st_mtime_ns == before


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path):
    longer = ("--set", "training.epochs=6")
    for folder in ("whole", "stopped"):
        (tmp_path / folder).mkdir()
        write_config(tmp_path / folder, "tiny", LAYER)
    folders = (tmp_path / "whole", tmp_path / "stopped")
    commands = [("train", "--config", folder / "tiny.yaml", "--out", folder, *longer) for folder in folders]
    run(*commands[0])
    program = [sys.executable, "-m", "emoe_med.vision", *map(str, commands[1])]
    with subprocess.Popen(program, stderr=subprocess.PIPE, text=True) as child:
        for line in child.stderr:
            if line.startswith("epoch 2/6"):
                child.send_signal(signal.SIGTERM)
                break
        child.stderr.read()
    assert child.returncode == 143
    assert not (tmp_path / "stopped" / "tiny" / "seed0" / "metrics.json").exists()
    run(*commands[1], "--resume")
    last = "tiny/seed0/checkpoints/step-00000018/model.safetensors"
    assert (folders[0] / last).read_bytes() == (folders[1] / last).read_bytes()


def test_evaluate_again_and_elsewhere(trained, tmp_path):
    run_dir = tmp_path / "tiny_emoe" / "seed0"
    shutil.copytree(trained / "tiny_emoe" / "seed0", run_dir)
    before = json.loads((run_dir / "metrics.json").read_text())
    assert "top1" in run("evaluate", "--run", run_dir).output
    assert json.loads((run_dir / "metrics.json").read_text()) == before
    shown = json.loads(run("evaluate", "--run", run_dir, "--json").output)
    assert shown["test"] == before["test"]
    (line,) = errors(run("evaluate", "--run", run_dir, "--data-root", tmp_path, code=3))
    assert "digits ships with a library" in line
    assert not (run_dir / "evaluations").exists()
    shown = run("evaluate", "--run", run_dir.parent, code=2).output
    assert (
        shown
        == f"error RUN-NONE  {run_dir.parent}  holds no run; name the folder of a seed, as runs/digits_emoe/seed0\n"
    )


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("metrics.json", None, "is not there.*train --resume"),
        ("predictions/val.csv", None, "is not there.*train --resume"),
        ("metrics.json", "{", "is damaged"),
        ("metrics.json", "3", "is damaged"),
        ("predictions/test.csv", "", "is damaged"),
        ("predictions/test.csv", "row,label\n0,1\n", "is damaged.*rank"),
        ("predictions/test.csv", "row,rank\n", "is damaged.*no ranks"),
        ("predictions/test.csv", "row,rank\n0,\n", "is damaged"),
        ("predictions/test.csv", "row,rank\n0,-1\n", "is damaged.*no ranks"),
        ("predictions/test.csv", "row,rank\n0,a\n", "is damaged"),
        ("predictions/test.csv", "\0\xff", "is damaged"),
    ],
)
def test_scoring_again_what_is_damaged_is_one_line_and_changes_nothing(trained, tmp_path, name, content, told):
    run_dir = tmp_path / "seed0"
    shutil.copytree(trained / "tiny_emoe" / "seed0", run_dir, ignore=shutil.ignore_patterns("checkpoints"))
    (run_dir / name).unlink()
    if content is not None:
        (run_dir / name).write_text(content)
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    shown = run("evaluate", "--run", run_dir, code=3).output
    assert re.fullmatch(rf"error RUN-METRICS  {run_dir / name}  {told}.*\n", shown)
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


def test_probes_and_heat_map_of_a_run(trained):
    run_dir = trained / "tiny_emoe" / "seed0"
    assert "1-shot" in run("fewshot", "--run", run_dir, "--shots", "1,5", "--draws", 5).output
    report = json.loads((run_dir / "fewshot" / "digits.json").read_text())
    assert set(report) == {"contents", "weights", "1", "5"}
    assert set(report["5"]) == {"token", "mean"}
    assert set(report["5"]["mean"]) == {"ridge", "logistic", "nearest_mean"}
    for probe in ("ridge", "logistic"):
        found = report["5"]["mean"][probe]
        assert found["low"] < found["value"] < found["high"]
        assert found["value"] > 30  # pixels of digits are nearly separable, even behind two epochs
    run("fewshot", "--run", run_dir, "--shots", "5,2", "--draws", 2)
    again = json.loads((run_dir / "fewshot" / "digits.json").read_text())
    assert again["5"] == report["5"]  # more draws stay
    assert again["2"]["mean"]["ridge"]["low"] is None  # an interval of two draws would look precise
    path = run_dir / "fewshot" / "digits.json"
    for other in ("contents", "weights"):
        path.write_text(json.dumps({**again, other: "another"}))
        run("fewshot", "--run", run_dir, "--shots", "2", "--draws", 2)
        assert json.loads(path.read_text()) == {key: again[key] for key in ("contents", "weights", "2")}
    path.write_text("{")
    assert "RUN-METRICS" in run("fewshot", "--run", run_dir, "--shots", "2", "--draws", 2, code=3).output
    path.write_text(json.dumps(again))
    for shots in ("a", "0", "0,5", "²"):
        assert "CLI-NUMBERS" in run("fewshot", "--run", run_dir, "--shots", shots, code=2).output
    assert "IMG-SHOTS" in run("fewshot", "--run", run_dir, "--shots", "200", code=3).output
    environment = run_dir / "environment.json"
    as_it_was = environment.read_text()
    environment.write_text(json.dumps({**json.loads(as_it_was), "contents": "other images"}))
    assert "CKPT-OTHER" in run("fewshot", "--run", run_dir, "--shots", "2", code=4).output
    environment.write_text(as_it_was)
    assert "block1" in run("heatmap", "--run", run_dir).output
    folder = run_dir / "expert_maps"
    table = pd.read_csv(folder / "expert_class.csv")
    by_class = table[table["layer"] == "block0"].groupby("class")
    np.testing.assert_allclose(by_class["patches"].sum(), 4)  # every patch of an image has one expert
    np.testing.assert_allclose(by_class["p_expert_given_class"].sum(), 1)
    assert (folder / "mean.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "expert_class.html").read_text()
    shown = json.loads(re.search(r"^const DATA = (.*);$", page, re.M)[1])
    first = table[(table["layer"] == "block1") & (table["expert"] == "E00")]
    np.testing.assert_allclose(shown["maps"]["block1"][0], first["patches"], atol=1e-4)
    assert "http" not in page  # asks nothing of anybody
    figures = json.loads((folder / "expert_class.json").read_text())
    assert set(figures) == {"block0", "block1", "mean"}
    assert figures["mean"]["nmi"] == pytest.approx((figures["block0"]["nmi"] + figures["block1"]["nmi"]) / 2)


def test_a_heat_map_is_of_the_images_of_its_run(trained, tmp_path):
    copy = shutil.copytree(trained / "tiny_emoe" / "seed0", tmp_path / "run")
    environment = json.loads((copy / "environment.json").read_text())
    (copy / "environment.json").write_text(json.dumps({**environment, "contents": "of other pictures"}))
    assert "contents was of other pictures" in run("heatmap", "--run", copy, code=4).output


def write_images(root: Path, count=6) -> Path:
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for number, name in enumerate(("n01", "n02")):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 80, (12, 10, 3), np.uint8) + np.uint8(150 * number)
                Image.fromarray(pixels).save(root / part / name / f"{i}.JPEG")
    return root


def test_a_folder_of_images_trains_and_a_broken_one_is_named(tmp_path):
    root = write_images(tmp_path / "imagenet")
    config = write_config(tmp_path, "folders", dataset="imagenet", images=8, batch=4)
    command = ("train", "--config", config, "--data-root", root, "--out", tmp_path / "runs")
    assert "top-1" in run(*command).output
    broken = root / "train" / "n02" / "3.JPEG"
    broken.write_bytes(broken.read_bytes()[:200])
    for workers in (0, 1):
        result = run(*command[:-1], tmp_path / f"w{workers}", "--set", f"training.workers={workers}", code=3)
        (line,) = set(errors(result))
        assert "IMG-DECODE" in line
        assert str(broken) in line
    shutil.rmtree(root / "val" / "n02")
    (root / "val" / "n02").mkdir()
    (line,) = errors(run(*command[:-1], tmp_path / "empty", code=3))
    assert "IMG-EMPTY" in line
    assert not (tmp_path / "empty").exists()


def test_other_images_are_scored_apart_and_resume_wants_the_same(tmp_path, caplog):
    """Other pictures of the same names are told from those of the run, by their sizes."""
    root = write_images(tmp_path / "imagenet")
    config = write_config(tmp_path, "folders", dataset="imagenet", images=8, batch=4)
    command = ("train", "--config", config, "--data-root", root, "--out", tmp_path / "runs")
    run(*command)
    run_dir = tmp_path / "runs" / "folders" / "seed0"
    evaluate = ("evaluate", "--run", run_dir, "--data-root")
    run(*evaluate, root)
    folder = tmp_path / "v2"
    shutil.copytree(root / "val", folder)
    for path in folder.rglob("*.JPEG"):
        Image.open(path).resize((20, 20)).save(path)
    (folder / "n01" / "5.JPEG").unlink()
    run(*evaluate, folder)
    shutil.copytree(root / "val" / "n02", tmp_path / "part" / "val" / "n02")
    run(*evaluate, tmp_path / "part")
    assert "without an image here: 1 of 2" in caplog.text
    found = {len(pd.read_csv(path)): path for path in run_dir.glob("evaluations/*/test.csv")}
    assert set(found) == {12, 11, 6}
    assert found[12].read_text() == (run_dir / "predictions" / "test.csv").read_text()
    assert pd.read_csv(found[6])["label"].tolist() == [1] * 6
    (folder / "n03").mkdir()
    (line,) = errors(run(*evaluate, folder, code=3))
    assert "n03 is none of the 2 classes" in line

    run(*command, "--resume")
    Image.new("RGB", (12, 12)).save(root / "train" / "n01" / "0.JPEG")
    (line,) = errors(run(*command, "--resume", code=4))
    assert "contents was" in line
    facts = json.loads((run_dir / "environment.json").read_text())
    del facts["contents"]  # as a run of an earlier version
    (run_dir / "environment.json").write_text(json.dumps(facts))
    run(*command, "--resume")


def test_bad_requests_are_one_line_each(tmp_path, monkeypatch):
    monkeypatch.delenv("EMOE_MED_DATA_ROOT", raising=False)
    out = ("--out", tmp_path / "runs")
    for arguments, code, told in (
        (("--dataset", "imagenet"), 3, "IMG-ROOT"),
        (("--dataset", "cifar10", "--data-root", tmp_path / "nowhere"), 3, "IMG-ROOT"),
        (("--dataset", "imagenet", "--data-root", tmp_path), 3, "IMG-LAYOUT"),
        (("--dataset", "mnist"), 2, "CLI-DATASET"),
        (("--seeds", "0,x"), 2, "CLI-NUMBERS"),
        (("--seeds", "²"), 2, "CLI-NUMBERS"),
        (("--data-root", tmp_path), 3, "IMG-ROOT"),
        (("--config", tmp_path / "none.yaml"), 2, "CFG-MISSING"),
        (("--set", "model.depths=3"), 2, "CFG-KEY"),
        (("--set", f"model.weights={tmp_path / 'none'}"), 4, "WGT-FILE"),
    ):
        (line,) = errors(run("train", *out, *arguments, code=code))
        assert told in line
    assert not (tmp_path / "runs").exists()


def published(path: Path, outputs=10, width=12) -> Path:
    torch.manual_seed(5)
    net = ViT(outputs, ViTOptions((16, 16), 4, 1, width, 3, 2))
    save_file(dict(net.state_dict()), path)
    return path


def test_published_weights_are_imported_and_trained_on(tmp_path):
    source, ours = published(tmp_path / "published.safetensors"), tmp_path / "ours.safetensors"
    assert "WGT-NORM" in run("import-weights", source, "-o", ours, code=4).output
    constants = ("--mean", "0.25", "--std", "0.5")
    shown = run("import-weights", source, "-o", ours, "--image-size", 8, *constants).output
    assert "width 12, depth 3, patches of 4, images of 8, 10 classes, 0 routed layers" in shown
    frozen = "model.freeze=[blocks, patch_embed, pos_embed, cls_token, norm]"
    config = write_config(tmp_path, "started", LAYER)
    given = ("--config", config, "--out", tmp_path, "--set", f"model.weights={ours}", "--set", frozen)
    assert "holds random ones" in run("train", *given[:4], "--set", frozen, code=2).output
    run("train", *given)
    from emoe_med.training.checkpoint import CheckpointFolder

    checkpoint = CheckpointFolder(tmp_path / "started" / "seed0").load("best")
    meta = checkpoint.state["meta"]
    assert (meta["mean"], meta["std"]) == ([0.25], [0.5])
    from safetensors.torch import load_file

    before = load_file(source)
    assert torch.equal(checkpoint.model["blocks.2.mlp.fc1.weight"], before["blocks.2.mlp.fc1.weight"])
    assert not torch.equal(checkpoint.model["head.weight"], before["head.weight"])
    assert checkpoint.model["blocks.1.moe.experts.w2"].abs().sum() > 0
    published(source, width=16)
    run("import-weights", source, "-o", ours, "--image-size", 8, *constants)
    refused = run("train", *given, "--resume", code=4)
    assert "weights was" in refused.output
    faults = errors(run("train", *given[:2], "--out", tmp_path / "other", *given[4:], code=4))
    assert all("CKPT-SHAPE" in line for line in faults)
    assert any("pos_embed has shape [1, 5, 16], the model has [1, 5, 12]" in line for line in faults)


def test_an_import_that_fails_leaves_no_file(tmp_path):
    source, ours = published(tmp_path / "published.safetensors"), tmp_path / "ours.safetensors"
    constants = ("--mean", "0.25", "--std", "0.5")
    assert "CLI-SIZE" in run("import-weights", source, "-o", ours, "--image-size", 9, *constants, code=2).output
    assert "CLI-NUMBERS" in run("import-weights", source, "-o", ours, "--mean", "a", code=2).output
    source.write_bytes(source.read_bytes()[:-9])
    assert "WGT-FILE" in run("import-weights", source, "-o", ours, *constants, code=4).output
    data = io.BytesIO()
    torch.save({"weights": 3}, data)
    (tmp_path / "a.pth").write_bytes(data.getvalue())
    assert "WGT-PTH" in run("import-weights", tmp_path / "a.pth", "-o", ours, *constants, code=4).output
    assert not ours.exists()
