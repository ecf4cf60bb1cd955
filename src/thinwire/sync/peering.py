"""A store whose large objects come from other workers first: peers, then the store.

Only objects that never change go this way: patches, anchors, trees, skip deltas. Manifests, hints and trust documents
always come from the store itself. Nothing that a peer sends is believed: the reader compares it with the digest in a
manifest (:class:`thinwire.sync.remote.Remote`), calls :meth:`PeerStore.distrust` if it differs, and gets it from the
store.

Peers cannot hold a worker up: who sends nothing for ``stall_s`` is given up, a carrier that hangs or fails is left
alone for a while, and then tried again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast, final

from thinwire.errors import MisuseError, RetryError, ThinwireError, first_line
from thinwire.peers import Carrier, Joint, open_peers
from thinwire.stores.encrypted import EncryptedStore
from thinwire.stores.protocol import Blob, Distrust, Notify, ObjectInfo, Store
from thinwire.sync.ranks import Ranks, agree
from thinwire.wire.skip import SKIPS_PREFIX

__all__ = ["PeerStore", "leave", "peered", "peered_ranks"]

_log = logging.getLogger(__name__)
_S = TypeVar("_S")
_REST_FIRST_S, _REST_MAX_S = 5.0, 300.0
_GRACE_S = 2.0
_LOOK_S = 0.25
_DISTRUSTED_MAX = 4096
_FAILURES = 3


def is_carried(key: str) -> bool:
    """Whether objects of this key go between peers: they must never change.

    >>> is_carried("objects/0000000002-ab/delta.safetensors"), is_carried("manifests/0000000002.json")
    (True, False)
    """
    if key.startswith(SKIPS_PREFIX):
        return not key.endswith(".json")
    return key.startswith("objects/")


class _Pause:
    """How long a carrier is left alone: longer each time, from the first failure that counts; none after a success."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._failures, self._until, self._rest_s = 0, 0.0, _REST_FIRST_S

    @property
    def over(self) -> bool:
        return time.monotonic() >= self._until

    def succeeded(self) -> None:
        with self._lock:
            self._failures, self._rest_s = 0, _REST_FIRST_S

    def failed(self, *, at_once: bool = False) -> float:
        """Note a failure; seconds of the pause that begins now, 0 if none does."""
        with self._lock:
            self._failures += 1
            if not at_once and self._failures < _FAILURES:
                return 0.0
            rest, self._rest_s = self._rest_s, min(2 * self._rest_s, _REST_MAX_S)
            self._until = time.monotonic() + rest
            return rest


@final
class PeerStore:
    """``inner``, with objects from ``carrier`` where peers have them.

    Args:
        inner: the store. It may be one that can only get and list, as a consumer's.
        carrier: the way to the peers; it is joined to this store's run here.
        publishing: others find one another through this worker.
        meeting: this is a further process of the publisher that said so (:class:`~thinwire.peers.Joint`).
        stall_s: peers that send nothing for so long are given up.

    ``peer_bytes`` and ``store_bytes`` count what came which way, of the objects that peers may carry.

    Raises:
        MisuseError: the carrier carries for another run, or needs a package that is missing.

    >>> from thinwire.peers.memory import MemoryPeers, Room
    >>> from thinwire.stores.memory import MemoryStore
    >>> store, room = MemoryStore(), Room()
    >>> trainer = PeerStore(store, MemoryPeers(room), publishing=True)
    >>> worker = PeerStore(store, MemoryPeers(room))
    >>> trainer.put("objects/1/delta", [b"weights"])
    >>> worker.get("objects/1/delta", size_max=7), worker.peer_bytes, worker.store_bytes
    (b'weights', 7, 0)
    """

    def __init__(
        self,
        inner: Store,
        carrier: Carrier,
        *,
        publishing: bool = False,
        meeting: bytes | None = None,
        stall_s: float = 5.0,
    ) -> None:
        if stall_s <= 0:
            raise MisuseError(f"stall_s is a time above 0, not {stall_s:g}")
        self.inner, self.carrier, self.stall_s = inner, carrier, stall_s
        self.peer_bytes = self.store_bytes = 0
        self._pause = _Pause()
        self._hanging = 0
        self._distrusted: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()
        self.create_is_atomic: bool = getattr(inner, "create_is_atomic", True)
        if isinstance(inner, Notify):
            self.wait_for = inner.wait_for
        if meeting is None:
            carrier.join(_Origin(inner), publishing=publishing)
        else:
            joint(carrier).join_at(_Origin(inner), meeting)

    @property
    def url(self) -> str:
        return self.inner.url

    # --- reading ---------------------------------------------------------------------------------------------------

    def get(self, key: str, *, size_max: int) -> bytes:
        carried = is_carried(key) and self.carrier.carries(key, size_max)
        if carried and self._may_ask(key):
            data = self._from_peers(key, size_max)
            if data is not None:
                with self._lock:
                    self.peer_bytes += len(data)
                return data
        data = self.inner.get(key, size_max=size_max)
        if carried:
            with self._lock:
                self.store_bytes += len(data)
            self._offer(key, [data])
        return data

    def _may_ask(self, key: str) -> bool:
        return self._hanging == 0 and key not in self._distrusted and self._pause.over

    def _from_peers(self, key: str, size_max: int) -> bytes | None:
        """What peers have, in a thread of its own: if it hangs, it hangs alone."""
        came = _Outcome()

        def run() -> None:
            try:
                came.data = self.carrier.fetch(key, size_max=size_max, stall_s=self.stall_s, progress=came.progress)
            except Exception as error:  # a carrier's libraries raise what they like
                came.error = error
            finally:
                with self._lock:
                    came.ended = True
                    if came.abandoned:
                        self._hanging -= 1
                came.done.set()

        threading.Thread(target=run, name="thinwire-peers", daemon=True).start()
        while not came.done.wait(_LOOK_S):
            if time.monotonic() - came.last > 2 * self.stall_s + _GRACE_S:
                with self._lock:
                    if came.ended:
                        break
                    came.abandoned = True
                    self._hanging += 1
                self._failed(f"no answer for {key}", at_once=True)
                return None
        if came.error is not None:
            self._failed(first_line(came.error), at_once=not isinstance(came.error, RetryError))
            return None
        data = came.data
        if data is not None and len(data) > size_max:
            self._failed(f"{len(data)} bytes of {key}, of at most {size_max}")
            self._forget(key)
            return None
        if data is not None:
            self._pause.succeeded()
        return data

    def _failed(self, why: str, *, at_once: bool = False) -> None:
        rest = self._pause.failed(at_once=at_once)
        then = f" for {rest:g} s" if rest else ""
        _log.warning("%s: %s; the store is asked instead%s", self.carrier.name, why, then)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        return self.inner.get_range(key, start, length)

    def head(self, key: str) -> ObjectInfo:
        return self.inner.head(key)

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        return self.inner.list(prefix, start_after=start_after)

    def distrust(self, key: str) -> None:
        """What was got under this key was wrong: from now on it comes from the store."""
        if is_carried(key):
            asked = key not in self._distrusted
            self._forget(key)
            if asked:
                self._failed(f"{key} is not what its manifest says")
        if isinstance(self.inner, Distrust):
            self.inner.distrust(key)

    def _forget(self, key: str) -> None:
        with self._lock:
            self._distrusted[key] = None
            while len(self._distrusted) > _DISTRUSTED_MAX:
                self._distrusted.popitem(last=False)
        self._safely(lambda: self.carrier.distrust(key))

    # --- writing ---------------------------------------------------------------------------------------------------

    def put(self, key: str, data: Blob) -> None:
        self.inner.put(key, data)
        self._offer(key, data)

    def create(self, key: str, data: Blob) -> None:
        self.inner.create(key, data)
        self._offer(key, data)

    def _offer(self, key: str, data: Blob) -> None:
        size = sum(memoryview(buffer).nbytes for buffer in data)
        if size and is_carried(key) and self.carrier.carries(key, size):
            self._safely(lambda: self.carrier.offer(key, data))

    def _safely(self, run: Callable[[], object]) -> None:
        try:
            run()
        except Exception as error:
            _log.warning("%s: %s", self.carrier.name, error)

    def delete(self, key: str) -> None:
        self.inner.delete(key)

    def leave(self) -> None:
        """Leave the peers; the store stays of use."""
        self._safely(self.carrier.leave)

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not made yet
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __repr__(self) -> str:
        return f"PeerStore({self.inner!r}, {self.carrier.name})"


class _Outcome:
    """What became of one request to peers, and when it last got on."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.last = time.monotonic()
        self.data: bytes | None = None
        self.error: Exception | None = None
        self.ended = self.abandoned = False
        self._most = 0

    def progress(self, size: int) -> None:
        if size > self._most:
            self._most, self.last = size, time.monotonic()


class _Origin:
    """A store as carriers may use it; what it cannot do is told as misuse."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def _verb(self, name: str) -> Any:
        verb = getattr(self._store, name, None)
        if verb is None:
            raise MisuseError(f"this store cannot {name}")
        return verb

    def get(self, key: str, *, size_max: int) -> bytes:
        return cast("bytes", self._verb("get")(key, size_max=size_max))

    def get_range(self, key: str, start: int, length: int) -> bytes:
        return cast("bytes", self._verb("get_range")(key, start, length))

    def put(self, key: str, data: Blob) -> None:
        self._verb("put")(key, data)


def joint(carrier: Carrier) -> Joint:
    """``carrier``, if several processes can publish with it as one. Raises MisuseError if not."""
    if not isinstance(carrier, Joint):
        raise MisuseError(f"the ranks of a sharded publisher cannot share {carrier.name}; take 'swarm', 'nixl', ...")
    return carrier


def carrier_of(peers: str | Carrier) -> Carrier:
    """The carrier that a word, a URL or a carrier names.

    Raises:
        MisuseError: there are no such peers, or a package for them is missing.
    """
    carrier = open_peers(peers) if isinstance(peers, str) else peers
    if not isinstance(carrier, Carrier):
        raise MisuseError(f"peers are a word such as 'swarm', or a carrier; not {type(peers).__name__}")
    return carrier


def peered(store: _S, peers: str | Carrier | None, *, publishing: bool = False, meeting: bytes | None = None) -> _S:
    """``store`` with peers; itself without any. ``publishing`` and ``meeting`` as :class:`PeerStore` takes them.

    Where ``store`` encrypts, the peers come beneath: what travels between them is what lies in the store, encrypted.

    Raises:
        MisuseError: there are no such peers, or a package for them is missing.
    """
    if peers is None:
        return store
    carrier = carrier_of(peers)
    if isinstance(store, EncryptedStore):
        return cast("_S", store.around(PeerStore(store.inner, carrier, publishing=publishing, meeting=meeting)))
    return cast("_S", PeerStore(cast("Store", store), carrier, publishing=publishing, meeting=meeting))


def peered_ranks(store: _S, peers: str | Carrier | None, ranks: Ranks) -> _S:
    """``store`` with peers, to which all ranks of a publisher give: workers meet where the first rank says.

    Called by all ranks at the same time, unless there are no peers.

    Raises:
        MisuseError: as :func:`peered`; several ranks cannot share such a carrier.
        RetryError: a rank does not answer.
    """
    if peers is None:
        return store
    made: list[_S] = []

    def first() -> bytes:
        if ranks.rank != 0:
            return b""
        carrier = carrier_of(peers)
        meet = joint(carrier) if ranks.size > 1 else None
        made.append(peered(store, carrier, publishing=True))
        return b"" if meet is None else meet.meeting()

    meeting = agree(ranks, first)[0]
    try:
        if ranks.size > 1:
            agree(ranks, lambda: None if made else made.append(peered(store, peers, meeting=meeting)))
    except ThinwireError:
        for store in made:
            leave(store)
        raise
    return made[0]


def leave(store: object) -> None:
    """Leave the peers of a store, whatever is wrapped around them."""
    while store is not None:
        if isinstance(store, PeerStore):
            store.leave()
        store = getattr(store, "inner", None)
