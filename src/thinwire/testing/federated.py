"""Faults for federations: what a network does to messages, decided by seed, node and turn, never by a clock.

Each is a function ``(node, direction, turn, data) -> data`` or None for lost, as
:class:`thinwire.integrations.flower_grid.LocalGrid` takes them; none imports Flower.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import final

__all__ = ["Damage", "Drop", "Replay"]


def _chance(seed: int, node: int, direction: str, turn: int) -> float:
    text = f"{seed} {node} {direction} {turn}".encode()
    return int.from_bytes(blake2b(text, digest_size=7).digest(), "little") / (1 << 56)


@final
@dataclass(frozen=True, slots=True)
class Drop:
    """Loses a share of the messages, of some nodes or all (None), in some directions.

    >>> lost = [Drop(0.5, seed=1)(1, "up", turn, b"x") is None for turn in range(1000)]
    >>> 400 < sum(lost) < 600
    True
    """

    share: float
    seed: int = 0
    nodes: Collection[int] | None = None
    directions: Collection[str] = ("down", "up")

    def __call__(self, node: int, direction: str, turn: int, data: bytes) -> bytes | None:
        meant = direction in self.directions and (self.nodes is None or node in self.nodes)
        return None if meant and _chance(self.seed, node, direction, turn) < self.share else data


@final
@dataclass(slots=True)
class Damage:
    """Flips one byte behind ``marker`` (``tw``, which begins a frame) in messages of some nodes, ``times`` in all."""

    nodes: Collection[int]
    direction: str = "up"
    times: int = 1
    offset: int = 60
    marker: bytes = b"tw\x01"
    done: int = field(default=0)

    def __call__(self, node: int, direction: str, turn: int, data: bytes) -> bytes | None:
        del turn
        at = data.find(self.marker)
        if node not in self.nodes or direction != self.direction or self.done >= self.times or at < 0:
            return data
        self.done += 1
        spoilt = bytearray(data)
        spoilt[min(at + self.offset, len(data) - 1)] ^= 0xFF
        return bytes(spoilt)


@final
@dataclass(slots=True)
class Replay:
    """From the second message of a node on, sends the frames of its first in place of its own: what an attacker who
    has listened could do. ``length`` bytes from ``marker`` on are taken where both have as many."""

    node: int
    marker: bytes = b"tw\x01"
    first: bytes | None = field(default=None)
    done: int = field(default=0)

    def __call__(self, node: int, direction: str, turn: int, data: bytes) -> bytes | None:
        del turn
        if node != self.node or direction != "up" or self.marker not in data:
            return data
        if self.first is None:
            self.first = data
            return data
        self.done += 1
        return self.first
