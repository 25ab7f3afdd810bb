"""Grouped dispatch: sort the slots by expert, run each expert once on its own rows, put the rows back.

Only the chosen experts run. The backward pass is written by hand so that nothing but the pre-activation is
kept, the gate gradient comes from the narrow hidden rows, and an expert without tokens gets a zero gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# oneDNN compiles a bfloat16 product anew for every segment length, and lengths change with every batch; below this
# many weights an expert is done sooner in float32
NARROW_ON_CPU = 2**16


def grouped_mlp(tokens: Tensor, expert_index: Tensor, gate: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Return sum_k gate[n, k] * GELU(tokens[n] @ w1[e]) @ w2[e] with e = expert_index[n, k].

    Args:
        tokens: [N, D].
        expert_index: [N, K] int64 in [0, E).
        gate: [N, K]; slots with gate 0 still compute, and contribute 0.
        w1: [E, D, b].
        w2: [E, b, D].

    Returns:
        [N, D] in the compute dtype: that of autocast where it is on, else that of the tokens; on a CPU narrow
        experts stay in float32.
    """
    device = tokens.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tokens.dtype
    if device == "cpu" and w1[0].numel() < NARROW_ON_CPU:
        dtype = torch.promote_types(dtype, torch.float32)
    return _GroupedMLP.apply(tokens, expert_index, gate, w1, w2, dtype)


def reference_mlp(tokens: Tensor, expert_index: Tensor, gate: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Run every expert on every token and sum; the plain meaning of `grouped_mlp`, for tests."""
    weight = torch.zeros(tokens.shape[0], w1.shape[0], dtype=tokens.dtype, device=tokens.device)
    weight = weight.scatter_add(1, expert_index, gate.to(tokens.dtype))
    hidden = F.gelu(torch.einsum("nd,edb->neb", tokens, w1))
    return torch.einsum("ne,neb,ebd->nd", weight, hidden, w2)


def _segments(expert_index: Tensor, num_experts: int) -> tuple[Tensor, list[tuple[int, int, int]]]:
    """Give the stable order of the N*K slots by expert, and (expert, start, stop) of those with rows."""
    flat = expert_index.flatten()
    order = flat.argsort(stable=True)
    stops = torch.bincount(flat, minlength=num_experts).cumsum(0).tolist()
    starts = [0, *stops[:-1]]
    spans = [(e, a, z) for e, (a, z) in enumerate(zip(starts, stops, strict=True)) if z > a]
    return order, spans


def _unsort(rows: Tensor, order: Tensor, top_k: int) -> Tensor:
    """Put sorted slot rows [N*K, D] back and add the K slots of a token: [N, D].

    A gather by the inverse permutation: exact and deterministic, unlike an atomic scatter-add.
    """
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    back = rows.index_select(0, inverse)
    return back if top_k == 1 else back.view(-1, top_k, rows.shape[-1]).sum(1)


class _GroupedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        expert_index: Tensor,
        gate: Tensor,
        w1: Tensor,
        w2: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        """Forward over sorted segments; saves the pre-activation [N*K, b] alone."""
        order, spans = _segments(expert_index, w1.shape[0])
        sample = order.div(expert_index.shape[1], rounding_mode="floor")
        rows = tokens.to(dtype).index_select(0, sample)
        gates = gate.flatten().index_select(0, order).to(dtype).unsqueeze(1)
        pre = rows.new_empty(rows.shape[0], w1.shape[2])
        out = rows.new_empty(rows.shape[0], w2.shape[2])
        with torch.autocast(tokens.device.type, enabled=False):
            for e, a, z in spans:
                torch.mm(rows[a:z], w1[e].to(dtype), out=pre[a:z])
                torch.mm(F.gelu(pre[a:z]) * gates[a:z], w2[e].to(dtype), out=out[a:z])
        ctx.save_for_backward(tokens, gate, w1, w2, order, sample, pre)
        ctx.spans, ctx.top_k = spans, expert_index.shape[1]
        return _unsort(out, order, ctx.top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients for tokens, gate, w1 and w2."""
        tokens, gate, w1, w2, order, sample, pre = ctx.saved_tensors
        dtype = pre.dtype
        grad_out = grad.to(dtype).index_select(0, sample)
        rows = tokens.to(dtype).index_select(0, sample)
        gates = gate.flatten().index_select(0, order).to(dtype).unsqueeze(1)
        grad_rows = torch.empty_like(rows)
        grad_gates = torch.empty_like(gates)
        grad_w1, grad_w2 = torch.zeros_like(w1), torch.zeros_like(w2)
        with torch.autocast(tokens.device.type, enabled=False):
            for e, a, z in ctx.spans:
                hidden = F.gelu(pre[a:z])
                grad_hidden = grad_out[a:z] @ w2[e].to(dtype).T
                grad_gates[a:z] = (grad_hidden * hidden).sum(1, keepdim=True)
                grad_w2[e] = (hidden * gates[a:z]).T @ grad_out[a:z]
                grad_pre = torch.ops.aten.gelu_backward(grad_hidden * gates[a:z], pre[a:z])
                grad_w1[e] = rows[a:z].T @ grad_pre
                torch.mm(grad_pre, w1[e].to(dtype).T, out=grad_rows[a:z])
        grad_gate = _unsort(grad_gates, order, 1).view_as(gate).to(gate.dtype)
        return _unsort(grad_rows, order, ctx.top_k).to(tokens.dtype), None, grad_gate, grad_w1, grad_w2, None
