import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from emoe_med.moe.basis import TrackedBasis, orthonormality_error, random_orthonormal, retract


def stream(steps, n=400, width=24, drift=0.0):
    """Tokens with eigenvalues 1/j in a slowly turning basis and a mean larger than all of them."""
    axes = random_orthonormal(width, width)
    mean = 5 * torch.ones(width)
    for _ in range(steps):
        axes = retract(axes + drift * torch.randn(width, width))
        scale = torch.arange(1, width + 1).float().rsqrt()
        yield torch.randn(n, width) * scale @ axes.T + mean, axes


def test_retract_keeps_the_span_and_the_signs():
    matrix = random_orthonormal(10, 4) @ torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    q = retract(matrix)
    assert orthonormality_error(q) < 1e-5
    torch.testing.assert_close(q, matrix / matrix.norm(dim=0), atol=1e-6, rtol=0)  # columns were orthogonal


def test_a_rank_above_the_width_is_refused():
    with pytest.raises(ValueError, match="rank 9"):
        random_orthonormal(8, 9)


def test_follows_the_principal_subspace_of_a_drifting_stream():
    tracked = TrackedBasis(24, 6, decay=0.95)
    axes = torch.eye(24)
    for tokens, axes in stream(200, drift=0.002):  # noqa: B007 the last axes are the truth
        tracked.observe(tokens)
        tracked.after_step()
        assert orthonormality_error(tracked.basis) < 1e-5
    overlap = (tracked.basis.T @ axes[:, :6]).square().sum() / 6
    assert overlap > 0.95
    assert tracked.judge(tracked.basis)["captured_variance"] > 0.99
    random = random_orthonormal(24, 6)
    assert (random.T @ axes[:, :6]).square().sum() / 6 < 0.6


def test_a_standing_stream_gives_the_covariance_and_vectors_of_scikit_learn():
    batches = [tokens for tokens, _ in stream(40)]
    tracked = TrackedBasis(24, 3, decay=0.999)
    for tokens in batches:
        tracked.observe(tokens)
        tracked.after_step()
    pca = PCA(3).fit(torch.cat(batches).numpy())
    truth = pca.get_covariance()
    np.testing.assert_allclose(tracked.mean, pca.mean_, atol=0.02)
    cosines = np.abs((tracked.basis.numpy().T * pca.components_).sum(1))
    assert cosines.min() > 0.97
    assert tracked.judge(tracked.basis)["alignment"] > 0.95
    assert tracked.judge(tracked.exact(3))["captured_variance"] == pytest.approx(1)
    assert tracked.judge(random_orthonormal(24, 3))["captured_variance"] < 0.7
    assert np.trace(tracked.covariance) == pytest.approx(np.trace(truth), rel=0.05)


def test_uncentred_tracking_finds_the_mean_first():
    tracked = TrackedBasis(24, 2, centre=False)
    for tokens, _ in stream(20):
        tracked.observe(tokens)
        tracked.after_step()
    assert not tracked.mean.any()
    assert tracked.basis[:, 0].abs().sum() == pytest.approx(24**0.5, rel=0.02)  # the diagonal direction


def test_micro_batches_add_up_and_nothing_seen_moves_nothing():
    torch.manual_seed(1)
    one = TrackedBasis(24, 4)
    two = TrackedBasis(24, 4)
    two.load_state_dict(one.state_dict())
    for tokens, _ in stream(5):
        one.observe(tokens)
        one.after_step()
        for half in tokens.chunk(2):
            two.observe(half)
        two.after_step()
    before = two.basis.clone()
    two.after_step()
    assert torch.equal(before, two.basis)
    torch.testing.assert_close(one.covariance, two.covariance, atol=1e-4, rtol=0)
    assert set(one.state_dict()) == {"basis", "covariance", "mean", "step"}


def test_of_many_tokens_an_even_sample_is_taken_whatever_the_grid():
    # 128 images of 14 x 14 tokens, whose columns differ: every column must be seen, and as often
    tracked = TrackedBasis(14, 3)
    tracked.observe(torch.eye(14).repeat(128 * 14, 1))
    count, total, _ = tracked.sums.take()
    assert count == TrackedBasis.MAX_TOKENS
    torch.testing.assert_close(total / count, torch.full((14,), 1 / 14), atol=0.004, rtol=0)


def test_a_batch_that_is_not_finite_leaves_no_trace():
    tracked = TrackedBasis(6, 2)
    tracked.observe(torch.randn(50, 6))
    tracked.after_step()
    before = {name: value.clone() for name, value in tracked.state_dict().items()}
    tracked.observe(torch.full((1, 6), torch.inf))
    tracked.after_step()
    assert all(torch.equal(before[name], value) for name, value in tracked.state_dict().items())
    tracked.observe(torch.randn(50, 6))
    tracked.after_step()
    assert tracked.basis.isfinite().all()
