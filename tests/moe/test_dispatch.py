import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe_med.moe.dispatch import grouped_mlp, reference_mlp


def problem(n, width, hidden, experts, top_k, dtype=torch.float64, used=None):
    used = experts if used is None else used
    index = torch.stack([torch.randperm(used)[:top_k] for _ in range(n)]).view(n, top_k)
    tensors = [
        torch.randn(n, width),
        torch.rand(n, top_k),
        torch.randn(experts, width, hidden),
        torch.randn(experts, hidden, width),
    ]
    return index, [t.to(dtype).requires_grad_() for t in tensors]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 6), st.integers(1, 5), st.integers(1, 7), st.data())
def test_equals_the_dense_sum_in_value_and_gradient(n, width, hidden, experts, data):
    top_k = data.draw(st.integers(1, experts))
    index, (x, gate, w1, w2) = problem(n, width, hidden, experts, top_k)
    got = grouped_mlp(x, index, gate, w1, w2)
    want = reference_mlp(x, index, gate, w1, w2)
    torch.testing.assert_close(got, want)
    weight = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad((got * weight).sum(), (x, gate, w1, w2)),
        torch.autograd.grad((want * weight).sum(), (x, gate, w1, w2)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("top_k", [1, 2])
def test_gradcheck(top_k):
    index, inputs = problem(9, 4, 3, 5, top_k, used=3)
    assert torch.autograd.gradcheck(lambda x, g, a, b: grouped_mlp(x, index, g, a, b), inputs)
    assert torch.autograd.gradcheck(lambda x, g, a, b: reference_mlp(x, index, g, a, b), inputs)


def test_empty_experts_get_a_zero_gradient_and_no_tokens_are_fine():
    index, (x, gate, w1, w2) = problem(6, 4, 3, 5, 1, used=1)
    grouped_mlp(x, index, gate, w1, w2).square().sum().backward()
    assert w1.grad[0].abs().sum() > 0
    assert not w1.grad[1:].any()
    assert not w2.grad[1:].any()
    index, (x, gate, w1, w2) = problem(6, 4, 3, 5, 1)
    assert grouped_mlp(x[:0], index[:0], gate[:0], w1, w2).shape == (0, 4)


def test_a_sum_backward_with_an_expanded_gradient_works():
    index, (x, gate, w1, w2) = problem(6, 4, 3, 5, 2)
    grouped_mlp(x, index, gate, w1, w2).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_autocast_computes_in_bfloat16_and_returns_float32_gradients(monkeypatch):
    index, (x, gate, w1, w2) = problem(64, 16, 8, 4, 1, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert grouped_mlp(x, index, gate, w1, w2).dtype == torch.float32  # narrow, on a CPU
    monkeypatch.setattr("emoe_med.moe.dispatch.NARROW_ON_CPU", 0)
    want = reference_mlp(x, index, gate, w1, w2)
    with torch.autocast("cpu", torch.bfloat16):
        got = grouped_mlp(x, index, gate, w1, w2)
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).norm() / want.norm() < 0.02
    got.float().square().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in (x, gate, w1, w2))


def test_same_bits_twice():
    index, (x, gate, w1, w2) = problem(200, 16, 8, 4, 2, dtype=torch.float32)
    assert torch.equal(grouped_mlp(x, index, gate, w1, w2), grouped_mlp(x, index, gate, w1, w2))
