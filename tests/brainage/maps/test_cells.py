"""Cells lie where they say: world coordinates of a planted blob, sides, and what each quantity is."""

import nibabel as nib
import numpy as np
import pytest
import torch

from emoe_med.brainage.maps.background import Background
from emoe_med.brainage.maps.cells import CellGrid
from emoe_med.brainage.maps.routes import Routes
from emoe_med.brainage.maps.write import Map, entropy, group_maps, margin, write_maps
from emoe_med.brainage.net import BrainAgeNet
from emoe_med.config import BrainAgeConfig, ModelConfig, MoEConfig
from emoe_med.data.grid import box_grid
from emoe_med.errors import ConfigError
from emoe_med.models.heads import TrainingAges

FACTS = {
    "space": "MNI152NLin2009aSym",
    "subjects": 20,
    "model": "one",
    "runs": ["seed0-fold0"],
    "weights": ["0" * 64],
    "held_out": True,
    "synthetic": False,
    "view": "as it is",
    "verdict": "not tested",
}


def routed_config(after_block=1, stem=1, spacing_mm=8.0, experts=4, pooled=2):
    moe = MoEConfig(after_block=after_block, num_experts=experts, router={"kind": "eigen", "rank": 4})
    model = ModelConfig(channels=(8, 8), pooled=pooled, neck=8, stem=stem, dropout=0.0, head="l1", moe=moe)
    data = {"spacing_mm": spacing_mm, "oversample": 1}
    return BrainAgeConfig(name="x", data=data, model=model, training={"epochs": 1, "lr": 1e-3})


def net_of(config):
    net = BrainAgeNet(config.model, TrainingAges.of([20.0, 80.0])).eval()
    torch.nn.init.normal_(net.net.moe.experts.w2)
    return net


def test_the_4_mm_preset_has_cells_of_16_mm_that_see_32_mm():
    config = routed_config(stem=2, spacing_mm=4.0)
    grid = CellGrid.of(net_of(config), config)
    assert (grid.edge, grid.cell_mm, grid.shape) == (4, 16.0, (10, 12, 10))
    # stem 2, conv3 on it: 2 + 2 * 2, pool of two: + 2
    assert grid.field * grid.spacing_mm == 32.0
    # the first cell: the corner of the box, and half a cell more
    np.testing.assert_allclose(grid.centres_mm[0], np.array([-80, -113.5, -75.5]) + 8)


def test_the_receptive_field_is_what_a_token_feels():
    config = routed_config(after_block=2, stem=2, spacing_mm=4.0)
    net = net_of(config)
    image = torch.ones(1, 1, 40, 48, 40, requires_grad=True)
    net.net.until(image * torch.rand_like(image), 2)[0, :, 2, 3, 2].sum().backward()
    felt = image.grad[0, 0].abs().sum((1, 2)).nonzero()
    assert felt.max() - felt.min() + 1 <= net.net.receptive_field(2) == 2 + 4 + 2 + 8 + 4


def test_coarse_cells_and_plain_nets_are_refused():
    with pytest.raises(ConfigError, match="MAPS-CELL"):
        CellGrid.of(net_of(routed_config(after_block=2)), routed_config(after_block=2))
    config = routed_config(spacing_mm=3.2)
    assert CellGrid.of(net_of(config), config).shape == (25, 30, 25)
    config = routed_config(stem=2, spacing_mm=3.2)
    with pytest.raises(ConfigError, match=r"MAPS-CELL.* 12\.8 mm"):
        CellGrid.of(net_of(config), config)
    config = routed_config(experts=1)
    with pytest.raises(ConfigError, match="MAPS-LAYER"):
        CellGrid.of(net_of(config), config)


@pytest.mark.parametrize("place", [(-36.0, -42.0, 26.0), (41.0, 20.0, -30.0), (0.0, -60.0, 50.0)])
def test_a_planted_blob_comes_back_within_half_a_cell(place, tmp_path):
    """Light one spot of the input; the cell of the map that moves most lies there in the world, left on the left."""
    config = routed_config(stem=2, spacing_mm=4.0)
    net, grid = net_of(config), CellGrid.of(net_of(config), config)
    shape, affine = box_grid(4.0)
    world = np.stack(np.meshgrid(*(np.arange(n) * 4 + affine[a, 3] for a, n in enumerate(shape)), indexing="ij"))
    blob = np.exp(-((world - np.array(place).reshape(3, 1, 1, 1)) ** 2).sum(0) / 2 / 5**2)
    image = torch.from_numpy(blob).float()[None, None]
    with torch.no_grad():
        moved = net.net.until(10 * image, 1) - net.net.until(0 * image, 1)
    values = moved.abs().sum(1).flatten().numpy()
    background = Background(4.0, with_labels=False)
    background.add("one", np.ones(shape, np.float32))
    write_maps(tmp_path, [Map("occupancy", values, "share", expert=0)], background, grid, "block1", FACTS)
    written = nib.load(tmp_path / "space-MNI152NLin2009aSym_res-4_label-E00_desc-occupancy_probseg.nii.gz")
    voxels = written.get_fdata()
    peak = np.argwhere(voxels == voxels.max())
    found = nib.affines.apply_affine(written.affine, peak).mean(0)
    assert np.abs(found - place).max() <= grid.cell_mm / 2 + 1e-6
    assert nib.aff2axcodes(written.affine) == ("R", "A", "S")
    assert written.header["sform_code"] == written.header["qform_code"] == 4
    np.testing.assert_allclose(written.get_qform(), written.get_sform(), atol=1e-4)


def test_every_voxel_has_the_value_of_its_cell_and_mirrors_are_mirrors():
    grid = CellGrid(4.0, 2, 4, 8)
    values = np.random.default_rng(0).random(1200)
    voxels = grid.spread(values)
    fine = grid.spread(values, fine=True)
    assert voxels.shape == (40, 48, 40)
    assert voxels[5, 13, 39] == values.reshape(10, 12, 10)[1, 3, 9] == fine[11, 27, 79]
    np.testing.assert_array_equal(grid.spread(values[grid.mirror]), voxels[::-1])
    np.testing.assert_allclose(grid.centres_mm[grid.mirror] * [-1, 1, 1], grid.centres_mm)
    inside = np.zeros((80, 96, 80), bool)
    inside[8:11, 0, 0] = True
    assert grid.count(inside)[np.ravel_multi_index((1, 0, 0), grid.shape)] == 3


def test_occupancy_gate_entropy_and_margin_by_hand():
    # two heads, three cells, one slot, two experts; cell 2 is routed in one head alone
    expert = np.array([[[0], [1], [1]], [[0], [0], [-1]]], np.int16)
    gate = np.array([[[1.0], [2.0], [0.5]], [[3.0], [1.0], [0.0]]], np.float32)
    routes = Routes.of(expert, gate, 2)
    np.testing.assert_allclose(routes.occupancy(), [[1, 0], [0.5, 0.5], [0, 1]])
    np.testing.assert_allclose(routes.gate_mass(), [[2, 0], [0.5, 1], [0, 0.5]])
    np.testing.assert_allclose(routes.coverage(), [1, 1, 0.5])
    np.testing.assert_allclose(routes.load(), [3 / 5, 2 / 5])
    np.testing.assert_allclose(entropy(routes.occupancy()), [0, 1, 0], atol=1e-12)
    np.testing.assert_allclose(margin(routes.occupancy()), [1, 0, 1])
    top = next(item for item in group_maps(routes) if item.quantity == "topexpert")
    assert top.values.tolist() == [1, 0, 2]  # the tie is nobody's


def test_two_slots_share_a_cell():
    routes = Routes.of(np.array([[[0, 2]]], np.int16), np.array([[[0.75, 0.25]]], np.float32), 3)
    np.testing.assert_allclose(routes.served(0), [[0.5, 0, 0.5]])
    np.testing.assert_allclose(routes.gate_mass(), [[0.75, 0, 0.25]])


def test_renaming_moves_contributions_with_their_experts():
    routes = Routes.of(
        np.array([[[0], [1], [-1]]], np.int16),
        np.ones((1, 3, 1), np.float32),
        3,
        contribution=np.array([[[5.0, 0, 0], [0, 7.0, 0], [0, 0, 0]]]),
        contribution_of=np.array([0]),
    )
    renamed = routes.renamed(np.array([2, 0, 1]))
    assert renamed.expert[0, :, 0].tolist() == [2, 0, -1]
    np.testing.assert_allclose(renamed.contribution[0], [[0, 0, 5], [7, 0, 0], [0, 0, 0]])


def test_background_votes_and_averages():
    background = Background(8.0, with_labels=True)
    head = np.zeros(background.shape, np.float32)
    head[5, 5, 5] = 3.0
    head[6, 6, 6] = -4.0
    label = np.zeros(background.shape, np.int32)
    for person, value in ((1, 7), (1, 9), (2, 9), (3, 7)):  # of a person, the first head counts
        label[5, 5, 5] = value
        background.add(person, head, label)
    assert background.majority()[5, 5, 5] == 7
    assert background.mean()[5, 5, 5] == pytest.approx(1)
    assert background.mean()[6, 6, 6] == 0  # the darkest there is
    assert background.mean()[0, 0, 0] == 0
