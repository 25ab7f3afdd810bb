"""The transformer against an independent one, its routed slots, and where gradients reach."""

import math

import pytest
import torch
from torch import nn

from emoe_med.models.vit import SIZES, ViT, ViTOptions, resized_positions, sinusoids
from emoe_med.moe import (
    EigenExpertOptions,
    EigenExperts,
    EigenOptions,
    EigenRouter,
    ERMoEOptions,
    ERMoERouter,
    LinearOptions,
    LinearRouter,
    MLPExperts,
    MLPOptions,
    MoELayer,
)

SMALL = ViTOptions((8, 8), 4, 3, width=24, depth=3, heads=3)
VOLUME = ViTOptions((8, 12, 8), 4, 1, width=24, depth=3, heads=3)


def eigen(width=24, **changes):
    made = MoELayer(EigenRouter(width, 4, 1, EigenOptions(rank=6)), MLPExperts(width, 4, MLPOptions(hidden=5)))
    return made


def linear(width=24, hidden=96):
    experts = MLPExperts(width, 4, MLPOptions(hidden=hidden, bias=True, zero_init=False))
    return MoELayer(LinearRouter(width, 4, 2, LinearOptions()), experts, normalise=False)


def ermoe(width=24):
    experts = EigenExperts(width, 4, EigenExpertOptions(rank=5))
    nn.init.normal_(experts.s)
    return MoELayer(ERMoERouter(width, 4, 2, ERMoEOptions()), experts)


def vit(options=SMALL, outputs=5):
    torch.manual_seed(3)
    net = ViT(outputs, options)
    nn.init.normal_(net.head.weight, std=0.1)
    return net


def reference(net: ViT, image: torch.Tensor) -> torch.Tensor:
    """The same transformer in float64 by torch's own attention, patches cut by hand."""
    options, state = net.options, {name: p.double() for name, p in net.state_dict().items()}
    p, (h, w) = options.patch_size, options.grid
    cut = image.double().unflatten(2, (h, p)).unflatten(4, (w, p)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    x = cut @ state["patch_embed.proj.weight"].flatten(1).T + state["patch_embed.proj.bias"]
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1) + state["pos_embed"]
    width = options.width
    for b in range(options.depth):
        s = {name.removeprefix(f"blocks.{b}."): p for name, p in state.items() if name.startswith(f"blocks.{b}.")}
        y = nn.functional.layer_norm(x, (width,), s["norm1.weight"], s["norm1.bias"], 1e-6)
        attention = nn.MultiheadAttention(width, options.heads, batch_first=True, dtype=torch.float64)
        attention.load_state_dict(
            {
                "in_proj_weight": s["attn.qkv.weight"],
                "in_proj_bias": s["attn.qkv.bias"],
                "out_proj.weight": s["attn.proj.weight"],
                "out_proj.bias": s["attn.proj.bias"],
            }
        )
        x = x + attention(y, y, y)[0]
        y = nn.functional.layer_norm(x, (width,), s["norm2.weight"], s["norm2.bias"], 1e-6)
        y = nn.functional.gelu(y @ s["mlp.fc1.weight"].T + s["mlp.fc1.bias"])
        x = x + y @ s["mlp.fc2.weight"].T + s["mlp.fc2.bias"]
    x = nn.functional.layer_norm(x, (width,), state["norm.weight"], state["norm.bias"], 1e-6)
    return x[:, 0] @ state["head.weight"].T + state["head.bias"]


def test_equals_a_transformer_written_with_torchs_attention():
    net = vit()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    image = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(net(image).output.double(), reference(net, image), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("size", "patch", "millions"),
    [("Ti", 16, 5.717), ("S", 16, 22.05), ("B", 16, 86.57), ("L", 16, 304.3), ("H", 14, 632.0)],
)
def test_sizes_have_the_published_numbers_of_parameters(size, patch, millions):
    width, depth, heads = SIZES[size]
    with torch.device("meta"):
        net = ViT(1000, ViTOptions((224, 224), patch, 3, width, depth, heads))
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, rel=1e-3)


def test_names_are_those_of_timm():
    names = set(vit().state_dict())
    kinds = ("weight", "bias")
    parts = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    block = {f"{part}.{kind}" for part in parts for kind in kinds}
    outside = {f"{part}.{kind}" for part in ("patch_embed.proj", "norm", "head") for kind in kinds}
    assert names == {"cls_token", "pos_embed"} | outside | {f"blocks.{n}.{name}" for n in range(3) for name in block}


@pytest.mark.parametrize("options", [SMALL, VOLUME], ids=["2d", "3d"])
@pytest.mark.parametrize("placement", ["parallel_ffn", "after_block"])
def test_starts_as_the_dense_network(options, placement):
    net = vit(options)
    image = torch.randn(2, options.in_channels, *options.image_size)
    before = net(image).output
    net.insert({0: eigen(), 1: eigen()}, placement)
    out = net(image)
    assert torch.equal(out.output, before)
    assert list(out.routing) == ["block0", "block1"] == list(net.routed_layers())
    patches = math.prod(options.grid)
    assert len(out.routing["block0"].gate) == 2 * patches
    assert out.token_mask["block0"].shape == (2, 1 + patches)
    assert out.token_mask["block0"].sum(1).tolist() == [patches, patches]
    assert not out.token_mask["block0"][:, 0].any()


def test_each_placement_is_the_formula_it_names():
    net = vit()
    block = net.blocks[1]
    x = torch.randn(2, 5, 24)
    attended = block.attn(block.norm1(x))
    middle = x + attended
    normal, plain = block.norm2(middle), nn.functional.layer_norm
    for placement, layer in (("parallel_ffn", eigen()), ("after_block", eigen())):
        nn.init.normal_(layer.experts.w2)
        net.insert({1: layer}, placement)
        dense = middle + block.mlp(normal)
        seen = normal if placement == "parallel_ffn" else plain(dense, (24,))
        tokens = seen[:, 1:].reshape(-1, 24)
        routing = layer.router(tokens, layer.experts)
        runs = [layer.experts.run(token[None], int(e)) for token, e in zip(tokens, routing.expert_index, strict=True)]
        branch = (torch.cat(runs) * routing.gate).view(2, 4, 24)
        found, _ = block(x)
        torch.testing.assert_close(found[:, 1:], dense[:, 1:] + branch, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found[:, :1], dense[:, :1])


def test_experts_that_replace_the_feed_forward_start_as_copies_of_it():
    net = vit().eval()
    x = torch.randn(2, 5, 24)
    block = net.blocks[1]
    middle = x + block.attn(block.norm1(x))
    dense = block.mlp(block.norm2(middle))
    layer = linear()
    net.insert({1: layer}, "replace_ffn", route_prefix=True)
    found, routing = block(x)
    share = routing.gate.sum(1).view(2, 5, 1)
    assert len(routing.gate) == 10
    torch.testing.assert_close(found, middle + share * dense, atol=1e-5, rtol=1e-4)
    assert not [name for name, _ in net.named_parameters() if name.startswith("blocks.1.mlp")]


def gradients(net):
    net.train()
    out = net(torch.randn(4, net.options.in_channels, *net.options.image_size))
    (out.output.square().mean() + out.aux_loss).backward()
    layers = net.routed_layers().items()
    return {name: float(sum(p.grad.abs().sum() for p in layer.experts.parameters())) for name, layer in layers}


@pytest.mark.parametrize("make", [eigen, linear, ermoe])
@pytest.mark.parametrize("placement", ["parallel_ffn", "after_block", "replace_ffn"])
def test_every_branch_before_the_last_block_learns(make, placement):
    net = vit()
    net.insert({0: make(), 1: make()}, placement, route_prefix=placement == "replace_ffn")
    assert min(gradients(net).values()) > 0


def test_the_branch_after_the_last_block_is_dead_under_the_class_token_and_alive_under_the_mean():
    for pool, route_prefix, alive in (("token", False, False), ("token", True, True), ("mean", False, True)):
        options = ViTOptions((8, 8), 4, 3, 24, 3, 3, pool=pool)
        for placement in ("parallel_ffn", "after_block"):
            net = vit(options)
            net.insert({2: eigen()}, placement, route_prefix)
            assert (gradients(net)["block2"] > 0) == alive


def test_the_context_of_ermoe_is_what_attention_added():
    net = vit()
    layer = ermoe()
    net.insert({1: layer}, "parallel_ffn")
    given = []
    layer.register_forward_pre_hook(lambda module, args: given.append(args[2]))
    block, x = net.blocks[1], torch.randn(2, 5, 24)
    block(x)
    assert torch.equal(given[0], block.attn(block.norm1(x))[:, 1:])


def test_registers_and_mean_pooling():
    options = ViTOptions((8, 8), 4, 3, 24, 3, 3, class_token=False, registers=2, pool="mean")
    net = vit(options)
    net.insert({1: eigen()}, "parallel_ffn")
    tokens, routing = net.features(torch.randn(2, 3, 8, 8))
    assert tokens.shape == (2, 6, 24)
    assert len(routing["block1"].gate) == 8
    torch.testing.assert_close(net.pooled(tokens), tokens[:, 2:].mean(1))


def test_positions_of_another_grid():
    ramp = torch.linspace(0, 1, 8)
    grid = (ramp[:, None] + 10 * ramp[None, :]).reshape(1, 64, 1)
    positions = torch.cat([torch.full((1, 1, 1), 7.0), grid], 1)
    assert torch.equal(resized_positions(positions, (8, 8), (8, 8), 1)[:, :1], positions[:, :1])
    halved = resized_positions(positions, (8, 8), (4, 4), 1)
    assert halved[0, 0] == 7
    centres = (ramp[::2] + ramp[1::2]) / 2
    expected = (centres[:, None] + 10 * centres[None, :]).reshape(16)
    inner = torch.tensor([5, 6, 9, 10])  # at the border the kernel is cut
    torch.testing.assert_close(halved[0, 1:, 0][inner], expected[inner], atol=2e-2, rtol=2e-2)
    net = vit()
    assert net(torch.randn(1, 3, 16, 8)).output.shape == (1, 5)
    assert vit(VOLUME)(torch.randn(1, 1, 16, 12, 8)).output.shape == (1, 5)


def test_a_position_embedding_starts_as_waves_that_tell_the_place():
    places = sinusoids((3, 5), 16)
    assert places.shape == (15, 16)
    x, y = 2, 3
    expected = [wave(k * 10_000 ** -(i / 4)) for k in (x, y) for wave in (math.sin, math.cos) for i in range(4)]
    torch.testing.assert_close(places[x * 5 + y], torch.tensor(expected))
    assert len(torch.unique(sinusoids((4, 4, 4), 32), dim=0)) == 64
    net = vit()
    assert torch.equal(net.pos_embed[0, 1:], sinusoids((2, 2), 24))
    assert not net.pos_embed[0, 0].any()


@pytest.mark.parametrize("wrong", [{"image_size": (9, 8)}, {"heads": 5}, {"class_token": False}])
def test_impossible_shapes_are_refused(wrong):
    with pytest.raises(ValueError, match=r"does not divide|needs a class token"):
        ViTOptions(**{"image_size": (8, 8), "patch_size": 4, "width": 24, "heads": 3} | wrong)
