"""Ranks that do something together: one verb, and all of them fail if one does."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol, TypeVar, final

import torch.distributed as dist

from thinwire import errors
from thinwire.errors import MisuseError, RetryError, ThinwireError

__all__ = ["Alone", "Ranks", "TorchRanks", "agree", "ranks_of"]

T = TypeVar("T")


class Ranks(Protocol):
    """Processes (or threads) that call the same methods in the same order."""

    @property
    def rank(self) -> int:
        """This one's number."""
        ...

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """What every rank has given, in order of the ranks. Raises RetryError if one does not answer."""
        ...


@final
class Alone:
    """One rank, which is all of them."""

    rank, size = 0, 1

    def gather(self, value: Any) -> list[Any]:
        return [value]


@final
class TorchRanks:
    """The ranks of a process group, over a Gloo group of their own: so that nothing goes through a GPU, and a thread in
    the background meets nobody else's collectives. The group is made on first use, by all ranks of ``group``.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, timeout_s: float = 1800.0) -> None:
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise MisuseError("this process is not one of the group's ranks")
        self._members = dist.get_process_group_ranks(group)
        self._timeout = timedelta(seconds=timeout_s)
        self._own: Any = None

    def gather(self, value: Any) -> list[Any]:
        try:
            if self._own is None:
                self._own = dist.new_group(
                    self._members, timeout=self._timeout, backend="gloo", use_local_synchronization=True
                )
            found: list[Any] = [None] * self.size
            dist.all_gather_object(found, value, group=self._own)
        except (RuntimeError, OSError, pickle.UnpicklingError) as error:
            raise RetryError(
                f"a rank does not answer: {str(error)[:200]}. Start the job again; what was not committed is not seen"
            ) from error
        return found


def ranks_of(group: Ranks | dist.ProcessGroup | None) -> Ranks:
    """The ranks of a process group; of the default one, if there is one, for None; else this process alone."""
    if group is None:
        return TorchRanks() if dist.is_available() and dist.is_initialized() else Alone()
    return TorchRanks(group) if isinstance(group, dist.ProcessGroup) else group


def agree(ranks: Ranks, work: Callable[[], T]) -> list[T]:
    """What ``work`` returns on each rank; all raise if it raises on one.

    Raises:
        ThinwireError: what this rank raised, or the first of the others', of the same class and with its rank's number.
        RetryError: another rank failed for a reason of its own, or does not answer.

    >>> agree(Alone(), lambda: 7)
    [7]
    """
    mine: T | None = None
    error: Exception | None = None
    try:
        mine = work()
    except Exception as caught:
        error = caught
    told = None if error is None else (type(error).__name__, str(error), isinstance(error, ThinwireError))
    answers = ranks.gather((told, mine))
    if error is not None:
        raise error
    for rank, (other, _) in enumerate(answers):
        if other is not None:
            name, message, ours = other
            kind = getattr(errors, name, RetryError) if ours else RetryError
            raise kind(f"on rank {rank}: {message if ours else f'{name}: {message}'}", rank=rank)
    return [value for _, value in answers]
