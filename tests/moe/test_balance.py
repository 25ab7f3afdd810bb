import pytest
import torch
from scipy.stats import norm

from emoe_med.moe.balance import BALANCES, ImportanceLoadLoss, MarginBias, Noise, SignBias, SwitchLoss
from emoe_med.moe.router import gate_values, select
from emoe_med.moe.stats import load_statistics

PROBS = torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.2, 0.8]])


def test_a_step_of_the_margin_bias_by_hand():
    balance = MarginBias(2, 0.5)
    balance.observe(PROBS, select(PROBS, 1))
    balance.after_step()
    # margins 0.4, 0.2, 0.6, mean 0.4; loads 2 and 1, a third above and below their mean: 0.5 * 0.4 / 3
    torch.testing.assert_close(balance.bias, torch.tensor([-0.2, 0.2]) / 3)
    assert not balance.bias.requires_grad


def test_a_step_of_the_published_rule_by_hand():
    balance = SignBias(2)
    balance.observe(PROBS, select(PROBS, 1))
    balance.after_step()
    torch.testing.assert_close(balance.bias, torch.tensor([-1e-3, 1e-3]))
    balance.after_step()  # nothing observed
    torch.testing.assert_close(balance.bias, torch.tensor([-1e-3, 1e-3]))


def test_nothing_observed_moves_nothing():
    balance = MarginBias(2, 0.5)
    balance.observe(PROBS, select(PROBS, 1))
    balance.after_step()
    before = {name: value.clone() for name, value in balance.state_dict().items()}
    balance.after_step()
    assert all(torch.equal(before[name], value) for name, value in balance.state_dict().items())


def test_the_switch_loss_by_hand():
    balance = SwitchLoss(2, 1.0)
    # f = (2/3, 1/3), P = (0.5, 0.5): 2 * (1/3 + 1/6)
    torch.testing.assert_close(balance.loss(PROBS, select(PROBS, 1)), torch.tensor(1.0))
    # second choices are no first choices
    torch.testing.assert_close(balance.loss(PROBS, select(PROBS, 2)), torch.tensor(1.0))
    balance.after_step()
    skewed = torch.tensor([[0.9, 0.1], [0.8, 0.2]])
    torch.testing.assert_close(balance.loss(skewed, select(skewed, 1)), torch.tensor(2 * 0.85))
    assert SwitchLoss(2).strength == 0.01


def test_the_importance_and_load_losses_by_hand_against_scipy():
    logits = torch.tensor([[1.0, 0.0], [0.5, 0.2], [-1.0, 0.0]])
    noisy = logits + torch.tensor([[0.1, -0.2], [-0.4, 0.3], [0.0, 0.1]])
    index = select(noisy, 1)
    assert index.flatten().tolist() == [0, 1, 1]
    probs = logits.softmax(-1)
    chance = norm.sf((noisy.numpy()[[0, 1, 2], [0, 1, 1]][:, None] - logits.numpy()) / 0.5)
    parts = [x.std(0) ** 2 / x.mean(0) ** 2 for x in (probs.sum(0).numpy(), chance.sum(0))]
    got = ImportanceLoadLoss(2, 1.0).loss(probs, index, Noise(logits, noisy, 0.5))
    assert got.item() == pytest.approx(sum(parts) / 2, rel=1e-5)


def test_importance_load_is_zero_where_even_and_refused_without_noise():
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    noise = Noise(logits, logits, 0.5)
    assert ImportanceLoadLoss(2).loss(logits.softmax(-1), select(logits, 1), noise).item() == pytest.approx(0, abs=1e-7)
    with pytest.raises(ValueError, match="noise"):
        ImportanceLoadLoss(2).loss(logits.softmax(-1), select(logits, 1))


def test_no_balance_selects_by_score_alone():
    balance = BALANCES["none"](2)
    balance.observe(PROBS, select(PROBS, 1))
    balance.after_step()
    assert torch.equal(balance.preference(PROBS), PROBS)
    assert balance.loss(PROBS, select(PROBS, 1)).item() == 0
    assert not balance.state_dict()


def test_a_skewed_stream_is_balanced_within_600_steps_and_gates_never_see_the_bias():
    balance = MarginBias(8)
    offset = torch.linspace(0, 0.02, 8)
    for _ in range(600):
        probs = ((0.01 * torch.randn(256, 8)) + offset).softmax(-1)
        balance.observe(probs, select(balance.preference(probs), 1))
        balance.after_step()
    probs = ((0.01 * torch.randn(4096, 8)) + offset).softmax(-1)
    index = select(balance.preference(probs), 1)
    assert load_statistics(torch.bincount(index.flatten(), minlength=8))["cv"] < 0.1
    assert load_statistics(torch.bincount(select(probs, 1).flatten(), minlength=8))["cv"] > 0.5
    assert torch.equal(gate_values(probs, index, "prob"), probs.gather(-1, index))


@pytest.mark.parametrize("kind", ["switch", "importance_load"])
def test_a_loss_pulls_towards_an_even_load(kind):
    balance = BALANCES[kind](4, 1.0)
    offset = torch.tensor([2.0, 1.0, 0.0, 0.0], requires_grad=True)
    tokens = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    for _ in range(100):
        logits = tokens + offset
        loss = balance.loss(logits.softmax(-1), select(logits, 1), Noise(logits, logits, 0.25))
        (slope,) = torch.autograd.grad(loss, offset)
        offset = (offset - 0.5 * slope).detach().requires_grad_()
    assert offset.std() < 0.5


def test_gate_scales():
    probs = torch.tensor([[0.1, 0.9]], requires_grad=True)
    index = torch.tensor([[1]])
    assert gate_values(probs, index, "prob").item() == torch.tensor(0.9).item()
    assert gate_values(probs, index, "prob_times_E").item() == torch.tensor(1.8).item()
    one = gate_values(probs, index, "one")
    assert one.item() == 1.0
    one.sum().backward()
    assert probs.grad.tolist() == [[0.0, 1.0]]


def test_top_k_is_best_first_and_follows_the_bias():
    probs = torch.tensor([[0.2, 0.5, 0.3]])
    assert select(probs, 2).tolist() == [[1, 2]]
    assert select(probs + torch.tensor([1.0, 0.0, 0.0]), 2).tolist() == [[0, 1]]
