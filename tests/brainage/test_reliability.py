"""Agreement of repeated sessions: published figures, figures by hand, another calculation, known components."""

import json

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from emoe_med.brainage.__main__ import app
from emoe_med.brainage.metrics import Bootstrap
from emoe_med.brainage.reliability import agreement, reliability
from emoe_med.errors import DataError

QUICK = Bootstrap(draws=200)


def test_the_example_of_shrout_and_fleiss():
    """Psychol. Bull. 1979, table 2 and its intraclass correlations: six targets, four judges."""
    ratings = np.array([[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]], float)
    found = agreement(ratings)
    assert round(float(found["icc_a1"]), 2) == 0.29
    assert round(float(found["icc_c1"]), 2) == 0.71
    assert found["sem"] ** 2 == pytest.approx(1.02, abs=5e-3)  # mean square error of table 3


def test_two_sessions_by_hand():
    """Persons 10, 20, 30 and 1, 3, 2 more at the second session: MS_R 201.5, MS_C 6, MS_E 0.5."""
    found = agreement(np.array([[10.0, 11], [20, 23], [30, 32]]))
    assert found["bias"] == 2
    assert (found["limit_low"], found["limit_high"]) == (pytest.approx(0.04), pytest.approx(3.96))
    rows = np.array([10.5, 21.5, 31.0])
    ms_r = 2 * np.square(rows - 21).sum() / 2
    assert found["icc_c1"] == pytest.approx((ms_r - 0.5) / (ms_r + 0.5))
    assert found["icc_a1"] == pytest.approx((ms_r - 0.5) / (ms_r + 0.5 + 2 * (6 - 0.5) / 3))
    assert found["sdc"] == pytest.approx(1.96 * 2**0.5 * 0.5**0.5)


def least_squares(values):
    """Mean squares by regression on dummy variables: what persons and sessions each explain."""
    n, k = values.shape
    person, session = np.repeat(np.eye(n), k, axis=0), np.tile(np.eye(k), (n, 1))
    flat = values.ravel()

    def rest(*designs):
        design = np.hstack([np.ones((n * k, 1)), *designs])
        return np.square(flat - design @ np.linalg.lstsq(design, flat)[0]).sum()

    error = rest(person, session)
    return (
        (rest(session) - error) / (n - 1),
        (rest(person) - error) / (k - 1),
        error / ((n - 1) * (k - 1)),
    )


@pytest.mark.parametrize(("n", "k"), [(5, 2), (12, 3), (30, 4)])
def test_another_calculation_agrees(n, k):
    values = np.random.default_rng(n).normal(50, 10, (n, 1)) + np.random.default_rng(k).normal(0, 3, (n, k))
    values += np.arange(k)
    ms_r, ms_c, ms_e = least_squares(values)
    found = agreement(values)
    assert found["icc_c1"] == pytest.approx((ms_r - ms_e) / (ms_r + (k - 1) * ms_e))
    assert found["icc_a1"] == pytest.approx((ms_r - ms_e) / (ms_r + (k - 1) * ms_e + k * (ms_c - ms_e) / n))
    assert found["sem"] == pytest.approx(ms_e**0.5)


def test_known_components_are_found_again():
    rng = np.random.default_rng(0)
    values = rng.normal(50, 10, (20_000, 1)) + rng.normal(0, 2, (20_000, 2)) + np.array([0, 5])
    found = agreement(values)
    assert found["icc_c1"] == pytest.approx(100 / 104, abs=2e-3)
    assert found["icc_a1"] == pytest.approx(100 / (104 + 25 / 2), abs=4e-3)  # an offset of 5 has variance 12.5
    assert found["sem"] == pytest.approx(2, abs=0.03)
    assert found["sdc"] == pytest.approx(1.96 * 2**0.5 * 2, abs=0.1)
    assert found["bias"] == pytest.approx(5, abs=0.1)


def test_samples_on_a_leading_axis_are_measured_apart():
    values = np.random.default_rng(0).normal(size=(3, 7, 2))
    together = agreement(values)
    for index in range(3):
        for name, value in agreement(values[index]).items():
            assert together[name][index] == pytest.approx(value)


@pytest.fixture
def predictions(tmp_path):
    """Twenty persons seen twice, two years apart, in any order; one refused, one seen once, one seen three times."""
    rng = np.random.default_rng(0)
    age = rng.uniform(20, 80, 20)
    rows = [
        {
            "participant_id": f"0{i}",
            "session_id": str(s),
            "age": age[i] + 2 * s,
            "predicted_age": age[i] + 2 * s + ahead,
        }
        for i, ahead in enumerate(rng.normal(0, 5, 20))
        for s in (1, 0)
    ]
    rows += [{"participant_id": "once", "session_id": "1", "age": 40.0, "predicted_age": 41.0}]
    rows += [{"participant_id": "00", "session_id": "2", "age": age[0] + 9, "predicted_age": 500.0}]
    rows += [{"participant_id": "refused", "session_id": str(s), "age": 40.0} for s in (0, 1)]
    path = tmp_path / "ages.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def test_a_table_of_predict(predictions):
    found = reliability(predictions, bootstrap=QUICK)
    assert (found["persons"], found["left_out"]) == (20, 1)
    assert found["flagged"] == 0
    table = pd.read_csv(predictions, dtype={"participant_id": str, "session_id": str})
    table.assign(status=np.where(table.index < 3, "check", "ok")).to_csv(predictions, index=False)
    assert reliability(predictions, bootstrap=QUICK)["flagged"] == 3
    assert found["years_between"] == pytest.approx(2)
    assert found["predicted_age"]["bias"]["value"] == pytest.approx(2)  # two years older, and seen to be
    assert found["brain_pad"]["bias"]["value"] == pytest.approx(0, abs=1e-9)
    assert found["brain_pad"]["icc_a1"]["value"] == pytest.approx(1)
    estimate = found["predicted_age"]["icc_a1"]
    assert estimate["low"] <= estimate["value"] <= estimate["high"]
    assert estimate["n"] == 20


def test_without_ages_there_is_no_pad(predictions):
    table = pd.read_csv(predictions, dtype={"participant_id": "str"})
    table.drop(columns="age").to_csv(predictions, index=False)
    found = reliability(predictions, bootstrap=QUICK)
    assert "brain_pad" not in found
    assert found["ageless"] == 40
    table.loc[0, "age"] = np.nan
    table.to_csv(predictions, index=False)
    found = reliability(predictions, bootstrap=QUICK)
    assert "brain_pad" not in found
    assert found["ageless"] == 1


def test_runs_of_one_visit_are_no_sessions(predictions):
    """A second run, off by nothing, must not stand for the second visit."""
    table = pd.read_csv(predictions, dtype={"participant_id": "str", "session_id": "str"})
    visits = reliability(predictions, bootstrap=QUICK)
    first = table.assign(session_id="ses-" + table["session_id"] + "_run-1")
    again = table.assign(session_id="ses-" + table["session_id"] + "_run-2", predicted_age=0 * table["predicted_age"])
    pd.concat([again, first, first.head(1)]).to_csv(predictions, index=False)
    found = reliability(predictions, bootstrap=QUICK)
    assert found["predicted_age"] == visits["predicted_age"]
    assert found["repeats"] == again["predicted_age"].notna().sum() + 1


def test_runs_without_a_session_are_of_one_visit(predictions):
    table = pd.read_csv(predictions, dtype={"participant_id": "str", "session_id": "str"})
    first = table[table["session_id"] == "0"].assign(age=40.0)
    both = pd.concat([first.assign(session_id=f"run-{run}") for run in (1, 2)])
    both.to_csv(predictions, index=False)
    with pytest.raises(DataError, match="REL-FEW"):
        reliability(predictions, bootstrap=QUICK)


def test_sessions_come_in_the_order_of_their_numbers_and_persons_by_any_spelling(tmp_path):
    rows = [
        (f"{'sub-' if s == '10' else ''}p{i}", s, i + (5 if s == "10" else 0)) for i in range(4) for s in ("10", "2")
    ]
    pd.DataFrame(rows, columns=["participant_id", "session_id", "predicted_age"]).to_csv(tmp_path / "a.csv")
    assert reliability(tmp_path / "a.csv", bootstrap=QUICK)["predicted_age"]["bias"]["value"] == pytest.approx(5)


def test_rows_without_a_session_are_told_apart_by_age(predictions):
    visits = reliability(predictions, bootstrap=QUICK)
    pd.read_csv(predictions, dtype={"participant_id": "str"}).drop(columns="session_id").to_csv(
        predictions, index=False
    )
    assert reliability(predictions, bootstrap=QUICK)["brain_pad"] == visits["brain_pad"]


def test_the_verb(predictions, tmp_path):
    shown = CliRunner().invoke(app, ["reliability", "--predictions", str(predictions)])
    assert shown.exit_code == 0
    assert "20 persons with 2 sessions; 1 with fewer left out" in shown.output
    assert "smallest detectable change" in shown.output
    as_json = CliRunner().invoke(app, ["reliability", "--predictions", str(predictions), "--json"])
    assert json.loads(as_json.output)["persons"] == 20
    few = CliRunner().invoke(app, ["reliability", "--predictions", str(predictions), "--sessions", "3"])
    assert few.exit_code == 3
    assert "REL-FEW" in few.output


NO_NUMBER = "participant_id,predicted_age,age\na,40,20\na,about 40,21\n"


@pytest.mark.parametrize(
    "text", [None, "", "a,b\n1,2\n", NO_NUMBER, NO_NUMBER.replace("20", "young").replace("about", "")]
)
def test_what_is_no_table_of_predictions(tmp_path, text):
    if text is not None:
        (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match="REL-TABLE"):
        reliability(tmp_path / "t.csv")
