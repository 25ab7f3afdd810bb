import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate

from emoe_med.brainage.cohort import chain_options, prepare_cohort
from emoe_med.brainage.first_choices import FirstChoices, missing_heads
from emoe_med.brainage.task import BrainAgeTask
from emoe_med.config import BrainAgeConfig
from emoe_med.data.cohort import write_cohort
from emoe_med.data.manifest import read_manifest

ORANGE, SKY, UNCLEAR, AIR = (230, 159, 0), (86, 180, 233), (64, 70, 78), (0, 0, 0)
TINY = {
    "name": "tiny",
    "data": {"spacing_mm": 8, "oversample": 1, "align": "centred"},
    "training": {"epochs": 1, "batch_size": 4, "lr": 0.001},
    "model": {
        **{"stem": 1, "channels": [4, 8], "pooled": 1, "neck": 8, "head": "l1"},
        "moe": {
            **{"after_block": 1, "num_experts": 3, "router": {"kind": "eigen", "rank": 3}},
            "experts": {"kind": "mlp", "hidden": 2},
        },
    },
}


def pixel(png, layer, x, y):
    """Colour in the middle of a cell of an axial layer; the box has 5 x 6 x 5 cells, y counts from the back."""
    picture = np.asarray(Image.open(io.BytesIO(png)))
    return tuple(picture[10 + 10 * (5 - y) + 5, 10 + layer * 60 + 10 * x + 5])


def test_a_cell_has_the_colour_of_its_first_choice_where_the_second_is_clearly_behind():
    found = FirstChoices(5 * 6 * 5, experts=2)
    mask = torch.ones(1, 150, dtype=torch.bool)
    mask[0, -1] = False  # x, y, z are all at their end: right, front, top
    cells = np.indices((5, 6, 5)).reshape(3, -1)[:, :-1]
    left = torch.as_tensor((cells[0] > 1).astype(int))  # expert 0 serves the two leftmost layers of cells
    for _ in range(10):
        found.add(left, mask)
    undecided = left.clone()
    undecided[0] = 1  # left, back, bottom
    for _ in range(10):
        found.add(undecided, mask)
    png = found.draw()
    assert pixel(png, 0, 0, 0) == UNCLEAR
    assert pixel(png, 0, 1, 0) == pixel(png, 0, 0, 1) == pixel(png, 4, 1, 5) == ORANGE
    assert pixel(png, 0, 2, 0) == pixel(png, 4, 4, 4) == SKY
    assert pixel(png, 4, 4, 5) == AIR


def test_tokens_that_are_no_cubes_of_the_box_are_not_drawn():
    assert FirstChoices(1200, 2).shape == (10, 12, 10)
    assert FirstChoices(1201, 2).shape is None


def test_a_training_run_draws_twenty_persons_and_no_fewer(tmp_path):
    manifest = read_manifest(write_cohort(tmp_path / "cohort", persons=21, seed=5, spacing_mm=8.0))
    config = BrainAgeConfig.model_validate(TINY)
    cohort = prepare_cohort(manifest, chain_options(config, manifest), tmp_path / "cache")
    scans = manifest.scans
    people = sorted({scan.participant_id for scan in scans})
    where = {name: [i for i, scan in enumerate(scans) if scan.participant_id == name] for name in people}
    assert len(people) == 21
    assert len(scans) > 21  # some were scanned twice, and count once
    val, train = ([i for name in names for i in where[name]] for names in (people[:7], people[7:]))
    missing, persons = missing_heads(scans, val, train)
    assert persons == 20
    assert missing == [where[name][0] for name in people[7:20]]
    assert missing_heads(scans, val, [i for i in train if scans[i].participant_id in people[:19]]) == ([], 0)
    assert missing_heads(scans, [*train, *val], []) == ([], 21)

    task = BrainAgeTask(config, cohort.heads, train, val, {})
    model = task.build_model().eval()
    batches = [task.prepare(default_collate([task.val_data[i]]), False, torch.zeros(1)) for i in range(len(val))]
    with torch.no_grad():
        task.validate(model, batches)
        (picture,) = task.pictures(model)
    assert (picture.key, picture.persons) == ("map/top_expert", 20)
    (choices,) = task._choices.values()
    assert choices.counts.sum(1).max() == len(val) + 13
    colours = {tuple(part) for part in np.asarray(Image.open(io.BytesIO(picture.png))).reshape(-1, 3)}
    assert {ORANGE, SKY} & colours
    assert BrainAgeTask(config, cohort.heads, train[:5], val, {}).pictures(model) == []


def test_weights_of_the_manifest_count_in_batches_of_one(tmp_path):
    rows = read_manifest(write_cohort(tmp_path / "cohort", persons=4, seed=5, spacing_mm=8.0))
    weights = [3.0 if n == 0 else 1.0 for n in range(len(rows.scans))]
    manifest = replace(rows, scans=tuple(replace(s, weight=w) for s, w in zip(rows.scans, weights, strict=True)))
    config = BrainAgeConfig.model_validate(TINY)
    cohort = prepare_cohort(manifest, chain_options(config, manifest), tmp_path / "cache")
    task = BrainAgeTask(config, cohort.heads, [0, 1], [2], {})
    model = task.build_model().eval()
    singles = [task.prepare(default_collate([task.train_data[i]]), False, torch.zeros(1)) for i in range(2)]
    whole = task.prepare(default_collate([task.train_data[i] for i in range(2)]), False, torch.zeros(2))
    with torch.no_grad():
        errors = [float(model.head.loss(model(batch["image"]).output, batch["age"])) for batch in singles]
        parts = [float(task.loss(model, batch)[1]["task"]) for batch in singles]
        together = float(task.loss(model, whole)[1]["task"])
    assert parts == pytest.approx([1.5 * errors[0], 0.5 * errors[1]], rel=1e-5)  # 3 and 1 over their mean, 2
    assert together == pytest.approx(sum(parts) / 2, rel=1e-5)
