from pathlib import Path

import pytest

from emoe_med.config import BrainAgeConfig, dump_run, load_run, read_yaml
from emoe_med.errors import ConfigError

CONFIGS = sorted((Path(__file__).parent.parent / "configs" / "brainage").glob("*.yaml"))
SMALL = "name: x\ntraining: {epochs: 3, lr: 2e-3}\n"


def load(tmp_path, text, *assignments) -> BrainAgeConfig:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return load_run(path, list(assignments))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_run_loads_builds_and_is_named_for_its_file(path):
    from emoe_med.brainage.net import BrainAgeNet
    from emoe_med.models.heads import TrainingAges

    config = load_run(path)
    assert config.name == path.stem
    BrainAgeNet(config.model, TrainingAges.of([20.0, 80.0]))


def test_arms_differ_in_the_layer_alone():
    for suffix in ("", "_4mm"):
        runs = [load_run(CONFIGS[0].parent / f"{arm}{suffix}.yaml") for arm in
                ("emoe", "cnn3d", "dense_adapter", "dense_adapter_8x")]  # fmt: skip
        stripped = [r.model_copy(update={"name": "", "model": r.model.model_copy(update={"moe": None})}) for r in runs]
        assert all(run == stripped[0] for run in stripped)


def test_other_networks_of_the_small_size_learn_from_the_same_data():
    runs = [load_run(CONFIGS[0].parent / f"{arm}_4mm.yaml") for arm in ("emoe", "deepmoe", "ermoe_ba")]
    for run in runs:
        assert (run.data, run.augment, run.evaluation) == (runs[0].data, runs[0].augment, runs[0].evaluation)
        assert run.training.model_copy(update={"lr": 1.0}) == runs[0].training.model_copy(update={"lr": 1.0})


def test_scientific_numbers_are_numbers_and_the_dump_reads_back(tmp_path):
    config = load(tmp_path, SMALL, "training.batch_size=4")
    assert config.training.lr == 0.002
    assert load(tmp_path, dump_run(config)) == config


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (SMALL + "name: y\n", "stands twice"),
        ("a: &x 1\nb: *x\n", "aliases"),
        ("a: !!python/object/apply:os.system ['touch canary']\n", "could not determine a constructor"),
        ("[1, 2]\n", "no mapping"),
        ("a: [1\n", "expected"),
        (SMALL + "unknown: 1\n", "unknown"),
        ("name: x\ntraining: {epochs: 0, lr: 1}\n", "training.epochs"),
        ("name: x\ntraining: {epochs: three, lr: 1}\n", "training.epochs"),
        ("name: ../x\ntraining: {epochs: 1, lr: 1}\n", "name"),
        (SMALL + "model: {moe: {after_block: 1, router: {kind: eigne}}}\n", "eigne"),
        (SMALL + "model: {moe: {after_block: 1, top_k: 9}}\n", "top_k"),
        (SMALL + "model: {moe: {after_block: 1, router: {kind: ermoe}}}\n", "needs experts with a basis: kind eigen"),
        (SMALL + "model: {moe: {after_block: 1, router: {kind: linear, noise: 0}}}\n", "importance_load needs noise"),
        (SMALL + "model: {moe: {after_block: 1, router: {kind: eigen, basis: paper_code}}}\n", "neither centres"),
    ],
)
def test_refused_with_the_key(tmp_path, text, told, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=told):
        load(tmp_path, text)
    assert not (tmp_path / "canary").exists()


def test_a_huge_or_binary_file_is_refused(tmp_path):
    path = tmp_path / "big.yaml"
    path.write_text("a: 1\n" * 300_000)
    with pytest.raises(ConfigError, match="1 MB"):
        read_yaml(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        read_yaml(path)


def test_all_faults_are_told_at_once(tmp_path):
    with pytest.raises(ConfigError) as refused:
        load(tmp_path, "name: x\nfoo: 1\ntraining: {epochs: -1, lr: -1}\n")
    assert len(refused.value.faults) == 3


@pytest.mark.parametrize("assignment", ["training.lr", "=3", "name.x=3", "training.lr=[1"])
def test_bad_assignments(tmp_path, assignment):
    with pytest.raises(ConfigError):
        load(tmp_path, SMALL, assignment)
