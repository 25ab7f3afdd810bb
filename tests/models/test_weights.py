"""Published weights by whatever name, checked whole, and put into dense and routed transformers."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from emoe_med.errors import CheckpointError
from emoe_med.models.vit import SIZES, ViT, ViTOptions
from emoe_med.models.weights import (
    ViTWeights,
    check_whole,
    load_weights,
    read_foreign,
    read_weights,
    resized,
    write_weights,
)
from emoe_med.moe import (
    EigenOptions,
    EigenRouter,
    LinearOptions,
    LinearRouter,
    MLPExperts,
    MLPOptions,
    MoELayer,
    orthonormality_error,
)

OPTIONS = ViTOptions((8, 8), 4, 3, width=24, depth=3, heads=3)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.2, 0.2)


def net(outputs=5, options=OPTIONS, seed=0):
    torch.manual_seed(seed)
    made = ViT(outputs, options)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made.eval()


def weights(made):
    return ViTWeights(dict(made.state_dict()), MEAN, STD)


def hugging_face(state):
    """Name the tensors as the model hub does, queries, keys and values apart."""
    named = {
        "vit.embeddings.cls_token": state["cls_token"],
        "vit.embeddings.position_embeddings": state["pos_embed"],
        "vit.pooler.dense.weight": torch.zeros(24, 24),
    }
    for kind in ("weight", "bias"):
        named[f"vit.embeddings.patch_embeddings.projection.{kind}"] = state[f"patch_embed.proj.{kind}"]
        named[f"vit.layernorm.{kind}"], named[f"classifier.{kind}"] = state[f"norm.{kind}"], state[f"head.{kind}"]
        for n in range(3):
            here, block = f"vit.encoder.layer.{n}", f"blocks.{n}"
            parts = state[f"{block}.attn.qkv.{kind}"].chunk(3)
            for name, part in zip(("query", "key", "value"), parts, strict=True):
                named[f"{here}.attention.attention.{name}.{kind}"] = part
            for theirs, ours in (
                ("attention.output.dense", "attn.proj"),
                ("layernorm_before", "norm1"),
                ("layernorm_after", "norm2"),
                ("intermediate.dense", "mlp.fc1"),
                ("output.dense", "mlp.fc2"),
            ):
                named[f"{here}.{theirs}.{kind}"] = state[f"{block}.{ours}.{kind}"]
    return {name: tensor.clone().contiguous() for name, tensor in named.items()}


def same_outputs(one, other):
    image = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        return torch.equal(one(image).output, other(image).output)


@pytest.mark.parametrize("names", ["timm", "hugging_face"])
def test_a_published_file_gives_its_outputs(tmp_path, names):
    source, target = net(), net(seed=1)
    state = dict(source.state_dict())
    save_file(state if names == "timm" else hugging_face(state), tmp_path / "model.safetensors")
    beside = (
        {"pretrained_cfg": {"mean": MEAN, "std": STD}} if names == "timm" else {"image_mean": MEAN, "image_std": STD}
    )
    (tmp_path / ("config.json" if names == "timm" else "preprocessor_config.json")).write_text(json.dumps(beside))
    found = read_foreign(tmp_path / "model.safetensors")
    assert (found.mean, found.std) == (MEAN, STD)
    (tmp_path / "ours.safetensors").write_bytes(write_weights(found))
    again = read_weights(tmp_path / "ours.safetensors")
    assert (again.mean, again.std) == (MEAN, STD)
    assert not same_outputs(source, target)
    assert load_weights(target, again, tmp_path)
    assert same_outputs(source, target)


def test_constants_are_asked_for_where_none_lie_beside(tmp_path):
    save_file(dict(net().state_dict()), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"WGT-NORM.*--mean"):
        read_foreign(tmp_path / "model.safetensors")
    assert read_foreign(tmp_path / "model.safetensors", MEAN, STD).std == STD
    with pytest.raises(CheckpointError, match=r"no normalisation constants.*import-weights"):
        read_weights(tmp_path / "model.safetensors")


def test_a_head_for_other_classes_starts_anew(tmp_path):
    source, target = net(), net(outputs=7, seed=1)
    head = target.head.weight.clone()
    assert not load_weights(target, weights(source), tmp_path)
    assert torch.equal(target.head.weight, head)
    assert torch.equal(target.blocks[2].mlp.fc1.weight, source.blocks[2].mlp.fc1.weight)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: s.pop("blocks.1.attn.qkv.bias"), r"CKPT-KEY.*blocks\.1\.attn\.qkv\.bias is missing"),
        (lambda s: s.update({"fc_norm.weight": torch.ones(24)}), r"fc_norm\.weight is unknown"),
        (lambda s: s.update({"norm.weight": torch.ones(25)}), r"CKPT-SHAPE.*norm\.weight.*\[25\].*\[24\]"),
        (lambda s: s.update({"pos_embed": torch.ones(1, 10, 24)}), r"CKPT-SHAPE.*pos_embed"),
    ],
)
def test_weights_of_another_shape_change_nothing(tmp_path, change, told):
    target, state = net(seed=1), dict(net().state_dict())
    change(state)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(CheckpointError, match=told) as refused:
        load_weights(target, ViTWeights(state, MEAN, STD), tmp_path)
    assert refused.value.exit_code == 4
    assert all(torch.equal(before[name], tensor) for name, tensor in target.state_dict().items())


def test_weights_of_another_size_are_told_in_a_few_lines(tmp_path):
    wider = net(options=ViTOptions((8, 8), 4, 3, width=48, depth=3, heads=3))
    with pytest.raises(CheckpointError) as refused:
        load_weights(net(seed=1), weights(wider), tmp_path)
    first, *_, last = str(refused.value).splitlines()
    differ = len(wider.state_dict()) - 1  # all but the bias of the head, which is as long as there are classes
    assert len(refused.value.faults) == 9
    assert "cls_token has shape [1, 1, 48], the model has [1, 1, 24]" in first
    assert f"and {differ - 2 - 8 + 1} more" in last  # the head itself starts anew


def test_a_position_embedding_is_interpolated_on_demand(tmp_path):
    source = weights(net())
    larger = net(options=ViTOptions((16, 16), 4, 3, width=24, depth=3, heads=3), seed=1)
    changed = resized(source, 4)
    assert changed.tensors["pos_embed"].shape == (1, 17, 24)
    assert torch.equal(changed.tensors["pos_embed"][:, 0], source.tensors["pos_embed"][:, 0])
    assert load_weights(larger, changed, tmp_path)
    with pytest.raises(CheckpointError, match="WGT-POS"):
        resized(ViTWeights({"pos_embed": torch.ones(1, 8, 24)}, MEAN, STD), 4)


def moe(hidden, gate="prob"):
    experts = MLPExperts(24, 4, MLPOptions(hidden=hidden, bias=True, zero_init=False))
    return MoELayer(LinearRouter(24, 4, 2, LinearOptions(gate=gate)), experts, normalise=False)


def test_upcycled_experts_are_copies_of_the_feed_forward_they_replace(tmp_path):
    source, target = net(), net(seed=1)
    target.insert({1: moe(96)}, "replace_ffn", route_prefix=True)
    load_weights(target, weights(source), tmp_path)
    mlp, experts = source.blocks[1].mlp, target.blocks[1].moe.experts
    for e in range(4):
        assert torch.equal(experts.w1[e], mlp.fc1.weight.T)
        assert torch.equal(experts.w2[e], mlp.fc2.weight.T)
        assert torch.equal(experts.b1[e], mlp.fc1.bias)
        assert torch.equal(experts.b2[e], mlp.fc2.bias)
    image = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert not torch.allclose(target(image).output, source(image).output, atol=1e-2)  # gates of 2 of 4 sum below 1
        same = net(seed=1)
        same.insert({1: moe(96, gate="share")}, "replace_ffn", route_prefix=True)
        load_weights(same, weights(source), tmp_path)
        torch.testing.assert_close(same.eval()(image).output, source(image).output)
    narrow = net(seed=1)
    narrow.insert({1: moe(8)}, "replace_ffn", route_prefix=True)
    with pytest.raises(CheckpointError, match="WGT-UPCYCLE"):
        load_weights(narrow, weights(source), tmp_path)


def published_branch(rank=5, experts=4, hidden=6):
    state = {
        "router.basis.Q": torch.linalg.qr(torch.randn(24, rank))[0],
        "router.basis.P": torch.linalg.qr(torch.randn(24, rank))[0],
        "router.basis.log_lambda": torch.randn(rank),
        "router.gamma": torch.randn(rank),
        "router.masks": torch.randn(experts, rank),
        "router.bias": torch.randn(experts),
        "alpha": torch.tensor(0.7),
    }
    for e in range(experts):
        state |= {
            f"experts.{e}.down.weight": torch.randn(hidden, 24),
            f"experts.{e}.up.weight": torch.randn(24, hidden),
        }
    return state


def test_the_authors_checkpoint_gives_their_network(tmp_path):
    backbone = net()
    branches = [published_branch(), published_branch()]
    state = {f"vit.{name}": tensor for name, tensor in backbone.state_dict().items()}
    state |= {f"branches.{i}.{name}": tensor for i, branch in enumerate(branches) for name, tensor in branch.items()}
    torch.save({"model": state}, tmp_path / "emoe.pth")
    found = read_foreign(tmp_path / "emoe.pth", MEAN, STD)
    assert not [name for name in found.tensors if name.startswith("blocks.2.moe")]  # reaches no class token
    target = net(seed=1)
    router = EigenRouter(24, 4, 1, EigenOptions.paper_code(rank=5))
    layer = MoELayer(router, MLPExperts(24, 4, MLPOptions(hidden=6)), normalise=False)
    target.insert({1: layer}, "after_block")
    assert load_weights(target.eval(), found, tmp_path)
    image = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        prefix = backbone.cls_token.expand(2, -1, -1)
        patches = backbone.patch_embed(image).flatten(2).mT
        x = torch.cat([prefix, patches], 1) + backbone.pos_embed
        for n, block in enumerate(backbone.blocks):
            x, _ = block(x)
            if n >= 1:  # their branch stands behind each of the last two blocks
                s, h = branches[n - 1], x[:, 1:]
                z = h @ s["router.basis.Q"]
                e = z**2 / ((z**2).sum(-1, keepdim=True) + 1e-6)
                p = ((e * s["router.gamma"]) @ s["router.masks"].softmax(0).T + s["router.bias"]).softmax(-1)
                best = p.argmax(-1)
                down, up = (torch.stack([s[f"experts.{k}.{name}.weight"] for k in range(4)]) for name in ("down", "up"))
                inner = nn.functional.gelu(torch.einsum("btd,btjd->btj", h, down[best]))
                out = torch.einsum("btj,btdj->btd", inner, up[best])
                x = torch.cat([x[:, :1], h + s["alpha"] * p.amax(-1, keepdim=True) * out], 1)
        expected = backbone.head(backbone.norm(x)[:, 0])
        torch.testing.assert_close(target(image).output, expected, atol=1e-4, rtol=1e-4)


def test_published_frames_are_retracted_before_they_first_train(tmp_path):
    """They were published as a step had left them; until then they are judged as they are."""
    state = {f"vit.{name}": tensor for name, tensor in net().state_dict().items()}
    branches = [published_branch(), published_branch()]
    branches[0]["router.basis.Q"] *= 1.05
    state |= {f"branches.{i}.{name}": tensor for i, branch in enumerate(branches) for name, tensor in branch.items()}
    torch.save(state, tmp_path / "emoe.pth")
    router = EigenRouter(24, 4, 1, EigenOptions.paper_code(rank=5))
    target = net(seed=1)
    target.insert({1: MoELayer(router, MLPExperts(24, 4, MLPOptions(hidden=6)), normalise=False)}, "after_block")
    load_weights(target, read_foreign(tmp_path / "emoe.pth", MEAN, STD), tmp_path)
    target.eval()(torch.randn(2, 3, 8, 8))
    assert orthonormality_error(router.basis()) > 0.1
    target.train()(torch.randn(2, 3, 8, 8))
    assert orthonormality_error(router.basis()) < 1e-5


def test_more_branches_than_blocks_are_refused(tmp_path):
    state = {f"vit.{name}": tensor for name, tensor in net().state_dict().items()}
    state |= {f"branches.{i}.{name}": tensor for i in range(4) for name, tensor in published_branch().items()}
    torch.save(state, tmp_path / "emoe.pth")
    with pytest.raises(CheckpointError, match=r"WGT-KEY.*4 branches for 3 blocks"):
        read_foreign(tmp_path / "emoe.pth", MEAN, STD)


def test_the_authors_huge_layout_is_imported_without_a_head(tmp_path):
    """32 blocks, patches of 14, branches behind the last six, no classifier: ViT-H/14's names at a small width."""
    huge = net(options=ViTOptions((224, 224), 14, 3, width=24, depth=32, heads=2))
    state = {f"vit.{name}": t for name, t in huge.state_dict().items() if not name.startswith("head.")}
    for i in range(6):
        state |= {f"branches.{i}.{name}": tensor for name, tensor in published_branch(experts=8).items()}
    torch.save(state, tmp_path / "emoe_h.pth")
    found = read_foreign(tmp_path / "emoe_h.pth", MEAN, STD)
    options = check_whole(found, tmp_path)
    assert (options.depth, options.patch_size, options.image_size) == (32, 14, (224, 224))
    live = {name.split(".")[1] for name in found.tensors if ".moe." in name}
    assert live == {"26", "27", "28", "29", "30"}  # what is behind the last block reaches no class token
    third = found.tensors["blocks.30.moe.experts.w1"][3]
    torch.testing.assert_close(third, state["branches.4.experts.3.down.weight"].T)


def test_a_checkpoint_that_wants_to_run_code_is_refused_and_does_not(tmp_path):
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {canary}",)

    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="WGT-PTH") as refused:
        read_foreign(tmp_path / "evil.pth", MEAN, STD)
    assert len(str(refused.value).splitlines()) == 1
    assert not canary.exists()
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(CheckpointError, match="WGT-PTH"):
        read_foreign(tmp_path / "text.pth", MEAN, STD)
    with pytest.raises(CheckpointError, match=r"WGT-FILE.*not there"):
        read_foreign(tmp_path / "nowhere.safetensors", MEAN, STD)
    (tmp_path / "cut.safetensors").write_bytes(write_weights(weights(net()))[:-100])
    with pytest.raises(CheckpointError, match=r"WGT-FILE.*cannot be read"):
        read_weights(tmp_path / "cut.safetensors")


TIMM = """
import sys, torch
library = torch.library.Library("torchvision", "DEF")  # a CUDA build of torchvision does not import beside a CPU torch
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
try:
    import timm
except ImportError:
    sys.exit(77)
from safetensors.torch import save_file
torch.manual_seed(0)
arms = {
    "tiny": {},
    "small": {},
    "base": {},
    "mean": {"global_pool": "avg", "fc_norm": False},
    "registers": {"reg_tokens": 4},
}
for name, options in arms.items():
    size = "tiny" if options else name
    made = timm.create_model(f"vit_{size}_patch16_224", num_classes=9, img_size=64, **options).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        content = {"image": image, "logits": made(image), **{f"net.{n}": t for n, t in made.state_dict().items()}}
    save_file(content, f"{sys.argv[1]}/{name}.safetensors")
"""


def test_logits_equal_those_of_timm(tmp_path):
    done = subprocess.run([sys.executable, "-c", TIMM, str(tmp_path)], capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip("timm is not installed")
    assert done.returncode == 0, done.stderr
    from safetensors.torch import load_file

    for name, size, options in (
        ("tiny", "Ti", {}),
        ("small", "S", {}),
        ("base", "B", {}),
        ("mean", "Ti", {"pool": "mean"}),
        ("registers", "Ti", {"registers": 4}),
    ):
        content = load_file(tmp_path / f"{name}.safetensors")
        state = {key.removeprefix("net."): value for key, value in content.items() if key.startswith("net.")}
        made = ViT(9, ViTOptions((64, 64), 16, 3, *SIZES[size], **options)).eval()
        assert load_weights(made, ViTWeights(state, MEAN, STD), tmp_path)
        with torch.no_grad():
            found = made(content["image"]).output
        torch.testing.assert_close(found, content["logits"], atol=1e-4, rtol=1e-4)
