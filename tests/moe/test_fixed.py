import torch

from emoe_med.moe import HashOptions, HashRouter, MLPExperts, MLPOptions, MoELayer, RandomOptions, RandomRouter


def test_random_router_is_even_stable_and_content_blind():
    r = RandomRouter(16, 8, 2, RandomOptions())
    tokens = torch.randn(8000, 16)
    a, b = r(tokens, None), r(tokens.flip(0), None)
    assert torch.equal(a.expert_index, b.expert_index.flip(0))
    share = torch.bincount(a.expert_index[:, 0], minlength=8) / 8000
    assert (share - 1 / 8).abs().max() < 0.02
    assert (a.expert_index[:, 0] != a.expert_index[:, 1]).all()
    nudged = r(tokens + 1e-6, None)
    assert (nudged.expert_index[:, 0] == a.expert_index[:, 0]).float().mean() < 0.3


def test_hash_follows_the_place_and_nothing_else():
    layer = MoELayer(HashRouter(16, 8, 1, HashOptions()), MLPExperts(16, 8, MLPOptions()))
    mask = torch.rand(3, 4000) > 0.2
    _, routing = layer(torch.randn(3, 4000, 16), mask)
    expert = torch.full((3, 4000), -1)
    expert[mask] = routing.expert_index[:, 0]
    both = mask[0] & mask[1]
    assert torch.equal(expert[0][both], expert[1][both])
    whole = layer(torch.randn(1, 4000, 16))[1].expert_index[:, 0]
    assert torch.equal(whole[mask[0]], expert[0][mask[0]])
    assert ((torch.bincount(whole, minlength=8) / 4000) - 1 / 8).abs().max() < 0.02
    assert (whole[1:] == whole[:-1]).float().mean() < 0.2  # neighbours are unrelated
