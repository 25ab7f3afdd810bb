"""Published transformer weights: read safely, named as timm names them, and put into a network that may route.

A file of ours is safetensors with timm's names; its metadata carry the constants that pixels are normalised by.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from emoe_med.errors import CheckpointError, ConfigError, Fault
from emoe_med.models.normalisation import flaw, published_constants
from emoe_med.models.pth import read_pth
from emoe_med.models.state import axis_size, check_tensors
from emoe_med.models.vit import Mlp, ViT, ViTOptions, copy_mlp, resized_positions
from emoe_med.moe import (
    EigenOptions,
    EigenRouter,
    MLPExperts,
    MLPOptions,
    MoELayer,
    load_published,
    retract_before_training,
)

# Hugging Face's names (transformers 4, as files on its hub have them) and timm's. Its layer norms add 1e-12 to the
# variance where timm and `vit.py` add 1e-6: nothing to activations of order one.
_HUGGING_FACE = (
    (r"(?:vit\.)?embeddings\.cls_token", "cls_token"),
    (r"(?:vit\.)?embeddings\.position_embeddings", "pos_embed"),
    (r"(?:vit\.)?embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"(?:vit\.)?encoder\.layer\.(\d+)\.layernorm_before\.", r"blocks.\1.norm1."),
    (r"(?:vit\.)?encoder\.layer\.(\d+)\.layernorm_after\.", r"blocks.\1.norm2."),
    (r"(?:vit\.)?encoder\.layer\.(\d+)\.attention\.attention\.", r"blocks.\1.attn."),
    (r"(?:vit\.)?encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"blocks.\1.attn.proj."),
    (r"(?:vit\.)?encoder\.layer\.(\d+)\.intermediate\.dense\.", r"blocks.\1.mlp.fc1."),
    (r"(?:vit\.)?encoder\.layer\.(\d+)\.output\.dense\.", r"blocks.\1.mlp.fc2."),
    (r"(?:vit\.)?layernorm\.", "norm."),
    (r"classifier\.", "head."),
)
_PART = re.compile(r"(?<=\.attn\.)(query|key|value)(?=\.)")
_BRANCH = re.compile(r"branches\.(\d+)\.")


@dataclass(frozen=True)
class ViTWeights:
    """Weights by timm's names, and the normalisation that they were trained with.

    Attributes:
        tensors: By name.
        mean: [C] of pixels in 0 to 1.
        std: [C].
        sha256: Of the file.
    """

    tensors: dict[str, Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sha256: str = ""


def read_weights(path: Path) -> ViTWeights:
    """Read a file that `write_weights` wrote.

    Raises:
        CheckpointError: WGT-FILE, missing, damaged, or not one of ours.
    """
    tensors, metadata = _safetensors(path)
    if not {"mean", "std"} <= metadata.keys():
        hint = "make one by `python -m emoe_med.vision import-weights`"
        raise CheckpointError(Fault("WGT-FILE", "carries no normalisation constants", str(path), hint=hint))
    try:
        mean, std = (tuple(map(float, json.loads(metadata[name]))) for name in ("mean", "std"))
        reason = flaw(mean, std)
    except (ValueError, TypeError) as error:
        reason = str(error)
    if reason:
        raise CheckpointError(Fault("WGT-FILE", f"carries no usable normalisation constants ({reason})", str(path)))
    return ViTWeights(tensors, mean, std, _digest(path))


def write_weights(weights: ViTWeights) -> bytes:
    """Return the content of a weights file."""
    metadata = {"mean": json.dumps(weights.mean), "std": json.dumps(weights.std), "source_sha256": weights.sha256}
    return save({name: tensor.contiguous() for name, tensor in weights.tensors.items()}, metadata)


def read_foreign(path: Path, mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None) -> ViTWeights:
    """Read a published file: timm's or Hugging Face's safetensors, or the EMoE authors' `.pth`.

    The constants are taken from timm's `config.json` or Hugging Face's `preprocessor_config.json` beside it, unless
    both are given.

    Raises:
        CheckpointError: WGT-FILE, WGT-PTH, CKPT-KEY; WGT-NAN, a weight is not finite; WGT-NORM, no usable constants
            beside the file.
        ConfigError: WGT-NORM, the given constants cannot be.
    """
    if not path.is_file():
        reason = "is a folder" if path.is_dir() else "is no file" if path.exists() else "is not there"
        raise CheckpointError(Fault("WGT-FILE", reason, str(path), hint="name the file of the weights"))
    tensors = read_pth(path) if path.suffix in (".pth", ".pt", ".bin") else _safetensors(path)[0]
    tensors = {name: tensor.float() for name, tensor in _as_timm(tensors, path).items()}
    wrong = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if wrong:
        raise CheckpointError(Fault("WGT-NAN", f"{wrong[0]} is not finite (and {len(wrong) - 1} more)", str(path)))
    error: type[CheckpointError | ConfigError] = ConfigError
    if mean is None or std is None:
        (mean, std), error = published_constants(path), CheckpointError
    stems = [tensors[name] for name in ("patch_embed.proj.weight", "conv1.weight") if name in tensors]
    channels = next((stem.shape[1] for stem in stems if stem.ndim == 4), None)
    if reason := flaw(mean, std, channels):
        raise error(Fault("WGT-NORM", reason, str(path), hint="give --mean and --std of pixels in 0 to 1"))
    return ViTWeights(tensors, mean, std, _digest(path))


def _safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        reason = "is not there" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise CheckpointError(Fault("WGT-FILE", reason, str(path))) from error


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _as_timm(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Rename; names that no rule knows stay, and are refused when they are put into a network.

    Raises:
        CheckpointError: CKPT-KEY, query, key and value do not go together; WGT-KEY.
    """
    if any(_BRANCH.match(name) for name in tensors):
        return _authors(tensors, path)
    if not any("embeddings.cls_token" in name for name in tensors):
        return dict(tensors)
    named = {}
    for name, tensor in tensors.items():
        if "pooler." in name:
            continue  # not part of the classifier
        for pattern, new in _HUGGING_FACE:
            name = re.sub(f"^{pattern}", new, name)
        named[name] = tensor
    for whole in sorted({_PART.sub("qkv", name) for name in named if _PART.search(name)}):
        parts = [whole.replace(".qkv.", f".{part}.") for part in ("query", "key", "value")]
        shapes = {named[part].shape if part in named else None for part in parts}
        if len(shapes) > 1 or shapes == {torch.Size()}:
            reason = f"{', '.join(parts)} are not there or differ in shape"
            raise CheckpointError(Fault("CKPT-KEY", reason, str(path)))
        named[whole] = torch.cat([named.pop(part) for part in parts])
    return named


def _authors(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Read the authors' EMoE: a timm backbone under `vit.`, one branch behind each of the last blocks.

    The branch behind the very last block is left out: the class token is pooled, so that it changes no output.

    Raises:
        CheckpointError: WGT-KEY, a branch is not as published.
    """
    named = {name.removeprefix("vit."): tensor for name, tensor in tensors.items() if name.startswith("vit.")}
    depth = 1 + max((int(name.split(".")[1]) for name in named if name.startswith("blocks.")), default=-1)
    branches = sorted({int(found[1]) for name in tensors if (found := _BRANCH.match(name))})
    if len(branches) > depth:
        reason = f"holds {len(branches)} branches for {depth} blocks"
        raise CheckpointError(Fault("WGT-KEY", reason, str(path)))
    for branch in branches:
        block = depth - len(branches) + branch
        if block == depth - 1:
            continue
        prefix = f"branches.{branch}."
        try:
            width, rank = tensors[f"{prefix}router.basis.Q"].shape
            hidden, experts = tensors[f"{prefix}experts.0.down.weight"].shape[0], len(tensors[f"{prefix}router.bias"])
            router = EigenRouter(width, experts, 1, EigenOptions.paper_code(rank=rank))
            layer = MoELayer(router, MLPExperts(width, experts, MLPOptions(hidden, zero_init=False)), normalise=False)
            load_published(layer, tensors, prefix)
        except (KeyError, ValueError, IndexError, TypeError, RuntimeError) as error:
            reason = f"branch {branch} is not as published: {error}"
            raise CheckpointError(Fault("WGT-KEY", reason, str(path))) from error
        named |= {f"blocks.{block}.moe.{name}": tensor for name, tensor in layer.state_dict().items()}
    return named


def check_whole(weights: ViTWeights, path: Path) -> ViTOptions:
    """Compare every name and shape with the transformer that the file seems to be of; returns its options.

    Raises:
        CheckpointError: CKPT-KEY, CKPT-SHAPE, each difference.
    """
    found = {name: tensor for name, tensor in weights.tensors.items() if ".moe." not in name}
    patch, positions = (found.get(name, torch.empty(0)) for name in ("patch_embed.proj.weight", "pos_embed"))
    depth = len({name.split(".")[1] for name in found if name.startswith("blocks.")})
    if patch.ndim != 4 or positions.ndim != 3 or not depth or 0 in patch.shape:
        raise CheckpointError(Fault("CKPT-KEY", "holds no patch_embed.proj, pos_embed and blocks of a ViT", str(path)))
    registers = axis_size(found, "reg_token", 1)
    class_token = "cls_token" in found
    edge = math.isqrt(max(0, positions.shape[1] - registers - class_token)) * patch.shape[2]
    options = ViTOptions(
        image_size=(edge, edge),
        patch_size=patch.shape[2],
        in_channels=patch.shape[1],
        width=patch.shape[0],
        depth=depth,
        heads=1,  # leaves no trace in a shape
        class_token=class_token,
        registers=registers,
        pool="token" if class_token else "mean",
    )
    with torch.device("meta"):
        net = ViT(axis_size(found, "head.bias") or 1, options)
    headless = not any(name.startswith("head.") for name in found)
    expected = {n: t.shape for n, t in net.state_dict().items() if not (headless and n.startswith("head."))}
    check_tensors(found, expected, path)
    return options


def resized(weights: ViTWeights, patches: int, prefix: int = 1) -> ViTWeights:
    """Interpolate the position embedding to a square of so many patches along each edge.

    Raises:
        CheckpointError: WGT-POS, none there, or not of a square.
    """
    positions = weights.tensors.get("pos_embed")
    edge = 0 if positions is None else math.isqrt(positions.shape[1] - prefix)
    if positions is None or edge * edge != positions.shape[1] - prefix:
        raise CheckpointError(Fault("WGT-POS", f"no position embedding of a square and {prefix} prefix tokens"))
    changed = resized_positions(positions, (edge, edge), (patches, patches), prefix)
    return replace(weights, tensors={**weights.tensors, "pos_embed": changed})


@torch.no_grad()
def load_weights(net: ViT, weights: ViTWeights, path: Path) -> bool:
    """Put weights into a network; everything is compared before anything is changed.

    Routed layers keep their own start, unless the file has them; experts that replace a feed-forward become copies
    of the file's.

    Args:
        net: Changed in place.
        weights: As read.
        path: Named in a refusal.

    Returns:
        Whether the head was taken over; it is left as it was where it has another number of classes, or is missing.

    Raises:
        CheckpointError: CKPT-KEY, a name is missing or unknown; CKPT-SHAPE, a shape differs: each of them. WGT-UPCYCLE.
    """
    own, found = net.state_dict(), dict(weights.tensors)
    replaced = {f"blocks.{n}.": layer for n, layer in _replaced(net).items() if f"blocks.{n}.mlp.fc1.weight" in found}
    expected = {name: tensor.shape for name, tensor in own.items() if ".moe." not in name}
    width = net.options.width
    mlps = {f"{prefix}mlp.": Mlp(width) for prefix in replaced}
    expected |= {f"{prefix}{name}": t.shape for prefix, mlp in mlps.items() for name, t in mlp.state_dict().items()}
    if any(".moe." in name for name in found):
        expected |= {name: tensor.shape for name, tensor in own.items() if ".moe." in name}
    has_head = found.get("head.weight", own["head.weight"][:0]).shape == own["head.weight"].shape
    if not has_head:
        found = {name: tensor for name, tensor in found.items() if not name.startswith("head.")}
        expected = {name: shape for name, shape in expected.items() if not name.startswith("head.")}
    check_tensors(found, expected, path)
    for prefix, layer in replaced.items():
        mlp = Mlp(width)
        mlp.load_state_dict({name: found.pop(f"{prefix}mlp.{name}") for name in mlp.state_dict()})
        if not copy_mlp(mlp, layer):
            reason = (
                f"{prefix}moe: the experts are no copies of the feed-forward; they need its hidden width and biases"
            )
            raise CheckpointError(Fault("WGT-UPCYCLE", reason, str(path)))
    net.load_state_dict({**own, **found})
    for layer in net.routed_layers().values() if any(".moe." in name for name in found) else ():
        if isinstance(layer.router, EigenRouter):
            retract_before_training(layer.router)
    return has_head


def _replaced(net: ViT) -> dict[int, MoELayer]:
    layers = {int(name.removeprefix("block")): layer for name, layer in net.routed_layers().items()}
    return {n: layer for n, layer in layers.items() if f"blocks.{n}.mlp.fc1.weight" not in net.state_dict()}
