"""Where a training set ends: limits by hand, sides that do not count, what a checkpoint keeps."""

import json
import math

import numpy as np
import pytest

from emoe_med.data.contract import FEW, FLAG, REFUSE, Spread, contract_digest, told
from emoe_med.data.fingerprint import FINGERPRINT_VERSION, MEASURES

NAMES = list(MEASURES)


def training(scans=101) -> np.ndarray:
    """Every measure runs evenly from 50 to 150: median 100, 5th and 95th percentile 55 and 145."""
    return np.repeat(np.linspace(50, 150, scans)[:, None], len(NAMES), axis=1)


def scan(**changed) -> np.ndarray:
    values = np.full(len(NAMES), 100.0)
    for name, value in changed.items():
        values[NAMES.index(name)] = value
    return values


def broken(spread, **changed):
    return [breach.measure for breach in spread.breaches(scan(**changed))]


def test_the_limit_worked_by_hand():
    spread = Spread.of(training())
    assert spread.percentiles["cv"] == pytest.approx([51, 55, 75, 100, 125, 145, 149])
    limit = FLAG * (1 + FEW / 101) * 45
    assert broken(spread) == []
    for sign in (-1, 1):
        assert broken(spread, cv=100 + sign * (limit - 0.1)) == []
        assert broken(spread, cv=100 + sign * (limit + 0.1)) == ["cv"]


def test_few_training_scans_allow_more():
    few, many = Spread.of(training(11)), Spread.of(training(1001))
    value = 100 + 3 * 45
    assert broken(few, cv=value) == []
    assert broken(many, cv=value) == ["cv"]


def test_a_side_that_does_no_harm_is_not_judged():
    spread = Spread.of(training())
    assert broken(spread, spacing_mm=-1e6, mode=-1e6, dark=-1e6) == []
    assert set(broken(spread, spacing_mm=1e6, mode=1e6, dark=1e6)) == {"spacing_mm", "mode", "dark"}


@pytest.mark.parametrize("name", NAMES)
def test_a_measure_that_is_zero_in_all_training_scans_still_judges(name):
    """As the signal around the brain is in stripped scans."""
    spread = Spread.of(np.tile(scan(**{name: 0.0}), (50, 1)))
    assert broken(spread, **{name: 0.0}) == []
    assert broken(spread, **{name: 1e3}) == [name]


def test_scans_that_are_all_alike_do_not_make_every_other_scan_odd():
    alike = Spread.of(np.tile(scan(spacing_mm=1.0, cut_cm2=0.0, negative=0.0), (50, 1)))
    assert broken(alike, spacing_mm=1.2, cut_cm2=2.0, negative=0.001, cv=101.0) == []
    assert set(broken(alike, spacing_mm=3.0, cut_cm2=40.0, negative=0.1, cv=110.0)) == {
        *("spacing_mm", "cut_cm2", "negative", "cv")
    }


def test_what_is_not_a_number_is_the_worst_breach():
    spread = Spread.of(training())
    first, second = spread.breaches(scan(similarity=math.nan, cv=1000))
    assert (first.measure, second.measure) == ("similarity", "cv")
    assert first.refuses
    assert not second.refuses  # a scan of odd contrast is a scan


def test_a_measure_that_the_chain_does_not_give_is_left_out():
    values = training()
    values[:, NAMES.index("similarity")] = math.nan
    spread = Spread.of(values)
    assert "similarity" not in spread.percentiles
    assert broken(spread, similarity=math.nan) == []


def test_far_is_flagged_and_very_far_is_refused():
    spread = Spread.of(training())
    (near,) = spread.breaches(scan(volume_ml=100 + 0.9 * REFUSE * (1 + FEW / 101) * 45))
    (far,) = spread.breaches(scan(volume_ml=100 + 1.1 * REFUSE * (1 + FEW / 101) * 45))
    assert (near.refuses, far.refuses) == (False, True)


def test_each_step_is_told_once_by_its_worst_measure():
    breaches = Spread.of(training()).breaches(scan(cv=1000, p50=5000, cut_cm2=900, rough_x=700, shell=600, dark=300))
    text = told(breaches)
    assert told(breaches[:1]) == text.split("; ")[0]
    assert text.endswith("; also brain mask")
    assert text.count("intensity scale or contrast") == 1
    assert f"intensity scale or contrast: {MEASURES['p50']} is 5e+03, in training 55 to 145" in text
    assert "field of view: " in text


def test_what_a_checkpoint_keeps_is_taken_back():
    spread = Spread.of(training())
    stored = json.loads(json.dumps(spread.to_json(), allow_nan=False))
    back = Spread.from_json(stored)
    assert back.scans == 101
    assert back.percentiles["cv"] == pytest.approx(spread.percentiles["cv"], rel=1e-4)
    assert Spread.from_json(None) is None
    assert Spread.from_json({**stored, "version": FINGERPRINT_VERSION + 1}) is None
    assert Spread.from_json({**stored, "scans": 7}) is None


def test_the_digest_names_chain_strip_and_spread():
    meta = {"chain": {"spacing_mm": 2}, "strip": {"mask": ["labels"]}, "fingerprint": {"scans": 9}, "seen": ["x"]}
    one = contract_digest(meta)
    assert contract_digest({**meta, "seen": []}) == one
    for part in ("chain", "strip", "fingerprint"):
        assert contract_digest({**meta, part: {}}) != one
    assert contract_digest({"chain": {}}) != one  # an old checkpoint has a digest too
