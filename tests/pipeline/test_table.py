"""The table against figures worked by hand, from run folders written by hand."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from emoe_med.errors import ConfigError, DataError
from emoe_med.pipeline.compare import compare
from emoe_med.pipeline.page import lines, markdown, write_pages
from emoe_med.pipeline.plan import plan, read_pipeline
from emoe_med.pipeline.schema import Column
from emoe_med.pipeline.table import make_table

FILE = """
name: some
about: Made up
runs:
  - {{config: configs/brainage/cnn3d_4mm.yaml, folds: [0, 1], seeds: {seeds}}}
  - {{config: configs/brainage/emoe_4mm.yaml, folds: [0, 1], seeds: {seeds}}}
  - {{config: configs/brainage/dense_adapter_4mm.yaml, folds: [0, 1], seeds: {seeds}}}
table:
  paired_with: cnn3d_4mm
  columns: [{{name: "MAE, years", metric: test/mae}}]
  rows:
    - {{name: Plain, arm: cnn3d_4mm, printed: [2.41]}}
    - {{name: EMoE, arm: emoe_4mm, printed: [2.16]}}
    - {{name: Adapter, arm: dense_adapter_4mm}}
    - {{name: Others, printed: [2.14]}}
    - {{name: Retrieval, note: "not run: no image-text data"}}
  source: Somewhere 2026
  differs: [the cohort]
"""
PERSONS = 20


def write_run(folder, rows, errors, guess=10.0, manifest="m" * 64, status="FINISHED"):
    """Leave what a finished run leaves; person r is 50 years old and predicted so many years too old."""
    (folder / "predictions").mkdir(parents=True)
    table = pd.DataFrame({"row": rows, "person": rows, "age": 50.0, "predicted_age": 50.0 + np.asarray(errors)})
    table.to_csv(folder / "predictions" / "test.csv", index=False)
    (folder / "metrics.json").write_text(json.dumps({"test": {"mae_training_median": {"value": guess}}}))
    facts = {
        "manifest": manifest,
        "chain": "c",
        "git_commit": "abcdef0123",
        "device": "cpu",
        "versions": {"torch": "2"},
    }
    (folder / "environment.json").write_text(json.dumps(facts))
    (folder / "splits.csv").write_text(f"row,split\n{rows[0]},test\n")
    events = [
        {"kind": "status", "time": 1000, "status": "RUNNING"},
        {"kind": "status", "time": 61000, "status": status},
    ]
    (folder / "journal.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


@pytest.fixture
def made(tmp_path):
    """Write runs by an arm's error of person r, seed and noise, and return what makes the table."""

    def make(errors, seeds=(0, 1, 2), skip=(), **more):
        path = tmp_path / "some.yaml"
        path.write_text(FILE.format(seeds=list(seeds)))
        pipeline = read_pipeline(path)
        jobs = plan(pipeline, path)
        for job in jobs:
            if job.label in skip:
                continue
            rows = np.arange(PERSONS) + 2 + PERSONS * job.fold
            values = errors[job.arm.name](rows, job.seed)
            write_run(tmp_path / job.folder, rows, values, **more.get(job.arm.name, {}))
        return pipeline, jobs, tmp_path

    return make


def sizes(rows, seed):
    return 2.0 + (rows % 5)


def by_row(columns):
    return {cell.row: cell for cell in columns[0].cells}


def test_figures_by_hand(made):
    arms = {
        "cnn3d_4mm": lambda rows, seed: -sizes(rows, seed) - seed,  # too young: the error counts without its sign
        "emoe_4mm": lambda rows, seed: sizes(rows, seed) - 1.5 + 0.9 * seed,
        "dense_adapter_4mm": lambda rows, seed: sizes(rows, seed) + np.where(rows % 2, 1.0, -1.0),
    }
    pipeline, jobs, out = made(arms)
    cells = by_row(columns := make_table(pipeline, jobs, out))
    assert cells["Plain"].own["value"] == pytest.approx(5.0)  # 2 + mean of 0..4, and the mean of the seeds
    assert cells["Plain"].by_seed == pytest.approx({0: 4.0, 1: 5.0, 2: 6.0})
    assert (cells["Plain"].own["n"], cells["Plain"].own["seeds"]) == (40, 3)
    assert (cells["Plain"].done, cells["Plain"].planned) == (6, 6)
    assert cells["EMoE"].own["value"] == pytest.approx(3.4)
    assert cells["EMoE"].difference["value"] == pytest.approx(-1.6)
    assert (cells["EMoE"].difference["low"], cells["EMoE"].difference["high"]) == pytest.approx((-1.7, -1.5))
    over_seeds = stats.ttest_1samp([-1.5, -1.6, -1.7], 0).pvalue  # larger than that of the bootstrap, 2 / 2001
    assert cells["EMoE"].difference["p_holm"] == pytest.approx(2 * over_seeds)  # the lesser of two p, times two
    assert cells["EMoE"].wins
    assert not cells["Adapter"].wins
    assert cells["Plain"].guess == 10.0
    assert cells["Others"].own is None
    text = write_pages(pipeline, jobs, columns, out)
    assert "| EMoE | **3.40 [" in text
    assert "| Others | not run |  |  |  |  |  | 2.14 |" in text
    assert "| Retrieval | not run |" in text
    assert "not run: no image-text data |" in text
    assert "† Literature, not run here: Somewhere 2026." in text
    assert "Differs: the cohort." in text
    assert "Every figure beats guessing" in text
    assert "commit abcdef0, torch 2, device cpu, in 0.30 hours" in text  # 18 runs of a minute
    page = (out / "some" / "report" / "report.html").read_text()
    assert "<b>3.40 [" in page
    assert str(out) not in page
    frame = pd.read_csv(out / "some" / "table.csv").set_index("row")
    assert frame.loc["EMoE", "difference_value"] == -1.6
    assert frame.loc["EMoE", "printed_in_paper"] == 2.16
    assert frame.loc["Plain", "n"] == 40


def test_no_winner_whose_interval_crosses_zero_or_from_one_seed(made):
    noise = np.random.default_rng(0).normal(size=200)
    arms = {
        "cnn3d_4mm": sizes,
        "emoe_4mm": lambda rows, seed: sizes(rows, seed) - 0.02 + 0.5 * noise[rows + 50 * seed],
        "dense_adapter_4mm": lambda rows, seed: sizes(rows, seed) + 1.0,  # clear of 0 on the wrong side
    }
    cells = by_row(make_table(*made(arms)))
    low, high = cells["EMoE"].difference["low"], cells["EMoE"].difference["high"]
    assert low < 0 < high
    assert cells["Adapter"].difference["p_holm"] < 0.05
    assert not any(cell.wins for cell in cells.values())


@pytest.mark.parametrize(("seeds", "p"), [([0], "one seed"), ([0, 1], "0.002"), ([0, 1, 2], "0.002")])
def test_fewer_than_three_seeds_win_nothing(made, seeds, p):
    arms = {"cnn3d_4mm": sizes, "emoe_4mm": lambda r, s: sizes(r, s) - 1, "dense_adapter_4mm": sizes}
    columns = make_table(*made(arms, seeds=seeds))
    assert by_row(columns)["EMoE"].wins == (len(seeds) == 3)
    header, rows = lines(columns[0])
    assert rows[1][header.index("p, Holm")] == p


def test_pairs_are_what_both_arms_have(made):
    arms = {
        "cnn3d_4mm": lambda rows, seed: sizes(rows, seed) + 10 * seed,
        "emoe_4mm": lambda rows, seed: sizes(rows, seed) + 10 * seed - 1,
        "dense_adapter_4mm": sizes,
    }
    skip = ["emoe_4mm/seed1-fold0", "emoe_4mm/seed1-fold1", "cnn3d_4mm/seed0-fold1"]
    cells = by_row(
        make_table(
            *made(
                arms,
                seeds=[0, 1],
                skip=[*skip, *(f"dense_adapter_4mm/seed{s}-fold{f}" for s in (0, 1) for f in (0, 1))],
            )
        )
    )
    assert (cells["EMoE"].done, cells["Plain"].done) == (2, 3)
    assert cells["EMoE"].difference["value"] == pytest.approx(-1.0)  # on seed 0, fold 0 alone
    assert (cells["EMoE"].difference["n"], cells["EMoE"].difference["seeds"]) == (20, 1)
    assert cells["Adapter"].note == "no run is done yet"
    assert cells["Adapter"].own is None


def test_runs_of_other_data_are_not_paired(made):
    arms = {"cnn3d_4mm": sizes, "emoe_4mm": sizes, "dense_adapter_4mm": sizes}
    cells = by_row(make_table(*made(arms, emoe_4mm={"manifest": "n" * 64})))
    assert cells["EMoE"].difference is None
    assert cells["EMoE"].note.startswith("not paired")
    assert cells["Adapter"].difference["value"] == 0.0


def test_runs_of_one_arm_on_different_data_are_not_pooled(made):
    pipeline, jobs, out = made({name: sizes for name in ("cnn3d_4mm", "emoe_4mm", "dense_adapter_4mm")})
    path = out / next(job for job in jobs if job.label == "emoe_4mm/seed1-fold0").folder / "environment.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "manifest": "n" * 64}))
    cell = by_row(make_table(pipeline, jobs, out))["EMoE"]
    assert cell.own is None
    assert "different data" in cell.note


def test_a_control_need_not_be_a_row(made):
    arms = {"cnn3d_4mm": sizes, "emoe_4mm": lambda r, s: sizes(r, s) - 1, "dense_adapter_4mm": sizes}
    pipeline, jobs, out = made(arms)
    rows = tuple(row for row in pipeline.table.rows if row.name != "Plain")
    pipeline = pipeline.model_copy(update={"table": pipeline.table.model_copy(update={"rows": rows})})
    assert by_row(make_table(pipeline, jobs, out))["EMoE"].difference["value"] == pytest.approx(-1.0)


def test_a_column_that_no_run_has_is_told(made):
    pipeline, jobs, out = made({name: sizes for name in ("cnn3d_4mm", "emoe_4mm", "dense_adapter_4mm")})
    column = Column(name="Nothing", metric="routing/nonsense")
    bare = pipeline.table.model_copy(update={"columns": (column,), "rows": ()})
    pipeline = pipeline.model_copy(update={"table": bare})
    text = write_pages(pipeline, jobs, make_table(pipeline, jobs, out), out)
    assert "Measured for no run so far: Nothing." in text
    assert pd.read_csv(out / "some" / "table.csv")["note"].tolist() == ["measured for no run"]


def test_damaged_figures_are_named(made):
    pipeline, jobs, out = made({name: sizes for name in ("cnn3d_4mm", "emoe_4mm", "dense_adapter_4mm")})
    (out / jobs[0].folder / "metrics.json").write_text("{")
    with pytest.raises(DataError, match=r"RUN-METRICS.*damaged"):
        make_table(pipeline, jobs, out)


def test_an_interrupted_run_is_not_used(made):
    arms = {"cnn3d_4mm": sizes, "emoe_4mm": sizes, "dense_adapter_4mm": sizes}
    cells = by_row(make_table(*made(arms, emoe_4mm={"status": "KILLED"})))
    assert cells["EMoE"].own is None


def test_what_does_not_beat_guessing_is_called_plumbing(made):
    arms = {"cnn3d_4mm": sizes, "emoe_4mm": sizes, "dense_adapter_4mm": sizes}
    pipeline, jobs, out = made(arms, emoe_4mm={"guess": 4.1}, dense_adapter_4mm={"guess": 4.9})
    text = write_pages(pipeline, jobs, make_table(pipeline, jobs, out), out)
    assert "PLUMBING ONLY, not better than guessing beyond the interval: EMoE, MAE, years." in text


def test_any_runs_can_be_compared(made):
    arms = {
        "cnn3d_4mm": sizes,
        "emoe_4mm": lambda rows, seed: sizes(rows, seed) + 1.5,
        "dense_adapter_4mm": lambda rows, seed: sizes(rows, seed) - 0.5 - rows % 2,
    }
    _, jobs, out = made(arms)
    plain, routed, adapter = (out / job.arm.folder for job in jobs[:3])
    pipeline, runs, columns = compare([plain, routed / "seed1-fold0", routed / "seed1-fold1", adapter])
    cells = by_row(columns)
    one = cells[f"{routed.name}/seed1-fold0"]
    assert one.own["value"] == pytest.approx(5.5)
    assert (one.done, one.own["n"], one.difference["seeds"]) == (1, PERSONS, 1)
    assert one.difference["value"] == pytest.approx(1.5)  # with the same persons of the control's same seed
    assert cells["dense_adapter_4mm"].difference["value"] == pytest.approx(-1.0)
    assert cells["dense_adapter_4mm"].wins
    assert "| cnn3d_4mm | 4.00 [" in markdown(pipeline, runs, columns, out)


def test_what_cannot_be_compared_is_named(made, tmp_path):
    _, jobs, out = made({name: sizes for name in ("cnn3d_4mm", "emoe_4mm", "dense_adapter_4mm")})
    run = out / jobs[0].folder
    with pytest.raises(DataError, match="CMP-NONE"):
        compare([run, tmp_path])
    with pytest.raises(DataError, match="stands twice"):
        compare([run, run.parent / "." / run.name])
    with pytest.raises(ConfigError, match="CLI-METRIC"):
        compare([run], ["test/mse"])
    with pytest.raises(DataError, match="CMP-METRIC  routing/nonsense was measured for none"):
        compare([run, out / jobs[1].folder], ["test/mae", "routing/nonsense"])


def test_two_seeds_of_an_arm_are_not_paired(made):
    _, jobs, out = made({name: sizes for name in ("cnn3d_4mm", "emoe_4mm", "dense_adapter_4mm")})
    seeds = [out / jobs[0].arm.folder / f"seed{seed}-fold0" for seed in (0, 1)]
    cell = by_row(compare(seeds)[2])["cnn3d_4mm/seed1-fold0"]
    assert cell.difference is None
    assert cell.note == "no seed with the same samples in common with the control"
