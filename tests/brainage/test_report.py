"""The report is one page, complete, safe to share, and shows the raw figures first."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from emoe_med.brainage.bias import fit_age_bias
from emoe_med.brainage.metrics import Bootstrap, evaluate
from emoe_med.brainage.report import write_report
from emoe_med.brainage.shared import shareable
from emoe_med.errors import DataError
from emoe_med.training.journal import Journal

CANARIES = ("CANARY-subject", "sub-CANARY", "CANARY folder", "CANARYhost", "CANARYuser")


def predictions(persons: int, slope: float, seed: int) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    first = rng.uniform(20, 85, persons)
    person = np.concatenate([np.arange(persons), np.arange(persons // 4)])  # a quarter came twice
    age = first[person] + np.repeat([0.0, 2.0], [persons, persons // 4])
    predicted = 50 + slope * (age - 50) + rng.normal(0, 5, persons)[person]
    return pd.DataFrame(
        {
            "row": np.arange(2, len(age) + 2),
            "participant_id": [f"CANARY-subject-{index}" for index in person],
            "age": age,
            "predicted_age": predicted,
            "sex": np.where(person % 2, "M", "F"),
            "site": np.where(person % 3, "north <A&B>", "south"),
            "status": "ok",
            "reason": "",
        }
    )


def make_run(run: Path, slope: float = 0.8) -> Path:
    """Write a run folder as training and evaluation would."""
    test, val = predictions(60, slope, 0), predictions(40, slope, 1)
    test.loc[3, ["predicted_age", "status", "reason"]] = [
        np.nan,
        "refused",
        "VOL-CRC checksum wrong in /data/CANARY folder/sub-CANARY_T1w.nii.gz",
    ]
    bias = fit_age_bias(val.age.to_numpy(), val.predicted_age.to_numpy(), val.participant_id.to_numpy())
    for table in (test, val):
        table["brain_pad"] = table.predicted_age - table.age
        table["predicted_age_corrected"], _ = bias.apply(table.predicted_age.to_numpy(), table.age.to_numpy())
    metrics = evaluate(test, 49.5, val=val, bias=bias, bootstrap=Bootstrap(draws=200))
    loads = {f"load/E{index:02d}": share for index, share in enumerate([0.3, 0.2, 0.2, 0.15, 0.1, 0.04, 0.01, 0.0])}
    metrics["routing"] = {"block2": {"cv": 0.8, "entropy": 0.82, "dead": 2.0, "captured_variance": 0.97, **loads}}
    metrics["data"] = {"space": "MNI152NLin2009aSym", "mask": "brain", "train_age_range": [20.1, 84.2]}
    (run / "predictions").mkdir(parents=True)
    test.drop(columns="participant_id").to_csv(run / "predictions/test.csv", index=False)
    val.drop(columns="participant_id").to_csv(run / "predictions/val.csv", index=False)
    (run / "metrics.json").write_text(json.dumps(metrics, allow_nan=False))
    (run / "config.yaml").write_text(
        "name: emoe-demo\ndata: {spacing_mm: 4.0, align: affine}\nmanifest: CANARY-subject.csv\n"
        "training: {lr: 0.001, out: 'x', note: '/data/CANARY folder'}\n"
    )
    environment = {"python": "3.11.7", "device": "cpu", "versions": {"torch": "2.13.0"}, "git_commit": "0" * 40 + "+"}
    environment |= {"synthetic": True, "hostname": "CANARYhost", "host": "CANARYhost", "user": "CANARYuser"}
    (run / "environment.json").write_text(json.dumps(environment))
    splits = ["test"] * len(test) + ["val"] * len(val) + ["train"] * 200
    pd.DataFrame({"row": np.arange(2, len(splits) + 2), "split": splits, "fold": 0}).to_csv(
        run / "splits.csv", index=False
    )
    with Journal(run / "journal.jsonl") as journal:
        for epoch in range(12):
            journal.metrics(epoch * 20, {"train/loss": 3 * 0.8**epoch, "val/mae": 6 + 10 * 0.7**epoch})
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run") / "fold0")


@pytest.fixture(scope="module")
def page(run) -> str:
    path = write_report(run)
    assert path == run / "report" / "report.html"
    return path.read_text("utf-8")


def text_of(page: str) -> str:
    return " ".join(re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL).split())


class Nesting(HTMLParser):
    """Every tag that is opened is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in {"meta", "img", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_loads_nothing(page):
    nesting = Nesting()
    nesting.feed(page)
    assert nesting.open == []
    assert not re.search(r"<(script|link|iframe)|https?://|url\(", page)
    sources = re.findall(r'<img alt="[^"]+" src="([^"]{30})', page)
    assert len(sources) == 4
    assert all(source.startswith("data:image/png;base64,") for source in sources)


def test_raw_figures_lead_and_equal_the_metrics(run, page):
    metrics, text = json.loads((run / "metrics.json").read_text()), text_of(page)
    mae, skill = metrics["test"]["mae"], metrics["test"]["skill"]
    assert f"{mae['value']:.2f} years mean absolute error [{mae['low']:.2f}, {mae['high']:.2f}]" in text
    assert f"on {mae['n']} held-out persons" in text
    assert f"the model removes {skill['value']:.0%} of that error" in text
    raw, corrected = text.index("mean absolute error"), text.index("Not the accuracy of the model")
    assert raw < corrected
    assert "circular" in text[corrected:]
    assert f"{metrics['corrected']['test']['mae']['value']:.2f}" in text[corrected:]


def test_every_section_is_there(page):
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == [
        "Accuracy",
        "Predictions",
        "By age, sex and site",
        "Age-bias correction",
        "Routing",
        "Training",
        "Data",
        "Refused or flagged scans",
        "Environment",
    ]
    text = text_of(page)
    for words in (
        "SYNTHETIC DATA",
        "train 200",
        "MNI152NLin2009aSym",
        "20.1, 84.2",
        "0.97",
        "2.13.0",
        "mean of rows",
    ):
        assert words in text, words


def test_no_person_path_or_host_is_on_the_page(page):
    assert [canary for canary in CANARIES if canary in page] == []
    assert "refused: VOL-CRC checksum wrong in …" in text_of(page)
    assert "north &lt;A" not in page  # a site that is no plain word is not shown


def test_a_model_without_skill_is_told_so(tmp_path):
    page = write_report(make_run(tmp_path / "run", slope=0.0)).read_text("utf-8")
    assert "not shown to be better than the guess" in page


def test_no_banner_without_the_flag_and_gaps_are_named(tmp_path):
    run = make_run(tmp_path / "run")
    for name in ("environment.json", "config.yaml", "splits.csv", "journal.jsonl", "predictions/val.csv"):
        (run / name).unlink()
    metrics = json.loads((run / "metrics.json").read_text())
    for name in ("corrected", "routing", "data", "val", "by_sex"):
        del metrics[name]
    (run / "metrics.json").write_text(json.dumps(metrics))
    text = text_of(write_report(run).read_text("utf-8"))
    assert "SYNTHETIC" not in text
    assert "environment.json is missing" in text
    assert "None was fitted" in text


def test_one_test_person_still_makes_a_page(tmp_path):
    run = make_run(tmp_path / "run")
    test = predictions(4, 0.8, 0).head(1)
    (run / "metrics.json").write_text(json.dumps(evaluate(test, 49.5, bootstrap=Bootstrap(draws=50))))
    test.to_csv(run / "predictions/test.csv", index=False)
    text = text_of(write_report(run).read_text("utf-8"))
    assert "no interval from fewer than 5 persons" in text
    assert "nan" not in text


def test_an_unevaluated_run_is_refused_with_every_missing_file(tmp_path):
    with pytest.raises(DataError) as caught:
        write_report(tmp_path)
    assert len(caught.value.faults) == 2
    assert not (tmp_path / "report").exists()


def test_the_shared_page_tells_that_small_groups_are_left_out(tmp_path):
    run = make_run(tmp_path / "run")
    told = "Groups of fewer than 5 persons are left out"
    assert told not in text_of(write_report(run).read_text("utf-8"))
    assert told in text_of(write_report(run, shared=True).read_text("utf-8"))


def test_what_may_leave_gives_back_no_small_group_and_no_exact_age():
    def row(n, mae=5.0):
        return {"mae": {"value": mae, "n": n}}

    found = shareable(
        {
            "test": {"mae": {"value": 6.0, "n": 30}},
            "by_sex": {"F": row(28), "M": row(2), "macro_mean": row(30)},  # 30 less 28 would tell the two
            "by_site": {"a": row(22), "b": row(4), "c": row(4), "macro_mean": row(30)},
            "by_age": {"20-29": row(15), "30-39": row(15), "macro_mean": row(30)},
            "training_median_age": 47.32,
            "counts": {"test": {"persons": 30, "age_low": 20.4, "age_high": 81.2}},
            "corrected": {"bias": {"slope": 0.8, "age_low": 25.0, "age_high": 93.17}},
        }
    )
    assert found["by_sex"] == {}
    assert set(found["by_site"]) == {"a"}
    assert set(found["by_age"]) == {"20-29", "30-39", "macro_mean"}
    assert found["training_median_age"] == 47
    assert found["counts"]["test"] == {"persons": 30, "age_low": 20, "age_high": 85}
    assert found["corrected"]["bias"] == {"slope": 0.8, "age_low": 25, "age_high": 95}
