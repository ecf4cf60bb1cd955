"""A folder that many workers of one machine share, in front of a store: each object comes over the network once.

What is kept, and for how long, goes by key:

- *for ever*, until there is no room: objects whose names hold a random part, so that no other bytes ever have them
  (``objects/``, the patches of skip deltas);
- *for a minute*: what is created once, under a name that another run in the same place would use again (manifests,
  records of skip deltas);
- *for a fraction of a second* (``fresh_s``): all else, and what is not there, and listings. So however many workers
  look for a new version, the origin is asked so often and no more.

While one worker asks the origin, the others that want the same object wait for its answer. The lock is the kernel's
and ends with its holder; who waited for ``patience_s`` asks by itself. Where nothing can be written (no room, no
right, no folder) the origin is asked as if there were no cache, with a warning in the log.

Nothing in the folder is believed. Small entries have a digest against a failing disk; readers compare objects with
their manifests, as they do with any store, and call :meth:`CachedStore.distrust` for what is wrong: the entry is
dropped, and the origin is asked again.
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Final, TypeVar, cast, final

from thinwire.errors import MisuseError, ObjectNotFoundError
from thinwire.stores.checks import check_list, check_range, is_key, not_there, too_large, views
from thinwire.stores.encrypted import EncryptedStore
from thinwire.stores.flights import Flights, Lookout
from thinwire.stores.protocol import Blob, Distrust, Notify, ObjectInfo, Store, check_key
from thinwire.stores.shelf import ABSENT, CHECKED_BYTES, LISTING, OBJECT, UNKEPT, Entry, Shelf

__all__ = ["CACHE_BYTES", "CachedStore", "cached"]

CACHE_BYTES: Final = 16 << 30
IMMUTABLE: Final = r"objects/.+|skips/[^/]+/.+"
SETTLED: Final = r"manifests/.+|skips/[^/]+"

_LISTED_MAX = 10_000  # objects of a listing that is shared
_LOOK_EVERY_S = 0.025
_PAUSES_S = (0.002, 0.05)
_PATIENCE_TO_DROP_S = 5.0
_WITHOUT_S = 30.0  # how long a process that could not keep an object goes without the lock
_log = logging.getLogger(__name__)


@final
class CachedStore:
    """``inner``, seen through a folder that any number of processes share.

    Args:
        inner: the origin, or whatever stands before it. Encryption goes around a cache, not inside one.
        folder: where the entries lie; several origins may share one. Best on a local disk.
        bytes_max: about how many bytes of entries are kept; those used longest ago go first.
        fresh_s: how old an answer may be that is not for ever: a fraction of the poll interval.
        settled_s: the same for what is created once.
        patience_s: how long one waits for another worker's answer before asking by oneself.
        immutable, settled: regular expressions; which keys are kept for ever, and for ``settled_s``.

    Writes go to the origin, and entries of what was written are dropped. ``wait_for`` is the inner store's, or
    without one wakes as soon as any worker of this machine has got the object: of those who wait none asks.

    Raises:
        MisuseError: a number is not positive, or ``inner`` is an :class:`~thinwire.stores.encrypted.EncryptedStore`.

    >>> import tempfile
    >>> from thinwire.stores.memory import MemoryStore
    >>> from thinwire.testing.faults import FaultyStore
    >>> inner = MemoryStore()
    >>> inner.put("objects/a", [b"weights"])
    >>> origin, folder = FaultyStore(inner), tempfile.mkdtemp()
    >>> [CachedStore(origin, folder).get("objects/a", size_max=100) for _ in range(3)]
    [b'weights', b'weights', b'weights']
    >>> origin.count("get")
    1
    """

    def __init__(
        self,
        inner: Store,
        folder: str | os.PathLike[str],
        *,
        bytes_max: int = CACHE_BYTES,
        fresh_s: float = 0.125,
        settled_s: float = 60.0,
        patience_s: float = 120.0,
        immutable: str = IMMUTABLE,
        settled: str = SETTLED,
    ) -> None:
        if bytes_max <= 0 or min(fresh_s, settled_s, patience_s) < 0:
            raise MisuseError("bytes_max must be positive, and no time negative")
        if isinstance(inner, EncryptedStore):
            raise MisuseError(
                "a cache around an encrypted store would keep plain objects on the disk; put the encryption outside: "
                "EncryptedStore(CachedStore(store, folder), keys)"
            )
        self.inner, self.folder = inner, os.fspath(folder)
        self.fresh_s, self.settled_s, self.patience_s = fresh_s, settled_s, patience_s
        self.create_is_atomic: bool = getattr(inner, "create_is_atomic", True)
        self._immutable, self._settled = re.compile(immutable), re.compile(settled)
        self._shelf = Shelf(folder, bytes_max=bytes_max)
        self._origin = f"{type(inner).__name__} {getattr(inner, 'url', '')}"
        self._flights: Flights[Entry] = Flights()
        self._lookout = Lookout(self._got_by_anyone, every_s=_LOOK_EVERY_S)
        self._served = threading.local()  # key and time of what this thread got last
        self._without_until = 0.0
        self._wrote_s = 0.0  # who has written wants to see it in the next listing

    @property
    def url(self) -> str:
        return self.inner.url

    def _name(self, key: str, kind: str = "object") -> str:
        return f"{self._origin}\0{kind}\0{key}"

    def _lifetime_s(self, key: str) -> float:
        if self._immutable.fullmatch(key):
            return math.inf
        return max(self.settled_s, self.fresh_s) if self._settled.fullmatch(key) else self.fresh_s

    def _is_fresh(self, entry: Entry, lifetime_s: float) -> bool:
        """An absent object may appear at any time; a clock that was set back makes nothing last longer."""
        if entry.kind == OBJECT and lifetime_s == math.inf:
            return True
        limits = {OBJECT: lifetime_s, UNKEPT: self.settled_s}
        return 0 <= time.time() - entry.asked_s < limits.get(entry.kind, self.fresh_s)

    # --- reading ---------------------------------------------------------------------------------------------------

    def get(self, key: str, *, size_max: int) -> bytes:
        check_key(key)
        name, lifetime_s = self._name(key), self._lifetime_s(key)

        def known() -> Entry | None:
            entry = self._shelf.read(name, size_max=size_max)
            if entry is not None and entry.kind == OBJECT and len(entry.data) > size_max:
                return None
            return entry if entry is not None and self._is_fresh(entry, lifetime_s) else None

        def ask() -> Entry:
            asked_s = time.time()
            try:
                return Entry(OBJECT, asked_s, self.inner.get(key, size_max=size_max))
            except ObjectNotFoundError:
                return Entry(ABSENT, asked_s)

        entry = self._flights.run((key, size_max), lambda: self._answer(name, known, ask))
        self._served.last = key, entry.asked_s
        if entry.kind == ABSENT:
            raise not_there(self.url, key)
        if len(entry.data) > size_max:
            raise too_large(self.url, key, len(entry.data), size_max)
        return entry.data

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """From the entry if there is one; else from the origin, and nothing is kept."""
        check_key(key)
        check_range(start, length)
        found = self._shelf.read_range(self._name(key), start, length)
        if found is not None and self._is_fresh(found[0], self._lifetime_s(key)):
            self._served.last = key, found[0].asked_s
            return found[1]
        return self.inner.get_range(key, start, length)

    def head(self, key: str) -> ObjectInfo:
        return self.inner.head(key)

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        check_list(prefix, start_after)
        name = self._name(f"{prefix}\0{start_after}", "list")
        rest: list[Iterator[ObjectInfo]] = []

        def known() -> Entry | None:
            entry = self._shelf.read(name)
            if entry is None or entry.kind != LISTING or entry.asked_s <= self._wrote_s:
                return None
            return entry if self._is_fresh(entry, 0.0) else None

        def ask() -> Entry:
            asked_s, found = time.time(), iter(self.inner.list(prefix, start_after=start_after))
            infos = [(info.key, info.size, info.modified_s) for info in islice(found, _LISTED_MAX)]
            if len(infos) == _LISTED_MAX:
                rest.append(found)
                return Entry(UNKEPT, asked_s, json.dumps(infos).encode())
            return Entry(LISTING, asked_s, json.dumps(infos).encode())

        entry = self._flights.run((prefix, start_after, "list"), lambda: self._answer(name, known, ask))
        infos = (ObjectInfo(*info) for info in json.loads(entry.data))
        if entry.kind == UNKEPT and not rest:  # another thread's long listing: only it has the end
            return self.inner.list(prefix, start_after=start_after)
        return (info for info in chain(infos, *rest) if is_key(info.key))

    def _answer(self, name: str, known: Callable[[], Entry | None], ask: Callable[[], Entry]) -> Entry:
        """What is known, or the origin's answer: asked for by one process, waited for by the others."""
        entry = known()
        if entry is not None and entry.kind != UNKEPT:
            return entry
        alone = entry is not None or time.monotonic() < self._without_until
        deadline, pause = time.monotonic() + self.patience_s, _PAUSES_S[0]
        while not alone:
            try:
                with self._shelf.locked(name) as mine:
                    entry = known()
                    if entry is not None and entry.kind != UNKEPT:
                        return entry
                    if mine:
                        return self._kept(name, ask())
            except OSError as error:
                self._go_without(error)
                break
            left = deadline - time.monotonic()
            if left <= 0:
                _log.warning("another worker has asked for an object for %g s; asking, too", self.patience_s)
            alone = entry is not None or left <= 0
            time.sleep(min(pause * random.uniform(0.5, 1.5), max(left, 0.0)))
            pause = min(1.5 * pause, _PAUSES_S[1])
        return ask()

    def _kept(self, name: str, entry: Entry) -> Entry:
        fits = len(entry.data) <= self._shelf.bytes_max // 2 and entry.kind != UNKEPT
        try:
            self._shelf.write(name, entry if fits else Entry(UNKEPT, entry.asked_s))
        except OSError as error:
            self._go_without(error)
        return entry

    def _go_without(self, error: OSError) -> None:
        if time.monotonic() >= self._without_until:
            _log.warning("the cache %s cannot be written, the store is asked instead: %s", self.folder, error)
        self._without_until = time.monotonic() + _WITHOUT_S

    # --- waiting ---------------------------------------------------------------------------------------------------

    def wait_for(self, key: str, *, timeout_s: float) -> bool:
        check_key(key)
        if not isinstance(self.inner, Notify):
            return self._lookout.wait(key, timeout_s=timeout_s)
        found = self.inner.wait_for(key, timeout_s=timeout_s)
        if found:
            entry = self._shelf.look(self._name(key))
            if entry is not None and entry.kind == ABSENT:  # that was before
                self._shelf.drop(self._name(key))
        return found

    def _got_by_anyone(self, key: str) -> bool:
        entry = self._shelf.look(self._name(key))
        return entry is not None and entry.kind == OBJECT

    # --- distrust --------------------------------------------------------------------------------------------------

    def distrust(self, key: str) -> None:
        """Drop the entry that this thread got under ``key``; not one that another worker has fetched anew since."""
        check_key(key)
        last, asked_s = getattr(self._served, "last", (None, 0.0))
        entry = self._shelf.look(self._name(key))
        if entry is not None and last == key and entry.asked_s > asked_s:
            return
        self._drop(key)
        if isinstance(self.inner, Distrust):
            self.inner.distrust(key)

    def _drop(self, key: str, entry: Entry | None = None) -> None:
        """Put ``entry`` in place of what is known of a key, or nothing, once nobody is about to write it."""
        self._flights.forget(lambda name: isinstance(name, tuple) and (name[0] == key or name[-1] == "list"))
        name, deadline = self._name(key), time.monotonic() + min(self.patience_s, _PATIENCE_TO_DROP_S)
        try:
            while time.monotonic() < deadline:
                with self._shelf.locked(name) as mine:
                    if mine and entry is not None:
                        self._shelf.write(name, entry)
                    elif mine:
                        self._shelf.drop(name)
                    if mine:
                        return
                time.sleep(_PAUSES_S[0])
        except OSError as error:
            self._go_without(error)
        self._shelf.drop(name)

    # --- writing ---------------------------------------------------------------------------------------------------

    def put(self, key: str, data: Blob) -> None:
        self._write(key, lambda: self.inner.put(key, data))

    def create(self, key: str, data: Blob) -> None:
        """As the inner store's; who waits here for this key is woken."""
        flat = views(data)
        small = sum(map(len, flat)) <= CHECKED_BYTES
        self._write(key, lambda: self.inner.create(key, data), b"".join(flat) if small else None)

    def delete(self, key: str) -> None:
        self._write(key, lambda: self.inner.delete(key))

    def _write(self, key: str, write: Callable[[], None], created: bytes | None = None) -> None:
        check_key(key)
        try:
            write()
        except BaseException:
            self._drop(key)  # it may have been written all the same
            raise
        self._drop(key, None if created is None else Entry(OBJECT, time.time(), created))
        self._wrote_s = time.time()

    def __repr__(self) -> str:
        return f"CachedStore({self.inner!r}, {self.folder!r})"


S = TypeVar("S")


def cached(store: S, folder: str | os.PathLike[str] | None, *, poll_s: float) -> S:
    """``store`` behind a folder that is shared by workers who look for something new every ``poll_s``; itself without.

    What may have changed is asked for again after a quarter of that time. Where ``store`` encrypts, the cache comes
    beneath it, and holds what the store holds.

    Raises:
        MisuseError: as :class:`CachedStore`.
    """
    if folder is None:
        return store
    if isinstance(store, EncryptedStore):
        return cast("S", store.around(CachedStore(store.inner, folder, fresh_s=poll_s / 4)))
    return cast("S", CachedStore(cast("Store", store), folder, fresh_s=poll_s / 4))
