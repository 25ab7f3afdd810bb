"""What a pipeline file is turned into, and what is refused before anything runs."""

from itertools import pairwise
from pathlib import Path

import pytest

from emoe_med.errors import ConfigError, DataError
from emoe_med.pipeline.plan import Places, commands, plan, read_pipeline

ROOT = Path(__file__).parents[2]
DIGITS = "configs/vision/digits_emoe.yaml"
SHIPPED = sorted((ROOT / "pipelines").glob("*.yaml"))


def write(folder, runs, table="columns: [{name: top, metric: test/top1}]", **more):
    path = folder / "some.yaml"
    rest = "".join(f"{key}: {value}\n" for key, value in more.items())
    path.write_text(f"name: some\nruns:\n{''.join(f'  - {run}' + chr(10) for run in runs)}table:\n  {table}\n{rest}")
    return path


def planned(path, only=()):
    return plan(read_pipeline(path), path, only)


def codes(error):
    return [fault.code for fault in error.value.faults]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_pipeline_can_be_planned(path):
    jobs = planned(path)
    assert len({job.folder for job in jobs}) == len(jobs)
    pipeline = read_pipeline(path)
    assert pipeline.name == path.stem
    shown = {row.arm for row in pipeline.table.rows}
    assert not shown or {job.arm.name for job in jobs} <= shown  # nothing is run that no row shows


def test_every_full_pipeline_has_a_twin():
    names = {path.stem for path in SHIPPED}
    full = {name for name in names if not name.endswith("_smoke") and not name.startswith("comparison")}
    assert full == {
        "paper_table1",
        "paper_table2_fewshot",
        "paper_fig2_oneshot",
        "paper_fig3_heatmap",
        "paper_brainage",
        "ermoe",
    }
    assert {f"{name}_smoke" for name in full} <= names


def test_the_few_shot_tables_train_nothing_that_table_1_has():
    first, second, third = (
        {job.folder for job in planned(ROOT / "pipelines" / f"{name}.yaml")}
        for name in ("paper_table1", "paper_table2_fewshot", "paper_fig2_oneshot")
    )
    assert first == second == third


def test_a_folder_is_keyed_by_the_complete_configuration_and_not_by_the_seed(tmp_path):
    runs = [f"{{config: {DIGITS}, seeds: [0, 3]}}", f"{{config: {DIGITS}, set: [name=other]}}"]
    jobs = planned(write(tmp_path, runs))
    assert [job.label for job in jobs] == ["digits_emoe/seed0", "other/seed0", "digits_emoe/seed3"]
    assert jobs[0].arm.key == jobs[2].arm.key
    assert jobs[0].arm.key != jobs[1].arm.key
    again = planned(write(tmp_path, runs, set="[training.lr=4e-3]"))  # what the file says anyway
    assert again[0].folder == jobs[0].folder
    changed = planned(write(tmp_path, runs, set="[training.lr=5e-3]"))
    assert changed[0].folder != jobs[0].folder


def test_a_table_grows_evenly_over_folds_and_seeds(tmp_path):
    runs = [
        "{config: configs/brainage/cnn3d_4mm.yaml, folds: [0, 2], seeds: [0, 1]}",
        "{config: configs/brainage/emoe_4mm.yaml, folds: [0, 2]}",
    ]
    jobs = planned(write(tmp_path, runs, "columns: [{name: MAE, metric: test/mae}]"))
    assert [job.label for job in jobs] == [
        "cnn3d_4mm/seed0-fold0",
        "emoe_4mm/seed0-fold0",
        "cnn3d_4mm/seed0-fold2",
        "emoe_4mm/seed0-fold2",
        "cnn3d_4mm/seed1-fold0",
        "cnn3d_4mm/seed1-fold2",
    ]


def test_only_narrows_by_arm_or_by_run(tmp_path):
    runs = [f"{{config: {DIGITS}, seeds: [0, 1]}}", "{config: configs/vision/digits_dense.yaml, seeds: [0, 1]}"]
    path = write(tmp_path, runs)
    assert [job.label for job in planned(path, ["*_emoe"])] == ["digits_emoe/seed0", "digits_emoe/seed1"]
    assert len(planned(path, ["*/seed1"])) == 2
    with pytest.raises(ConfigError) as error:
        planned(path, ["nothing"])
    assert codes(error) == ["PIPE-ONLY"]


def test_all_missing_and_faulty_run_files_are_named_at_once(tmp_path):
    runs = [
        "{config: configs/vision/not_there.yaml}",
        "{config: configs/brainage/nor_this.yaml}",
        f"{{config: {DIGITS}, set: [training.lrr=1]}}",
    ]
    path = write(tmp_path, runs)
    with pytest.raises(ConfigError) as error:
        planned(path)
    assert codes(error) == ["CFG-MISSING", "CFG-MISSING", "CFG-KEY"]
    assert "not_there.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("runs", "table", "code"),
    [
        ([f"{{config: {DIGITS}}}", f"{{config: {DIGITS}, set: [training.lr=1e-3]}}"], None, "PIPE-NAMES"),
        ([f"{{config: {DIGITS}, folds: [0]}}"], None, "PIPE-FOLDS"),
        (["{config: configs/brainage/emoe_4mm.yaml, folds: [5]}"], None, "PIPE-FOLDS"),
        ([f"{{config: {DIGITS}, seeds: [1, 1]}}"], None, "PIPE-SEEDS"),
        (["{config: configs/brainage/emoe_4mm.yaml, folds: []}"], None, "PIPE-FOLDS"),
        (["{config: pipelines/ermoe.yaml}"], None, "PIPE-TASK"),
        ([f"{{config: {DIGITS}, sets: []}}"], None, "CFG-KEY"),
        ([f"{{config: {DIGITS}}}"], "columns: [{name: x, metric: test/loss}]", "CFG-KEY"),
        ([f"{{config: {DIGITS}}}"], "{columns: [{name: x, metric: test/top1}], paired_with: gone}", "PIPE-ARM"),
        ([f"{{config: {DIGITS}}}"], "columns: [{name: x, metric: fewshot/digits/1/mean/ridge}]", "PIPE-STEP"),
        (
            [f"{{config: {DIGITS}}}"],
            "{columns: [{name: x, metric: test/top1}], rows: [{name: a, printed: [1, 2]}]}",
            "CFG-KEY",
        ),
        ([f"{{config: {DIGITS}}}"], "{columns: [{name: x, metric: test/top1}], rows: [{name: a}]}", "CFG-KEY"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, runs, table, code):
    path = write(tmp_path, runs, table) if table else write(tmp_path, runs)
    with pytest.raises(ConfigError) as error:
        planned(path)
    assert codes(error) == [code]


def test_missing_data_and_weights_are_named_at_once(tmp_path, monkeypatch):
    monkeypatch.delenv("EMOE_MED_DATA_ROOT", raising=False)
    path = ROOT / "pipelines" / "paper_table2_fewshot.yaml"
    places = Places(read_pipeline(path), tmp_path)
    with pytest.raises(DataError) as error:
        places.check(planned(path, ["vit_b"]))
    assert codes(error) == ["PIPE-WEIGHTS", "PIPE-DATA", "PIPE-DATA", "PIPE-DATA"]
    path = ROOT / "pipelines" / "paper_brainage.yaml"
    with pytest.raises(DataError, match="give --manifest"):
        Places(read_pipeline(path)).check(planned(path))
    with pytest.raises(DataError, match="manifest of the scans is not here"):
        Places(read_pipeline(path), manifest=tmp_path / "typo.csv").check(planned(path))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_what_routing_is_worth_is_told_in_the_unit_of_its_task(path):
    tasks = {job.arm.task for job in planned(path)}
    for column in read_pipeline(path).table.columns:
        for prefix, task in (("routing/error_", "vision"), ("routing/mae_", "brainage")):
            assert not column.metric.startswith(prefix) or task in tasks, column.metric


def test_commands_are_what_a_person_would_type(tmp_path):
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "all.csv").write_text("image,age\n")
    path = write(
        tmp_path,
        [
            "{config: configs/brainage/emoe_4mm.yaml, folds: [1], seeds: [2]}",
            f"{{config: {DIGITS}}}",
            f'{{config: {DIGITS}, set: [name=adapter, model.moe.num_experts=1, "model.moe.router={{kind: random}}"]}}',
        ],
        data="{brainage: scans/all.csv}",
        steps="[{verb: heatmap}, {verb: fewshot, dataset: digits, shots: [1, 5], draws: 7}]",
    )
    pipeline = read_pipeline(path)
    places = Places(pipeline, tmp_path)
    found = {job.arm.name: commands(job, tmp_path / "runs", places) for job in plan(pipeline, path)}
    ((module, verb, *rest),) = found["emoe_4mm"]
    assert (module, verb) == ("emoe_med.brainage", "train")
    given = dict(pairwise(rest))
    assert given["--manifest"] == str(tmp_path / "scans" / "all.csv")
    assert given["--data-root"] == str(tmp_path / "scans")  # paths start beside the manifest
    assert (given["--fold"], given["--set"]) == ("1", "training.seed=2")
    assert [command[:2] for command in found["digits_emoe"]] == [
        ("emoe_med.vision", "train"),
        ("emoe_med.vision", "heatmap"),
        ("emoe_med.vision", "fewshot"),
    ]
    assert [command[1] for command in found["adapter"]] == ["train", "fewshot"]  # one expert: nothing to map
    assert found["digits_emoe"][2][-4:] == ("--shots", "1,5", "--draws", "7")
    elsewhere = Places(pipeline, tmp_path, path)  # any file; --data-root is for the images then
    assert elsewhere.scans() == (path, None)  # the verb settles the root


@pytest.mark.parametrize("path", [path for path in SHIPPED if path.stem.endswith("_smoke")], ids=lambda path: path.stem)
def test_the_data_of_the_twins_are_at_hand(path, real_data):
    Places(read_pipeline(path), real_data).check(planned(path))
