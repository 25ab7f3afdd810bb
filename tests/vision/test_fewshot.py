from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge as Reference
from sklearn.metrics import normalized_mutual_info_score

from emoe_med.data.image_layouts import Listing, Pixels
from emoe_med.data.images import split
from emoe_med.errors import DataError
from emoe_med.models.vit import ViT, ViTOptions
from emoe_med.moe.router import Routing
from emoe_med.vision.fewshot import PENALTIES, Logistic, Ridge, _unseen, nearest_mean, penalty_of, supports
from emoe_med.vision.heatmap import describe, expert_class_counts


def drawn(n, d, classes=4, seed=0):
    means = np.random.default_rng(classes).normal(size=(classes, d))  # whatever is drawn around them
    y = np.arange(n) % classes
    return np.random.default_rng(seed).normal(size=(n, d)) + 0.7 * means[y], y


@pytest.mark.parametrize(("n", "d"), [(60, 7), (12, 30)], ids=["primal", "dual"])
def test_ridge_is_that_of_scikit_learn(n, d):
    x, y = drawn(n, d)
    probe = Ridge(x, y, 4)
    standard = np.column_stack([(x - x.mean(0)) / (x.std(0) + 1e-5), np.full(n, 100.0)])
    for index in (0, 9, 15, 29):
        reference = Reference(alpha=PENALTIES[index], fit_intercept=False, solver="svd", tol=1e-10)
        reference.fit(standard, 2 * np.eye(4)[y] - 1)
        np.testing.assert_allclose(probe.weights[index], reference.coef_.T, atol=1e-7)


def test_logistic_probes_come_in_order_of_penalty_and_learn():
    x, y = drawn(40, 6)
    other, labels = drawn(400, 6, seed=1)
    probe = Logistic(x, y, 4)
    sizes = [np.abs(fit[-1].coef_).sum() for fit in probe.fits]
    assert sizes == sorted(sizes, reverse=True)
    assert probe.accuracy(0, x, y) > probe.accuracy(-1, x, y) - 1e-9
    assert max(probe.accuracy(i, other, labels) for i in range(probe.count)) > 60


def test_classes_in_another_order_give_the_same_accuracy():
    x, y = drawn(40, 6)
    other, labels = drawn(200, 6, seed=1)
    order = np.array([2, 0, 3, 1])
    for i in range(Ridge.count):
        assert Ridge(x, y, 4).accuracy(i, other, labels) == Ridge(x, order[y], 4).accuracy(i, other, order[labels])


def test_supports_and_held_out_images_are_disjoint_and_of_each_class():
    labels = np.repeat([0, 1, 2], [30, 12, 40])
    support, held = supports(labels, 5, 0)
    assert np.bincount(labels[support]).tolist() == [5, 5, 5]
    assert np.bincount(labels[held]).tolist() == [10, 7, 10]
    assert not set(support) & set(held)
    assert not np.array_equal(supports(labels, 5, 1)[0], support)
    with pytest.raises(DataError, match="class 1 has 12 images"):
        supports(labels, 12, 0)


def test_supports_come_from_the_pool_alone():
    labels, pool = np.repeat([0, 1], [30, 30]), np.arange(0, 60, 2)
    support, held = supports(labels, 4, 0, pool)
    assert np.bincount(labels[support]).tolist() == [4, 4]
    assert set(support) | set(held) <= set(pool)


def test_what_a_data_set_selects_on_is_not_unseen():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1], 30))
    listing = Listing(("a", "b"), Pixels(np.zeros((60, 1)), labels), Pixels(np.zeros((0, 1)), labels[:0]), held=20)
    data = SimpleNamespace(val_share=0.1, train_images=10, split_seed=0)
    pool = _unseen(SimpleNamespace(config=SimpleNamespace(data=data)), listing, 1)
    learned, selected = split(labels, 0.1, 10, 0, 20)
    assert set(selected) == set(range(40, 60))
    assert set(pool) == set(range(40)) - set(learned)


class Told:
    """A probe whose accuracy on each set of images is told."""

    count = 4

    def accuracy(self, penalty, x, y):
        return {"held": [30.0, 50, 50, 10], "test": [10.0, 20, 30, 90]}[x][penalty]


def test_the_penalty_is_chosen_on_held_out_images_and_of_equals_it_is_the_largest():
    assert penalty_of(Told(), "held", None) == 2


class Counted:
    """Two images of two patches each, of the classes 1 and 0; each patch goes to two experts, one has no slot left.

    With a class token it is routed first, to the experts 0 and 1.
    """

    def __init__(self, class_token=False):
        self.token = class_token
        self.net = ViT(2, ViTOptions((2, 4), 2, width=4, depth=1, heads=1, class_token=class_token, pool="mean"))

    meta = MappingProxyType({"classes": ["a", "b"]})

    def outputs(self, data):
        index = torch.tensor([[0, 1], [2, 1], [2, 0], [1, 0]])
        gate = torch.tensor([[0.6, 0.4], [0.5, 0.5], [0.7, 0.3], [0.9, 0.0]])
        if self.token:
            index, gate = (
                torch.cat([torch.tensor([[token]]).expand(2, 1, 2), part.view(2, 2, 2)], 1).flatten(0, 1)
                for token, part in ((0, index), (1.0, gate))
            )
        routing = Routing(index, gate, torch.full((len(gate), 3), 1 / 3), torch.zeros(()))
        mask = torch.ones(2, len(gate) // 2, dtype=torch.bool)
        found = SimpleNamespace(routing={"block0": routing}, token_mask={"block0": mask})
        yield {"label": torch.tensor([1, 0])}, found


@pytest.mark.parametrize("class_token", [False, True])
def test_patches_are_counted_by_expert_and_class_of_their_image(class_token):
    assert expert_class_counts(Counted(class_token), None)["block0"].tolist() == [[1, 1], [1, 2], [1, 1]]


def test_nearest_mean_by_hand():
    x, y = np.array([[1.0, 0], [3, 0], [0, 2]]), np.array([0, 0, 1])
    assert nearest_mean(x, y, np.array([[5.0, 1], [1, 4], [2, 1]]), np.array([0, 1, 1])) == pytest.approx(200 / 3)


def test_nmi_is_that_of_scikit_learn_and_extremes_are_told():
    rng = np.random.default_rng(0)
    expert, label = rng.integers(0, 3, 500), rng.integers(0, 5, 500)
    expert = np.where(rng.random(500) < 0.5, label % 3, expert)
    counts = np.zeros((3, 5))
    np.add.at(counts, (expert, label), 1)
    assert describe(counts)["nmi"] == pytest.approx(normalized_mutual_info_score(label, expert))
    assert describe(np.eye(4))["nmi"] == pytest.approx(1)
    assert describe(np.eye(4))["entropy_given_class"] == pytest.approx(0)
    even = describe(np.ones((4, 7)))
    assert even == pytest.approx({"nmi": 0, "entropy_given_class": 1, "load_cv": 0}, abs=1e-12)
    assert describe(np.array([[5.0, 5], [0, 0]]))["load_cv"] == pytest.approx(1)
