"""What a federation sent: bytes by round, hop, direction, client and kind."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, final

__all__ = ["Entry", "Ledger"]


@final
@dataclass(frozen=True, slots=True)
class Entry:
    """Bytes of one message or a part of it. ``kind`` is ``anchor`` or ``delta`` (down), ``update`` (up) or ``header``
    (all that carries them: names of records, metadata, metrics, configuration)."""

    round: int
    hop: str
    direction: str
    node: int
    kind: str
    nbytes: int


@final
@dataclass
class Ledger:
    """A list of :class:`Entry`, and sums of it.

    >>> ledger = Ledger()
    >>> ledger.add(1, "client", "up", node=7, kind="update", nbytes=330)
    >>> ledger.add(1, "client", "up", node=7, kind="header", nbytes=70)
    >>> ledger.total(), ledger.total(kind="header"), ledger.by("direction", "kind")
    (400, 70, {('up', 'update'): 330, ('up', 'header'): 70})
    """

    entries: list[Entry] = field(default_factory=list)

    def add(self, round_: int, hop: str, direction: str, *, node: int, kind: str, nbytes: int) -> None:
        """Notes ``nbytes``."""
        self.entries.append(Entry(round_, hop, direction, node, kind, nbytes))

    def _matching(self, wanted: dict[str, Any]) -> Iterator[Entry]:
        return (e for e in self.entries if all(getattr(e, name) == value for name, value in wanted.items()))

    def total(self, **wanted: Any) -> int:
        """Bytes of all entries with these attributes (``round=3, direction="up"``)."""
        return sum(entry.nbytes for entry in self._matching(wanted))

    def by(self, *names: str, **wanted: Any) -> dict[tuple[Any, ...], int]:
        """Bytes by the values of some attributes."""
        sums: dict[tuple[Any, ...], int] = defaultdict(int)
        for entry in self._matching(wanted):
            sums[tuple(getattr(entry, name) for name in names)] += entry.nbytes
        return dict(sums)
