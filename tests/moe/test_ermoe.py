import pytest
import torch

from emoe_med.moe import EigenExpertOptions, EigenExperts, ERMoEOptions, ERMoERouter, MoELayer
from emoe_med.moe.basis import orthonormality_error


def experts(count=3, width=4, rank=1):
    """Expert e looks along axis e."""
    made = EigenExperts(width, count, EigenExpertOptions(rank=rank))
    made.U.data = torch.eye(width)[:count].reshape(count, width, 1).clone()
    return made


def test_one_expert_a_token_is_refused():
    """Its share would be 1 whatever the scores."""
    with pytest.raises(ValueError, match="top_k above 1"):
        ERMoERouter(4, 3, 1, ERMoEOptions())


def test_scores_by_hand():
    router = ERMoERouter(4, 3, 2, ERMoEOptions(threshold=0.0))
    token = torch.tensor([[1.0, 1.0, 1.0, 9.0]])
    # one direction per expert: the cosine is the sign of the product along it
    context = torch.tensor([[2.0, -1.0, 0.5, 9.0]])
    routing = router(token, experts(), context)
    assert set(routing.expert_index[0].tolist()) == {0, 2}
    torch.testing.assert_close(routing.gate, torch.tensor([[0.5, 0.5]]))
    torch.testing.assert_close(routing.probs[0], torch.tensor([1.0, -1.0, 1.0]).softmax(0))


def test_weights_are_the_scores_above_the_threshold():
    torch.manual_seed(0)
    made = EigenExperts(6, 4, EigenExpertOptions(rank=3))
    token, context = torch.randn(200, 6), torch.randn(200, 6)
    routing = ERMoERouter(6, 4, 2, ERMoEOptions(threshold=0.3))(token, made, context)
    for n in range(200):
        scores = []
        for e in range(4):
            a, c = made.U[e].T.detach() @ token[n], made.U[e].T.detach() @ context[n]
            scores.append(float(a @ c / (a.norm() * c.norm())))
        best = sorted(range(4), key=lambda e: -scores[e])[:2]
        weight = [scores[e] if scores[e] > 0.3 else 0.0 for e in best]
        want = [w / sum(weight) for w in weight] if sum(weight) else [1.0, 0.0]  # none qualifies: the best one
        assert routing.expert_index[n].tolist() == best
        assert routing.gate[n].tolist() == pytest.approx(want, abs=1e-5)
    assert (routing.gate[:, 1] == 0).any()


def test_a_threshold_outside_its_range_is_refused():
    with pytest.raises(ValueError, match="threshold"):
        ERMoEOptions(threshold=-0.1)


def test_experts_are_u_diag_s_v_and_start_as_nothing():
    made = EigenExperts(6, 2, EigenExpertOptions(rank=3))
    x = torch.randn(5, 6)
    assert not made.run(x, 1).any()
    torch.nn.init.normal_(made.s)
    want = torch.nn.functional.gelu(x @ made.V[1]) @ torch.diag(made.s[1]) @ made.U[1].T
    torch.testing.assert_close(made.run(x, 1), want)


def test_training_reaches_all_frames_and_keeps_them_orthonormal():
    layer = MoELayer(ERMoERouter(16, 4, 2, ERMoEOptions()), EigenExperts(16, 4, EigenExpertOptions()))
    optimizer = torch.optim.AdamW(layer.parameters(), 1e-2)
    target, first = torch.randn(16, 16), None
    x = torch.randn(8, 50, 16)
    for _ in range(200):
        y, _ = layer(x, context=x.roll(1, 1) + x)
        loss = (y - x - torch.nn.functional.gelu(x @ target)).square().mean()
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        layer.after_step()
        assert orthonormality_error(layer.experts.U).max() < 1e-5
        assert orthonormality_error(layer.experts.V).max() < 1e-5
    assert loss.item() < 0.8 * first
