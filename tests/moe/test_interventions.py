from itertools import permutations

import pytest
import torch

from emoe_med.moe import (
    EigenOptions,
    EigenRouter,
    ExpertChoiceOptions,
    ExpertChoiceRouter,
    MLPExperts,
    MLPOptions,
    MoELayer,
)
from emoe_med.moe.interventions import (
    ablated_expert,
    permuted_routing,
    random_routing,
    rerouted,
    without_branch,
    worst_routing,
)


def layer(top_k=2):
    made = MoELayer(EigenRouter(12, 4, top_k, EigenOptions(rank=4)), MLPExperts(12, 4, MLPOptions(hidden=5)))
    torch.nn.init.normal_(made.experts.w2)
    return made.eval()


X = torch.randn(2, 30, 12, generator=torch.Generator().manual_seed(1))


def by_hand(made, routing):
    """What the layer gives under a routing, token by token."""
    tokens = X.view(-1, 12)
    normal = torch.nn.functional.layer_norm(tokens, (12,))
    want = tokens.clone()
    for n in range(len(tokens)):
        for e, gate in zip(routing.expert_index[n].tolist(), routing.gate[n], strict=True):
            want[n] += made.alpha * gate * made.experts.run(normal[n : n + 1], e)[0]
    return want.view_as(X)


@pytest.fixture
def made():
    with torch.no_grad():
        yield layer()


@pytest.mark.parametrize(
    "change",
    [
        lambda made: permuted_routing(made, 0),
        lambda made: random_routing(made, 0),
        lambda made: worst_routing(made),
        lambda made: ablated_expert(made, 1),
        lambda made: without_branch(made),
    ],
)
def test_changes_the_output_for_its_block_alone_whatever_ends_it(made, change):
    state = {name: value.clone() for name, value in made.state_dict().items()}
    before, _ = made(X)
    with change(made):
        assert not torch.allclose(made(X)[0], before)
    assert torch.equal(made(X)[0], before)
    with pytest.raises(AttributeError), change(made):
        made(None)
    assert torch.equal(made(X)[0], before)
    assert all(torch.equal(state[name], value) for name, value in made.state_dict().items())


def test_the_experts_run_on_the_changed_routing(made):
    _, plain = made(X)
    for intervention in (permuted_routing(made, 3), worst_routing(made), ablated_expert(made, 2)):
        with intervention:
            y, routing = made(X)
        torch.testing.assert_close(y, by_hand(made, routing), atol=1e-5, rtol=0)
        assert torch.equal(routing.probs, plain.probs)


def test_permuted_routing_moves_whole_rows(made):
    _, plain = made(X)
    with permuted_routing(made, 0):
        _, moved = made(X)

    def rows(routing):
        return sorted(torch.cat([routing.expert_index.double(), routing.gate.double()], dim=1).tolist())

    assert rows(moved) == rows(plain)
    assert not torch.equal(moved.gate, plain.gate)
    with permuted_routing(made, 0):
        assert torch.equal(made(X)[1].gate, moved.gate)
        assert not torch.equal(made(X)[1].gate, moved.gate)  # each batch anew


def test_random_routing_is_uniform_over_different_experts_with_the_gates_kept(made):
    x = torch.randn(1, 20_000, 12)
    _, plain = made(x)
    with random_routing(made, 0):
        _, drawn = made(x)
    assert torch.equal(drawn.gate, plain.gate)
    pairs = drawn.expert_index[:, 0] * 4 + drawn.expert_index[:, 1]
    share = torch.bincount(pairs, minlength=16).view(4, 4) / 20_000
    assert (share.diagonal() == 0).all()
    # 12 ordered pairs, standard error 0.002
    assert (share[~torch.eye(4, dtype=torch.bool)] - 1 / 12).abs().max() < 0.01


def test_worst_routing_puts_the_largest_gate_on_the_least_probable_expert(made):
    _, plain = made(X)
    with worst_routing(made):
        _, worst = made(X)
    order = plain.probs.numpy().argsort(axis=-1)
    assert (worst.expert_index.numpy() == order[:, :2]).all()
    assert torch.equal(worst.gate.sort().values, plain.gate.sort().values)
    assert (worst.gate[:, 0] >= worst.gate[:, 1]).all()


def test_worst_routing_cannot_be_made_worse_where_experts_choose():
    made = MoELayer(ExpertChoiceRouter(12, 4, 2, ExpertChoiceOptions()), MLPExperts(12, 4, MLPOptions())).eval()
    with torch.no_grad(), worst_routing(made):
        _, worst = made(X)
    taken = (worst.gate * worst.probs.gather(-1, worst.expert_index)).sum(-1)
    others = [(worst.gate * worst.probs[:, list(order)]).sum(-1) for order in permutations(range(4))]
    torch.testing.assert_close(taken, torch.stack(others).amin(0))
    assert (worst.expert_index.sort().values == torch.arange(4)).all()


def test_ablated_expert_drops_its_slots_and_no_other(made):
    _, plain = made(X)
    with ablated_expert(made, 1):
        _, left = made(X)
    gone = plain.expert_index == 1
    assert 0 < gone.sum() < gone.numel()
    assert (left.gate[gone] == 0).all()
    assert torch.equal(left.gate[~gone], plain.gate[~gone])
    assert torch.equal(left.expert_index, plain.expert_index)
    for expert in (-1, 4):
        with pytest.raises(ValueError, match="none of the layer's 4"):
            ablated_expert(made, expert)


def test_without_all_experts_is_without_branch(made):
    with without_branch(made):
        assert torch.equal(made(X)[0], X)
    with ablated_expert(made, 0), ablated_expert(made, 1), ablated_expert(made, 2), ablated_expert(made, 3):
        assert torch.equal(made(X)[0], X)


def test_masked_tokens_stay_as_they_are(made):
    mask = torch.rand(2, 30) > 0.5
    with random_routing(made, 0):
        y, routing = made(X, mask)
    assert len(routing.gate) == mask.sum()
    assert torch.equal(y[~mask], X[~mask])


def test_rerouted_hands_on_what_the_router_chose(made):
    seen = []
    with rerouted(made, lambda routing: seen.append(routing) or routing):
        _, routing = made(X)
    assert seen == [routing]
