"""Parity with the authors' published layer, re-told here expert by expert from its description."""

import pytest
import torch
from torch import nn

from emoe_med.moe import EigenOptions, EigenRouter, MLPExperts, MLPOptions, MoELayer
from emoe_med.moe.basis import orthonormality_error
from emoe_med.moe.published import load_published

D, R, E, B = 12, 5, 4, 6


class Basis(nn.Module):
    def __init__(self):
        super().__init__()
        self.Q = nn.Parameter(torch.linalg.qr(torch.randn(D, R))[0] + 0.05 * torch.randn(D, R))
        self.P = nn.Parameter(torch.linalg.qr(torch.randn(D, R))[0] + 0.05 * torch.randn(D, R))
        self.log_lambda = nn.Parameter(torch.randn(R))


class PublishedRouter(nn.Module):
    def __init__(self):
        super().__init__()
        self.basis = Basis()
        self.gamma = nn.Parameter(torch.randn(R))
        self.masks = nn.Parameter(torch.randn(E, R))
        self.bias = nn.Parameter(torch.randn(E) / 10)


class PublishedExpert(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Linear(D, B, bias=False), nn.Linear(B, D, bias=False)


class PublishedBranch(nn.Module):
    """Every expert runs on every token; masks choose what counts."""

    def __init__(self, mode):
        super().__init__()
        self.mode = mode
        self.router = PublishedRouter()
        self.experts = nn.ModuleList(PublishedExpert() for _ in range(E))
        self.alpha = nn.Parameter(torch.tensor(0.8))

    def forward(self, h):
        basis = self.router.basis
        if self.training:
            for frame in (basis.Q, basis.P):
                q, r = torch.linalg.qr(frame.data)
                frame.data.copy_(q * r.diagonal().sign())
        z = h @ basis.Q
        energy = z**2 / ((z**2).sum(-1, keepdim=True) + 1e-6)
        mix = self.router.masks.softmax(0)
        score = torch.stack([(energy * self.router.gamma * mix[e]).sum(-1) + self.router.bias[e] for e in range(E)], -1)
        p = score.softmax(-1)
        wanted = {"soft": E, "top1": 1, "top2": 2}[self.mode]
        chosen = p >= p.topk(wanted, -1).values[..., -1:]
        out = sum(
            (p * chosen)[..., e : e + 1] * x.up(nn.functional.gelu(x.down(h))) for e, x in enumerate(self.experts)
        )
        eye = torch.eye(R)
        penalty = 5e-4 * sum(((f.T @ f - eye) ** 2).sum() for f in (basis.Q, basis.P))
        return h + self.alpha * out, penalty


def ours(top_k):
    router = EigenRouter(D, E, top_k, EigenOptions.paper_code(rank=R))
    return MoELayer(router, MLPExperts(D, E, MLPOptions(hidden=B, zero_init=False)), normalise=False)


@pytest.mark.parametrize(("mode", "top_k"), [("top1", 1), ("top2", 2), ("soft", E)])
def test_loaded_weights_give_the_published_outputs_gradients_and_penalty(mode, top_k):
    torch.manual_seed(1)
    theirs, layer = PublishedBranch(mode), ours(top_k)
    load_published(layer, {f"branches.3.{name}": value for name, value in theirs.state_dict().items()}, "branches.3.")
    x = torch.randn(2, 40, D)
    for training in (False, True):  # evaluation takes the frames as stored, training retracts them first
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        want, penalty = theirs.train(training)(a)
        got, routing = layer.train(training)(b)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
        torch.testing.assert_close(routing.aux_loss, penalty, atol=1e-5, rtol=0)
        assert routing.aux_loss > 1e-5 or training  # stored frames are off the manifold; retraction makes it a no-op
        direction = torch.randn_like(x)
        (want * direction).sum().backward()
        (got * direction).sum().backward()
        torch.testing.assert_close(b.grad, a.grad, atol=1e-5, rtol=0)
        torch.testing.assert_close(layer.experts.w1.grad[2].T, theirs.experts[2].down.weight.grad, atol=1e-5, rtol=0)
        torch.testing.assert_close(layer.router.mix_logits.grad.T, theirs.router.masks.grad, atol=1e-5, rtol=0)
    assert orthonormality_error(layer.router.learned) < 1e-5
    assert routing.aux_loss < 1e-8


def test_evaluation_leaves_the_stored_frames_alone():
    theirs, layer = PublishedBranch("top1"), ours(1)
    load_published(layer, theirs.state_dict())
    layer.eval()(torch.randn(1, 5, D))
    assert torch.equal(layer.router.learned, theirs.router.basis.Q)


def test_several_steps_visit_the_same_weights():
    torch.manual_seed(2)
    theirs, layer = PublishedBranch("top1").train(), ours(1)
    load_published(layer, theirs.state_dict())  # a fresh layer is in training mode
    optimizers = [torch.optim.SGD(m.parameters(), 0.05) for m in (theirs, layer)]
    for _ in range(10):
        x = torch.randn(2, 30, D)
        for module, optimizer in zip((theirs, layer), optimizers, strict=True):
            out, _ = module(x)  # the first one retracts
            optimizer.zero_grad()
            (out - x.roll(1, -1)).square().mean().backward()
            optimizer.step()
        layer.after_step()
    x = torch.randn(2, 30, D)
    with torch.no_grad():  # the published training forward retracts first
        torch.testing.assert_close(layer(x)[0], theirs(x)[0], atol=1e-4, rtol=0)


def test_wrong_names_and_shapes_are_told_and_change_nothing():
    theirs, layer = PublishedBranch("top1").state_dict(), ours(1)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with pytest.raises(ValueError, match=r"router\.gamma is missing; extra is unknown"):
        load_published(layer, {"extra": torch.zeros(1)} | {n: t for n, t in theirs.items() if n != "router.gamma"})
    with pytest.raises(ValueError, match=r"router\.masks is \(4, 6\), not \(4, 5\)"):
        load_published(layer, theirs | {"router.masks": torch.zeros(4, 6)})
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_published_settings_are_refused_where_they_contradict_each_other():
    with pytest.raises(ValueError, match="centre"):
        EigenOptions(basis="paper_code")
    assert EigenOptions.paper_code(balance="bias").balance == "bias"
