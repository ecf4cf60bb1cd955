"""What consumers of whole models and of shards have in common: the version held, looking for newer ones, waiting."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Generic, Protocol, Self, TypeVar

from thinwire.errors import MisuseError, NoPathError, ObjectNotFoundError, StoreUnavailableError
from thinwire.peers import Carrier
from thinwire.stores import Notify, open_store
from thinwire.stores.cached import cached
from thinwire.sync import events
from thinwire.sync.peering import leave, peered
from thinwire.sync.remote import ReadableStore, Remote
from thinwire.sync.retrying import jittered
from thinwire.sync.trust import Memory, Pinned, read_trust
from thinwire.wire.manifest import Manifest, manifest_key

__all__ = ["Following", "Offered"]


class Offered:
    """A version that is newer than the one held. What is needed of it has been fetched; nothing has been applied."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest

    @property
    def number(self) -> int:
        """The version's number in the chain."""
        return self.manifest.version

    @property
    def step(self) -> int | None:
        """The trainer's step, as it was given to ``publish``."""
        return self.manifest.step

    @property
    def metadata(self) -> Mapping[str, str]:
        """The trainer's metadata, as they were given to ``publish``."""
        return self.manifest.metadata

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.number} step={self.step} state={self.manifest.state[:12]}>"


class _Numbered(Protocol):
    @property
    def number(self) -> int: ...


_V = TypeVar("_V", bound=_Numbered)


class Following(ABC, Generic[_V]):
    """The part of a consumer that knows versions and time, and no weights."""

    def __init__(
        self,
        store: str | ReadableStore,
        *,
        poll_s: float,
        retry_s: float,
        floor: int,
        threads: int,
        trust: Pinned | None,
        memory: str | os.PathLike[str] | None,
        observer: events.Observer | None,
        cache: str | os.PathLike[str] | None,
        peers: str | Carrier | None,
        in_parts: bool,
    ) -> None:
        if poll_s <= 0 or retry_s < 0:
            raise MisuseError("poll_s must be positive and retry_s not negative")
        opened: ReadableStore = open_store(store) if isinstance(store, str) else store
        self._peered = peered(opened, peers)
        self.store: ReadableStore = cached(self._peered, cache, poll_s=poll_s)
        self.poll_s, self.threads, self.observer = poll_s, threads, observer
        self._remote = Remote(
            events.observed(self.store, observer),
            retry_s=retry_s,
            floor=floor,
            trust=None if trust is None else read_trust(trust),
            memory=None if memory is None else Memory.open(memory),
            in_parts=in_parts,
        )
        self._avoid: set[str] = set()
        self._held: Manifest | None = None

    def close(self) -> None:
        """Leave the peers, if there are any. The end of the process does that, too."""
        leave(self._peered)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def version(self) -> int | None:
        """The version that the model is at; None before :meth:`load`."""
        return None if self._held is None else self._held.version

    @property
    def digest(self) -> str | None:
        """Digest of the whole state that the model is at, or is a part of."""
        return None if self._held is None else self._held.state

    @abstractmethod
    def poll(self, *, every: bool = False) -> _V | None:
        """The newest version behind the one held, or None; with ``every``, the very next one. Does not wait."""
        ...

    def follow(self, *, every: bool = False, timeout_s: float | None = None) -> Iterator[_V]:
        """Yield each newer version as it appears, what is needed of it already fetched; blocks between them.

        When several have appeared meanwhile the newest is yielded, or with ``every`` each in turn. A version that is
        not applied is yielded again, or a newer one instead. Ends when none appears for ``timeout_s`` (None: never).
        """
        self._require_held()
        last = time.monotonic()
        while True:
            version = self.poll(every=every)
            if version is not None:
                yield version
                last = time.monotonic()
                if self.version == version.number:
                    continue
            if timeout_s is not None and self._idle_s(time.monotonic() - last) >= timeout_s:
                return
            self._wait()

    def _idle_s(self, mine: float) -> float:
        """Seconds since the last version, for all who follow together."""
        return mine

    def _wait(self) -> None:
        """Until a new version may be there: on a notification where the store has one, else for the poll interval."""
        held = self._require_held()
        if isinstance(self.store, Notify):
            self.store.wait_for(manifest_key(held.version + 1), timeout_s=jittered(self.poll_s))
        else:
            time.sleep(jittered(self.poll_s))

    def _require_held(self) -> Manifest:
        if self._held is None:
            raise MisuseError("load a version first: consumer.load(model)")
        return self._held

    def _manifest(self, version: int) -> Manifest:
        try:
            return self._remote.manifest(version)
        except ObjectNotFoundError as error:
            raise NoPathError(f"there is no version {version} in this store", version=version) from error

    def _wait_for_first(self, timeout_s: float) -> Manifest:
        deadline = time.monotonic() + timeout_s
        while True:
            found = self._remote.newest()
            if found is not None:
                return found
            left = deadline - time.monotonic()
            if left <= 0:
                raise StoreUnavailableError(
                    f"no version has appeared in the store within {timeout_s:g} s; is the publisher running?"
                )
            time.sleep(min(jittered(self.poll_s), left))
