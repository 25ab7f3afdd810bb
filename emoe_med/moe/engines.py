"""Two engines for the same sum: sort the slots by expert, run each expert on its own rows, put the rows back.

- `Segments`, for a CPU: one pass per expert over its own rows, so that no [N*K, D] copy of tokens or outputs ever
  exists and the working set stays in the cache.
- `Grouped`, for a GPU, and for `torch.compile` in bfloat16: six `grouped_mm` over all rows at once. Counts stay on
  the device and shapes do not depend on the load, so that nothing is compiled anew. In bfloat16 on Hopper and later
  the host never waits; elsewhere torch itself runs `grouped_mm` expert by expert, and does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Weights(NamedTuple):
    """Stacked weights of E two-layer experts: w1 [E, D, b], w2 [E, b, D], biases b1 [E, b], b2 [E, D] or None."""

    w1: Tensor
    w2: Tensor
    b1: Tensor | None = None
    b2: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> Weights:
        """Change every tensor that is there."""
        b1, b2 = (None if b is None else change(b) for b in (self.b1, self.b2))
        return Weights(change(self.w1), change(self.w2), b1, b2)


class Segments:
    """One pass per expert over its own rows."""

    class Slots(NamedTuple):
        """Kept slots by expert: their place in the [N*K] gates, their token, and how many each expert has.

        `once`: every token has exactly one slot, so that rows are put in place and not added up.
        """

        order: Tensor
        token: Tensor
        sizes: list[int]
        once: bool

    @staticmethod
    def sort(expert_index: Tensor, kept: Tensor, num_experts: int) -> Slots:
        """Sort stably by expert; dropped slots go behind the last expert, and off."""
        count, choices = expert_index.shape
        key = torch.where(kept, expert_index, num_experts).flatten()
        *sizes, dropped = torch.bincount(key, minlength=num_experts + 1).tolist()
        order = key.argsort(stable=True)[: count * choices - dropped]
        token = order if choices == 1 else order.div(choices, rounding_mode="floor")
        return Segments.Slots(order, token, sizes, once=choices == 1 and not dropped)

    @staticmethod
    def forward(
        tokens: Tensor, expert_index: Tensor, gate: Tensor, kept: Tensor, weights: Weights, own: bool
    ) -> tuple[Slots, Tensor, Tensor]:
        """Return the sorted slots, the pre-activation [kept slots, b] and the output [N, D]."""
        slots = Segments.sort(expert_index, kept, weights.w1.shape[0])
        pre = tokens.new_empty(len(slots.order), weights.w1.shape[2])
        gates = gate.flatten()[slots.order].unsqueeze(1)
        out = Segments._start(slots, tokens, own)
        segments = (part.split(slots.sizes) for part in (slots.token, pre, gates))
        with torch.autocast(tokens.device.type, enabled=False):
            for token, pre_, gate_, w1, w2, b1, b2 in zip(*segments, *_by_expert(weights), strict=True):
                rows = tokens.index_select(0, token)
                torch.mm(rows, w1, out=pre_) if b1 is None else torch.addmm(b1, rows, w1, out=pre_)
                hidden = F.gelu(pre_).mul_(gate_)
                result = rows.addmm_(hidden, w2) if own and slots.once else hidden @ w2
                Segments._put(slots, out, token, result if b2 is None else result.addcmul_(gate_, b2))
        return slots, pre, out

    @staticmethod
    def backward(
        grad: Tensor, tokens: Tensor, gate: Tensor, pre: Tensor, weights: Weights, slots: Slots, own: bool
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of tokens, gate, w1, w2, b1, b2; a product over no rows is the zero it has to be."""
        gates = gate.flatten()[slots.order].unsqueeze(1)
        grad_gates = torch.empty_like(gates)
        grads = weights.each(torch.empty_like)
        grad_tokens = Segments._start(slots, grad, own)
        segments = (part.split(slots.sizes) for part in (slots.token, pre, gates, grad_gates))
        stacks = (*_by_expert(weights), *_by_expert(grads))
        with torch.autocast(tokens.device.type, enabled=False):
            for token, pre_, gate_, grad_gate_, w1, w2, _, b2, grad_w1, grad_w2, grad_b1, grad_b2 in zip(
                *segments, *stacks, strict=True
            ):
                hidden, grad_out = F.gelu(pre_), grad.index_select(0, token)
                grad_hidden = grad_out @ w2.T
                torch.sum(grad_hidden * hidden, 1, keepdim=True, out=grad_gate_)
                if b2 is not None:
                    grad_gate_ += (grad_out @ b2).unsqueeze(1)
                    torch.sum(gate_ * grad_out, 0, out=grad_b2)
                torch.mm(hidden.mul_(gate_).T, grad_out, out=grad_w2)
                grad_pre = torch.ops.aten.gelu_backward(grad_hidden.mul_(gate_), pre_)
                torch.mm(tokens.index_select(0, token).T, grad_pre, out=grad_w1)
                if grad_b1 is not None:
                    torch.sum(grad_pre, 0, out=grad_b1)
                result = grad_out.addmm_(grad_pre, w1.T) if own and slots.once else grad_pre @ w1.T
                Segments._put(slots, grad_tokens, token, result)
        grad_gate = torch.zeros_like(gate.flatten()).index_copy_(0, slots.order, grad_gates.squeeze(1)).view_as(gate)
        return grad_tokens, grad_gate, *grads

    @staticmethod
    def _start(slots: Slots, source: Tensor, own: bool) -> Tensor:
        """Return what rows are put into; where tokens have several slots or none, what is to be added comes first."""
        if slots.once:
            return torch.empty_like(source)
        return source.clone() if own else torch.zeros_like(source)

    @staticmethod
    def _put(slots: Slots, target: Tensor, token: Tensor, rows: Tensor) -> None:
        """Put rows in their tokens' places; those of one expert are distinct, so that bits repeat also when added."""
        target.index_copy_(0, token, rows) if slots.once else target.index_add_(0, token, rows)


def _by_expert(weights: Weights) -> tuple[Sequence[Any], ...]:
    """Take stacks apart along the expert axis; Nones where there is no bias."""
    return tuple(weights.w1.shape[0] * [None] if stack is None else stack.unbind() for stack in weights)


class Grouped:
    """All experts at once by `grouped_mm`; no shape and no branch depends on the load."""

    class Slots(NamedTuple):
        """All slots by expert, dropped ones last: token, order and its inverse, ends of the experts, owner of a row."""

        token: Tensor
        order: Tensor
        inverse: Tensor
        ends: Tensor
        owner: Tensor

    @staticmethod
    def sort(expert_index: Tensor, kept: Tensor, num_experts: int) -> Slots:
        """Sort stably by expert; `owner` [N*K, E] is one-hot, and all zero for dropped slots."""
        key = torch.where(kept, expert_index, num_experts).flatten()
        order = key.argsort(stable=True)
        # a gather by the inverse permutation is exact and deterministic, unlike an atomic scatter-add
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        owner = key[order].unsqueeze(1) == torch.arange(num_experts, device=key.device)
        ends = owner.sum(0).cumsum(0).to(torch.int32)
        token = order.div(expert_index.shape[1], rounding_mode="floor")
        return Grouped.Slots(token, order, inverse, ends, owner)

    @staticmethod
    def forward(
        tokens: Tensor, expert_index: Tensor, gate: Tensor, kept: Tensor, weights: Weights, own: bool
    ) -> tuple[Slots, Tensor, Tensor]:
        """Return the sorted slots, the pre-activation [N*K, b] and the output [N, D]."""
        w1, w2, b1, b2 = weights
        slots = Grouped.sort(expert_index, kept, w1.shape[0])
        owner = slots.owner.to(tokens.dtype)
        gates = gate.flatten()[slots.order].unsqueeze(1)
        pre = F.grouped_mm(tokens[slots.token], w1, offs=slots.ends)
        pre = pre if b1 is None else pre + owner @ b1
        out = F.grouped_mm(F.gelu(pre) * gates, w2, offs=slots.ends)
        out = out if b2 is None else out + gates * (owner @ b2)
        out = Grouped._gather(out, slots, gate.shape)
        return slots, pre, out + tokens if own else out

    @staticmethod
    def backward(
        grad: Tensor, tokens: Tensor, gate: Tensor, pre: Tensor, weights: Weights, slots: Slots, own: bool
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of tokens, gate, w1, w2, b1, b2."""
        w1, w2, b1, b2 = weights
        owner = slots.owner.to(tokens.dtype)
        gates = gate.flatten()[slots.order].unsqueeze(1)
        grad_out, hidden = grad[slots.token], F.gelu(pre)
        grad_hidden = F.grouped_mm(grad_out, w2.mT, offs=slots.ends)
        grad_gates = (grad_hidden * hidden).sum(1, keepdim=True)
        if b2 is not None:
            grad_gates = grad_gates + (grad_out * (owner @ b2)).sum(1, keepdim=True)
        grad_w2 = Grouped._outer(hidden * gates, grad_out, slots)
        grad_pre = torch.ops.aten.gelu_backward(grad_hidden * gates, pre)
        grad_w1 = Grouped._outer(tokens[slots.token], grad_pre, slots)
        grad_rows = F.grouped_mm(grad_pre, w1.mT, offs=slots.ends)
        served = slots.owner.any(1, keepdim=True)
        grad_b1 = None if b1 is None else owner.T @ torch.where(served, grad_pre, 0)
        grad_b2 = None if b2 is None else owner.T @ (gates * grad_out)
        grad_gate = torch.where(served, grad_gates, 0)[slots.inverse].view_as(gate)
        grad_tokens = Grouped._gather(grad_rows, slots, gate.shape)
        grad_tokens = grad_tokens + grad if own else grad_tokens
        return grad_tokens, grad_gate, grad_w1, grad_w2, grad_b1, grad_b2

    @staticmethod
    def _gather(rows: Tensor, slots: Slots, shape: torch.Size) -> Tensor:
        """Put sorted rows [N*K, D] back and add the K slots of a token; rows behind the last expert hold garbage."""
        rows = torch.where(slots.owner.any(1, keepdim=True), rows, 0)[slots.inverse]
        return rows if shape[1] == 1 else rows.view(*shape, -1).sum(1)

    @staticmethod
    def _outer(left: Tensor, right: Tensor, slots: Slots) -> Tensor:
        """Sum the outer products of each expert's rows, [E, ., .]; an expert without rows gets zeros."""
        product = F.grouped_mm(left.T, right, offs=slots.ends)
        return torch.where(slots.owner.any(0)[:, None, None], product, 0)
