import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emoe_med.training import allow_list

ALLOWED = [
    "val/mae",
    "val/r2",
    "train/loss",
    "train/step_loss",
    "test/mae",
    "test/mae/age_40_50",
    "expert/E03/load",
    "expert/L2/E11/load",
    "router/captured_variance",
    "router/L0/margin",
    "map/stability",
    "system/samples_per_second",
]
REFUSED = [
    "mae",
    "val",
    "val/",
    "/val/mae",
    "val//mae",
    "val/sub-01",
    "val/sub-01_ses-2",
    "val/1234567",
    "val/eid1234567",
    "val/a12345b",
    "val/MAE",
    "val/IXI002",
    "val/mae of site",
    "val/../etc",
    "other/mae",
    "expert/E1234/load",
    "val/müller",
    "val/mae\n",
    "val/" + "x" * 80,
    "C:\\scans",
    "file:///scans",
]


@pytest.mark.parametrize("name", ALLOWED)
def test_metric_names_that_leave(name):
    assert allow_list.numbers({name: 1.5}) == ({name: 1.5}, [])


@pytest.mark.parametrize("name", REFUSED)
def test_metric_names_that_stay(name):
    assert allow_list.numbers({name: 1.5}) == ({}, [name])


def test_values_that_are_no_numbers_stay_and_non_finite_ones_are_empty():
    values = {"val/a": "sub-01", "val/b": True, "val/c": None, "val/d": [1.0]}
    assert allow_list.numbers(values) == ({}, list(values))
    kept, refused = allow_list.numbers({"val/a": math.nan, "val/b": math.inf, "val/c": 3})
    assert (kept, refused) == ({"val/a": None, "val/b": None, "val/c": 3.0}, [])


def test_settings_keep_numbers_flags_and_known_words():
    flat = {
        "training.lr": 1e-3,
        "training.epochs": 20,
        "training.channels_last": False,
        "training.ema_decay": None,
        "training.schedule": "cosine",
        "model.moe.blocks": [3, 4],
        "model.note": "trained for dr. house",
        "data.manifest": "cosine",
        "data.data_root": "/scans/private",
        "data.exclude": ["sub-01"],
        "out": "cosine",
    }
    kept, refused = allow_list.settings(flat, {"cosine"})
    assert refused == []
    assert kept == {
        "training.lr": "0.001",
        "training.epochs": "20",
        "training.channels_last": "False",
        "training.ema_decay": "None",
        "training.schedule": "cosine",
        "model.moe.blocks": "[3, 4]",
    }
    assert allow_list.settings({"Data Root": 1, "sub-01": 2, "scan.1234567": 3}, ())[1] == [
        "Data Root",
        "sub-01",
        "scan.1234567",
    ]


def test_tags_keep_their_names_and_plain_values_or_digests():
    values = {"manifest_sha256": "0" * 64, "git_commit": "a" * 40 + "+", "fold": 3, "task": "brainage"}
    assert allow_list.labels(values, {"brainage"})[0] == {name: str(value) for name, value in values.items()}
    bad = {"user": 3, "manifest_sha256": "1234567", "task": "/scans", "git_commit": "Error: /scans/sub-01"}
    assert allow_list.labels(bad, {"brainage"}) == ({}, list(bad))


@given(st.text(), st.sampled_from("/\\ -.:@~$%\n\0é"), st.text())
def test_no_text_with_a_separator_is_ever_a_value(before, separator, after):
    text = before + separator + after
    assert allow_list.settings({"a.b": text}, {"cosine"}) == ({}, [])
    assert allow_list.labels({"task": text}, {"cosine"}) == ({}, ["task"])


@given(st.from_regex(r"[A-Za-z_]{0,8}[0-9]{5,10}[A-Za-z_]{0,8}", fullmatch=True))
def test_no_name_carries_a_participant_number(number):
    assert allow_list.numbers({f"val/{number}": 1.0})[0] == {}
    assert allow_list.settings({f"a.{number}": 1.0}, ())[0] == {}
    assert allow_list.LABEL.fullmatch(f"run_{number}") is None


@pytest.mark.parametrize("name", ["viewer.html", "space-MNI_label-E00_desc-gate_probseg.nii.gz", "E00.png"])
def test_file_names_that_leave(name):
    assert allow_list.FILE.fullmatch(name)


@pytest.mark.parametrize("name", ["sub-01_map.nii.gz", ".hidden", "a/b", "..", "", "a b.png", "ü.png"])
def test_file_names_that_stay(name):
    assert allow_list.FILE.fullmatch(name) is None


MAPS = [
    *("maps.json", "stability.json", "regions.csv", "viewer.html", "montage.png", "dseg.tsv"),
    "space-MNI152NLin2009aSym_res-2_desc-mean_T1w.nii.gz",
    "space-MNI152NLin2009aSym_res-4_label-E03_desc-contribution_statmap.nii.gz",
    "space-centred_res-2_desc-topexpert_dseg.json",
    "space-MNI152NLin2009aSym_seg-cerebra2009c_res-1_dseg.tsv",
]


@pytest.mark.parametrize("name", MAPS)
def test_maps_of_a_group_leave(name):
    assert allow_list.may_leave("expert_maps", name, persons=20)
    assert allow_list.may_leave("expert_maps", name, persons=math.inf)
    assert not allow_list.may_leave("expert_maps", name, persons=19)
    assert not allow_list.may_leave("expert_maps", f"sub-01_{name}", persons=20)
    assert not allow_list.may_leave("elsewhere", name, persons=20)


@pytest.mark.parametrize(
    "name",
    [
        *("IXI002.nii.gz", "E00.png", "notes.txt", "predictions.csv", "viewer.html.bak", "../viewer.html"),
        "sub-01_space-MNI152NLin2009aSym_desc-gate_probseg.nii.gz",
        "space-MNI152NLin2009aSym_desc-IXI002_T1w.nii.gz",
        "space-MNI152NLin2009aSym_res-4_label-E1234_desc-gate_probseg.nii.gz",
        "space-MNI152NLin2009aSym_seg-eid1234567_dseg.nii.gz",
    ],
)
def test_other_files_are_no_maps(name):
    assert not allow_list.may_leave("expert_maps", name, persons=math.inf)


def test_a_report_is_of_no_group_and_a_picture_is():
    assert allow_list.may_leave("report", "report.html", persons=0)
    assert allow_list.may_leave("expert_maps", "expert_class.html", persons=0)  # of images of things
    assert allow_list.picture_may_leave("map/top_expert", persons=20)
    assert not allow_list.picture_may_leave("map/top_expert", persons=19)
    assert not allow_list.picture_may_leave("map/sub-01", persons=20)
