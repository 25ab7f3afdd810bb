"""Grouped dispatch: only the chosen experts run, each once, on its own tokens.

The backward pass is written by hand so that nothing but the pre-activation is kept, the gate gradient comes from the
narrow hidden rows, and an expert without tokens gets a zero gradient. How the rows are sorted, multiplied and put
back is the work of an engine (`engines.py`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

from emoe_med.moe.engines import Grouped, Segments, Weights

# oneDNN compiles a bfloat16 product anew for every segment length, and lengths change with every batch; below this
# many weights an expert is done sooner in float32
NARROW_ON_CPU = 2**16


def grouped_mlp(
    tokens: Tensor,
    expert_index: Tensor,
    gate: Tensor,
    weights: Weights,
    scale: Tensor | None = None,
    stream: Tensor | None = None,
) -> Tensor:
    """Return stream[n] + scale * sum_k gate[n, k] * (GELU(tokens[n] @ w1[e] + b1[e]) @ w2[e] + b2[e]).

    e is expert_index[n, k].

    Args:
        tokens: [N, D].
        expert_index: [N, K] int64 in [0, E).
        gate: [N, K]; a slot with gate exactly 0 was dropped: no computation and no gradient.
        weights: of the experts.
        scale: [], or None for 1.
        stream: [N, D], or None for 0. The tokens themselves are added within the products, for nothing.

    Returns:
        [N, D] in the compute dtype, promoted to that of the stream. The compute dtype is that of autocast where it
        is on, else that of the tokens; on a CPU narrow experts stay in float32.
    """
    device = tokens.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tokens.dtype
    if device == "cpu" and weights.w1[0].numel() < NARROW_ON_CPU:
        dtype = torch.promote_types(dtype, torch.float32)
    kept = gate.detach() != 0
    scaled = gate if scale is None else gate * scale
    low = weights.each(lambda weight: _cast(weight, dtype))
    engine = _engine(tokens, weights, dtype)
    own = stream is tokens and tokens.dtype == dtype
    branch = _GroupedMLP.apply(tokens.to(dtype), expert_index, scaled, kept, low, engine, own, *weights)
    return branch if stream is None or own else stream + branch


def reference_mlp(
    tokens: Tensor, expert_index: Tensor, gate: Tensor, weights: Weights, scale: Tensor | None = None
) -> Tensor:
    """Run every expert on every token and sum; the plain meaning of `grouped_mlp`, for tests."""
    w1, w2, b1, b2 = weights
    hidden = torch.einsum("nd,edb->neb", tokens, w1)
    outputs = torch.einsum("neb,ebd->ned", F.gelu(hidden if b1 is None else hidden + b1), w2)
    outputs = outputs if b2 is None else outputs + b2
    shares = torch.where(gate == 0, 0, gate).to(tokens.dtype)
    combine = torch.zeros(outputs.shape[:2], dtype=tokens.dtype, device=tokens.device)
    combine = combine.scatter_add(1, expert_index, shares)
    return torch.einsum("ne,ned->nd", combine, outputs) * (1 if scale is None else scale)


_copies: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def forget_copies() -> None:
    """Drop the low-precision copies of weights; needed after a write through `.data` alone, which nothing tells of."""
    _copies.clear()


# a fused step changes weights and leaves their version counters as they were
register_optimizer_step_post_hook(lambda *_: forget_copies())


def _cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Give weights in the compute dtype; the copy of a parameter lives until a step or a load changes it.

    Autocast would cast all experts in every forward pass; with few tokens that costs more than the experts. Any step
    of a `torch.optim.Optimizer` drops all copies; of other changes the version counter tells.
    """
    if weight.dtype == dtype:
        return weight.detach()
    if not weight.is_leaf or weight.is_inference() or torch.compiler.is_compiling():
        return weight.detach().to(dtype)
    state = (weight._version, weight.data_ptr(), dtype)
    held = _copies.get(weight)
    if held is None or held[0] != state:
        with torch.inference_mode(False):  # else training could not use the copy that an evaluation left
            held = _copies[weight] = (state, weight.detach().to(dtype))
    return held[1]


class _GroupedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        expert_index: Tensor,
        gate: Tensor,
        kept: Tensor,
        low: Weights,
        engine: type[Segments] | type[Grouped],
        own: bool,
        *weights: Tensor | None,
    ) -> Tensor:
        """Run the engine on weights in the compute dtype; `weights` are where the gradients go.

        `own` adds the tokens to the output, and its gradient to theirs.
        """
        slots, pre, out = engine.forward(tokens, expert_index, gate.to(tokens.dtype), kept, low, own)
        ctx.save_for_backward(tokens, gate, pre, *low, *weights)
        ctx.slots, ctx.engine, ctx.own = slots, engine, own
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients for tokens, gate and weights."""
        tokens, gate, pre, *rest = ctx.saved_tensors
        low, weights = Weights(*rest[:4]), rest[4:]
        grad_tokens, grad_gate, *grads = ctx.engine.backward(
            grad.to(tokens.dtype).contiguous(), tokens, gate.to(tokens.dtype), pre, low, ctx.slots, ctx.own
        )
        grads = (None if w is None else g.to(w.dtype) for w, g in zip(weights, grads, strict=True))
        return grad_tokens, None, grad_gate.to(gate.dtype), None, None, None, None, *grads


def _engine(tokens: Tensor, weights: Weights, dtype: torch.dtype) -> type[Segments] | type[Grouped]:
    """Choose by device: grouped_mm wants rows of whole 16 bytes and no float64; compiled, bfloat16 alone."""
    aligned = all(size * dtype.itemsize % 16 == 0 for size in weights.w1.shape[1:])
    if dtype == torch.float64 or not aligned or tokens.shape[0] == 0:
        return Segments
    if torch.compiler.is_compiling():
        return Grouped if dtype == torch.bfloat16 else Segments
    return Grouped if tokens.is_cuda else Segments
