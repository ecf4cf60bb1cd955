"""What thinwire asks of peers: to carry immutable objects between the workers of one run, and never to be needed.

A carrier moves opaque bytes by key. It may fail, lie or stall: whoever asks it knows the digest, has a time limit, and
has a store to turn to (:mod:`thinwire.sync.peering`). The contract is :class:`thinwire.testing.peers.CarrierContract`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

__all__ = ["Blob", "Carrier", "Joint", "Origin", "Progress"]

Blob = Sequence[bytes | bytearray | memoryview]
"""An object's bytes as consecutive buffers."""

Progress = Callable[[int], object]
"""Called with the bytes of an object that have come so far."""


class Origin(Protocol):
    """The store behind the peers, as a carrier may use it: to find the others, and for what no peer has.

    The verbs are a store's own (:mod:`thinwire.stores.protocol`). A worker may be allowed to read only; then ``put``
    raises ``MisuseError``, which a carrier survives.
    """

    def get(self, key: str, *, size_max: int) -> bytes: ...

    def get_range(self, key: str, start: int, length: int) -> bytes: ...

    def put(self, key: str, data: Blob) -> None: ...


@runtime_checkable
class Carrier(Protocol):
    """One way to the other workers. Safe to use from several threads; every call returns within its time.

    A carrier belongs to one run: it is joined to one store, once.
    """

    @property
    def name(self) -> str:
        """What to call it in messages."""
        ...

    def join(self, origin: Origin, *, publishing: bool) -> None:
        """Take part in the run whose store is ``origin``. ``publishing``: others find one another through this worker.

        Raises:
            MisuseError: it was joined before, or a package that it needs is missing.
        """
        ...

    def carries(self, key: str, size: int) -> bool:
        """Whether an object of this key and about this size is worth asking peers for. Asks nobody."""
        ...

    def offer(self, key: str, data: Blob) -> None:
        """Let others have this object. The buffers may be reused afterwards. What goes wrong is logged, not raised."""
        ...

    def fetch(self, key: str, *, size_max: int, stall_s: float, progress: Progress) -> bytes | None:
        """The object as peers have it, at most ``size_max`` bytes; nothing else is known of them. None: nobody has it.

        Gives up when nothing has come for about ``stall_s`` seconds.

        Raises:
            RetryError: it was given up.
        """
        ...

    def distrust(self, key: str) -> None:
        """What :meth:`fetch` gave for ``key`` was wrong: drop any copy of it, and avoid whoever it came from."""
        ...

    def leave(self) -> None:
        """Stop carrying; everything held goes. May be called twice, and while others fetch."""
        ...


@runtime_checkable
class Joint(Protocol):
    """What a carrier can do besides, so that several processes publish as one: the ranks of a sharded trainer.

    The first one joins with ``publishing=True``; the others :meth:`join_at` where it says that workers meet.
    """

    def meeting(self) -> bytes:
        """Where workers meet, and what lets publishers speak there. Only for processes of the same publisher."""
        ...

    def join_at(self, origin: Origin, meeting: bytes) -> None:
        """Take part as a further process of the publisher whose first one said ``meeting``.

        Raises:
            MisuseError: as :meth:`Carrier.join`.
            MalformedError: that is no meeting of such a carrier.
        """
        ...
