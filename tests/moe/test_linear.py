import math

import pytest
import torch

from emoe_med.moe import LinearOptions, LinearRouter
from emoe_med.moe.routers.linear import within_capacity


def router(weight, top_k, **options):
    made = LinearRouter(len(weight), len(weight[0]), top_k, LinearOptions(**options))
    made.weight.data = torch.tensor(weight)
    return made


# three tokens, two experts, logits = tokens: p = softmax
TOKENS = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0]])
IDENTITY = [[1.0, 0.0], [0.0, 1.0]]
P = 1 / (1 + torch.exp(-torch.tensor([1.0, 3.0, 2.0])))  # of expert 0


def test_v_moe_by_hand_without_a_capacity():
    routing = router(IDENTITY, 2).eval()(TOKENS, None)
    assert routing.expert_index.tolist() == [[0, 1]] * 3
    torch.testing.assert_close(routing.gate, torch.stack([P, 1 - P], 1))  # softmax before top-k, not renormalised


def test_slots_are_filled_choice_major_then_in_token_order():
    # capacity 1 x 2 choices x 3 tokens / 2 experts = 3 slots each; with 2/3 of it, 2 slots each
    routing = router(IDENTITY, 2, eval_capacity=2 / 3).eval()(TOKENS, None)
    # expert 0: first choices of tokens 0, 1; token 2 comes too late. Expert 1: second choices of tokens 0, 1
    kept = torch.tensor([[True, True], [True, True], [False, False]])
    assert torch.equal(routing.gate > 0, kept)
    torch.testing.assert_close(routing.gate[:2], torch.stack([P, 1 - P], 1)[:2])
    assert routing.load().tolist() == [2, 2]


def test_batch_priority_gives_the_slots_to_the_surest_tokens():
    options = {"eval_capacity": 1 / 3, "batch_priority": True}
    routing = router(IDENTITY, 2, **options).eval()(TOKENS, None)
    # one slot each: token 1 is the surest and gets both its choices
    assert torch.equal(routing.gate > 0, torch.tensor([[False, False], [True, True], [False, False]]))
    first_come = router(IDENTITY, 2, eval_capacity=1 / 3).eval()(TOKENS, None)
    assert torch.equal(first_come.gate > 0, torch.tensor([[True, True], [False, False], [False, False]]))


def test_all_first_choices_come_before_any_second_choice():
    # token 0 prefers expert 0 then 1; tokens 1 and 2 prefer expert 1: its second choice waits behind them
    index = torch.tensor([[0, 1], [1, 0], [1, 0]])
    assert within_capacity(index, 2, 2).tolist() == [[True, False], [True, True], [True, False]]
    priority = torch.tensor([0.1, 0.2, 0.9])
    assert within_capacity(index, 2, 1, priority).tolist() == [[True, False], [False, False], [True, False]]


def test_importance_and_load_of_three_tokens_by_hand():
    from scipy.stats import norm

    made = router(IDENTITY, 1)
    torch.manual_seed(3)
    routing = made.train()(TOKENS, None)
    torch.manual_seed(3)
    noisy = (TOKENS + 0.5 * torch.randn(3, 2)).numpy()  # sigma = 1/E
    chance = norm.sf((noisy.max(1)[:, None] - TOKENS.numpy()) / 0.5).sum(0)
    importance = torch.stack([P, 1 - P]).sum(1).numpy()
    want = sum(x.std() ** 2 / x.mean() ** 2 for x in (importance, chance)) / 2 * 0.01
    assert routing.aux_loss.item() == pytest.approx(want, rel=1e-4)
    torch.testing.assert_close(routing.probs, torch.stack([P, 1 - P], 1))  # without noise
    torch.testing.assert_close(routing.gate, torch.tensor(noisy).softmax(-1).amax(1, keepdim=True))  # with it


def test_no_noise_and_no_jitter_outside_training():
    made = router(IDENTITY, 1, jitter=0.5).eval()
    assert torch.equal(made(TOKENS, None).gate, made(TOKENS, None).gate)
    assert not torch.equal(made.train()(TOKENS, None).gate, made(TOKENS, None).gate)


def test_jitter_stays_within_its_bounds():
    made = router(IDENTITY, 1, jitter=0.1, noise=0, balance="none").train()
    ratio = made(torch.ones(5000, 2), None).probs.logit()[:, 0].abs()
    assert 0.15 < ratio.max() <= 0.2 + 1e-5  # of two inputs within 10 % of 1


def test_z_loss_by_hand():
    routing = router(IDENTITY, 1, noise=0, balance="none", z_loss=0.5).eval()(TOKENS, None)
    want = 0.5 * TOKENS.exp().sum(1).log().square().mean()
    torch.testing.assert_close(routing.aux_loss, want)


def test_published_loss_free_gates_with_the_sigmoid_and_selects_with_the_bias():
    made = router(IDENTITY, 1, score="sigmoid", balance="bias_sign", noise=0)
    made.balance.bias.copy_(torch.tensor([-1.0, 1.0]))
    routing = made.eval()(TOKENS, None)
    assert routing.expert_index.flatten().tolist() == [1, 1, 1]
    torch.testing.assert_close(routing.gate, torch.full((3, 1), 0.5))
    made.train()(TOKENS, None)
    made.after_step()
    torch.testing.assert_close(made.balance.bias, torch.tensor([-1 + 1e-3, 1 - 1e-3]))


def test_importance_load_without_noise_is_refused():
    with pytest.raises(ValueError, match="noise"):
        LinearOptions(noise=0)


def test_priority_is_certainty_whatever_the_gate():
    for gate in ("prob", "one", "prob_times_E"):
        made = router(IDENTITY, 1, eval_capacity=2 / 3, batch_priority=True, gate=gate).eval()
        # one expert is wanted by all three and has one slot: the surest token, the second, gets it
        assert (made(TOKENS, None).gate[:, 0] > 0).tolist() == [False, True, False]


def test_shares_of_the_chosen_sum_to_one():
    made = router([[math.log(4), 0.0], [0.0, math.log(2)]], 2, gate="share").eval()
    torch.testing.assert_close(made(torch.eye(2), None).gate, torch.tensor([[4 / 5, 1 / 5], [2 / 3, 1 / 3]]))
    with pytest.raises(ValueError, match="top_k above 1"):
        router(IDENTITY, 1, gate="share")


def test_a_capacity_is_not_rounded_up_by_a_rounding_error():
    made = LinearRouter(4, 8, 1, LinearOptions(eval_capacity=1.1))
    made.weight.data.zero_()  # all tokens want the first expert
    routing = made.eval()(torch.randn(400, 4), None)
    assert routing.load().max() == 55  # 1.1 * 400 / 8
