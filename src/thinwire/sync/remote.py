"""Reading a chain from a store: the newest version, manifests by number, objects that are what their manifest says."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Protocol

from thinwire.chain.trusted import TrustedChain
from thinwire.errors import (
    DamagedObjectError,
    MalformedError,
    MisuseError,
    ObjectNotFoundError,
    RefetchError,
    RefuseError,
    RetryError,
    ThinwireError,
    UntrustedError,
)
from thinwire.stores.protocol import Get, List
from thinwire.sync.guard import Guard
from thinwire.sync.retrying import retrying
from thinwire.sync.trust import Memory, Trust, now_ms
from thinwire.wire import canonical
from thinwire.wire.digests import hasher
from thinwire.wire.manifest import Manifest, ObjectRef, manifest_key, version_of_key
from thinwire.wire.skip import SKIP_BYTES_MAX, SKIPS_PREFIX, Skip, skip_key, skip_of_key
from thinwire.wire.spec import MANIFEST_BYTES_MAX

__all__ = ["HINT_KEY", "ReadableStore", "Remote", "hash_bytes", "hint_bytes"]

HINT_KEY = "latest.json"
"""Holds the newest version's number, to save a listing. It is a hint: what it says is never taken for true."""

_AHEAD = 8
_WALK = 256
_log = logging.getLogger(__name__)


class ReadableStore(Get, List, Protocol):
    """What following a chain needs."""


def hint_bytes(version: int) -> bytes:
    """Content of the hint."""
    return canonical.dump({"version": version})


def hash_bytes(hash_name: str, data: Iterable[bytes | bytearray | memoryview]) -> str:
    """Digest of an object given as buffers, in hexadecimal; BLAKE3 uses all cores for large buffers."""
    if hash_name == "blake3":
        import blake3

        h = blake3.blake3(max_threads=blake3.blake3.AUTO)
        for part in data:
            h.update(part)
        return h.digest().hex()
    other = hasher(hash_name)(b"")
    for part in data:
        other.update(part)
    return other.digest().hex()


class Remote:
    """A store's chain as one party sees it. Not to be used by two threads at once, but for :meth:`fetch`.

    With ``trust`` only what its keys have signed is accepted, or what that names as its past; ``memory`` is what was
    seen before, and is kept up to date; ``vouched`` are digests of manifests that the caller answers for. Versions in
    parts are for those who can do with them, who say so by ``in_parts``.
    """

    def __init__(
        self,
        store: ReadableStore,
        *,
        retry_s: float,
        floor: int = 0,
        connections: int = 8,
        trust: Trust | None = None,
        memory: Memory | None = None,
        vouched: Set[str] = frozenset(),
        in_parts: bool = False,
    ) -> None:
        self.store, self.in_parts = store, in_parts
        self.retry_s = retry_s
        self.connections = connections
        self.guard = None if trust is None else Guard(store, trust, memory, retry_s=retry_s)
        seen = None
        if memory is not None and memory.version >= floor:
            floor, seen = memory.version, memory.manifest
        self.chain = TrustedChain(
            floor=floor, seen=seen, authority=None if self.guard is None else self.guard.authority, vouched=vouched
        )
        self.memory = memory
        self._proving = False
        self._checked_seen = memory is None or memory.version == 0
        self.skips: dict[tuple[int, int], Skip] = {}
        self._bad_skips: set[tuple[int, int]] = set()

    def manifest(self, version: int) -> Manifest:
        """The manifest of ``version``, accepted by the chain.

        Raises:
            ObjectNotFoundError: there is no such version.
            RefuseError: what is stored contradicts what has been accepted, twice.
            MisuseError: it is in parts, and the caller is not for that.
            RetryError: the store does not answer.
        """
        found = self.chain.manifests.get(version) or self._accepted(version)
        if found.parts and not self.in_parts:
            raise MisuseError(
                f"version {version} was published in {len(found.parts)} parts by a sharded trainer; read it with "
                "thinwire.ShardedConsumer, go on from it with thinwire.ShardedPublisher",
                version=version,
            )
        return found

    def _accepted(self, version: int) -> Manifest:
        data = self._get_manifest(version)
        if self.guard is not None and version > max(self.chain.manifests, default=0):
            self.guard.refresh()
        try:
            return self.chain.accept(data, version=version, now_ms=now_ms())
        except RefuseError:  # one short, mangled or mistaken reply is not the store's last word
            self._distrust(manifest_key(version))
            data = self._get_manifest(version)
            if self.guard is not None:
                self._prove(version)
            return self.chain.accept(data, version=version, now_ms=now_ms())

    def _prove(self, version: int) -> None:
        """Walk back to ``version`` from the next one that is believed: keys end, and each manifest names its parent.

        What goes wrong on the way is told by who accepts ``version`` next.
        """
        if self._proving:
            return
        self._proving = True
        try:
            with suppress(ObjectNotFoundError, RefuseError):
                if not any(v > version for v in self.chain.manifests):
                    self.newest()
                above = [v for v in self.chain.manifests if v > version]
                between = range(min(above) - 1, version, -1) if above else range(0)
                with ThreadPoolExecutor(self.connections) as pool:
                    for start in range(0, len(between), _WALK):
                        part = between[start : start + _WALK]
                        for number, data in zip(part, pool.map(self._get_manifest, part), strict=True):
                            self.chain.accept(data, version=number, now_ms=now_ms())
        finally:
            self._proving = False

    def manifests(self, versions: Iterable[int]) -> None:
        """Fetch those manifests of ``versions`` that are missing, side by side; ones the store lacks are left out."""
        missing = [v for v in versions if v not in self.chain.manifests]

        def get(version: int) -> tuple[int, bytes | None]:
            for _ in range(2):  # it lies between versions that are there: a replica may lag
                with suppress(ObjectNotFoundError):
                    return version, self._get_manifest(version)
            return version, None

        with ThreadPoolExecutor(min(self.connections, max(len(missing), 1))) as pool:
            for version, data in pool.map(get, missing):
                if data is not None:
                    try:
                        self.chain.accept(data, version=version, now_ms=now_ms())
                    except RefuseError:
                        self.manifest(version)

    def skip_hints(self, first: int, last: int) -> dict[tuple[int, int], tuple[str, int]]:
        """What a listing shows of the skip deltas between the versions ``first`` and ``last``: key and bytes by (base,
        version). Hints: none of it is believed. Empty where listing fails, for skip deltas are never needed."""
        found: dict[tuple[int, int], tuple[str, int]] = {}
        records: set[tuple[int, int]] = set()

        def listing() -> None:
            for info in self.store.list(SKIPS_PREFIX, start_after=f"{SKIPS_PREFIX}{first + 1:010d}"):
                pair = skip_of_key(info.key)
                if pair is not None and pair[1] > last:
                    return
                if pair is None or pair[0] < first or pair in self._bad_skips:
                    continue
                if info.key == skip_key(*pair):
                    records.add(pair)
                elif pair not in found or info.size < found[pair][1]:
                    found[pair] = info.key, info.size

        try:
            retrying(listing, limit_s=self.retry_s)
        except ThinwireError as error:
            _log.warning("skip deltas cannot be listed, going without: %s", error)
            return {}
        return {pair: hint for pair, hint in found.items() if pair in records}

    def skip(self, base: int, version: int) -> Skip | None:
        """The skip delta from ``base`` to ``version``, whose manifests have been accepted; None, with a warning in the
        log, if its record is missing, damaged, or contradicts them. It is then not asked for again."""
        pair = base, version
        if pair in self.skips or pair in self._bad_skips:
            return self.skips.get(pair)
        key = skip_key(base, version)
        for last in (False, True):
            try:
                data = retrying(lambda: self.store.get(key, size_max=SKIP_BYTES_MAX), limit_s=self.retry_s)
                must_be_signed = self.guard is not None and self.guard.trust.signed_skips
                self.skips[pair] = self.chain.accept_skip(
                    data, base=base, version=version, now_ms=now_ms(), must_be_signed=must_be_signed
                )
                break
            except (RefuseError, RefetchError, RetryError) as error:
                if last:
                    self._bad_skips.add(pair)
                    _log.warning("the skip delta from version %d to %d is not used: %s", base, version, error)
                else:
                    self._distrust(key)
        return self.skips.get(pair)

    def newest(self) -> Manifest | None:
        """The store's newest version, or None if it has none.

        Raises:
            UntrustedError: it is older than one that has been seen, not signed as it must be, or nobody has said for
                too long that it is the newest.
        """
        if self.guard is not None:
            self.guard.refresh()
        start = max(self._hint(), self.chain.floor)
        listed = start
        for info in retrying(
            lambda: list(self.store.list("manifests/", start_after=manifest_key(start))), limit_s=self.retry_s
        ):
            listed = max(listed, version_of_key(info.key) or 0)
        found = self._at_or_after(listed)
        if found is None and listed > self.chain.floor:  # the hint was of no use
            versions = [
                version_of_key(i.key) or 0
                for i in retrying(lambda: list(self.store.list("manifests/")), limit_s=self.retry_s)
            ]
            found = self._at_or_after(max(versions, default=0))
        if found is None and self.chain.floor:
            found = self._at_or_after(self.chain.floor)
            if found is None:
                raise UntrustedError(
                    f"the store no longer shows version {self.chain.floor}, which has been seen: a rollback, or "
                    "another store under the same name. Start anew, without this floor, only if that is meant",
                    seen=self.chain.floor,
                )
        if found is None:
            return None
        self._check_seen()
        return self._note(found)

    def after(self, version: int) -> Manifest | None:
        """The newest version behind ``version``, or None: one request when there is none.

        Raises:
            UntrustedError: as :meth:`newest`.
        """
        found = self._next(version)
        if found is not None:
            return self._note(self._at_or_after(found.version, found) or found)
        held = self.chain.manifests.get(version)
        if self.guard is None or held is None:
            return None
        newer = self.guard.check_fresh(held, self._shown)
        return None if newer is held else self._note(newer)

    def _note(self, found: Manifest) -> Manifest:
        """Take ``found``, or a newer version that a heartbeat names, for the newest; it is remembered."""
        self.chain.accept_newest(found.encode(), version=found.version, now_ms=now_ms())
        if self.guard is not None:
            newer = self.guard.check_fresh(found, self._shown)
            if newer is not found:
                found = self._at_or_after(newer.version, newer) or newer
                self.chain.accept_newest(found.encode(), version=found.version, now_ms=now_ms())
        if self.memory is not None:
            self.memory.note(found.version, found.digest)
        return found

    def _shown(self, version: int) -> Manifest | None:
        return self._next(version - 1)

    def _check_seen(self) -> None:
        """Once after a restart: the version that was seen last must still be there, with the same manifest."""
        if not self._checked_seen and self.memory is not None:
            try:
                self.manifest(self.memory.version)
            except ObjectNotFoundError as error:
                raise UntrustedError(
                    f"the store no longer shows version {self.memory.version}, which has been seen, though it shows "
                    "later ones: manifests are never deleted. Do not use this store; ask its publisher",
                    seen=self.memory.version,
                ) from error
            self._checked_seen = True

    def _at_or_after(self, version: int, found: Manifest | None = None) -> Manifest | None:
        """The newest version from ``version`` on; looks ahead one by one, then by a listing."""
        if found is None:
            try:
                found = self.manifest(version) if version else None
            except ObjectNotFoundError:
                return None
        if found is None:
            found = self._next(0)
        for _ in range(_AHEAD):
            following = self._next(found.version) if found is not None else None
            if following is None:
                return found
            found = following
        assert found is not None
        start = manifest_key(found.version)
        listing = retrying(lambda: list(self.store.list("manifests/", start_after=start)), limit_s=self.retry_s)
        versions = [v for info in listing if (v := version_of_key(info.key))]
        return self.manifest(max(versions)) if versions else found

    def _next(self, version: int) -> Manifest | None:
        try:
            return self.manifest(version + 1)
        except ObjectNotFoundError:
            return None

    def _hint(self) -> int:
        try:
            data = retrying(lambda: self.store.get(HINT_KEY, size_max=4096), limit_s=self.retry_s)
            value = canonical.parse(data, bytes_max=4096)
            version = value.get("version") if isinstance(value, dict) else None
            return version if type(version) is int and 0 < version < 10**10 else 0
        except (RefetchError, MalformedError):
            return 0

    def _get_manifest(self, version: int) -> bytes:
        key = manifest_key(version)
        return retrying(lambda: self.store.get(key, size_max=MANIFEST_BYTES_MAX), limit_s=self.retry_s)

    def fetch(self, ref: ObjectRef, hash_name: str) -> bytes:
        """An object's bytes, which agree with their reference; one that is missing or does not is asked for twice.

        Raises:
            ObjectNotFoundError: it is not there.
            DamagedObjectError: size or digest differ, twice.
            RetryError: the store does not answer.
        """
        for last in (False, True):
            try:
                return self._fetch_once(ref, hash_name)
            except RefetchError:
                if last:
                    raise
                self._distrust(ref.key)
        raise AssertionError("unreachable")

    def _distrust(self, key: str) -> None:
        """Where the store gives copies, have the next answer from further back."""
        distrust = getattr(self.store, "distrust", None)  # by name: isinstance() does not see what a wrapper passes on
        if distrust is not None:
            distrust(key)

    def _fetch_once(self, ref: ObjectRef, hash_name: str) -> bytes:
        data = retrying(lambda: self.store.get(ref.key, size_max=ref.size), limit_s=self.retry_s)
        if len(data) != ref.size:
            raise DamagedObjectError(
                f"object {ref.key} has {len(data)} bytes, its manifest says {ref.size}",
                key=ref.key,
                expected=ref.size,
                actual=len(data),
            )
        actual = hash_bytes(hash_name, [data])
        if actual != ref.digest:
            raise DamagedObjectError(
                f"object {ref.key} has digest {actual}, its manifest says {ref.digest}",
                key=ref.key,
                expected=ref.digest,
                actual=actual,
            )
        return data
