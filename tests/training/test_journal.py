import errno
import json
import logging
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_disk import small_disk

from emoe_med.errors import StorageError
from emoe_med.training.journal import Journal, read_journal


def events(path, offset=0):
    return [event for _, event in read_journal(path, offset)]


def fill(path, steps):
    with Journal(path) as journal:
        for step in range(1, steps + 1):
            journal.metrics(step, {"train/step_loss": step / 3, "train/lr": None})


def test_one_json_line_per_event_with_time(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        assert not journal.begun
        journal.write("start", step=0)
        journal.metrics(1, {"val/mae": 0.1 + 0.2, "val/r": None})
        assert journal.begun
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["start", "metrics"]
    assert lines[1]["values"] == {"val/mae": 0.1 + 0.2, "val/r": None}
    assert all(line["time"] > 1.6e12 for line in lines)  # milliseconds since 1970


def test_a_resumed_run_repeats_no_metric_and_no_parameter(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.params({"lr": "0.1"})
        journal.metrics(1, {"train/loss": 1.0})
        journal.metrics(2, {"train/loss": 2.0})
    with Journal(path) as journal:  # from a checkpoint at step 1
        assert journal.begun
        journal.params({"lr": "0.1", "epochs": "3"})
        journal.metrics(2, {"train/loss": 2.0})
        journal.metrics(2, {"train/loss": 2.0, "val/mae": 5.0})
        journal.metrics(3, {"train/loss": 3.0})
    found = [(event.get("step"), event["values"]) for event in events(path)]
    assert found == [
        (None, {"lr": "0.1"}),
        (1, {"train/loss": 1.0}),
        (2, {"train/loss": 2.0}),
        (None, {"epochs": "3"}),
        (2, {"val/mae": 5.0}),
        (3, {"train/loss": 3.0}),
    ]


@given(cut=st.integers(0, 2000))
def test_cut_at_any_byte_all_whole_lines_survive(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("cut") / "journal.jsonl"
    fill(path, 20)
    whole = path.read_bytes()
    cut = min(cut, len(whole))
    path.write_bytes(whole[:cut])
    lines = whole[:cut].count(b"\n")
    assert len(events(path)) == lines  # a reader passes over the piece
    with Journal(path) as journal:
        for step in range(1, 21):
            journal.metrics(step, {"train/step_loss": step / 3, "train/lr": None})
    steps = [event["step"] for event in events(path) if event["kind"] == "metrics"]
    assert steps == list(range(1, 21))
    assert [e["bytes_removed"] for e in events(path) if e["kind"] == "repaired"] == (
        [] if whole[:cut].endswith(b"\n") or not cut else [cut - whole[:cut].rfind(b"\n") - 1]
    )


def test_results_are_the_last_point_of_their_name_and_told_once(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.metrics(8, {"val/mae": 7.4, "train/loss": 1.0})
        journal.results({"val/mae": 7.1, "test/mae": 7.0})  # of the best epoch, which was not the last
    with Journal(path) as journal:
        journal.results({"val/mae": 7.1, "test/mae": 7.0})
        journal.results({"val/mae": 7.1, "test/mae": 6.9})
    assert [event.get("whole", False) for event in events(path)] == [False, True, True]
    found = [(event["step"], event["values"]) for event in events(path)]
    assert found == [
        (8, {"val/mae": 7.4, "train/loss": 1.0}),
        (9, {"val/mae": 7.1, "test/mae": 7.0}),
        (10, {"test/mae": 6.9}),
    ]


def test_damaged_lines_are_told_and_passed_over(tmp_path, caplog):
    path = tmp_path / "journal.jsonl"
    fill(path, 3)
    lines = path.read_bytes().splitlines(keepends=True)
    bad = [b"\x00\xff\n", b"[]\n", b'{"kind": "metrics", "time": 1}\n', b"\n"]
    path.write_bytes(b"".join([lines[0], *bad, *lines[1:]]))
    with caplog.at_level(logging.WARNING, "emoe_med"):
        assert [event["step"] for event in events(path)] == [1, 2, 3]
    assert caplog.text.count("cannot be read") == 4


def test_offsets_continue_where_reading_ended(tmp_path):
    path = tmp_path / "journal.jsonl"
    fill(path, 5)
    offsets = [offset for offset, _ in read_journal(path)]
    assert offsets[-1] == path.stat().st_size
    assert [event["step"] for event in events(path, offsets[1])] == [3, 4, 5]


def test_a_full_disk_is_code_6_and_leaves_whole_lines(tmp_path):
    with small_disk(tmp_path / "disk", 16) as disk, Journal(disk / "journal.jsonl") as journal:
        endless = ({"train/loss": 1 / 3} for _ in range(10_000))
        with pytest.raises(StorageError, match=os.strerror(errno.ENOSPC)) as caught:
            list(map(journal.metrics, range(10_000), endless))
        assert caught.value.exit_code == 6
        assert (disk / "journal.jsonl").read_bytes().endswith(b"\n")


def test_a_folder_in_the_journal_s_place_is_code_6(tmp_path):
    with pytest.raises(StorageError, match="journal cannot be opened"):
        Journal(tmp_path)
