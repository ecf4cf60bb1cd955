"""A version between being made and being committed, and what goes for its head and its signatures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from thinwire.errors import UntrustedError
from thinwire.sync.remote import Remote
from thinwire.sync.trust import now_ms
from thinwire.wire.manifest import Manifest, ObjectRef
from thinwire.wire.signing import Signer, sign

__all__ = ["Pending", "PublishReport", "head_of", "signed"]


@dataclass(frozen=True, slots=True)
class PublishReport:
    """One published version.

    ``kind`` is ``delta``, ``anchor`` or ``delta+anchor``; sizes are in bytes, ``full_bytes`` being that of the state;
    ``density`` is the share of changed elements. ``seconds`` by stage: ``base`` (first publish only), ``encode`` (diff,
    encode, hash in one pass), ``upload``, ``commit``, ``total``. ``level`` is the patch's; empty if there is none.
    """

    version: int
    step: int | None
    digest: str
    kind: str
    patch_bytes: int
    anchor_bytes: int
    total_bytes: int
    full_bytes: int
    changed: int
    elements: int
    density: float
    seconds: Mapping[str, float]
    level: str = ""


@dataclass(slots=True)
class Pending:
    """A version that is made but not committed: what to upload, then the manifest."""

    manifest: Manifest
    uploads: list[tuple[ObjectRef, list[bytes | memoryview]]]
    report: PublishReport
    began: float

    def delta(self) -> list[bytes | memoryview]:
        """The patch, if it is not uploaded yet."""
        keys = {delta.object.key for delta in self.manifest.deltas}
        return next((buffers for ref, buffers in self.uploads if ref.key in keys), [])


def head_of(remote: Remote) -> Manifest | None:
    """The version to go on from, or None if there is none.

    Raises:
        UntrustedError: the keys that are trusted have not signed it, and nobody has vouched for it.
    """
    try:
        return remote.newest()
    except UntrustedError as error:
        raise UntrustedError(
            f"{error}. If you know this version to be right, go on from it with adopt=DIGEST (the digest of its "
            "manifest, as above)",
            **error.facts,
        ) from error


def signed(manifest: Manifest, remote: Remote, signers: Sequence[Signer]) -> Manifest:
    """The manifest with its publisher's signatures, and under the chain's name if the trust document has one.

    Raises:
        UntrustedError: who trusts as this publisher does would not accept it: too few keys, or other ones.
    """
    if remote.guard is None:
        return manifest
    authority = remote.guard.authority
    if authority.document.chain is not None:
        manifest = replace(manifest, extra={"chain": authority.document.chain})
    manifest = replace(manifest, signatures=sign(manifest.signed(), signers))
    authority.check(
        manifest.signed(), manifest.signatures, role="publisher", now_ms=now_ms(), what="what this publisher makes"
    )
    return manifest
