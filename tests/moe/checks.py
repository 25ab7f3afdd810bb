"""What every router and every kind of expert has to keep: run by test_conformance.py and by docs/new_router.md."""

import copy

import torch

from emoe_med.moe import MLPExperts, MLPOptions, MoELayer
from emoe_med.moe.basis import orthonormality_error
from emoe_med.training.optim import build_optimizer, update

WIDTH, EXPERTS, TOP_K = 16, 4, 2


def build(router, router_options, experts=MLPExperts, expert_options=None):
    """A layer of 4 experts, 2 per token, on tokens of width 16, with experts that do something."""
    torch.manual_seed(0)
    made = MoELayer(
        router(WIDTH, EXPERTS, TOP_K, router_options),
        experts(WIDTH, EXPERTS, expert_options or MLPOptions(hidden=8)),
    )
    for parameter in made.experts.parameters():
        if not parameter.any():  # starts at zero so that the layer starts as the identity
            torch.nn.init.normal_(parameter)
    return made


def call(layer, x):
    """Hand in neighbours as context, which serves the routers that ask for it."""
    return layer(x, context=x.roll(1, dims=1) + 0.5 * x)


def check_shapes_and_ranges(layer):
    """Shapes and types; probabilities sum to 1; gates are not negative; experts exist."""
    for mode in (True, False):
        y, routing = call(layer.train(mode), torch.randn(3, 10, WIDTH))
        slots = routing.expert_index.shape[1]
        assert y.shape == (3, 10, WIDTH)
        assert routing.expert_index.shape == routing.gate.shape == (30, slots)
        assert slots >= TOP_K
        assert routing.probs.shape == (30, EXPERTS)
        assert routing.expert_index.dtype == torch.int64
        assert routing.gate.dtype == routing.probs.dtype == torch.float32
        torch.testing.assert_close(routing.probs.sum(-1), torch.ones(30))
        assert (routing.gate >= 0).all()
        assert ((routing.expert_index >= 0) & (routing.expert_index < EXPERTS)).all()
        assert (routing.expert_index.sort(-1).values.diff(dim=-1) > 0).all(), "a token chose one expert twice"
        assert routing.aux_loss.shape == ()


def check_degenerate_tokens_stay_finite(layer):
    """Zeros, one token, one token many times (all to the same experts), large and tiny tokens, no tokens."""
    token = torch.randn(1, 1, WIDTH)
    for x in (0 * token, token, token.expand(2, 20, -1), 1e4 * token, 1e-20 * token, torch.zeros(2, 0, WIDTH)):
        layer.train()
        x = x.clone().requires_grad_()
        y, routing = call(layer, x)
        (y.sum() + routing.aux_loss).backward()
        assert torch.isfinite(y).all()
        assert torch.isfinite(x.grad).all()
        gradients = [p.grad for p in layer.parameters() if p.grad is not None]
        assert all(torch.isfinite(g).all() for g in gradients)
        layer.after_step()
        assert all(torch.isfinite(b).all() for b in layer.state_dict().values())


def check_every_parameter_gets_a_gradient(layer):
    """Distributed training waits for ever for a parameter without one, even with all tokens on one expert."""
    for x in (torch.randn(2, 20, WIDTH), torch.randn(1, 1, WIDTH).expand(2, 20, -1)):
        layer.zero_grad(set_to_none=True)
        y, routing = call(layer.train(), x)
        (y.square().mean() + routing.aux_loss).backward()
        assert all(p.grad is not None for p in layer.parameters())


def check_a_router_that_calls_itself_independent_is(layer):
    """Taking half of the samples away, or half of the tokens, moves no other token."""
    x = torch.randn(4, 12, WIDTH)
    _, whole = call(layer.eval(), x)
    mask = torch.zeros(4, 12, dtype=torch.bool)
    mask[1:3, :7] = True
    _, part = layer(x, mask=mask, context=x.roll(1, dims=1) + 0.5 * x)
    stays = torch.equal(whole.expert_index[mask.flatten()], part.expert_index)
    assert stays or not layer.router.independent


def check_evaluation_repeats_itself(layer):
    """The same tokens give the same routing and output, and leave no trace."""
    x = torch.randn(2, 10, WIDTH)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    (one, first), (other, second) = (call(layer.eval(), x) for _ in range(2))
    assert torch.equal(one, other)
    assert torch.equal(first.expert_index, second.expert_index)
    assert torch.equal(first.gate, second.gate)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def check_forward_is_pure(layer):
    """Training forward passes change no parameter and no persistent buffer: only `after_step` does."""
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    for _ in range(2):
        call(layer.train(), torch.randn(2, 10, WIDTH))
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def check_order_of_samples_does_not_matter(layer):
    """A sample's output does not depend on its place in the batch."""
    x = torch.randn(4, 10, WIDTH)
    y, _ = call(layer.eval(), x)
    z, _ = call(layer, x.flip(0))
    torch.testing.assert_close(z, y.flip(0))


def check_a_sample_does_not_depend_on_the_others(layer):
    """Alone or in a batch, a sample gets the same output."""
    x = torch.randn(4, 10, WIDTH)
    y, _ = call(layer.eval(), x)
    z, _ = call(layer, x[1:2])
    torch.testing.assert_close(z, y[1:2])


def check_other_precisions_run(layer):
    """A model in half or double precision routes in float32 and returns its own precision."""
    for dtype in (torch.bfloat16, torch.float64):
        other = copy.deepcopy(layer).to(dtype).eval()
        y, routing = call(other, torch.randn(2, 10, WIDTH, dtype=dtype))
        assert y.dtype == dtype
        assert routing.gate.dtype == routing.probs.dtype == torch.float32


def check_masked_tokens_leave_no_trace(layer):
    """Masked tokens pass unchanged, and nothing about them reaches the others."""
    x, mask = torch.randn(3, 10, WIDTH), torch.rand(3, 10) > 0.3
    other = torch.where(mask.unsqueeze(-1), x, 1e3 * torch.randn_like(x))
    y, routing = layer.eval()(x, mask, context=x)
    z, _ = layer(other, mask, context=other)
    assert torch.equal(y[~mask], x[~mask])
    assert torch.equal(y[mask], z[mask])
    assert len(routing.gate) == mask.sum()


def check_equals_a_dense_sum(layer):
    """The layer is h + alpha * sum of gate * expert, expert by expert."""
    x = torch.randn(2, 9, WIDTH)
    with torch.no_grad():
        layer.alpha.fill_(0.7)
        y, routing = call(layer.eval(), x)
        tokens = torch.nn.functional.layer_norm(x.flatten(0, 1), (WIDTH,))
        outputs = torch.stack([layer.experts.run(tokens, e) for e in range(EXPERTS)], 1)
        chosen = outputs.gather(1, routing.expert_index.unsqueeze(-1).expand(-1, -1, WIDTH))
        want = x.flatten(0, 1) + 0.7 * (routing.gate.unsqueeze(-1) * chosen).sum(1)
    torch.testing.assert_close(y.flatten(0, 1), want, atol=1e-5, rtol=1e-5)


def check_autocast_keeps_the_routing_in_float32(layer):
    """Gates and probabilities stay float32, and the same, under bfloat16."""
    x = torch.randn(2, 10, WIDTH)
    _, high = call(layer.eval(), x)
    with torch.autocast("cpu", torch.bfloat16):
        _, low = call(layer, x)
    assert low.gate.dtype == low.probs.dtype == torch.float32
    torch.testing.assert_close(low.probs, high.probs, atol=1e-5, rtol=0)


def check_state_dict_round_trip(layer):
    """A layer that took some steps routes the same after being saved and loaded into a fresh one."""
    fresh = build_like(layer)
    for _ in range(3):
        call(layer.train(), torch.randn(2, 20, WIDTH))
        layer.after_step()
    fresh.load_state_dict(layer.state_dict())
    x = torch.randn(2, 10, WIDTH)
    assert torch.equal(call(layer.eval(), x)[0], call(fresh.eval(), x)[0])


def check_training_keeps_frames_and_idle_experts(layer):
    """Frames stay orthonormal; an expert without a token is not moved by momentum, weight decay or retraction."""
    optimizer = build_optimizer(layer, 1e-2, 0.1)
    idle_seen = False
    for step in range(12):
        # later steps see one token many times, so that some experts starve
        x = torch.randn(4, 20, WIDTH) if step < 6 else torch.randn(1, 1, WIDTH).expand(4, 20, -1)
        y, routing = call(layer.train(), x)
        optimizer.zero_grad()
        (y.square().mean() + routing.aux_loss).backward()
        before = {name: p.detach().clone() for name, p in layer.named_parameters()}
        idle = layer.load.sums[0] == 0
        update(optimizer, layer)
        for name, parameter in layer.experts.named_parameters(prefix="experts"):
            if parameter.shape[:1] == (EXPERTS,) and idle.any():
                idle_seen = True
                assert torch.equal(parameter[idle], before[name][idle]), name
                assert not torch.equal(parameter[~idle], before[name][~idle]), name
        frames = [
            f
            for f in (getattr(layer.router, "learned", None), getattr(layer.router, "rotation", None))
            if f is not None
        ]
        frames += [layer.experts.basis()] if layer.experts.has_basis else []
        assert all(orthonormality_error(frame).max() < 1e-5 for frame in frames)
    return idle_seen


def build_like(layer):
    fresh = copy.deepcopy(layer)
    for parameter in fresh.parameters():
        torch.nn.init.normal_(parameter.data)
    for buffer in fresh.buffers():
        buffer.zero_()
    return fresh


CHECKS = [check for name, check in list(globals().items()) if name.startswith("check_")]
