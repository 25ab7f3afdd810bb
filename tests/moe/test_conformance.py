"""Every entry of ROUTERS and EXPERTS, in every variety, through the same checks."""

import pytest
import torch
from checks import CHECKS, build, check_training_keeps_frames_and_idle_experts

from emoe_med.moe import EXPERTS, ROUTERS, EigenExpertOptions, EigenExperts, EigenOptions, LinearOptions, MLPOptions

VARIETIES = {
    "eigen": [
        EigenOptions(rank=6, basis=basis, rotation=rotation)
        for basis in ("tracked", "learned", "fixed")
        for rotation in ("learned", "none")
    ]
    + [
        EigenOptions(rank=6, balance=balance, gate=gate)
        for balance, gate in [("none", "prob"), ("bias_sign", "one"), ("switch", "prob_times_E")]
    ]
    + [EigenOptions.paper_code(rank=6), EigenOptions.paper_code(rank=6, balance="bias")],
    "linear": [
        LinearOptions(),
        LinearOptions(balance="switch", noise=0, jitter=0.01, z_loss=1e-3),
        LinearOptions(balance="bias", noise=0),
        LinearOptions(balance="bias_sign", score="sigmoid", noise=0),
        LinearOptions(capacity=1.05),
        LinearOptions(capacity=0.5, batch_priority=True),
    ],
}
CASES = [
    pytest.param(router, options, None, None, id=f"{kind}-{number}")
    for kind, (router, defaults) in ROUTERS.items()
    if not router.needs_basis
    for number, options in enumerate(VARIETIES.get(kind, [defaults()]))
] + [
    pytest.param(router, router_defaults(), experts, options, id=f"{kind}-{name}-{number}")
    for name, (experts, expert_defaults) in EXPERTS.items()
    for number, options in enumerate([expert_defaults(), *([MLPOptions(hidden=8, bias=True)] if name == "mlp" else [])])
    for kind, (router, router_defaults) in ROUTERS.items()
    if kind in ("eigen", "ermoe") and (experts.has_basis or not router.needs_basis)
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(("router", "options", "experts", "expert_options"), CASES)
def test_conforms(check, router, options, experts, expert_options):
    layer = build(router, options, experts, expert_options) if experts else build(router, options)
    check(layer)


def test_the_check_of_idle_experts_has_seen_some():
    router, defaults = ROUTERS["eigen"]
    assert check_training_keeps_frames_and_idle_experts(build(router, defaults()))


@pytest.mark.parametrize("table", [ROUTERS, EXPERTS])
def test_every_entry_is_built_from_its_options(table):
    for kind, (made, options) in table.items():
        assert made.__doc__, kind
        assert options.__dataclass_params__.frozen, kind
        assert options.__doc__, kind


def test_experts_without_a_basis_are_refused_where_one_is_needed():
    router, defaults = ROUTERS["ermoe"]
    with pytest.raises(ValueError, match="ERMoERouter needs experts with a basis"):
        build(router, defaults())
    layer = build(router, defaults(), EigenExperts, EigenExpertOptions())
    with pytest.raises(ValueError, match="context"):
        layer(torch.randn(1, 3, 16))
