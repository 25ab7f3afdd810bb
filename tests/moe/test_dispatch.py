import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe_med.moe import dispatch
from emoe_med.moe.dispatch import grouped_mlp, reference_mlp
from emoe_med.moe.engines import Grouped, Segments, Weights


def problem(n, width, hidden, experts, top_k, dtype=torch.float64, used=None, bias=False, dropped=0.0):
    """Random tokens, `top_k` different experts of the first `used` for each, and a share of dropped slots."""
    used = experts if used is None else used
    index = torch.stack([torch.randperm(used)[:top_k] for _ in range(n)]).view(n, top_k)
    gate = torch.rand(n, top_k) * (torch.rand(n, top_k) >= dropped)
    shapes = [(experts, width, hidden), (experts, hidden, width), (experts, hidden), (experts, width)]
    weights = Weights(*(torch.randn(shape).to(dtype).requires_grad_() for shape in shapes[: 4 if bias else 2]))
    return index, torch.randn(n, width).to(dtype).requires_grad_(), gate.to(dtype).requires_grad_(), weights


def given_tensors(x, gate, weights):
    return [x, gate, *(w for w in weights if w is not None)]


def assert_same(index, x, gate, weights, **tolerance):
    """Value and gradients are those of the dense sum: alone, added to the tokens, added to another stream."""
    scale = torch.tensor(1.3, dtype=x.dtype, requires_grad=True)
    direction, other = torch.randn_like(x), torch.randn_like(x).requires_grad_()
    inputs = [scale, other, *given_tensors(x, gate, weights)]
    for stream in (None, x, other):
        got = grouped_mlp(x, index, gate, weights, scale, stream)
        want = reference_mlp(x, index, gate, weights, scale) + (0 if stream is None else stream)
        torch.testing.assert_close(got, want, **tolerance)
        for a, b in zip(
            torch.autograd.grad((got * direction).sum(), inputs, materialize_grads=True, allow_unused=True),
            torch.autograd.grad((want * direction).sum(), inputs, materialize_grads=True, allow_unused=True),
            strict=True,
        ):
            torch.testing.assert_close(a, b, **tolerance)


@pytest.fixture
def grouped(monkeypatch):
    """Take the engine of the GPU, which runs on a CPU too."""
    monkeypatch.setattr(dispatch, "_engine", lambda *_: Grouped)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 6), st.integers(1, 5), st.integers(1, 7), st.booleans(), st.data())
def test_segments_equal_the_dense_sum_in_value_and_gradient(n, width, hidden, experts, bias, data):
    top_k = data.draw(st.integers(1, experts))
    dropped = data.draw(st.sampled_from([0.0, 0.4, 1.0]))
    assert_same(*problem(n, width, hidden, experts, top_k, bias=bias, dropped=dropped))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropped", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("n", "experts", "used", "top_k"), [(1, 4, 4, 1), (40, 5, 2, 1), (40, 5, 5, 2), (24, 3, 3, 3)])
def test_grouped_equals_the_dense_sum_in_value_and_gradient(grouped, n, experts, used, top_k, bias, dropped):
    given = problem(n, 16, 8, experts, top_k, torch.float32, used, bias, dropped)
    assert_same(*given, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("top_k", [1, 2])
def test_gradcheck(top_k, bias):
    index, x, gate, weights = problem(9, 4, 3, 5, top_k, used=3, bias=bias)
    for function in (grouped_mlp, reference_mlp):
        assert torch.autograd.gradcheck(
            lambda a, g, *w, function=function: function(a, index, g, Weights(*w)),
            given_tensors(x, gate, weights),
        )


def test_empty_experts_get_a_zero_gradient_and_no_tokens_are_fine():
    index, x, gate, weights = problem(6, 4, 3, 5, 1, used=1)
    grouped_mlp(x, index, gate, weights).square().sum().backward()
    assert weights.w1.grad[0].abs().sum() > 0
    assert not weights.w1.grad[1:].any()
    assert not weights.w2.grad[1:].any()
    assert grouped_mlp(x[:0], index[:0], gate[:0], weights).shape == (0, 4)


def test_empty_experts_get_a_zero_gradient_in_the_grouped_engine(grouped):
    index, x, gate, weights = problem(6, 16, 8, 5, 1, torch.float32, used=1)
    grouped_mlp(x, index, gate, weights).square().sum().backward()
    assert weights.w1.grad[0].abs().sum() > 0
    assert not weights.w1.grad[1:].any()
    assert not weights.w2.grad[1:].any()


def test_a_dropped_slot_is_not_computed():
    index, x, gate, weights = problem(6, 4, 3, 2, 1)
    with torch.no_grad():
        gate[2] = 0
        weights.w1[:] = 1
        x[2] = torch.nan
    assert torch.isfinite(grouped_mlp(x, index, gate, weights)).all()
    kept = torch.arange(6) != 2
    slots = Segments.sort(index, gate != 0, 2)
    assert sorted(slots.token.tolist()) == torch.arange(6)[kept].tolist()


def test_a_sum_backward_with_an_expanded_gradient_works():
    index, x, gate, weights = problem(6, 4, 3, 5, 2)
    grouped_mlp(x, index, gate, weights).sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("engine", [Segments, Grouped])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_low_precision_and_returns_float32_gradients(monkeypatch, engine, dtype):
    monkeypatch.setattr(dispatch, "_engine", lambda *_: engine)
    monkeypatch.setattr(dispatch, "NARROW_ON_CPU", 0)
    index, x, gate, weights = problem(64, 16, 8, 4, 2, dtype=torch.float32)
    want = reference_mlp(x, index, gate, weights)
    with torch.autocast("cpu", dtype):
        got = grouped_mlp(x, index, gate, weights)
    assert got.dtype == dtype
    assert (got.float() - want).norm() / want.norm() < 0.02
    got.float().square().sum().backward()
    assert all(t.grad.dtype == torch.float32 and t.grad.isfinite().all() for t in given_tensors(x, gate, weights))


def test_narrow_experts_stay_in_float32_on_a_cpu():
    index, x, gate, weights = problem(64, 16, 8, 4, 1, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert grouped_mlp(x, index, gate, weights).dtype == torch.float32


@pytest.mark.parametrize("fused", [False, True])
def test_a_low_precision_copy_lives_until_the_weights_change(fused):
    weight = torch.nn.Parameter(torch.randn(3, 4, 4))
    first = dispatch._cast(weight, torch.bfloat16)
    assert dispatch._cast(weight, torch.bfloat16) is first
    optimizer = torch.optim.AdamW([weight], 0.1, fused=fused)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    second = dispatch._cast(weight, torch.bfloat16)
    torch.testing.assert_close(second, weight.detach().bfloat16())
    assert not torch.equal(first, second)
    torch.nn.Module.load_state_dict(holder := torch.nn.ParameterDict({"w": weight}), {"w": torch.zeros(3, 4, 4)})
    assert not dispatch._cast(holder["w"], torch.bfloat16).any()
    assert dispatch._cast(weight, torch.float32) is not weight
    weight.data.add_(1)
    dispatch.forget_copies()
    assert (dispatch._cast(weight, torch.bfloat16) == 1).all()


def test_training_goes_on_after_an_evaluation_in_inference_mode(monkeypatch):
    monkeypatch.setattr(dispatch, "NARROW_ON_CPU", 0)
    index, x, gate, weights = problem(20, 8, 4, 3, 1, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.inference_mode():
            grouped_mlp(x, index, gate, weights)
        grouped_mlp(x, index, gate, weights).sum().backward()
    assert weights.w1.grad.isfinite().all()


@pytest.mark.parametrize("engine", [Segments, Grouped])
def test_same_bits_twice(monkeypatch, engine):
    monkeypatch.setattr(dispatch, "_engine", lambda *_: engine)
    index, x, gate, weights = problem(200, 16, 8, 4, 2, dtype=torch.float32)
    outputs, gradients = [], []
    for _ in range(2):
        outputs.append(grouped_mlp(x, index, gate, weights))
        gradients.append(torch.autograd.grad(outputs[-1].square().sum(), given_tensors(x, gate, weights)))
    assert torch.equal(*outputs)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_compiles_without_a_graph_break():
    torch._dynamo.reset()
    index, x, gate, weights = problem(64, 16, 8, 4, 2, dtype=torch.float32)
    low = weights.each(lambda w: w.detach().bfloat16().requires_grad_())
    x = x.detach().bfloat16().requires_grad_()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(dispatch, "NARROW_ON_CPU", 0)
        compiled = torch.compile(grouped_mlp, fullgraph=True, backend="aot_eager")
        for routed in (index, index.flip(0), torch.zeros_like(index)):  # the load moves, the graph stays
            with torch._dynamo.config.patch(error_on_recompile=True):
                got = compiled(x, routed, gate, low)
            want = reference_mlp(x.float(), routed, gate, low.each(lambda w: w.float()))
            assert (got.float() - want).norm() / want.norm() < 0.02
            got.float().sum().backward()
            assert torch.isfinite(low.w1.grad).all()
