import pytest
import torch

from emoe_med.moe import EigenOptions, EigenRouter, MLPExperts, MLPOptions, MoELayer
from emoe_med.moe.basis import orthonormality_error

BASES = ["tracked", "learned", "fixed"]


def router(width=16, experts=8, top_k=1, **options):
    return EigenRouter(width, experts, top_k, EigenOptions(rank=6, **options))


def test_equations_by_hand():
    r = EigenRouter(3, 2, 1, EigenOptions(rank=2, basis="fixed", rotation="none", centre=False, gate="prob"))
    r.fixed.copy_(torch.eye(3)[:, :2])
    r.gamma.data = torch.tensor([1.0, 2.0])
    r.mix_logits.data = torch.log(torch.tensor([[0.75, 0.25], [0.5, 0.5]]))
    r.expert_bias.data = torch.tensor([0.0, 0.1])
    routing = r(torch.tensor([[1.0, 2.0, 9.0]]), None)
    # z = (1, 2); e = (1/5, 4/5); s_0 = 0.2*0.75 + 0.8*2*0.5 = 0.95; s_1 = 0.2*0.25 + 0.8*2*0.5 + 0.1 = 0.95
    torch.testing.assert_close(routing.probs, torch.tensor([[0.5, 0.5]]), atol=1e-6, rtol=0)
    r.expert_bias.data = torch.tensor([0.0, 0.2])
    routing = r(torch.tensor([[1.0, 2.0, 9.0]]), None)
    assert routing.expert_index.item() == 1
    assert routing.gate.item() == pytest.approx(1 / (1 + 2.718281828**-0.1), abs=1e-6)


@pytest.mark.parametrize("basis", BASES)
def test_energies_are_shares_blind_to_sign_and_scale(basis):
    r = router(basis=basis, centre=False)
    tokens = 10 * torch.randn(40, 16)
    e = r.energies(tokens)
    assert (e >= 0).all()
    torch.testing.assert_close(e.sum(-1), torch.ones(40), atol=1e-5, rtol=0)
    torch.testing.assert_close(e, r.energies(-tokens))
    torch.testing.assert_close(e, r.energies(1e4 * tokens), atol=1e-5, rtol=0)


def test_softmaxed_mix_bounds_the_probability():
    r = router(experts=8)
    probs = r(torch.randn(500, 16), None).probs
    assert probs.max() <= 2.718281829 / (2.718281829 + 7)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("rotation", ["learned", "none"])
def test_training_keeps_the_basis_orthonormal_and_every_parameter_moving(basis, rotation):
    r = router(basis=basis, rotation=rotation)
    layer = MoELayer(r, MLPExperts(16, 8, MLPOptions(hidden=4)))
    torch.nn.init.normal_(layer.experts.w2)
    optimizer = torch.optim.AdamW(layer.parameters(), 1e-2)
    target = torch.randn(16, 16)
    for _ in range(30):
        x = torch.randn(4, 50, 16) + 3
        y, routing = layer(x)
        optimizer.zero_grad()
        ((y - x @ target).square().mean() + routing.aux_loss).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
        optimizer.step()
        layer.after_step()
        assert orthonormality_error(r.basis()) < 1e-4
    health = r.health()
    if basis == "tracked":
        assert health["captured_variance"] > 0.95
    assert health["orthonormality_error"] < 1e-4


def test_evaluation_changes_nothing_even_after_a_step():
    r = router().eval()
    before = {k: v.clone() for k, v in r.state_dict().items()}
    first = r(torch.randn(100, 16), None)
    r.after_step()
    after = {k: v.clone() for k, v in r.state_dict().items()}
    assert all(torch.allclose(before[k], after[k], atol=1e-6) for k in before)
    assert first.expert_index.shape == (100, 1)


def test_ortho_loss_is_eq_3_and_vanishes_after_retraction():
    r = router(basis="learned", ortho_loss=0.5)
    r.learned.data *= 2
    want = 0.5 * (r.learned.T @ r.learned - torch.eye(6)).square().sum()
    torch.testing.assert_close(r(torch.randn(5, 16), None).aux_loss, want)
    r.after_step()
    assert r(torch.randn(5, 16), None).aux_loss < 1e-8
