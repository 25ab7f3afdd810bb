import subprocess
import sys

import torch

from emoe_med.moe import EigenOptions, EigenRouter, MLPExperts, MLPOptions, MoELayer, RandomOptions, RandomRouter


def layer(width=12, experts=4, top_k=1):
    made = MoELayer(
        EigenRouter(width, experts, top_k, EigenOptions(rank=4)),
        MLPExperts(width, experts, MLPOptions(hidden=5)),
    )
    torch.nn.init.normal_(made.experts.w2)
    return made


def test_starts_as_the_identity():
    made = MoELayer(EigenRouter(12, 4, 1, EigenOptions(rank=4)), MLPExperts(12, 4, MLPOptions()))
    x = torch.randn(2, 7, 12)
    assert torch.equal(made(x)[0], x)


def test_masked_tokens_pass_through_and_leave_no_trace():
    made = layer().train()
    x = torch.randn(3, 10, 12)
    mask = torch.rand(3, 10) > 0.4
    other = x.clone()
    other[~mask] = 1e3
    y, routing = made(x, mask)
    z, _ = made(other, mask)
    assert torch.equal(y[~mask], x[~mask])
    assert torch.equal(y[mask], z[mask])
    assert len(routing.probs) == mask.sum()
    assert not torch.equal(y[mask], x[mask])
    assert made.router.moments.sums.sums[0] == 2 * mask.sum()


def test_equals_a_sum_over_experts_in_float64():
    made = layer(top_k=2).double().eval()
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    y, routing = made(x)
    tokens = torch.nn.functional.layer_norm(x.view(-1, 12), (12,))
    want = x.reshape(-1, 12).clone()
    for n in range(18):
        for k in range(2):
            e = int(routing.expert_index[n, k])
            want[n] += made.alpha * routing.gate[n, k] * made.experts.run(tokens[n : n + 1], e)[0]
    torch.testing.assert_close(y.view(-1, 12), want, atol=1e-6, rtol=0)


def test_idle_experts_are_those_without_tokens_since_the_last_call():
    made = MoELayer(RandomRouter(12, 6, 1, RandomOptions()), MLPExperts(12, 6, MLPOptions(hidden=2))).train()
    _, routing = made(torch.randn(1, 3, 12))
    idle = made.take_idle()
    assert idle.tolist() == [e not in routing.expert_index for e in range(6)]
    assert made.take_idle().all()
    assert [p.shape[0] for p in made.expert_parameters()] == [6, 6]


def test_one_expert_makes_a_dense_adapter():
    made = MoELayer(RandomRouter(12, 1, 1, RandomOptions()), MLPExperts(12, 1, MLPOptions(hidden=2)))
    torch.nn.init.normal_(made.experts.w2)
    x = torch.randn(1, 5, 12)
    want = x + made.experts.run(torch.nn.functional.layer_norm(x, (12,)), 0)
    torch.testing.assert_close(made(x)[0], want)


def test_the_core_imports_torch_alone():
    code = (
        "import emoe_med.moe, sys; "
        "print({'monai', 'pandas', 'mlflow', 'pydantic', 'nibabel', 'sklearn'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"
