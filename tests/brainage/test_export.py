"""A bundle predicts as its run does, under MONAI's own command; it names nobody; damage and other machines are told."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from command_line import typed

from emoe_med.brainage import bundle as bundles
from emoe_med.brainage.__main__ import app
from emoe_med.brainage.export import export
from emoe_med.brainage.selftest import drawn_scan, measure, other_versions, selftest
from emoe_med.data.prepare import Preparation
from emoe_med.errors import CheckpointError
from emoe_med.training.amend import amend
from emoe_med.training.seal import sealed

REPOSITORY = Path(__file__).parent.parent.parent
CONFIG = """
name: tiny
data: {spacing_mm: 8, oversample: 1, align: centred, folds: 3, val_share: 0.3}
model:
  stem: 1
  channels: [4, 8]
  pooled: 1
  neck: 8
  head: l1
  moe: {after_block: 1, num_experts: 3, router: {kind: eigen, rank: 3}, experts: {kind: mlp, hidden: 2}}
training: {epochs: 4, batch_size: 4, lr: 1e-2, threads: 1, select: last}
evaluation: {bootstrap: 1000}
tracking: {mlflow: false}
"""


run = typed(app)


@pytest.fixture(scope="module")
def trained(cohort, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    config = out / "tiny.yaml"
    config.write_text(CONFIG)
    run("train", "--manifest", cohort, "--config", config, "--out", out)
    return out / "tiny" / "seed0-fold0"


@pytest.fixture(scope="module")
def bundle(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    assert "self-test passed" in run("export", "--run", trained, "-o", folder).output
    return folder


def monai(folder, *arguments):
    pytest.importorskip("fire", reason="python -m monai.bundle needs the extra `export`")
    command = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", "--config_file"]
    command += [str(folder / "configs" / "inference.json"), "--bundle_root", str(folder), *map(str, arguments)]
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)


@pytest.fixture(scope="module")
def scans(cohort, tmp_path_factory):
    """A manifest: drawn heads, one of an age nobody had; a file that is no image; a real head where there is one."""
    folder = tmp_path_factory.mktemp("scans")
    table = pd.read_csv(cohort)[["participant_id", "session_id", "image", "mask", "age"]]
    table.loc[0, "age"] = 110.0
    for column in ("image", "mask"):
        table[column] = [str(cohort.parent / path) for path in table[column]]
    (folder / "broken.nii.gz").write_bytes(gzip.compress(b"no image"))
    table.loc[len(table)] = ["sub-broken", "ses-01", str(folder / "broken.nii.gz"), None, 50.0]
    real = Path(os.environ.get("EMOE_MED_TEST_DATA", "nowhere")) / "ixi"
    if real.is_dir():
        row = pd.read_csv(real / "manifest.csv").iloc[0]
        table.loc[len(table)] = ["sub-real", "ses-01", str(real / row["image"]), str(real / row["labels"]), row["age"]]
    table.to_csv(folder / "scans.csv", index=False)
    return folder / "scans.csv"


def test_monais_command_gives_what_predict_gives(bundle, trained, scans, tmp_path):
    run("predict", "--run", trained, "-i", scans, "--data-root", "/", "-o", tmp_path / "run.csv", code=8)
    done = monai(bundle, "--input", scans, "--data_root", "/", "--output", tmp_path / "bundle.csv")
    assert done.returncode == 8, done.stderr  # some are refused
    assert "Traceback" not in done.stderr  # MONAI wraps every exception of a call; ours is none
    ours, theirs = (pd.read_csv(tmp_path / f"{name}.csv") for name in ("run", "bundle"))
    pd.testing.assert_frame_equal(ours, theirs, atol=0.01, rtol=0)
    assert {"ok", "check", "refused"} == set(ours["status"])
    assert ours["predicted_age"].std() > 0.1  # ten times what may differ
    assert {"lower", "upper", "ood_score", "contract"} <= set(ours.dropna(axis=1, how="all").columns)
    assert ours["in_training"].any()
    assert ours["predicted_age"].isna().sum() == 1  # the real head has an age


def test_the_network_alone_is_what_monai_is_told_of(bundle):
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    told = metadata["network_data_format"]["inputs"]["image"]
    ages = bundles.AgeNetwork(bundle).eval()(torch.zeros(2, told["num_channels"], *told["spatial_shape"]))
    assert ages.shape == (2, metadata["network_data_format"]["outputs"]["pred"]["num_channels"])
    assert ages.dtype == torch.float32
    required = {
        *("schema", "version", "monai_version", "pytorch_version", "numpy_version", "required_packages_version"),
        *("task", "description", "authors", "copyright", "network_data_format"),
    }
    assert required <= set(metadata)
    assert metadata["required_packages_version"]["emoe-med"]


def changed(bundle, tmp_path):
    copy = tmp_path / "changed"
    shutil.copytree(bundle, copy)
    return copy


@pytest.mark.parametrize("name", bundles.BOUND)
def test_a_changed_byte_is_refused_by_the_name_of_its_file(bundle, tmp_path, name):
    copy = changed(bundle, tmp_path)
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    output = run("selftest", "--bundle", copy, code=4).output
    assert re.fullmatch(rf"error CKPT-DAMAGED  \S+{name}  SHA-256 differs\n", output)


def test_a_changed_contract_ends_the_call_that_monai_makes_with_one_line(bundle, scans, tmp_path, capsys):
    copy = changed(bundle, tmp_path)
    contract = copy / bundles.CONTRACT
    record = json.loads(contract.read_text())
    record["meta"]["training_ages"]["high"] = 120.0
    contract.write_text(json.dumps(record))
    with pytest.raises(SystemExit) as end:
        bundles.run(copy, scans, tmp_path / "ages.csv")
    assert end.value.code == 4
    assert capsys.readouterr().err.splitlines() == [f"error CKPT-DAMAGED  {contract}  SHA-256 differs"]
    assert not (tmp_path / "ages.csv").exists()


def resealed(bundle, tmp_path, change):
    copy = changed(bundle, tmp_path)
    record = json.loads((copy / bundles.CONTRACT).read_text())
    change(record)
    (copy / bundles.CONTRACT).write_bytes(sealed(record))
    return copy


def test_another_version_of_the_chain_is_refused_with_the_version_to_install(bundle, tmp_path):
    copy = resealed(bundle, tmp_path, lambda record: record["meta"]["chain"].update(digest="0" * 16))
    with pytest.raises(CheckpointError, match=r"BUN-VERSION .*chain .*exported by emoe-med \d"):
        bundles.load_bundle(copy)
    copy = resealed(bundle, tmp_path / "2", lambda record: record["config"]["training"].update(tomorrow=1))
    with pytest.raises(CheckpointError, match=r"BUN-VERSION .*unknown settings"):
        bundles.load_bundle(copy)


def test_selftest_says_the_same_here_and_names_what_is_another(bundle, tmp_path):
    assert "gives the same numbers" in run("selftest", "--bundle", bundle).output
    found = json.loads(run("selftest", "--bundle", bundle, "--json").output)
    assert found["same"]
    assert [stage["difference"] for stage in found["stages"]] == [0.0] * 5
    copy = resealed(bundle, tmp_path, lambda record: record["environment"]["versions"].update(torch="1.0"))
    assert f"torch: 1.0 there, {torch.__version__} here" in run("selftest", "--bundle", copy).output


def test_a_model_of_preprocessed_volumes_tries_its_preprocessing_too(trained, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(trained, run_dir)
    steps = Preparation(8.0, "light").steps()
    checkpoint = run_dir / "checkpoints" / (run_dir / "checkpoints" / "last").read_text().strip()
    amend(
        checkpoint, {"strip": {"mask": ["mask"], "stated": {json.dumps(steps, sort_keys=True): 14}, "prepared": steps}}
    )
    read = export(run_dir, tmp_path / "bundle")
    raw = read.record["selftest"]
    read.predictor.model.contract["strip"]["prepared"] = None
    tensors, figures = measure(read.predictor.model, drawn_scan(read.folder))
    assert not torch.equal(tensors["volume"], read.vectors["volume"])
    assert figures["years"] != raw["years"]
    read.predictor.model.contract["strip"]["prepared"] = steps | {"Template": "another"}
    (other,) = other_versions(read)
    assert other.startswith("preprocessing: Template is MNI152")


def test_selftest_names_the_stage_that_differs(bundle, tmp_path):
    copy = resealed(bundle, tmp_path, lambda record: record["selftest"].update(status="never"))
    output = run("selftest", "--bundle", copy, code=8).output
    assert re.findall(r"^DIFFERS *(.*?)  ", output, re.M) == ["verdict"]
    assert "gives OTHER numbers" in output

    read = bundles.load_bundle(bundle)
    read.vectors["matrix"][0, 3] += 3.0  # the exporting machine placed the head 3 mm to the right, at the same volume
    stages = {stage.name: stage for stage in selftest(read)}
    assert [name for name, stage in stages.items() if not stage.same] == ["chain, placement"]
    assert stages["chain, placement"].difference == pytest.approx(3.0)

    read = bundles.load_bundle(bundle)
    with torch.no_grad():
        read.predictor.model.net.head.mean += 2.5  # this machine's network says 2.5 years more of anything
    stages = {stage.name: stage for stage in selftest(read)}
    assert stages["network"].difference == pytest.approx(2.5, abs=1e-3)
    assert {name for name, stage in stages.items() if not stage.same} >= {"network", "scan to age"}
    assert stages["chain, volume"].same


def test_nobody_is_named_and_nothing_is_pickled(bundle, cohort, trained):
    table = pd.read_csv(cohort)
    ids = {*table["participant_id"], *(name.removeprefix("sub-") for name in table["participant_id"])}
    names = {Path(path).name for column in ("image", "mask", "labels") for path in table[column]}
    secrets = [*names, *(i for i in ids if not i.isdigit()), str(cohort.parent), str(trained), str(Path.home()), "/tmp"]
    images = {(cohort.parent / path).read_bytes() for path in table["image"]}
    files = [path for path in bundle.rglob("*") if path.is_file()]
    assert len(files) == 9
    for path in files:
        content = path.read_bytes()
        assert content not in images
        content += gzip.decompress(content) if path.suffix == ".gz" else b""
        assert not [secret for secret in secrets if secret.encode() in content], path
        assert not re.search(rb"\x80[\x02-\x05]}?\x95|PK\x03\x04", content[:64]), path
        # an id on its own, as a number in a table would be
        if path.suffix in (".json", ".md"):
            assert not [i for i in ids if re.search(rf"(?<![\w.]){i}(?![\w.])", content.decode())], path


def test_the_card_tells_what_the_run_knows_and_marks_what_only_its_author_does(bundle, trained, cohort):
    card = (bundle / bundles.CARD).read_text()
    metrics = json.loads((trained / "metrics.json").read_text())
    mae = metrics["test"]["mae"]
    assert f"{mae['value']:.2f} [{mae['low']:.2f}, {mae['high']:.2f}], n = {mae['n']}" in card
    assert "Not for diagnosis" in card
    assert card.count("**author must complete**") > 8
    assert metrics["contract"] in card
    splits = pd.read_csv(trained / "splits.csv").assign(**pd.read_csv(cohort)[["participant_id", "sex", "age"]])
    train = splits[splits["split"] == "train"].sort_values("age").drop_duplicates("participant_id")
    for sex, count in train["sex"].value_counts().items():
        assert f"| {sex} | {count if count >= 5 else 'fewer than 5'} |" in card
    for decade, count in (train["age"] // 10 * 10).astype(int).value_counts().items():
        assert f"| {decade}-{decade + 9} | {count if count >= 5 else 'fewer than 5'} |" in card
    assert f"digests of {(splits['split'] != 'test').sum()} training and validation volumes" in card
    by_age = [name for name, found in metrics["by_age"].items() if found["mae"]["n"] < 5]
    assert by_age
    assert not [name for name in by_age if f"| age {name} |" in card]


def test_an_export_is_whole_or_not_there(trained, bundle, tmp_path):
    assert "BUN-EXISTS" in run("export", "--run", trained, "-o", bundle, code=2).output
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    (copy / "metrics.json").unlink()
    assert "RUN-METRICS" in run("export", "--run", copy, "-o", tmp_path / "bundle", code=3).output
    shutil.copy(trained / "metrics.json", copy)
    for file in (copy / "checkpoints").glob("step-*/model.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    assert "CKPT-DAMAGED" in run("export", "--run", copy, "-o", tmp_path / "bundle", code=4).output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    assert "holds no run" in run("export", "--run", tmp_path, "-o", tmp_path / "bundle", code=2).output
