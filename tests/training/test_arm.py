import json

import pytest

from emoe_med.errors import CheckpointError, DataError
from emoe_med.training.arm import check_alike, check_same, is_done
from emoe_med.training.tracking import Tracker


def recorded(folder, **facts):
    folder.mkdir()
    (folder / "environment.json").write_text(json.dumps(facts))
    (folder / "splits.csv").write_text("row,split\n")
    return folder


def test_what_a_run_did_not_record_is_not_compared(tmp_path):
    early = recorded(tmp_path / "early", data="a")
    late = recorded(tmp_path / "late", data="a", contents="x")
    other = recorded(tmp_path / "other", data="a", contents="y")
    check_same(early, {"data": "a", "contents": "x"})
    check_same(tmp_path / "new", {"data": "a", "contents": "x"})
    with pytest.raises(CheckpointError, match="data was a in this run and is b now"):
        check_same(early, {"data": "b", "contents": "x"})
    with pytest.raises(CheckpointError, match="contents was y in this run and is x now"):
        check_same(other, {"data": "a", "contents": "x"})
    check_alike([(0, early), (0, late), (0, early)])
    with pytest.raises(DataError, match=r"CMP-OTHER.*other  another contents") as refused:
        check_alike([(0, late), (0, early), (0, other)])
    assert len(refused.value.faults) == 1


def test_a_run_is_done_once_scored_whatever_a_later_session_comes_to(tmp_path):
    """`maps` enters the record of a run again."""
    with Tracker(tmp_path, uri="none"):
        pass
    assert not is_done(tmp_path)  # maps of a run that was stopped do not end it
    (tmp_path / "metrics.json").write_text("{}")
    assert is_done(tmp_path)
    with Tracker(tmp_path, uri="none"):
        assert is_done(tmp_path)


def test_a_scored_run_is_not_done_before_its_record_ends(tmp_path):
    (tmp_path / "metrics.json").write_text("{}")
    with Tracker(tmp_path, uri="none"):
        assert not is_done(tmp_path)
