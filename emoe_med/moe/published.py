"""Reading the authors' published routed layers into ours, name by name and shape by shape."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from emoe_med.moe.layer import MoELayer
from emoe_med.moe.routers.eigen import EigenRouter


@torch.no_grad()
def load_published(layer: MoELayer, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
    """Put one published branch into a layer with `EigenOptions.paper_code` and `MLPExperts`.

    Modes of the published code: `top1` is top_k 1, `top2` is top_k 2, `soft` is top_k E.

    Args:
        layer: Changed in place.
        tensors: The published state dict, or more than that.
        prefix: Of the branch in it, such as `branches.0.`.

    Raises:
        ValueError: A name is missing or unknown, or a shape differs; says which. Nothing is changed then.
    """
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    routes = _names(layer)
    missing, unknown = routes.keys() - found.keys(), found.keys() - routes.keys()
    if missing or unknown:
        wrong = [f"{prefix}{name} is missing" for name in sorted(missing)]
        raise ValueError("; ".join(wrong + [f"{prefix}{name} is unknown" for name in sorted(unknown)]))
    for name, target in routes.items():
        if found[name].shape != target.shape:
            raise ValueError(f"{prefix}{name} is {tuple(found[name].shape)}, not {tuple(target.shape)}")
    for name, target in routes.items():
        target.copy_(found[name])
    if isinstance(layer.router, EigenRouter):
        retract_before_training(layer.router)


def retract_before_training(router: EigenRouter) -> None:
    """Make the frames orthonormal at the first training pass: they were published as a step had left them."""

    def retract_once(module: EigenRouter, args: tuple[object, ...]) -> None:
        if module.training:
            module.retract()
            handle.remove()

    handle = router.register_forward_pre_hook(retract_once)


def _names(layer: MoELayer) -> dict[str, Tensor]:
    """Map the published names to views of our tensors, shaped as published."""
    own = dict(layer.named_parameters()) | dict(layer.named_buffers())
    names = {
        "router.basis.Q": own["router.learned"],
        "router.basis.P": own["router.P"],
        "router.basis.log_lambda": own["router.log_lambda"],
        "router.gamma": own["router.gamma"],
        "router.masks": own["router.mix_logits"].T,
        "router.bias": own["router.expert_bias"],
        "alpha": own["alpha"],
    }
    for expert in range(layer.router.num_experts):
        names[f"experts.{expert}.down.weight"] = own["experts.w1"][expert].T
        names[f"experts.{expert}.up.weight"] = own["experts.w2"][expert].T
    return names
