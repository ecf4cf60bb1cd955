"""What an all-reduce asks of the ranks that take part: three verbs over bytes, and what they cost.

:class:`MemoryGroup` joins threads of one process. It serves tests, and simulations of more workers than a machine can
hold as processes; real ranks are joined by :class:`thinwire.integrations.process_group.TorchGroup`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Protocol, final, runtime_checkable

import torch
from torch import Tensor

from thinwire.errors import MisuseError, RetryError

__all__ = ["Group", "MemoryGroup", "sizes_of"]


@runtime_checkable
class Group(Protocol):
    """Ranks 0 to ``size - 1``. Every verb is collective: all ranks call the same verbs in the same order.

    A verb that cannot complete within the group's time-out, because a rank died or lags, raises
    :class:`~thinwire.errors.RetryError` on every rank that waits; nothing hangs. The contract is
    ``thinwire.testing.groups.GroupContract``.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def received_bytes(self) -> int:
        """Payload that has come from other ranks since the start."""

    @property
    def sent_bytes(self) -> int:
        """Payload that has gone to other ranks since the start."""

    def all_to_all(self, outgoing: Sequence[Tensor], incoming: Sequence[int]) -> list[Tensor]:
        """Rank i gets ``outgoing[i]`` (uint8); ``incoming[i]`` bytes come from rank i. One's own part does not travel
        and comes back as it is."""

    def all_gather(self, data: Tensor, incoming: Sequence[int]) -> list[Tensor]:
        """Every rank gets every rank's ``data`` (uint8), of the sizes ``incoming``."""

    def all_reduce_(self, values: Tensor) -> None:
        """Sums float32 ``values`` over the ranks, in place. All ranks get the same bits."""


def sizes_of(group: Group, size: int) -> list[int]:
    """Every rank's ``size``, by one all-gather of 8 bytes."""
    data = torch.tensor([size], dtype=torch.int64).view(torch.uint8)
    return [int(part.clone().view(torch.int64)) for part in group.all_gather(data, [8] * group.size)]


class _Table:
    """Where the threads of one group meet: everybody lays down a row, waits for all, and reads its column."""

    def __init__(self, size: int, timeout_s: float) -> None:
        self.barrier = threading.Barrier(size, timeout=timeout_s)
        self.rows: list[Any] = [None] * size


@final
class MemoryGroup:
    """Threads of one process as ranks; bytes are counted as if they had travelled.

    >>> from concurrent.futures import ThreadPoolExecutor
    >>> with ThreadPoolExecutor(3) as pool:
    ...     print(list(pool.map(lambda group: sizes_of(group, 10 * group.rank)[2], MemoryGroup.of(3))))
    [20, 20, 20]
    """

    def __init__(self, rank: int, table: _Table) -> None:
        self._rank = rank
        self._table = table
        self._received = 0
        self._sent = 0

    @classmethod
    def of(cls, size: int, timeout_s: float = 60.0) -> list[MemoryGroup]:
        """The ``size`` ranks of a new group, one for each thread."""
        if size < 1:
            raise MisuseError(f"a group of {size}; there is at least one rank", size=size)
        table = _Table(size, timeout_s)
        return [cls(rank, table) for rank in range(size)]

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return len(self._table.rows)

    @property
    def received_bytes(self) -> int:
        return self._received

    @property
    def sent_bytes(self) -> int:
        return self._sent

    def _meet(self, row: Any) -> list[Any]:
        table = self._table
        table.rows[self._rank] = row
        try:
            table.barrier.wait()
            rows = list(table.rows)
            table.barrier.wait()  # nobody lays down the next row before all have read this one
        except threading.BrokenBarrierError as error:
            raise RetryError("a rank did not come to the exchange in time; start again from a checkpoint") from error
        return rows

    def all_to_all(self, outgoing: Sequence[Tensor], incoming: Sequence[int]) -> list[Tensor]:
        if len(outgoing) != self.size or len(incoming) != self.size:
            raise MisuseError(f"{len(outgoing)} parts out and {len(incoming)} in for {self.size} ranks")
        rows = self._meet(list(outgoing))
        parts = [row[self._rank] for row in rows]
        self._check(parts, incoming)
        self._sent += sum(part.numel() for i, part in enumerate(outgoing) if i != self._rank)
        return parts

    def all_gather(self, data: Tensor, incoming: Sequence[int]) -> list[Tensor]:
        parts = self._meet(data)
        self._check(parts, incoming)
        self._sent += data.numel() * (self.size - 1)
        return parts

    def all_reduce_(self, values: Tensor) -> None:
        rows = self._meet(values.clone())
        values.copy_(torch.stack(rows).sum(0))
        ring = 2 * values.nbytes * (self.size - 1) // self.size
        self._received += ring
        self._sent += ring

    def _check(self, parts: Sequence[Tensor], incoming: Sequence[int]) -> None:
        for i, (part, due) in enumerate(zip(parts, incoming, strict=True)):
            if part.numel() != due:
                raise MisuseError(f"rank {i} sent {part.numel()} bytes where {due} were expected", rank=i)
            if i != self._rank:
                self._received += part.numel()
