import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.cluster import KMeans
from torch import nn

from emoe_med.models.heads import L1Head, SoftLabelHead, TrainingAges
from emoe_med.models.resnet import ResNet, ResNetOptions
from emoe_med.models.sfcn import SFCN, SFCNOptions
from emoe_med.models.single_gated import STARTS, ClassEnsembler, ClusterGate, SingleGated, macs, weigh

AGES = TrainingAges(20.0, 80.0, 50.0, 10.0, 50.0, 100)


def networks():
    torch.manual_seed(3)
    sfcn = SFCN(5, SFCNOptions((2, 3, 4), pooled=2, neck=6, stem=2, dropout=0.5))
    resnet = ResNet(5, ResNetOptions(stem="cifar", width=1 / 16))
    for net in (sfcn, resnet):
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
                nn.init.uniform_(module.running_var, 0.5, 1.5)
                nn.init.normal_(module.running_mean)
    return {"sfcn": (sfcn.eval(), torch.randn(7, 1, 16, 16, 16)), "resnet": (resnet.eval(), torch.randn(7, 3, 8, 8))}


NETWORKS = networks()


def mixture(name, tau=None, experts=3, stages=2) -> tuple[SingleGated, torch.Tensor]:
    """A mixture whose gate and experts are unlike each other."""
    net, image = NETWORKS[name]
    whole = SingleGated(net, experts, stages, ClassEnsembler(), tau).eval()
    torch.manual_seed(4)
    for parameter in whole.experts.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    with torch.no_grad():  # each expert gets some images
        features = whole.features(image).flatten(1)
        whole.gate.weight.copy_(3 * torch.randn(experts, features.shape[1]) / features.std(0).clamp_min(0.01))
        whole.gate.bias.copy_(-whole.gate.weight @ features.mean(0))
    return whole, image


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_cut_behind_any_stage_answers_as_the_whole(name):
    net, image = NETWORKS[name]
    last = len(net.blocks) if name == "sfcn" else 4
    with torch.no_grad():
        whole = net(image).output
        for stages in range(last + 1):
            tail, shared = net.tail(stages), net.until(image, stages)
            torch.testing.assert_close(net.answer(net.beyond(shared, stages)), whole)
            torch.testing.assert_close(tail.answer(tail.beyond(shared, stages)), whole)
            assert net.beyond(shared, stages).flatten(1).shape == (7, net.num_features)
    left = {parameter for parameter, _ in net.tail(last).named_parameters()}
    assert left == (
        {"fc.weight", "fc.bias"} if name == "resnet" else {n for n, _ in net.named_parameters() if "blocks" not in n}
    )
    assert net.tail(1).state_dict().keys() < net.state_dict().keys()


def test_the_gate_starts_as_k_means_and_as_the_posterior_of_its_gaussians():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(90, 3)) + 2.0 * rng.normal(size=(4, 3))[rng.integers(4, size=90)]
    gate = ClusterGate.fit(x, 4, seed=5)
    reference = KMeans(4, n_init=STARTS, random_state=5).fit(x)
    with torch.no_grad():
        logits = gate(torch.tensor(x))
        assert np.array_equal(logits.argmax(1), reference.labels_)
        assert np.array_equal(gate.nearest(torch.tensor(x)), reference.labels_)
        np.testing.assert_allclose(gate.centroids, reference.cluster_centers_, rtol=1e-6)
        variance = np.square(x - reference.cluster_centers_[reference.labels_]).mean()
        density = np.stack([multivariate_normal(c, variance).pdf(x) for c in reference.cluster_centers_], 1)
        np.testing.assert_allclose(logits.softmax(1), density / density.sum(1, keepdims=True), atol=1e-4)
        # maps are flattened, and low precision around it does not reach in
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(gate(torch.tensor(x).reshape(90, 3, 1, 1)), logits)


def test_who_answers_by_hand():
    probs = torch.tensor([[0.9, 0.1, 0.0], [0.9, 0.1, 0.0], [0.5, 0.4, 0.1], [0.2, 0.2, 0.6]])
    confidence = torch.tensor([0.8, 0.6, 0.1, 0.3])
    always = torch.tensor([[1.0, 0, 0], [1, 0, 0], [1, 0, 0], [0, 0, 1]])
    assert torch.equal(weigh(probs, confidence, None), always)
    # gate * (1 - confidence): .18 .02 0 | .36 .04 0 | .45 .36 .09 | .14 .14 .42; an expert runs above 1 - tau
    expected = {
        0.0: torch.zeros(4, 3),
        0.6: torch.tensor([[0.0, 0, 0], [0, 0, 0], [1, 0, 0], [0, 0, 1]]),
        0.7: torch.tensor([[0.0, 0, 0], [1, 0, 0], [5 / 9, 4 / 9, 0], [0, 0, 1]]),
        0.85: torch.tensor([[1.0, 0, 0], [1, 0, 0], [5 / 9, 4 / 9, 0], [0, 0, 1]]),
        1.0: torch.tensor([[0.9, 0.1, 0], [0.9, 0.1, 0], [0.5, 0.4, 0.1], [0.2, 0.2, 0.6]]),
    }
    for tau, weights in expected.items():
        torch.testing.assert_close(weigh(probs, confidence, tau), weights, msg=str(tau))


def test_a_sure_gate_and_a_base_as_sure_as_tau_need_no_expert():
    one = torch.tensor([[1.0, 0.0]])
    assert weigh(one, torch.tensor([0.76]), 0.75).sum() == 0
    assert weigh(one, torch.tensor([0.74]), 0.75).tolist() == [[1.0, 0.0]]


def test_class_answers_are_averaged_by_hand():
    outputs = torch.tensor([[[2.0, 0.0], [0.0, 4.0], [8.0, 8.0]], [[2.0, 0.0], [0.0, 4.0], [6.0, -6.0]]])
    whole = SingleGated(NETWORKS["resnet"][0], 2, 3, ClassEnsembler())
    joined = whole.joined(outputs, torch.tensor([[1.0, 0.0], [0.25, 0.75]]))
    assert joined.tolist() == [[1.0, 2.0], [0.5 * 2 + 0.125 * 0 + 0.375 * 6, 0.5 * 0 + 0.125 * 4 - 0.375 * 6]]
    assert whole.joined(outputs, torch.zeros(2, 2)).tolist() == outputs[:, 0].tolist()
    sure = ClassEnsembler().confidence(torch.tensor([[0.0, np.log(3.0)]]))
    torch.testing.assert_close(sure, torch.tensor([0.75]))


def test_ages_are_averaged_as_distributions_or_as_numbers():
    soft, number = SoftLabelHead(AGES), L1Head(AGES)
    torch.manual_seed(1)
    outputs, weights = torch.randn(4, 3, soft.outputs) * 2, torch.rand(4, 3)
    weights /= weights.sum(1, keepdim=True)
    weights[0] = torch.tensor([1.0, 0.0, 0.0])
    joined = soft.join(outputs, weights)
    by_hand = (weights[..., None] * outputs.softmax(-1)).sum(1)
    torch.testing.assert_close(joined.softmax(1), by_hand)
    ages = torch.stack([soft.predict(outputs[:, j]) for j in range(3)], 1)
    torch.testing.assert_close(soft.predict(joined), (weights * ages).sum(1))
    z = torch.tensor([[[1.0], [3.0]]])
    assert float(number.predict(number.join(z, torch.tensor([[0.25, 0.75]])))) == pytest.approx(50 + 10 * 2.5)


def test_an_age_is_as_sure_as_its_distribution_is_narrow():
    head = SoftLabelHead(AGES)
    single, two = torch.full((2, head.outputs), -1e4).unbind()
    single[7] = two[7] = two[17] = 0.0
    found = head.confidence(torch.stack([single, two, torch.zeros(head.outputs)]))
    uniform = np.sqrt((head.outputs**2 - 1) / 12)  # spread of so many neighbouring years
    np.testing.assert_allclose(found, [1.0, 1 - 5 / uniform, 0.0], atol=1e-5)
    assert head.has_confidence
    assert not L1Head(AGES).has_confidence
    assert L1Head(AGES).confidence(torch.randn(3, 1)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("tau", [None, 0.0, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("name", NETWORKS)
def test_experts_run_on_their_images_alone_and_the_answer_is_as_if_all_had_run(name, tau):
    whole, image = mixture(name, tau)
    ran = []
    for number, expert in enumerate(whole.experts):
        layer = expert.neck if name == "sfcn" else expert.layer4[0]
        layer.register_forward_pre_hook(lambda module, args, number=number: ran.append((number, len(args[0]))))
    with torch.no_grad():
        out = whole(image)
        mine = list(ran)
        answers = whole.answers(image)
        weights = weigh(answers.probs, answers.confidence, tau)
        torch.testing.assert_close(out.output, whole.joined(answers.outputs, weights), rtol=1e-4, atol=1e-5)
        assert mine == [(k, int(n)) for k, n in enumerate((weights > 0).sum(0)) if n]
        routing = out.routing["gate"]
        assert torch.equal(routing.load(), (weights > 0).sum(0))
        torch.testing.assert_close(answers.outputs[:, 0], whole.base(image).output)
    if tau is None:
        assert sum(count for _, count in mine) == len(image)
        assert len(mine) > 1
    if tau == 0.0:
        assert not mine
        torch.testing.assert_close(out.output, whole.base(image).output)


def test_the_cost_by_hand_and_the_cost_that_was_paid():
    net, image = NETWORKS["sfcn"]
    # 16^3 voxels fold to 8 channels of 8^3; blocks of 2, 3, 4 channels, the first two halve the map; then 6 and 5
    shared = 27 * 8 * 2 * 8**3 + 27 * 2 * 3 * 4**3
    rest = 27 * 3 * 4 * 2**3 + 4 * 6 * 2**3 + 6 * 5
    whole = SingleGated(net, 3, 2, ClassEnsembler()).eval()
    assert whole.cost(image[:1]) == {"base": shared + rest, "gate": 6 * 3, "expert": rest}
    whole, image = mixture("resnet", tau=0.5)
    cost = whole.cost(image[:1])
    with torch.no_grad():
        experts = int(whole(image).routing["gate"].load().sum())
        paid = macs(lambda: whole(image))
    assert 0 < experts < 3 * len(image)
    assert paid == len(image) * (cost["base"] + cost["gate"]) + experts * cost["expert"]


def test_its_weights_are_those_of_base_gate_and_experts():
    whole, _ = mixture("resnet")
    assert {name.partition(".")[0] for name in whole.state_dict()} == {"base", "gate", "experts"}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_probe_sees_the_base_and_the_likeliest_expert(name):
    whole, image = mixture(name)
    with torch.no_grad():
        found = whole.probed(image)["mean"]
        base = whole.features(image)
        chosen, shared = whole.gate(base).argmax(1), whole.base.until(image, 2)
        for row in range(len(image)):
            expert = whole.experts[chosen[row]].beyond(shared[row : row + 1], 2)
            torch.testing.assert_close(found[row], torch.cat([base[row], expert[0]]), rtol=1e-4, atol=1e-4)
