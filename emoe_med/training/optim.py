"""The optimiser step: schedule, clipping, idle experts held still, then `after_step` of the modules."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from emoe_med.config import TrainingConfig

SLOTS = ("exp_avg", "exp_avg_sq", "step")  # what AdamW keeps for each parameter

# one-cycle as torch.optim.lr_scheduler.OneCycleLR ships it: start at 1/25 of the peak, momentum 0.95 to 0.85
ONE_CYCLE_START = 1 / 25
ONE_CYCLE_MOMENTUM = (0.85, 0.95)


def build_optimizer(model: nn.Module, lr: float, weight_decay: float) -> AdamW:
    """Build AdamW with weight decay on magnitudes only.

    One-dimensional parameters (biases, norms, scales) and those that a module returns from an optional
    `no_weight_decay()` (orthonormal frames, softmaxed mixes, stacked biases) are not decayed.
    """
    exempt = {id(parameter) for module in model.modules() for parameter in getattr(module, "no_weight_decay", list)()}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (plain if parameter.ndim <= 1 or id(parameter) in exempt else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    on_cuda = any(parameter.is_cuda for parameter in decayed + plain)
    return AdamW([group for group in groups if group["params"]], lr=lr, fused=on_cuda or None)


def set_schedule(optimizer: Optimizer, step: int, total: int, options: TrainingConfig) -> float:
    """Set the learning rate (and for one-cycle the momentum) of one step, as a pure function of the step.

    Args:
        optimizer: Its groups are changed.
        step: 0 to total - 1.
        total: Optimiser steps of the whole run.
        options: Shape of the schedule.

    Returns:
        The learning rate set.
    """
    warmup_share, final_lr_share, lr = options.warmup_share, options.final_lr_share, options.lr
    if options.schedule == "cosine":
        rise = round(warmup_share * total)
        if step < rise:
            share = (step + 1) / rise
        else:
            share = _half_cosine(1.0, final_lr_share, (step - rise) / max(1, total - rise))
    else:
        rise, last = warmup_share * total - 1, total - 1
        low, high = ONE_CYCLE_MOMENTUM
        if step <= rise:
            share = _half_cosine(ONE_CYCLE_START, 1.0, step / rise if rise > 0 else 1.0)
            momentum = _half_cosine(high, low, step / rise if rise > 0 else 1.0)
        else:
            way = (step - rise) / max(1e-12, last - rise)
            share = _half_cosine(1.0, final_lr_share, way)
            momentum = _half_cosine(low, high, way)
        for group in optimizer.param_groups:
            group["betas"] = (momentum, group["betas"][1])
    for group in optimizer.param_groups:
        group["lr"] = lr * share
    return lr * share


def _half_cosine(start: float, end: float, way: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * way))


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients so that their joint norm is at most max_norm; returns the norm [] before."""
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    return nn.utils.clip_grad_norm_(trained, max_norm)


@torch.no_grad()
def update(optimizer: Optimizer, model: nn.Module) -> None:
    """Take one optimiser step, hold idle experts still, and let the modules move their own state."""
    with _idle_experts_held(optimizer, model):
        optimizer.step()
    after_step(model)


@torch.no_grad()
def after_step(model: nn.Module) -> None:
    """Call `after_step()` of the outermost modules that have it; such a module moves its own children."""
    move = getattr(model, "after_step", None)
    if move is not None:
        move()
        return
    for child in model.children():
        after_step(child)


def _routed_layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if hasattr(m, "take_idle") and hasattr(m, "expert_parameters")]


@contextmanager
def _idle_experts_held(optimizer: Optimizer, model: nn.Module) -> Generator[None]:
    """Keep weights and moments of experts without a token bit-equal across the step.

    Their gradient is zero, yet weight decay and momentum would move them. AdamW counts the steps of all
    experts together: one that is first chosen late has young moments hardly corrected, and first steps of up to 3.2
    learning rates (0.1 over the root of 0.001).
    """
    held: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []
    for layer in _routed_layers(model):
        idle = layer.take_idle().nonzero().squeeze(1)
        for parameter in layer.expert_parameters() if idle.numel() else ():
            slots = {"weight": parameter, **_moments(optimizer, parameter)}
            held.append((parameter, idle, {name: slot[idle].clone() for name, slot in slots.items()}))
    yield
    for parameter, idle, kept in held:
        slots = {"weight": parameter, **_moments(optimizer, parameter)}
        for name, slot in slots.items():
            # a moment that this step made anew starts at zero
            slot[idle] = kept[name] if name in kept else torch.zeros_like(slot[idle])


def _moments(optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    state = optimizer.state.get(parameter, {})
    return {name: slot for name, slot in state.items() if name != "step"}


def optimizer_tensors(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Name the optimiser's tensors `<parameter>/<slot>`."""
    return {
        f"{name}/{slot}": value
        for name, parameter in model.named_parameters()
        for slot, value in optimizer.state.get(parameter, {}).items()
    }


def expected_shapes(model: nn.Module, found: Iterable[str]) -> dict[str, torch.Size]:
    """Give the shape of every slot of the parameters that have one (one without a gradient has none)."""
    moved = {name.rpartition("/")[0] for name in found}
    return {
        f"{name}/{slot}": torch.Size([]) if slot == "step" else parameter.shape
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name in moved
        for slot in SLOTS
    }


def load_optimizer_tensors(optimizer: Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors named by `optimizer_tensors` back; the optimiser owns copies, laid out as the parameters are.

    Files hold moments without strides; fused steps refuse, or misread, moments that are not strided as their weights.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state: dict[int, dict[str, Tensor]] = {}
    saved = optimizer.state_dict()
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        name = names[id(parameter)]
        found = {slot: tensors[f"{name}/{slot}"] for slot in SLOTS if f"{name}/{slot}" in tensors}
        slots = {
            slot: value.clone() if slot == "step" else torch.empty_like(parameter, requires_grad=False).copy_(value)
            for slot, value in found.items()
        }
        if slots:
            state[number] = slots
    optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})
