"""Following the trust document and the heartbeat of a store, for one party that pinned keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Protocol, final

from thinwire.chain.authority import Authority, date_text
from thinwire.errors import MalformedError, ObjectNotFoundError, RefetchError, RefuseError, UntrustedError
from thinwire.stores.protocol import Distrust, Get, Put
from thinwire.sync.retrying import retrying
from thinwire.sync.trust import Memory, Trust, now_ms
from thinwire.wire.manifest import Manifest
from thinwire.wire.signing import Signer, sign
from thinwire.wire.trust import HEARTBEAT_KEY, TRUST_BYTES_MAX, Heartbeat, trust_key

__all__ = ["Guard", "put_heartbeat"]


class _Beaten(Put, Protocol):
    """What a heartbeat needs."""


def put_heartbeat(store: _Beaten, newest: Manifest, signers: Sequence[Signer], *, retry_s: float) -> Heartbeat:
    """Say that ``newest`` is the newest version now. Raises RetryError."""
    beat = Heartbeat(newest.version, newest.digest, now_ms())
    beat = replace(beat, signatures=sign(beat.signed(), signers))
    retrying(lambda: store.put(HEARTBEAT_KEY, [beat.encode()]), limit_s=retry_s)
    return beat


@final
class Guard:
    """Args: the store, what is trusted, what was seen (or None), how long a request is retried.

    One thread at a time.
    """

    def __init__(self, store: Get, trust: Trust, memory: Memory | None, *, retry_s: float) -> None:
        self.store, self.trust, self.memory, self.retry_s = store, trust, memory, retry_s
        self.authority = Authority(trust.document)
        self._proved_ms = 0  # the newest signed time at which what is held was the newest version

    def refresh(self) -> None:
        """Walk on to the newest trust document in the store; one request if there is none.

        Raises:
            UntrustedError: one is not signed by enough of the root keys before it, is not the one seen before a
                restart, or the store withholds one that was seen.
            RetryError: the store does not answer.
        """
        while self.authority.document.version > 0:
            key = trust_key(self.authority.document.version + 1)
            try:
                data = self._get(key)
            except ObjectNotFoundError:
                break
            try:
                self.authority.advance(data)
            except RefuseError:  # one short or mangled reply is not the store's last word
                self._distrust(key)
                self.authority.advance(self._get(key))
            self._remember()
        self._remember()
        held = self.authority.document.version
        if self.memory is not None and 0 < held < self.memory.trust:
            raise UntrustedError(
                f"trust document {self.memory.trust} has been seen, and the store shows none after {held}: a rollback "
                "of the keys. Do not use this store, or pin the newer document",
                offered=held,
                seen=self.memory.trust,
            )

    def _get(self, key: str) -> bytes:
        return retrying(lambda: self.store.get(key, size_max=TRUST_BYTES_MAX), limit_s=self.retry_s)

    def _distrust(self, key: str) -> None:
        """Where the store gives copies, have the next answer from further back."""
        if isinstance(self.store, Distrust):
            self.store.distrust(key)

    def _remember(self) -> None:
        memory, document = self.memory, self.authority.document
        if memory is None or document.version == 0:
            return
        if document.version == memory.trust and document.digest != memory.trust_digest:
            raise UntrustedError(
                f"trust document {document.version} was seen as {memory.trust_digest}, now it is {document.digest}. Do "
                "not use this store or this document; ask the chain's owner which one is right",
                expected=memory.trust_digest,
                actual=document.digest,
            )
        if document.version > memory.trust:
            memory.trust, memory.trust_digest = document.version, document.digest
            memory.write()

    # --- freshness -------------------------------------------------------------------------------------------------

    def check_fresh(self, newest: Manifest, manifest_of: Callable[[int], Manifest | None]) -> Manifest:
        """``newest``, or the newer version that a heartbeat names; asks for a heartbeat only when it has to.

        A version's own signed time counts as a heartbeat's: when it was made it was the newest. ``manifest_of`` gives
        the manifest of a version, accepted, or None if the store does not show it.

        Raises:
            UntrustedError: nobody has said within ``max_age_s`` that this is the newest version (a freeze), the
                heartbeat names a version that the store does not show, or another manifest, or is of the future.
        """
        if self.trust.max_age_s is None:
            return newest
        age_ms, now = int(1000 * self.trust.max_age_s), now_ms()
        created = newest.facts.get("created_ms", 0)
        if created <= now + age_ms:
            self._proved_ms = max(self._proved_ms, created)
        if now <= self._proved_ms + age_ms:
            return newest
        beat = self._heartbeat(now)
        if beat is not None:
            newest = self._held_against(beat, newest, manifest_of)
            if beat.signed_ms > now + age_ms:
                raise UntrustedError(
                    f"the heartbeat is of {date_text(beat.signed_ms)}, and here it is {date_text(now)}: set the clocks",
                    signed_ms=beat.signed_ms,
                    now_ms=now,
                )
            self._proved_ms = max(self._proved_ms, beat.signed_ms)
        if now > self._proved_ms + age_ms:
            raise UntrustedError(
                f"nobody has signed since {date_text(self._proved_ms)} that version {newest.version} is the newest; at "
                f"most {self.trust.max_age_s:g} s were to pass. Either the store is frozen, or the publisher has "
                "stopped: look there, and let it renew the heartbeat (thinwire trust heartbeat)",
                proved_ms=self._proved_ms,
                now_ms=now,
            )
        return newest

    def _heartbeat(self, now: int) -> Heartbeat | None:
        for last in (False, True):
            with suppress(ObjectNotFoundError):
                try:
                    beat = Heartbeat.parse(self._get(HEARTBEAT_KEY))
                    self.authority.check(
                        beat.signed(), beat.signatures, role="heartbeat", now_ms=now, what="the heartbeat"
                    )
                    return beat
                except (MalformedError, RefetchError, UntrustedError) as error:
                    if last or isinstance(error, ObjectNotFoundError):
                        raise
                    self._distrust(HEARTBEAT_KEY)
        return None

    @staticmethod
    def _held_against(beat: Heartbeat, newest: Manifest, manifest_of: Callable[[int], Manifest | None]) -> Manifest:
        named = newest if beat.version == newest.version else manifest_of(beat.version)
        if named is None:
            raise UntrustedError(
                f"the heartbeat names version {beat.version}, which the store does not show: versions are withheld. "
                "Read from another copy of the store",
                expected=beat.version,
                actual=newest.version,
            )
        if named.digest != beat.manifest:
            raise UntrustedError(
                f"the heartbeat gives version {beat.version} the manifest {beat.manifest}, the store {named.digest}: a "
                "fork. Ask the publisher which one is right",
                expected=beat.manifest,
                actual=named.digest,
            )
        return named if named.version > newest.version else newest
