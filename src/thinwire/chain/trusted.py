"""The manifests a party has come to believe. :class:`TrustedChain` accepts a manifest or raises; it does nothing else.

Fetching, retrying and deciding what a refusal means are the caller's. With an authority
(:class:`thinwire.chain.authority.Authority`) a manifest is believed if enough keys that hold now have signed it, or if
one that is believed names it as its parent: so history outlives the keys that signed it. What is offered as the newest
version has no child, and must be signed.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from types import MappingProxyType

from thinwire.chain.authority import Authority
from thinwire.errors import UntrustedError
from thinwire.wire.manifest import Manifest
from thinwire.wire.skip import Skip

__all__ = ["TrustedChain"]


class TrustedChain:
    """Accepts manifests in any order; no two of them may contradict each other.

    ``floor`` is the oldest version that may be taken for the newest: one that has been seen once is never gone back on.
    ``seen`` is the digest of that version's manifest, if it is remembered. ``vouched`` are digests of manifests that
    the caller answers for, signed or not. ``now_ms`` is the caller's clock, in milliseconds since the epoch; keys that
    have ended by then count no more.

    >>> TrustedChain().newest is None
    True
    """

    def __init__(
        self,
        *,
        floor: int = 0,
        seen: str | None = None,
        authority: Authority | None = None,
        vouched: Set[str] = frozenset(),
    ) -> None:
        self.floor, self.authority, self.vouched = floor, authority, vouched
        self._seen = {floor: seen} if seen is not None else {}
        self._manifests: dict[int, Manifest] = {}
        self._expected: dict[int, tuple[str, int]] = {}  # version -> (manifest digest, the child that says so)

    @property
    def manifests(self) -> Mapping[int, Manifest]:
        """All accepted manifests by version."""
        return MappingProxyType(self._manifests)

    @property
    def newest(self) -> Manifest | None:
        """The accepted manifest with the highest version."""
        return self._manifests[max(self._manifests)] if self._manifests else None

    def accept(self, data: bytes, *, version: int, now_ms: int = 0) -> Manifest:
        """Accept the manifest in ``data``, which was stored as that of ``version``.

        Raises:
            MalformedError, UnsupportedError: not a manifest this release can read.
            UntrustedError: of another version than asked for, different from one accepted before, or not the parent
                that an accepted child names (a fork), built on another parent than the accepted one, or neither signed
                as the authority wants it nor the parent of an accepted one.
        """
        manifest = Manifest.parse(data)
        if manifest.version != version:
            raise UntrustedError(
                f"the manifest stored for version {version} is that of version {manifest.version}",
                expected=version,
                actual=manifest.version,
            )
        self._check(manifest)
        if version not in self._expected:
            self._check_signed(manifest, now_ms)
        self._manifests[version] = manifest
        if manifest.parent is not None:
            self._expected.setdefault(manifest.parent.version, (manifest.parent.manifest, version))
        return manifest

    def accept_newest(self, data: bytes, *, version: int, now_ms: int = 0) -> Manifest:
        """Like :meth:`accept`, for what a store offers as its newest version.

        Raises:
            UntrustedError: also for a version older than one that was seen (a rollback), and for one that is not signed
                by keys that hold now, whoever names it as a parent.
        """
        if version < self.floor:
            raise UntrustedError(
                f"the store offers version {version} as its newest, but version {self.floor} has been seen: a rollback",
                offered=version,
                seen=self.floor,
            )
        manifest = self.accept(data, version=version, now_ms=now_ms)
        if version in self._expected:
            self._check_signed(manifest, now_ms)
        self.floor = max(self.floor, version)
        return manifest

    def _check_signed(self, manifest: Manifest, now_ms: int) -> None:
        if self.authority is not None and manifest.digest not in self.vouched:
            self.authority.check(
                manifest.signed(), manifest.signatures, role="publisher", now_ms=now_ms,
                what=f"the manifest of version {manifest.version} ({manifest.digest})",
            )  # fmt: skip

    def accept_skip(
        self, data: bytes, *, base: int, version: int, now_ms: int = 0, must_be_signed: bool = False
    ) -> Skip:
        """Accept the record in ``data``, which was stored as that of the skip delta from ``base`` to ``version``.

        The manifests of both versions must have been accepted. Believing a record is no more than trying its patch:
        the digest of what the patch makes decides. So it need not be signed, unless ``must_be_signed`` says so.

        Raises:
            MalformedError, UnsupportedError: not a record this release can read.
            UntrustedError: of other versions than asked for, between other states than those of these versions, or
                not signed and it must be.
        """
        skip = Skip.parse(data)
        if (skip.base, skip.version) != (base, version):
            raise UntrustedError(
                f"the record stored for a skip from {base} to {version} is that of {skip.base} to {skip.version}",
                expected=(base, version),
                actual=(skip.base, skip.version),
            )
        for number, state in ((base, skip.base_state), (version, skip.state)):
            manifest = self._manifests[number]
            if (manifest.state, manifest.hash) != (state, skip.hash):
                raise UntrustedError(
                    f"a skip delta's record gives version {number} the state {state} ({skip.hash}), "
                    f"its manifest says {manifest.state} ({manifest.hash})",
                    expected=manifest.state,
                    actual=state,
                )
        if must_be_signed and self.authority is not None:
            self.authority.check(
                skip.signed(), skip.signatures, role="compactor", now_ms=now_ms,
                what=f"the record of the skip delta from {base} to {version}",
            )  # fmt: skip
        return skip

    def _check(self, manifest: Manifest) -> None:
        version, digest = manifest.version, manifest.digest
        known = self._manifests.get(version)
        if known is not None and known.digest != digest:
            raise UntrustedError(
                f"version {version} has two manifests: {known.digest} was accepted, now there is {digest}",
                expected=known.digest,
                actual=digest,
            )
        if self._seen.get(version, digest) != digest:
            raise UntrustedError(
                f"version {version} was seen with manifest {self._seen[version]}, now the store has {digest}: a fork. "
                "Do not use this store; ask its publisher which one is right",
                expected=self._seen[version],
                actual=digest,
            )
        if version in self._expected and self._expected[version][0] != digest:
            wanted, child = self._expected[version]
            raise UntrustedError(
                f"version {child} was built on manifest {wanted} of version {version}, not on {digest}: a fork",
                expected=wanted,
                actual=digest,
            )
        if manifest.parent is not None:
            before = self._manifests.get(manifest.parent.version)
            wanted = self._expected.get(manifest.parent.version, (manifest.parent.manifest, 0))[0]
            actual = before.digest if before else wanted
            if actual != manifest.parent.manifest:
                raise UntrustedError(
                    f"version {version} names manifest {manifest.parent.manifest} as its parent, "
                    f"but version {manifest.parent.version} is {actual}: a fork",
                    expected=actual,
                    actual=manifest.parent.manifest,
                )
        for delta in manifest.deltas:
            base = self._manifests.get(delta.base)
            if base is not None and base.state != delta.base_state:
                raise UntrustedError(
                    f"the delta {delta.base} -> {version} starts from state {delta.base_state}, "
                    f"but version {delta.base} is {base.state}",
                    expected=base.state,
                    actual=delta.base_state,
                )
