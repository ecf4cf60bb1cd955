"""Workers, edges, centre: updates are summed at each hop, and made sparse again before the next.

An edge sums what its children sent, weighted, adds what it held back itself, sends the largest and keeps the rest. Its
density should grow towards the centre, since the union of sparse updates is denser than each: 0.1 % at the workers, 1 %
at the edges, 5 % above, is the classic choice; :class:`Coverage` takes as much as holds a share of the energy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from thinwire.compress.base import check_density
from thinwire.errors import MisuseError
from thinwire.federated import frame as frames
from thinwire.federated.model import ModelLayout
from thinwire.federated.selection import entries
from thinwire.tensors.select import top_k

__all__ = ["Coverage", "Hierarchy", "Hop"]


@final
@dataclass(frozen=True)
class Coverage:
    """As many entries as hold ``share`` of an update's squared norm, at most ``maximum`` of all."""

    share: float = 0.95
    maximum: float = 0.2

    def __post_init__(self) -> None:
        check_density(self.share)
        check_density(self.maximum)

    def count(self, update: Tensor) -> int:
        """How many of ``update`` (float32 ``[numel]``) that is.

        >>> Coverage(0.5, maximum=1.0).count(torch.tensor([1.0, 3.0, 1.0, 1.0]))
        1
        """
        energy = update.double().square().sort(descending=True).values.cumsum(0)
        if not energy.numel() or energy[-1] == 0:
            return 0
        due = int(torch.searchsorted(energy, self.share * energy[-1])) + 1
        return min(due, entries(self.maximum, update.numel()))


@final
@dataclass(frozen=True)
class Hop:
    """One level of parents: each has up to ``children``, and sends ``density`` of what it summed, as ``values``."""

    children: int
    density: float | Coverage = 0.01
    values: str = "float16"

    def __post_init__(self) -> None:
        if self.children < 1:
            raise MisuseError(f"a parent of {self.children} children; give 1 or more")
        if not isinstance(self.density, Coverage):
            check_density(self.density)
        if self.values not in frames.VALUES:
            raise MisuseError(f"values={self.values!r}; there are {', '.join(frames.VALUES)}")


@final
@dataclass(frozen=True, slots=True)
class Sum:
    """``weight`` and the weighted sum float32 ``[numel]`` of what a subtree sent; ``nodes`` are its leaves."""

    weight: float
    total: Tensor
    nodes: tuple[int, ...]


@final
@dataclass
class Hierarchy:
    """Parents over the clients, level by level; clients keep the parent that they were first given.

    The law, for each parent over any rounds: what its children sent, weighted and summed, is what it sent and what
    ``residuals`` holds (float64, so that weights of thousands of samples lose nothing that matters).

    >>> tree = Hierarchy((Hop(children=2, density=0.5),))
    >>> updates = {1: (1.0, torch.tensor([1.0, 0.0])), 2: (1.0, torch.tensor([3.0, 2.0])), 3: (2.0, torch.ones(2))}
    >>> tops, sent = tree.up(updates)
    >>> [(top.nodes, top.weight, top.total.tolist()) for top in tops], len(sent)
    ([((1, 2), 2.0, [4.0, 0.0]), ((3,), 2.0, [2.0, 0.0])], 2)
    """

    hops: tuple[Hop, ...]
    residuals: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    places: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.hops:
            raise MisuseError("a hierarchy has at least one hop; without any, leave it out")

    def parent(self, level: int, node: int) -> int:
        """Which parent of ``level`` (0 above the clients) a client is under."""
        place = self.places.setdefault(node, len(self.places))
        for hop in self.hops[: level + 1]:
            place //= hop.children
        return place

    def up(self, updates: Mapping[int, tuple[float, Tensor]]) -> tuple[list[Sum], list[tuple[int, int, bytes]]]:
        """What reaches the centre from the clients' ``{node: (weight, update)}``, and each parent's
        ``(level, parent, frame)`` on the way.

        Raises:
            MisuseError: a weight that is not positive and finite.
        """
        for node, (weight, _) in updates.items():
            if not 0 < weight < float("inf"):
                raise MisuseError(f"client {node} has a weight of {weight}; give a positive one", node=node)
        sums = [Sum(weight, weight * update.double(), (node,)) for node, (weight, update) in sorted(updates.items())]
        sent: list[tuple[int, int, bytes]] = []
        for level, hop in enumerate(self.hops):
            groups: dict[int, list[Sum]] = {}
            for child in sums:
                groups.setdefault(self.parent(level, child.nodes[0]), []).append(child)
            sums = []
            for parent, children in sorted(groups.items()):
                made, data = self._forward(level, parent, hop, children)
                sums.append(made)
                sent.append((level, parent, data))
        return sums, sent

    def _forward(self, level: int, parent: int, hop: Hop, children: Sequence[Sum]) -> tuple[Sum, bytes]:
        total = sum((child.total for child in children), torch.zeros_like(children[0].total))
        due = total + self.residuals.get((level, parent), torch.zeros_like(total))
        weight = sum(child.weight for child in children)
        mean = (due / weight).float()
        count = hop.density.count(mean) if isinstance(hop.density, Coverage) else entries(hop.density, mean.numel())
        positions = top_k(mean, count).indices
        positions = positions[mean[positions.long()] != 0]
        data = frames.encode_sparse(positions, mean[positions.long()], mean.numel(), name=hop.values)
        layout = ModelLayout((("update", "F32", (mean.numel(),)),))
        seen = frames.decode_sparse(frames.parse_frame(data), layout)  # the bytes that would travel, as they arrive
        out = torch.zeros_like(total)
        out[seen.positions.long()] = weight * seen.values.double()
        self.residuals[level, parent] = due - out
        return Sum(weight, out, tuple(node for child in children for node in child.nodes)), data
