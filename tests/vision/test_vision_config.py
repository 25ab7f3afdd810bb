"""Every shipped run builds; what cannot work is refused when the file is read."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from emoe_med.config import dump_run
from emoe_med.errors import ConfigError
from emoe_med.vision.config import VisionConfig
from emoe_med.vision.net import build_net
from emoe_med.vision.run import CONFIGS, DEFAULTS, chosen_run, load_vision

SHIPPED = sorted(CONFIGS.glob("*.yaml"))
SMALL = """
name: small
data: {dataset: digits, resize: 8}
model: {image_size: 8, patch_size: 4, width: 12, depth: 4, heads: 2, moe: {num_experts: 3}}
training: {epochs: 1, lr: 1e-3}
"""


def load(tmp_path, *assignments, text=SMALL) -> VisionConfig:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return load_vision(path, list(assignments))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_run_loads_builds_and_tells_what_it_is(path):
    config = load_vision(path)
    assert config.name == path.stem
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for word in ("Source:", "Expect:", "Run: python -m emoe_med.vision train"):
        assert any(word in line for line in head), word
    assert f"{path.stem}.yaml" in head[-1] or path.stem in DEFAULTS.values()
    with torch.device("meta"):
        net = build_net(config.model, 3, 10)
    layers = getattr(config.model, "moe", None)
    assert [*net.routed_layers()] == [f"block{n}" for n in (layers.blocks if layers else ())]
    assert [*net.parameters()][-1].requires_grad  # the head


def test_defaults_are_shipped_and_named_by_data_set():
    for dataset, name in DEFAULTS.items():
        assert (CONFIGS / f"{name}.yaml").is_file()
        assert chosen_run(None, dataset).data.dataset == dataset
    assert chosen_run(None, None).data.dataset == "digits"
    assert chosen_run(CONFIGS / "cifar10_emoe_small.yaml", "cifar100").data.dataset == "cifar100"


def test_arms_of_one_comparison_differ_in_the_layer_alone():
    for arms in (
        [f"cifar10_{arm}_small" for arm in ("emoe", "dense", "dense_adapter", "dense_adapter_8x", "vmoe", "ermoe")],
        ["digits_emoe", "digits_dense"],
        ["emoe_vit_b", "vit_b", "dense_adapter_vit_b", "dense_adapter_8x_vit_b", "ermoe_vit_b"],
    ):
        runs = [load_vision(CONFIGS / f"{arm}.yaml") for arm in arms]
        stripped = [r.model_copy(update={"name": "", "model": r.model.model_copy(update={"moe": None})}) for r in runs]
        assert all(run == stripped[0] for run in stripped)


def test_residual_arms_differ_from_the_transformers_in_the_network_alone():
    runs = [load_vision(CONFIGS / f"cifar10_{arm}_small.yaml") for arm in ("emoe", "resnet", "deepmoe")]
    stripped = [run.model_copy(update={"name": "", "model": runs[0].model}) for run in runs]
    assert all(run == stripped[0] for run in stripped)


def test_adapters_have_the_active_and_the_total_expert_weights():
    def experts(arm):
        net = build_net(load_vision(CONFIGS / f"{arm}.yaml").model, 3, 10)
        return sum(p.numel() for layer in net.routed_layers().values() for p in layer.experts.parameters())

    routed = experts("cifar10_emoe_small")
    assert experts("cifar10_dense_adapter_small") == routed / 8
    assert experts("cifar10_dense_adapter_8x_small") == routed


def test_what_a_size_and_missing_blocks_stand_for_is_written_out(tmp_path):
    config = load(tmp_path)
    assert config.model.moe.blocks == (0, 1, 2)
    again = load(tmp_path, text=dump_run(config))
    assert again == config
    deep = load(tmp_path, "model={size: B, moe: {}}", "data.resize=224")
    assert deep.model.moe.blocks == (5, 6, 7, 8, 9, 10)
    assert (deep.model.width, deep.model.depth, deep.model.heads) == (768, 12, 12)
    assert load(tmp_path, text=dump_run(deep)) == deep


@pytest.mark.parametrize(
    ("assignment", "told"),
    [
        ("model.moe.blocks=[3]", "nothing reaches the class token"),
        ("model.moe.blocks=[4]", "each from 0 to 3"),
        ("model.moe.blocks=[1, 1]", "once"),
        ("model.moe.blocks=[]", "blocks"),
        ("model.moe.placement=replace_ffn", "route_prefix: true"),
        ("model.heads=5", "does not divide into 5 heads"),
        ("model.patch_size=3", "does not divide into patches"),
        ("model.size=B", "width 12 is not that of size B"),
        ("data.resize=4", "below model.image_size"),
        ("data.mean=[0.5]", "go together"),
        ("data.dataset=mnist", "dataset"),
        ("model.moe.router.kind=ermoe", "needs experts with a basis"),
        ("augment.cutout=1", "cutout"),
        ("model.kind=vgg", "model: kind is not one of vit, resnet"),
        ("model.colour=1", r"model\.colour: Extra"),
        ("model={kind: resnet, image_size: 8, heads: 3}", r"model\.heads: Extra"),
        ("model={kind: resnet, image_size: 8, width: 0.01}", "leave no channel"),
    ],
)
def test_what_cannot_work_is_refused_by_name(tmp_path, assignment, told):
    with pytest.raises(ConfigError, match=told) as refused:
        load(tmp_path, assignment)
    assert refused.value.exit_code == 2


def test_the_last_block_is_routed_where_its_branch_learns(tmp_path):
    for change in ("model.pool=mean", "model.moe.route_prefix=true"):
        assert load(tmp_path, "model.moe.blocks=[3]", change).model.moe.blocks == (3,)


def test_freezing_holds_the_backbone_and_never_head_or_routed_layers(tmp_path):
    config = load(tmp_path, "model.freeze=[blocks, patch_embed, pos_embed, cls_token, norm]")
    net = build_net(config.model, 1, 10)
    learning = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert learning == {name for name in dict(net.named_parameters()) if ".moe." in name or name.startswith("head.")}
    with pytest.raises(ConfigError, match=r"model\.freeze heads"):
        build_net(load(tmp_path, "model.freeze=[heads]").model, 1, 10)


def test_importing_the_schema_loads_no_torch():
    heavy = "{'torch', 'monai', 'numpy'} & set(sys.modules)"
    code = f"import sys, emoe_med.vision.__main__, emoe_med.vision.config; print({heavy})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
    assert Path(CONFIGS, "digits_emoe.yaml").is_file()
