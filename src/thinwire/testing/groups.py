"""The contract of a :class:`~thinwire.compress.group.Group`.

Subclass :class:`GroupContract` and give it ``run``, which calls a function on every rank of a fresh group, all at the
same time, and returns what each returned. The functions are module-level, so that they can be sent to other processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from thinwire.compress.group import Group, sizes_of
from thinwire.errors import RetryError

__all__ = ["GroupContract"]


def _letters(source: int, target: int) -> torch.Tensor:
    """What ``source`` sends to ``target``: its size and its bytes tell the pair."""
    return torch.full((source * 10 + target,), source * 16 + target, dtype=torch.uint8)


def swap_letters(group: Group) -> list[list[int]]:
    outgoing = [_letters(group.rank, r) for r in range(group.size)]
    parts = group.all_to_all(outgoing, [r * 10 + group.rank for r in range(group.size)])
    return [part.tolist() for part in parts]


def gather_letters(group: Group) -> list[list[int]]:
    parts = group.all_gather(_letters(group.rank, 0), [r * 10 for r in range(group.size)])
    return [part.tolist() for part in parts]


def count_bytes(group: Group) -> tuple[int, int, int, int]:
    group.all_to_all(
        [_letters(group.rank, r) for r in range(group.size)], [r * 10 + group.rank for r in range(group.size)]
    )
    swapped = group.received_bytes, group.sent_bytes
    group.all_gather(torch.zeros(100, dtype=torch.uint8), [100] * group.size)
    return (*swapped, group.received_bytes - swapped[0], group.sent_bytes - swapped[1])


def sum_values(group: Group) -> list[float]:
    values = torch.arange(5, dtype=torch.float32) + group.rank
    group.all_reduce_(values)
    return values.tolist()


def sum_awkward(group: Group) -> bytes:
    generator = torch.Generator().manual_seed(group.rank)
    values = torch.randn(1001, generator=generator) * 10.0 ** (group.rank * 3)
    group.all_reduce_(values)
    return values.numpy().tobytes()


def announce(group: Group) -> list[int]:
    return sizes_of(group, group.rank * group.rank - 1)


def nothing_at_all(group: Group) -> list[int]:
    empty = torch.empty(0, dtype=torch.uint8)
    parts = group.all_to_all([empty] * group.size, [0] * group.size)
    return [part.numel() for part in parts]


def leave_early(group: Group) -> str:
    """The last rank does not come; the others must say so, not hang."""
    if group.rank == group.size - 1:
        return "left"
    try:
        sizes_of(group, 1)
    except RetryError as error:
        return str(error)
    return "no error"


class GroupContract:
    """What every group must do, for several sizes."""

    sizes = (1, 2, 3, 4)
    patience_s = 2.0
    """Time-out where a rank stays away; long enough for a group to come about on a busy machine."""

    def run(self, size: int, work: Callable[[Group], Any], timeout_s: float = 30.0) -> list[Any]:
        raise NotImplementedError

    def test_every_rank_gets_what_was_meant_for_it(self) -> None:
        for size in self.sizes:
            for rank, parts in enumerate(self.run(size, swap_letters)):
                assert parts == [_letters(source, rank).tolist() for source in range(size)]

    def test_all_gather_gives_everybody_everything_in_order(self) -> None:
        for size in self.sizes:
            for parts in self.run(size, gather_letters):
                assert parts == [_letters(source, 0).tolist() for source in range(size)]

    def test_only_what_travels_is_counted(self) -> None:
        for size in self.sizes:
            for rank, counted in enumerate(self.run(size, count_bytes)):
                others = [r for r in range(size) if r != rank]
                received, sent = sum(r * 10 + rank for r in others), sum(rank * 10 + r for r in others)
                assert counted == (received, sent, 100 * (size - 1), 100 * (size - 1))

    def test_all_reduce_sums_in_place(self) -> None:
        for size in self.sizes:
            expected = [float(size * i + sum(range(size))) for i in range(5)]
            assert self.run(size, sum_values) == [expected] * size

    def test_all_reduce_gives_the_same_bits_everywhere(self) -> None:
        for size in self.sizes:
            assert len(set(self.run(size, sum_awkward))) == 1

    def test_sizes_may_be_zero_or_negative_marks(self) -> None:
        for size in self.sizes:
            assert self.run(size, announce) == [[r * r - 1 for r in range(size)]] * size
            assert self.run(size, nothing_at_all) == [[0] * size] * size

    def test_a_rank_that_does_not_come_is_an_error_on_the_others(self) -> None:
        *others, last = self.run(3, leave_early, timeout_s=self.patience_s)
        assert last == "left"
        assert all("start" in message for message in others), others
