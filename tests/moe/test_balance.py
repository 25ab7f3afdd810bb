import torch

from emoe_med.moe.balance import BiasBalance
from emoe_med.moe.router import gate_values, select
from emoe_med.moe.stats import load_statistics


def test_a_step_by_hand():
    balance = BiasBalance(2, rate=0.5)
    probs = torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.2, 0.8]])
    balance.observe(probs, select(probs, 1))
    balance.after_step()
    # margins 0.4, 0.2, 0.6, mean 0.4; loads 2 and 1, a third above and below their mean: 0.5 * 0.4 / 3
    torch.testing.assert_close(balance.bias, torch.tensor([-0.2, 0.2]) / 3)
    assert not balance.bias.requires_grad


def test_a_skewed_stream_is_balanced_within_600_steps_and_gates_never_see_the_bias():
    balance = BiasBalance(8)
    offset = torch.linspace(0, 0.02, 8)
    for _ in range(600):
        probs = ((0.01 * torch.randn(256, 8)) + offset).softmax(-1)
        index = select(probs, 1, balance.bias)
        balance.observe(probs, index)
        balance.after_step()
    probs = ((0.01 * torch.randn(4096, 8)) + offset).softmax(-1)
    index = select(probs, 1, balance.bias)
    assert load_statistics(torch.bincount(index.flatten(), minlength=8))["cv"] < 0.1
    assert load_statistics(torch.bincount(select(probs, 1).flatten(), minlength=8))["cv"] > 0.5
    assert torch.equal(gate_values(probs, index, "prob"), probs.gather(-1, index))


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
    assert select(probs, 2, torch.tensor([1.0, 0.0, 0.0])).tolist() == [[0, 1]]
