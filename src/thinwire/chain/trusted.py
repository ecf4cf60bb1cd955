"""The manifests a party has come to believe. :class:`TrustedChain` accepts a manifest or raises; it does nothing else.

Fetching, retrying and deciding what a refusal means are the caller's.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from thinwire.errors import UntrustedError
from thinwire.wire.manifest import Manifest
from thinwire.wire.skip import Skip

__all__ = ["TrustedChain"]


class TrustedChain:
    """Accepts manifests in any order; no two of them may contradict each other.

    ``floor`` is the oldest version that may be taken for the newest: one that has been seen once is never gone back on.

    >>> TrustedChain().newest is None
    True
    """

    def __init__(self, *, floor: int = 0) -> None:
        self.floor = floor
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

    def accept(self, data: bytes, *, version: int) -> Manifest:
        """Accept the manifest in ``data``, which was stored as that of ``version``.

        Raises:
            MalformedError, UnsupportedError: not a manifest this release can read.
            UntrustedError: of another version than asked for, different from one accepted before, or not the parent
                that an accepted child names (a fork), or built on another parent than the accepted one.
        """
        manifest = Manifest.parse(data)
        if manifest.version != version:
            raise UntrustedError(
                f"the manifest stored for version {version} is that of version {manifest.version}",
                expected=version,
                actual=manifest.version,
            )
        self._check(manifest)
        self._manifests[version] = manifest
        if manifest.parent is not None:
            self._expected.setdefault(manifest.parent.version, (manifest.parent.manifest, version))
        return manifest

    def accept_newest(self, data: bytes, *, version: int) -> Manifest:
        """Like :meth:`accept`, for what a store offers as its newest version.

        Raises:
            UntrustedError: also for a version older than one that was seen (a rollback).
        """
        if version < self.floor:
            raise UntrustedError(
                f"the store offers version {version} as its newest, but version {self.floor} has been seen: a rollback",
                offered=version,
                seen=self.floor,
            )
        manifest = self.accept(data, version=version)
        self.floor = max(self.floor, version)
        return manifest

    def accept_skip(self, data: bytes, *, base: int, version: int) -> Skip:
        """Accept the record in ``data``, which was stored as that of the skip delta from ``base`` to ``version``.

        The manifests of both versions must have been accepted. Believing a record is no more than trying its patch:
        the digest of what the patch makes decides.

        Raises:
            MalformedError, UnsupportedError: not a record this release can read.
            UntrustedError: of other versions than asked for, or between other states than those of these versions.
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
