"""Interventions on the routed layer do what their names say, and scans become a cohort or are refused."""

import shutil

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch

from emoe_med.brainage.cohort import chain_options, prepare_cohort
from emoe_med.brainage.inference import TrainedModel
from emoe_med.brainage.net import BrainAgeNet
from emoe_med.brainage.predict import _scans
from emoe_med.config import BrainAgeConfig, ModelConfig, MoEConfig
from emoe_med.data.brain import ChainOptions
from emoe_med.data.cohort import write_cohort
from emoe_med.data.manifest import read_manifest
from emoe_med.errors import CheckpointError, DataError
from emoe_med.models.heads import TrainingAges
from emoe_med.moe import RoutingStats, branch_norms, collected_routing, permuted_routing, without_branch

CONFIG = BrainAgeConfig(name="x", training={"epochs": 1, "lr": 1e-3})


def routed_net():
    moe = MoEConfig(after_block=1, num_experts=4, router={"kind": "eigen", "rank": 4})
    model = ModelConfig(channels=(8, 8), pooled=1, neck=8, dropout=0.0, head="l1", moe=moe)
    net = BrainAgeNet(model, TrainingAges.of([20.0, 80.0])).eval()
    torch.nn.init.normal_(net.net.moe.experts.w2)
    return net


def image():
    return torch.randn(2, 1, 8, 8, 8)


def test_arms_of_one_seed_start_as_the_same_network():
    outputs = []
    for moe in (None, MoEConfig(after_block=1), MoEConfig(after_block=1, num_experts=1, router={"kind": "random"})):
        torch.manual_seed(4)
        model = ModelConfig(channels=(8, 8), pooled=1, neck=8, dropout=0.0, head="l1", moe=moe)
        net = BrainAgeNet(model, TrainingAges.of([20.0, 80.0])).eval()
        with torch.no_grad():
            outputs.append(net(torch.ones(1, 1, 8, 8, 8)).output)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_permuted_routing_keeps_the_load_and_changes_the_prediction():
    net, x = routed_net(), image()
    (layer,) = net.routed_layers().values()
    stats, moved = RoutingStats(4), RoutingStats(4)
    with torch.no_grad(), collected_routing(layer, stats):
        before, _ = net.ages(x)
    with torch.no_grad(), permuted_routing(layer, 0), collected_routing(layer, moved):
        after, _ = net.ages(x)
    with torch.no_grad():
        again, _ = net.ages(x)
    assert torch.equal(before, again)
    assert not torch.equal(before, after)
    assert stats.counts.sum() > 0
    assert torch.equal(stats.counts, moved.counts)


def test_without_branch_is_the_plain_net_and_is_undone():
    net, x = routed_net(), image()
    (layer,) = net.routed_layers().values()
    alpha = layer.alpha.item()
    with torch.no_grad(), without_branch(layer), branch_norms(layer) as norms:
        net.ages(x)
    assert norms == [0.0]
    assert layer.alpha.item() == alpha
    with torch.no_grad(), branch_norms(layer) as norms:
        net.ages(x)
    assert norms[0] > 0.01


def test_flip_average_is_blind_to_sides():
    net, x = routed_net(), image()
    with torch.no_grad():
        torch.testing.assert_close(net.ages(x, True)[0], net.ages(x.flip(2), True)[0])
        assert not torch.allclose(net.ages(x)[0], net.ages(x.flip(2))[0])


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_cohort(tmp_path_factory.mktemp("c") / "synthetic", persons=5, seed=2, spacing_mm=8.0, repeat_share=0)


def test_masks_for_all_or_for_none(cohort, tmp_path):
    table = pd.read_csv(cohort).drop(columns="labels")
    assert chain_options(CONFIG, read_manifest(cohort)).mask == "brain"
    table.drop(columns="mask").to_csv(tmp_path / "none.csv", index=False)
    none = chain_options(CONFIG, read_manifest(tmp_path / "none.csv", cohort.parent))
    assert (none.mask, none.align, none.space) == ("head", "centred", "centred")
    table.loc[2, "mask"] = np.nan
    table.to_csv(tmp_path / "some.csv", index=False)
    with pytest.raises(DataError, match="MAN-MASK") as refused:
        chain_options(CONFIG, read_manifest(tmp_path / "some.csv", cohort.parent))
    assert [fault.row for fault in refused.value.faults] == [4]


def test_one_image_in_two_rows_is_refused(cohort, tmp_path):
    table = pd.read_csv(cohort)
    for column in ("image", "mask"):
        source = cohort.parent / table.loc[0, column]
        copy = source.with_name(f"copy_{column}.nii.gz")
        shutil.copyfile(source, copy)
        table.loc[3, column] = copy.relative_to(cohort.parent).as_posix()
    table.drop(columns="labels").to_csv(tmp_path / "twice.csv", index=False)
    manifest = read_manifest(tmp_path / "twice.csv", cohort.parent)
    with pytest.raises(DataError, match="same image as row 2") as refused:
        prepare_cohort(manifest, ChainOptions(16, "centred"), tmp_path / "cache")
    assert refused.value.faults[0].row == 5


def test_one_image_under_another_mask_is_refused_all_the_same(cohort, tmp_path):
    table = pd.read_csv(cohort)
    table.loc[3, "image"] = "twin.nii.gz"
    shutil.copyfile(cohort.parent / table.loc[0, "image"], cohort.parent / "twin.nii.gz")
    mask = nib.load(cohort.parent / table.loc[0, "mask"])
    voxels = np.asarray(mask.dataobj).copy()
    voxels[tuple(np.argwhere(voxels)[0])] = 0
    nib.save(nib.Nifti1Image(voxels, mask.affine), cohort.parent / "other_mask.nii.gz")
    table.loc[3, "mask"] = "other_mask.nii.gz"
    table.drop(columns="labels").to_csv(tmp_path / "twice.csv", index=False)
    with pytest.raises(DataError, match="same image as row 2"):
        prepare_cohort(
            read_manifest(tmp_path / "twice.csv", cohort.parent), ChainOptions(16, "centred"), tmp_path / "cache"
        )


def test_a_chain_of_another_version_is_refused_before_any_scan():
    contract = {"chain": ChainOptions(4.0, "centred").contract()}
    assert TrainedModel(routed_net(), CONFIG, contract).chain() == ChainOptions(4.0, "centred")
    contract["chain"]["digest"] = "of an older version"
    with pytest.raises(CheckpointError, match="CKPT-CHAIN"):
        TrainedModel(routed_net(), CONFIG, contract).chain()


def test_a_column_that_is_misspelt_is_no_scan(cohort, tmp_path):
    pd.read_csv(cohort).rename(columns={"mask": "masks"}).to_csv(tmp_path / "m.csv", index=False)
    with pytest.raises(DataError, match="MAN-COLUMN"):
        _scans(tmp_path / "m.csv", cohort.parent)
