"""What only a GPU can show: its engine against float64, no waiting for the host, fused steps, compiled steps."""

import warnings

import pytest
import torch

from emoe_med.moe import EigenOptions, EigenRouter, MLPExperts, MLPOptions, MoELayer
from emoe_med.moe.dispatch import grouped_mlp, reference_mlp
from emoe_med.moe.engines import Weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


def layer(basis="tracked", width=256, hidden=64):
    router = EigenRouter(width, 8, 1, EigenOptions(rank=32, basis=basis, balance="bias"))
    return MoELayer(router, MLPExperts(width, 8, MLPOptions(hidden=hidden))).cuda()


def step(layer, tokens):
    with torch.autocast("cuda", torch.bfloat16):
        out, routing = layer(tokens)
    (out.float().square().mean() + routing.aux_loss).backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("used", [1, 8])
@pytest.mark.parametrize("top_k", [1, 2])
def test_the_engine_of_the_gpu_equals_the_dense_sum_in_float64(dtype, used, top_k):
    used = max(used, top_k)
    shapes = [(8, 64, 32), (8, 32, 64), (8, 32), (8, 64)]
    weights = Weights(*(torch.randn(shape, device="cuda").mul_(0.2).to(dtype).requires_grad_() for shape in shapes))
    tokens = torch.randn(500, 64, device="cuda").to(dtype).requires_grad_()
    index = torch.stack([torch.randperm(used)[:top_k] for _ in range(500)]).cuda()
    gate = (torch.rand(500, top_k, device="cuda") * (torch.rand(500, top_k, device="cuda") > 0.3)).to(dtype)
    gate.requires_grad_()
    direction = torch.randn(500, 64, device="cuda").double()
    given = [tokens, gate, *weights]
    exact = [value.detach().double().requires_grad_() for value in given]
    want = reference_mlp(exact[0], index, exact[1], Weights(*exact[2:]))
    got = grouped_mlp(tokens, index, gate, weights)
    relative = 2e-2 if dtype == torch.bfloat16 else 2e-3  # of the largest entry; float32 may be TF32
    wanted = [want, *torch.autograd.grad((want * direction).sum(), exact)]
    gotten = [got, *torch.autograd.grad((got.double() * direction).sum(), given)]
    for a, b in zip(gotten, wanted, strict=True):
        assert torch.isfinite(a).all()
        assert (a.double() - b).abs().max() <= relative * b.abs().max()


@pytest.mark.skipif(not HOPPER, reason="torch runs grouped_mm expert by expert on GPUs before Hopper")
@pytest.mark.parametrize("basis", ["tracked", "learned", "fixed"])
def test_forward_and_backward_never_wait_for_the_host(basis):
    moe, tokens = layer(basis), torch.randn(4, 512, 256, device="cuda", requires_grad=True)
    step(moe, tokens)  # libraries set themselves up
    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings(action="ignore"):  # that this mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
        step(moe, tokens)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_fused_step_is_seen_by_the_next_forward_pass():
    moe, tokens = layer(), torch.randn(4, 512, 256, device="cuda")
    optimizer = torch.optim.AdamW(moe.parameters(), 0.1, fused=True)
    for _ in range(2):
        step(moe, tokens)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        low = moe.eval()(tokens)[0]
        fresh = layer().eval()
        fresh.load_state_dict(moe.state_dict())
        torch.testing.assert_close(low, fresh(tokens)[0], rtol=0, atol=0)


def test_training_twice_gives_the_same_bits():
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        moe, tokens = layer(), torch.randn(4, 512, 256, device="cuda")
        optimizer = torch.optim.AdamW(moe.parameters(), 1e-2, fused=True)
        for _ in range(5):
            step(moe, tokens)
            optimizer.step()
            optimizer.zero_grad()
            moe.after_step()
        results.append([value.clone() for value in moe.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.filterwarnings("ignore")  # inductor advises on TF32
def test_a_compiled_layer_gives_what_the_plain_one_gives():
    moe, tokens = layer().eval(), torch.randn(4, 512, 256, device="cuda")
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        want = moe(tokens)[0]
        got = torch.compile(moe, fullgraph=True)(tokens)[0]
    assert (got - want).abs().mean() < 1e-2 * want.abs().mean()
