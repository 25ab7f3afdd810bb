"""What the routed layer did with every head: kept per cell, in bytes; the voxels of a head are let go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from emoe_med.brainage.maps.cells import routed_part
from emoe_med.brainage.maps.measured import Measured
from emoe_med.brainage.net import BrainAgeNet

COVERED = 0.5  # a cell belongs to the group's brain where it was routed in this share of the heads


@dataclass
class Routes:
    """Routing of N heads, and what was measured at their cells.

    Attributes:
        expert: [N, C, K] int16, the expert of each slot; -1 where the cell was not routed or the slot dropped.
        gate: [N, C, K] float32, combine weight.
        brain: [N, C] float32, share of the cell that is brain.
        age: [N] years, NaN where unknown.
        person: [N], equal for all scans of a person.
        run: [N] name of the run that looked.
        contribution: [M, C, E] years, of the heads in `contribution_of`, indices into N.
        occlusion: [O, C] years, of the heads in `occlusion_of`.
        num_experts: E.
    """

    expert: np.ndarray
    gate: np.ndarray
    brain: np.ndarray
    age: np.ndarray
    person: np.ndarray
    run: np.ndarray
    contribution: np.ndarray
    contribution_of: np.ndarray
    occlusion: np.ndarray
    occlusion_of: np.ndarray
    num_experts: int

    @classmethod
    def of(cls, expert: np.ndarray, gate: np.ndarray, num_experts: int, **known: np.ndarray) -> Routes:
        """Take routing [N, C, K]; what else is known may be added, and is empty otherwise."""
        heads, cells, _ = expert.shape
        empty: dict[str, np.ndarray] = {
            "brain": np.ones((heads, cells), np.float32),
            "age": np.full(heads, np.nan),
            "person": np.arange(heads),
            "run": np.full(heads, ""),
            "contribution": np.zeros((0, cells, num_experts), np.float32),
            "contribution_of": np.zeros(0, int),
            "occlusion": np.zeros((0, cells), np.float32),
            "occlusion_of": np.zeros(0, int),
        }
        return cls(expert=expert, gate=gate, num_experts=num_experts, **empty | known)

    def __len__(self) -> int:
        return len(self.expert)

    @property
    def routed(self) -> np.ndarray:
        """Which cells were served, [N, C] bool."""
        return np.any(self.expert >= 0, axis=-1)

    def served(self, head: int) -> np.ndarray:
        """Share of a head's served slots that each expert has at each cell, [C, E]; rows sum to 1 or are 0."""
        count = self._scatter(head, (self.expert[head] >= 0).astype(np.float32))
        return count / np.maximum(count.sum(1, keepdims=True), 1)

    def occupancy(self, heads: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """Mean of `served` over the heads in which the cell was routed, [C, E]; rows sum to 1 or are 0."""
        chosen = range(len(self)) if heads is None else heads
        total = np.zeros((self.expert.shape[1], self.num_experts))
        for head in chosen:
            total += self.served(head)
        return total / np.maximum(total.sum(1, keepdims=True), 1)

    def gate_mass(self) -> np.ndarray:
        """Mean combine weight that each expert had, over the heads in which the cell was routed, [C, E]."""
        total = sum(self._scatter(head, self.gate[head]) for head in range(len(self)))
        return total / np.maximum(self.routed.sum(0), 1)[:, None]

    def coverage(self) -> np.ndarray:
        """Share of heads in which the cell was routed, [C]."""
        return self.routed.mean(0)

    def persons(self, heads: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """Count the persons in whom each cell was routed, of all heads or some, [C]."""
        chosen = np.arange(len(self)) if heads is None else np.asarray(heads, int)
        found, number = np.unique(self.person[chosen], return_inverse=True)
        seen = np.zeros((len(found), self.expert.shape[1]), bool)
        np.logical_or.at(seen, number, self.routed[chosen])
        return seen.sum(0)

    def inside(self, least: int = 1, heads: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """Tell the cells of the group's brain: routed in half of the heads or more, and in ``least`` persons, [C]."""
        chosen = np.arange(len(self)) if heads is None else np.asarray(heads, int)
        if not len(chosen):
            return np.zeros(self.expert.shape[1], bool)
        return (self.routed[chosen].mean(0) >= COVERED) & (self.persons(chosen) >= least)

    def load(self) -> np.ndarray:
        """Share of all served slots that each expert has, [E]."""
        count = np.bincount(self.expert[self.expert >= 0], minlength=self.num_experts)
        return count / max(count.sum(), 1)

    def influence(self) -> dict[str, Measured]:
        """Return what one cell does to the age of each head by either measure, experts aside."""
        measured = {
            "contribution": (self.contribution.sum(-1), self.contribution_of),
            "occlusion": (self.occlusion, self.occlusion_of),
        }
        return {name: Measured.of(v, of, self.age[of], self.run[of]) for name, (v, of) in measured.items()}

    def of_many(self, persons: int) -> Routes:
        """Return the same without contribution, or occlusion, that was measured on fewer persons than this."""
        kept = {}
        for name in ("contribution", "occlusion"):
            chosen = getattr(self, f"{name}_of")
            if len(np.unique(self.person[chosen])) < persons:
                kept |= {name: getattr(self, name)[:0], f"{name}_of": chosen[:0]}
        return replace(self, **kept)

    def renamed(self, name: np.ndarray) -> Routes:
        """Return the same with expert e called name[e]."""
        known = np.append(name, -1).astype(self.expert.dtype)
        order = np.argsort(name)
        return replace(self, expert=known[self.expert], contribution=self.contribution[:, :, order])

    def _scatter(self, head: int, weight: np.ndarray) -> np.ndarray:
        """Sum weights [C, K] of the slots by expert, [C, E]."""
        expert = self.expert[head]
        cell, slot = np.nonzero(expert >= 0)
        total = np.zeros((len(expert), self.num_experts), np.float32)
        np.add.at(total, (cell, expert[cell, slot]), weight[cell, slot])
        return total


def joined(parts: Sequence[Routes]) -> Routes:
    """Put the heads of several runs one after the other; a head that two runs saw comes twice."""
    starts = np.cumsum([0, *(len(part) for part in parts[:-1])])
    values = {
        field.name: np.concatenate([getattr(part, field.name) for part in parts])
        for field in fields(Routes)
        if field.name != "num_experts"
    }
    for name in ("contribution_of", "occlusion_of"):
        values[name] = np.concatenate([getattr(part, name) + s for part, s in zip(parts, starts, strict=True)])
    return Routes(**values, num_experts=parts[0].num_experts)


@torch.no_grad()
def route(net: BrainAgeNet, image: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Route one head [1, 1, X, Y, Z]: expert [C, K] int16 (-1 not served) and gate [C, K]."""
    return route_tokens(net, *tokens_of(net, image))


@torch.no_grad()
def tokens_of(net: BrainAgeNet, image: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the routed layer gets of one head [1, 1, X, Y, Z]: map [1, D, X', Y', Z'] and mask [1, C]."""
    sfcn, _, after = routed_part(net)
    before = sfcn.until(image, after)
    return before, sfcn.token_mask(image)


@torch.no_grad()
def route_tokens(net: BrainAgeNet, before: Tensor, mask: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Route what `tokens_of` returned, as `route` does; the slots of a token by falling gate."""
    sfcn, layer, _ = routed_part(net)
    _, routing = sfcn.route(layer, before, mask)
    # Expert Choice has a slot for each expert, in the order of experts
    weight, order = routing.gate.float().sort(dim=1, descending=True, stable=True)
    inside = mask[0].cpu().numpy()
    expert = np.full((len(inside), weight.shape[1]), -1, np.int16)
    gate = np.zeros(expert.shape, np.float32)
    chosen = routing.expert_index.gather(1, order).where(weight > 0, -1)
    expert[inside], gate[inside] = chosen.cpu().numpy(), weight.cpu().numpy()
    return expert, gate
