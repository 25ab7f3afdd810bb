import pytest
import torch
from scipy import stats

from emoe_med.models.heads import L1Head, SoftLabelHead, TrainingAges
from emoe_med.models.sfcn import SFCN, SFCNOptions, _local_mean, fold_space
from emoe_med.models.vit import ViT, ViTOptions
from emoe_med.moe import (
    EigenExpertOptions,
    EigenExperts,
    EigenOptions,
    EigenRouter,
    ERMoEOptions,
    ERMoERouter,
    MLPExperts,
    MLPOptions,
    MoELayer,
)


def routed_layer(width):
    return MoELayer(EigenRouter(width, 4, 1, EigenOptions(rank=8)), MLPExperts(width, 4, MLPOptions()))


def small(**kwargs):
    return SFCN(1, SFCNOptions(channels=(8, 16, 16), pooled=2, neck=8), **kwargs)


def head(batch=2, size=(16, 24, 16)):
    image = torch.randn(batch, 1, *size)
    image[:, :, :6] = 0
    return image


def test_published_shape_has_the_published_number_of_parameters():
    net = SFCN(40, SFCNOptions())
    assert sum(p.numel() for p in net.parameters()) == 2_952_936
    assert net.cell(4) == 16
    with torch.no_grad():
        assert net.eval()(torch.zeros(1, 1, 160, 192, 160)).output.shape == (1, 40)


def test_the_layer_starts_as_the_plain_net_and_gets_a_gradient():
    torch.manual_seed(3)
    plain = small()
    torch.manual_seed(3)
    routed = small(moe=routed_layer(16), moe_after=2)
    routed.load_state_dict(plain.state_dict(), strict=False)
    image = head()
    torch.testing.assert_close(routed.eval()(image).output, plain.eval()(image).output)
    routed.train()(image).output.sum().backward()
    assert routed.moe.experts.w2.grad.abs().sum() > 0


def test_only_cells_with_brain_are_routed():
    net = small(moe=routed_layer(16), moe_after=2).eval()
    image = head()
    image[:, :, 6:8] = 0  # the first two of four cells along X are empty now
    out = net(image)
    mask = out.token_mask["block2"].view(2, 4, 6, 4)
    assert not mask[:, :2].any()
    assert mask[:, 2:].all()
    assert len(out.routing["block2"].probs) == mask.sum()


def test_what_pooling_drops_decides_for_no_cell():
    net = small(moe=routed_layer(16), moe_after=2).eval()
    edge = net.cell(2)
    image = torch.zeros(1, 1, 2 * edge + edge // 2, edge, edge)
    image[:, :, : edge + 1] = 1
    assert net(image).token_mask["block2"].tolist() == [[True, True]]
    image[:, :, edge:] = 0
    assert net(image).token_mask["block2"].tolist() == [[True, False]]


def test_fold_space_keeps_every_voxel_in_its_cube():
    x = torch.arange(64.0).view(1, 1, 4, 4, 4)
    folded = fold_space(x, 2)
    assert folded.shape == (1, 8, 2, 2, 2)
    assert sorted(folded[0, :, 0, 0, 0].tolist()) == sorted(x[0, 0, :2, :2, :2].flatten().tolist())
    with pytest.raises(ValueError, match="does not divide"):
        fold_space(torch.zeros(1, 1, 5, 4, 4), 2)


def test_soft_labels_agree_with_scipy_and_centre_on_the_age():
    soft = SoftLabelHead(TrainingAges.of([20.0, 80.0]))
    ages = torch.tensor([20.0, 47.3, 80.0])
    target = soft.target(ages)
    torch.testing.assert_close(target.sum(1), torch.ones(3))
    centres = (soft.edges[:-1] + soft.edges[1:]) / 2
    torch.testing.assert_close(target @ centres, ages, atol=0.03, rtol=0)
    edges = soft.edges.numpy()
    want = stats.norm.cdf(edges[1:], 47.3, 1) - stats.norm.cdf(edges[:-1], 47.3, 1)
    torch.testing.assert_close(target[1].double(), torch.from_numpy(want / want.sum()), atol=1e-5, rtol=0)
    perfect = target.clamp_min(1e-12).log()
    assert soft.loss(perfect, ages).max() < 1e-4
    torch.testing.assert_close(soft.predict(perfect), ages, atol=0.03, rtol=0)


def test_ages_are_as_fine_under_autocast_as_without():
    """A matrix product would be of bfloat16 there, which knows ages to half a year."""
    soft = SoftLabelHead(TrainingAges.of([20.0, 80.0]))
    output = torch.randn(50, soft.outputs)
    with torch.autocast("cpu", torch.bfloat16):
        low = soft.predict(output), soft.confidence(output)
    for found, expected in zip(low, (soft.predict(output), soft.confidence(output)), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_the_last_layer_is_as_fine_under_autocast_as_without():
    """Of an answer in bfloat16 ages of the L1 head would be known to an eighth of a year."""
    net, vit = small().eval(), ViT(5, ViTOptions((8, 8), 4, 1, width=16, depth=1, heads=2)).eval()
    torch.nn.init.normal_(vit.head.weight)
    features = torch.randn(50, 8, 1, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(net.answer(features.bfloat16()), net.answer(features.bfloat16().float()))
        low = vit(torch.randn(2, 1, 8, 8)).output
    assert net.answer(features.bfloat16()).dtype == low.dtype == torch.float32
    assert (low != low.bfloat16()).any()


def test_l1_head_is_in_training_standard_deviations():
    l1 = L1Head(TrainingAges.of([40.0, 50.0, 60.0]))
    output = torch.tensor([[0.0], [1.0]])
    assert l1.predict(output).tolist() == [50.0, 60.0]
    assert l1.loss(output, torch.tensor([55.0, 60.0])).tolist() == pytest.approx([0.5, 0.0])


def test_context_is_the_mean_over_neighbouring_cells_with_brain():
    x = torch.randn(2, 3, 4, 5, 4)
    mask = torch.rand(2, 4 * 5 * 4) > 0.4
    got, inside = _local_mean(x, mask), mask.view(2, 4, 5, 4)
    for b, i, j, k in inside.nonzero().tolist():
        near = (slice(max(0, n - 1), n + 2) for n in (i, j, k))
        cube = (b, *near)
        want = x.movedim(1, -1)[cube][inside[cube]].mean(0)
        torch.testing.assert_close(got[b, :, i, j, k], want, atol=1e-5, rtol=1e-5)


def test_a_router_that_asks_for_context_gets_it():
    layer = MoELayer(ERMoERouter(16, 4, 2, ERMoEOptions()), EigenExperts(16, 4, EigenExpertOptions()))
    torch.nn.init.normal_(layer.experts.s)
    net = small(moe=layer, moe_after=2).train()
    out = net(head())
    out.output.square().sum().backward()
    assert layer.experts.U.grad.abs().sum() > 0
    assert out.routing["block2"].expert_index.shape[1] == 2
