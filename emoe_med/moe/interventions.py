"""What routing is worth: change it at test time, and see what the metric loses.

    with permuted_routing(layer, seed=0):
        worse = evaluate(net)

Each intervention lasts for its block; the layer's parameters and state are not touched.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import torch

from emoe_med.moe.layer import MoELayer
from emoe_med.moe.router import Routing


@contextmanager
def rerouted(layer: MoELayer, change: Callable[[Routing], Routing]):
    """Send the tokens where `change` says: it gets what the router chose, and its result is used instead."""
    handle = layer.router.register_forward_hook(lambda module, args, routing: change(routing))
    try:
        yield
    finally:
        handle.remove()


def permuted_routing(layer: MoELayer, seed: int) -> AbstractContextManager[None]:
    """Give every token the experts and gates of another token of its batch, drawn at random.

    The load stays as it was and only the assignment is lost; what the error gains is the value of routing.
    """
    generator = torch.Generator().manual_seed(seed)

    def permute(routing: Routing) -> Routing:
        order = torch.randperm(len(routing.gate), generator=generator).to(routing.gate.device)
        return replace(routing, expert_index=routing.expert_index[order], gate=routing.gate[order])

    return rerouted(layer, permute)


def random_routing(layer: MoELayer, seed: int) -> AbstractContextManager[None]:
    """Give every token different experts drawn uniformly from all, with the gates it had; the load is lost too."""
    generator = torch.Generator().manual_seed(seed)

    def draw(routing: Routing) -> Routing:
        order = torch.rand(routing.probs.shape, generator=generator).argsort(dim=-1)
        index = order[:, : routing.gate.shape[1]].to(routing.gate.device)
        return replace(routing, expert_index=index)

    return rerouted(layer, draw)


def worst_routing(layer: MoELayer) -> AbstractContextManager[None]:
    """Give every token its least probable experts, the least probable of them with its largest gate."""

    def invert(routing: Routing) -> Routing:
        index = routing.probs.topk(routing.gate.shape[1], dim=-1, largest=False).indices
        return replace(routing, expert_index=index, gate=routing.gate.sort(dim=-1, descending=True).values)

    return rerouted(layer, invert)


def ablated_expert(layer: MoELayer, expert: int) -> AbstractContextManager[None]:
    """Drop all slots of one expert; nothing takes its place."""
    if not 0 <= expert < layer.router.num_experts:
        raise ValueError(f"expert {expert} is none of the layer's {layer.router.num_experts}")
    return rerouted(layer, lambda routing: replace(routing, gate=routing.gate * (routing.expert_index != expert)))


@contextmanager
def without_branch(layer: MoELayer):
    """Let the stream [B, T, D] pass the layer unchanged; what the error gains is the value of the whole layer."""
    handle = layer.register_forward_hook(lambda module, args, result: (args[0], result[1]))
    try:
        yield
    finally:
        handle.remove()
