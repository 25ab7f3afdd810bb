import torch

from emoe_med.moe import ExpertChoiceOptions, ExpertChoiceRouter, Place
from emoe_med.moe.stats import RoutingStats


def router(experts=2, top_k=1, width=2):
    made = ExpertChoiceRouter(width, experts, top_k, ExpertChoiceOptions())
    made.weight.data = torch.eye(width)[:, :experts].clone()
    return made


def test_four_tokens_by_hand():
    tokens = torch.tensor([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    routing = router()(tokens, None)
    # 4 tokens, 2 experts, one expert per token on average: each expert takes 2
    p = tokens.softmax(-1)
    # expert 0 takes tokens 0 and 1, expert 1 tokens 3 and 2
    want = torch.tensor([[1, 0], [1, 0], [0, 1], [0, 1]]) * p
    torch.testing.assert_close(routing.gate, want)
    assert routing.load().tolist() == [2, 2]


def test_a_token_may_get_no_expert_and_another_all():
    tokens = torch.tensor([[3.0, 3.0, 0.0], [0.0, 0.0, 3.0], [1.0, 1.0, 1.0]])
    routing = router(experts=3, width=3)(tokens, None)
    assert (routing.gate > 0).sum(1).tolist() == [2, 1, 0]
    stats = RoutingStats(3)
    stats.update(routing)
    assert stats.summary()["cv"] == 0


def test_samples_of_any_length_choose_by_themselves():
    made = ExpertChoiceRouter(8, 4, 2, ExpertChoiceOptions())
    a, b, c = torch.randn(12, 8), torch.randn(7, 8), torch.randn(1, 8)
    sample = torch.tensor([0] * 12 + [1] * 7 + [3])
    mixed = torch.randperm(20)
    place = Place(sample[mixed], torch.zeros(20, dtype=torch.int64), 4)
    together = made(torch.cat([a, b, c])[mixed], None, None, place)
    apart = torch.cat([made(x, None).gate for x in (a, b, c)])[mixed]
    torch.testing.assert_close(together.gate, apart)
    for number, length in [(0, 12), (1, 7), (3, 1)]:
        taken = (together.gate[place.sample == number] > 0).sum(0)
        assert taken.tolist() == [-(-length * 2 // 4)] * 4
