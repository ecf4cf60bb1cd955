"""The contract of a :class:`~thinwire.peers.protocol.Carrier`, and carriers that lie, stall and fail.

Subclass :class:`CarrierContract` and give it ``run``, which calls a function once for each party of a fresh run, all at
the same time, and returns what each returned. Party 0 publishes. The functions are module-level, so that they can be
sent to other processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal

from thinwire.errors import MalformedError, RetryError
from thinwire.peers.protocol import Blob, Carrier, Joint, Origin, Progress
from thinwire.stores.memory import MemoryStore

__all__ = ["BadPeers", "CarrierContract", "JointContract", "Party"]

STALL_S = 3.0


@dataclass(slots=True)
class Party:
    """One worker of a run: its carrier, joined; its number among ``size``; the run's store; a barrier of all."""

    carrier: Carrier
    rank: int
    size: int
    origin: Origin
    meet: Callable[[], object]
    seen: list[int] = field(default_factory=list)

    def fetch(self, key: str, size_max: int) -> bytes | None:
        """As :meth:`Carrier.fetch`; None where it gives up, too."""
        try:
            return self.carrier.fetch(key, size_max=size_max, stall_s=STALL_S, progress=self.seen.append)
        except RetryError:
            return None

    def eventually(self, key: str, size_max: int, *, within_s: float = 20.0) -> bytes | None:
        """As :meth:`fetch`, again while nobody has it: news may take a moment to get around."""
        deadline = time.monotonic() + within_s
        while (data := self.fetch(key, size_max)) is None and time.monotonic() < deadline:
            time.sleep(0.1)
        return data


def body(seed: int, size: int) -> bytes:
    """Bytes that compress badly and that no other seed has."""
    return Random(seed).randbytes(size)


def _key(name: str) -> str:
    return f"objects/0000000001-aaaa/{name}"


# --- scenarios: each is run by every party ----------------------------------------------------------------------------


def share_sizes(party: Party, sizes: list[int]) -> list[bool]:
    """What the publisher offers, all others get, whatever its size."""
    if party.rank == 0:
        for size in sizes:
            data = body(size, size)
            party.origin.put(_key(str(size)), [data])
            party.carrier.offer(_key(str(size)), [data[: size // 3], memoryview(data)[size // 3 :]])
    party.meet()
    found = [True]
    if party.rank:
        found = [party.eventually(_key(str(size)), size) == body(size, size) for size in sizes]
        found.append(not party.seen or max(party.seen) <= max(sizes))
    party.meet()
    return found


def ask_for_what_nobody_has(party: Party, size: int) -> tuple[bool, float]:
    party.meet()
    began = time.monotonic()
    data = party.fetch(_key("nothing"), size)
    took = time.monotonic() - began
    party.meet()
    return data is None, took


def ask_for_less(party: Party, size: int) -> bool:
    """An object larger than asked for is not handed out."""
    if party.rank == 0:
        party.origin.put(_key("large"), [body(1, size)])
        party.carrier.offer(_key("large"), [body(1, size)])
    party.meet()
    data = None if party.rank == 0 else party.fetch(_key("large"), size - 1)
    party.meet()
    return data is None


def reuse_buffers(party: Party, size: int) -> bool:
    if party.rank == 0:
        buffer = bytearray(body(2, size))
        party.origin.put(_key("reused"), [buffer])
        party.carrier.offer(_key("reused"), [buffer])
        buffer[:] = bytes(size)
    party.meet()
    fine = party.rank == 0 or party.eventually(_key("reused"), size) == body(2, size)
    party.meet()
    return fine


def fetch_many_at_once(party: Party, size: int) -> list[bool]:
    """Eight threads, eight objects."""
    names = [f"many-{n}" for n in range(8)]
    if party.rank == 0:
        for n, name in enumerate(names):
            party.origin.put(_key(name), [body(n, size)])
            party.carrier.offer(_key(name), [body(n, size)])
    party.meet()
    found = [True]
    if party.rank:
        with ThreadPoolExecutor(8) as pool:
            got = list(pool.map(lambda name: party.eventually(_key(name), size), names))
        found = [data == body(n, size) for n, data in enumerate(got)]
    party.meet()
    return found


def distrust_what_came(party: Party, size: int) -> list[bool]:
    """After it was distrusted nothing is handed out again that was wrong; other objects still are."""
    for name in ("bad", "good"):
        if party.rank == 0:
            party.origin.put(_key(name), [body(3, size)])
            party.carrier.offer(_key(name), [body(3, size)])
    party.meet()
    found = [True]
    if party.rank:
        found = [party.eventually(_key("bad"), size) == body(3, size)]
        party.carrier.distrust(_key("bad"))
        party.carrier.distrust(_key("never heard of"))
        found.append(party.eventually(_key("good"), size) == body(3, size))
    party.meet()
    return found


def leave_twice(party: Party, size: int) -> bool:
    if party.rank == 0:
        party.carrier.offer(_key("left"), [body(4, size)])
    party.meet()
    party.carrier.leave()
    party.carrier.leave()
    party.carrier.offer(_key("late"), [body(4, size)])
    party.carrier.distrust(_key("left"))
    data = party.fetch(_key("left"), size)
    party.meet()
    return data is None


def lose_the_publisher(party: Party, size: int) -> tuple[bool, float]:
    """What is asked for after the publisher has gone comes from elsewhere or not at all, and soon."""
    if party.rank == 0:
        party.origin.put(_key("gone"), [body(5, size)])
        party.carrier.offer(_key("gone"), [body(5, size)])
    party.meet()
    if party.rank == 0:
        party.carrier.leave()
    party.meet()
    began = time.monotonic()
    data = None if party.rank == 0 else party.fetch(_key("gone"), size)
    took = time.monotonic() - began
    party.meet()
    return data in (None, body(5, size)), took


class CarrierContract:
    """What every carrier must do.

    Class attributes to override where a carrier needs it: ``parties`` of a run; ``sizes`` of objects that it carries;
    ``patience_s``, within which a fetch of what nobody has must end.
    """

    parties = 3
    sizes = (1, 1000, (1 << 20) + 5)
    patience_s = 3 * STALL_S

    def run(self, scenario: Callable[..., Any], *args: Any) -> list[Any]:
        raise NotImplementedError("give the subclass a method 'run'")

    @property
    def size(self) -> int:
        return self.sizes[-1]

    def test_what_one_offers_all_get(self) -> None:
        for found in self.run(share_sizes, list(self.sizes)):
            assert all(found)

    def test_what_nobody_has_is_nothing_and_soon(self) -> None:
        for nothing, took in self.run(ask_for_what_nobody_has, self.size):
            assert nothing
            assert took < self.patience_s

    def test_no_more_is_handed_out_than_was_asked_for(self) -> None:
        assert all(self.run(ask_for_less, self.size))

    def test_buffers_may_be_reused(self) -> None:
        assert all(self.run(reuse_buffers, self.size))

    def test_several_objects_at_once(self) -> None:
        for found in self.run(fetch_many_at_once, self.size):
            assert all(found)

    def test_what_is_distrusted_goes_and_the_rest_stays(self) -> None:
        for found in self.run(distrust_what_came, self.size):
            assert all(found)

    def test_leaving(self) -> None:
        assert all(self.run(leave_twice, self.size))

    def test_a_publisher_that_goes_leaves_nobody_hanging(self) -> None:
        for fine, took in self.run(lose_the_publisher, self.size):
            assert fine
            assert took < self.patience_s


class JointContract:
    """What a carrier with which several processes publish as one must do (:class:`~thinwire.peers.Joint`).

    Subclass it and give it ``carrier``, which makes one that was not joined yet, of the same run each time.
    """

    size = (1 << 20) + 5

    def carrier(self) -> Carrier:
        raise NotImplementedError("give the subclass a method 'carrier'")

    @contextmanager
    def _run(self) -> Iterator[tuple[MemoryStore, Carrier, Carrier, Party]]:
        """Two processes of a publisher, and a worker that joined before they said anything."""
        store = MemoryStore()
        first, second, worker = (self.carrier() for _ in range(3))
        assert isinstance(first, Joint)
        assert isinstance(second, Joint)
        worker.join(store, publishing=False)
        first.join(store, publishing=True)
        second.join_at(store, first.meeting())
        try:
            yield store, first, second, Party(worker, 2, 3, store, lambda: None)
        finally:
            for carrier in (first, second, worker):
                carrier.leave()

    def test_workers_get_what_each_of_them_offers(self) -> None:
        with self._run() as (store, first, second, worker):
            for n, carrier in enumerate((second, first)):
                store.put(_key(f"part-{n}"), [body(n, self.size)])
                carrier.offer(_key(f"part-{n}"), [body(n, self.size)])
            for n in range(2):
                assert worker.eventually(_key(f"part-{n}"), self.size) == body(n, self.size)

    def test_one_of_them_alone_is_found(self) -> None:
        with self._run() as (store, _, second, worker):
            store.put(_key("part"), [body(6, self.size)])
            second.offer(_key("part"), [body(6, self.size)])
            assert worker.eventually(_key("part"), self.size) == body(6, self.size)

    def test_no_meeting_is_refused(self) -> None:
        for meeting in (b"", b"{}", b"[" * 3000, b"\xff" * 40, b'{"rendezvous": ["nowhere"]}'):
            carrier = self.carrier()
            assert isinstance(carrier, Joint)
            try:
                carrier.join_at(MemoryStore(), meeting)
            except MalformedError:
                continue
            finally:
                carrier.leave()
            raise AssertionError(f"{meeting[:20]!r} was taken for a meeting")


class BadPeers:
    """A carrier that does wrong in one way, whatever it is asked for.

    - ``lie``: gives as many bytes as may come, none of them right;
    - ``flip``: gives what ``inner`` gives, with one bit changed;
    - ``short``, ``long``: gives a byte less, or more, than that;
    - ``stall``: gives nothing and does not come back until it is left;
    - ``drip``: says that a byte came, again and again, and gives nothing until it is left;
    - ``fail``: raises a foreign error; ``retry``: raises RetryError.
    """

    name = "bad peers"

    def __init__(
        self,
        how: Literal["lie", "flip", "short", "long", "stall", "drip", "fail", "retry"],
        inner: Carrier | None = None,
    ) -> None:
        self.how, self.inner = how, inner
        self.asked: list[str] = []
        self.distrusted: list[str] = []
        self._left = False

    def join(self, origin: Origin, *, publishing: bool) -> None:
        if self.inner is not None:
            self.inner.join(origin, publishing=publishing)

    def carries(self, key: str, size: int) -> bool:
        return True

    def offer(self, key: str, data: Blob) -> None:
        if self.inner is not None:
            self.inner.offer(key, data)

    def fetch(self, key: str, *, size_max: int, stall_s: float, progress: Progress) -> bytes | None:
        self.asked.append(key)
        if self.how == "fail":
            raise ValueError("a library's own error")
        if self.how == "retry":
            raise RetryError("planned: peers gave up")
        while self.how in ("stall", "drip") and not self._left:
            if self.how == "drip":
                progress(1)
            time.sleep(0.02)
        data = None
        if self.inner is not None:
            data = self.inner.fetch(key, size_max=size_max, stall_s=stall_s, progress=progress)
        if data is None:
            return None if self.inner is not None or self._left else bytes(size_max)
        middle = len(data) // 2
        return {
            "lie": bytes(len(data)),
            "flip": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
            "short": data[:-1],
            "long": data + b"x",
        }[self.how]

    def distrust(self, key: str) -> None:
        self.distrusted.append(key)
        if self.inner is not None:
            self.inner.distrust(key)

    def leave(self) -> None:
        self._left = True
        if self.inner is not None:
            self.inner.leave()
