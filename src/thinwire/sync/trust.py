"""What a party trusts and remembers: pinned keys, and a small file that outlives restarts; making trust documents."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from thinwire.chain.authority import Authority
from thinwire.crypto import SigningKey
from thinwire.errors import (
    ConflictError,
    MalformedError,
    MisuseError,
    ObjectExistsError,
    ObjectNotFoundError,
    RefuseError,
    UntrustedError,
)
from thinwire.stores.protocol import Create, Get
from thinwire.sync.files import write_file
from thinwire.sync.retrying import retrying
from thinwire.wire import canonical
from thinwire.wire.digests import check_digest
from thinwire.wire.signing import Signer, parse_public, sign
from thinwire.wire.trust import TRUST_BYTES_MAX, PublicKey, Role, TrustDocument, trust_key

__all__ = [
    "Keys", "Memory", "Pinned", "Trust", "first_document", "next_document", "now_ms", "pinned_by", "publish_document",
    "read_public", "read_trust", "signers_of",
]  # fmt: skip

_MEMORY_FORMAT = "thinwire.seen.v1"

Keys = Signer | str | os.PathLike[str] | Sequence[Signer | str | os.PathLike[str]]
"""A private key, its file, or several of them."""


def now_ms() -> int:
    """Milliseconds since the epoch, by this machine's clock."""
    return time.time_ns() // 10**6


@dataclass(frozen=True, slots=True)
class Trust:
    """What a consumer insists on.

    ``document`` says whose signatures count; newer versions of it are taken from the store as they come. ``max_age_s``:
    refuse a store in which nobody who may has said for so long that its newest version is the newest (a freeze).
    ``signed_skips``: leave out skip deltas whose records the compactor has not signed; they prove nothing either way.
    """

    document: TrustDocument
    max_age_s: float | None = None
    signed_skips: bool = False

    def __post_init__(self) -> None:
        if self.max_age_s is not None and not self.max_age_s > 0:
            raise MisuseError(f"max_age_s must be positive, not {self.max_age_s}")


Pinned = Trust | TrustDocument | str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""A :class:`Trust`, a document, the path of a trust document, or those of public keys, each of which may sign alone."""


def read_trust(pinned: Pinned, *, max_age_s: float | None = None, signed_skips: bool = False) -> Trust:
    """What ``pinned`` says is to be trusted.

    Raises:
        MisuseError: a file cannot be read, or is neither a trust document nor a public key; a document among several.
        RefuseError: a trust document is malformed, or not signed by its own root keys.
    """
    if isinstance(pinned, Trust):
        return pinned
    if isinstance(pinned, TrustDocument):
        return Trust(pinned, max_age_s, signed_skips)
    paths = [pinned] if isinstance(pinned, str | os.PathLike) else list(pinned)
    texts = [_read(Path(path)) for path in paths]
    if len(texts) == 1 and texts[0].lstrip().startswith(b"{"):
        document = TrustDocument.parse(texts[0].strip())
        Authority(document).check(
            document.signed(), document.signatures, role="root", now_ms=0, what=f"the trust document {paths[0]}"
        )
        return Trust(document, max_age_s, signed_skips)
    return Trust(TrustDocument.of_keys([read_public(path) for path in paths]), max_age_s, signed_skips)


def read_public(path: str | os.PathLike[str]) -> bytes:
    """The public key in a file, as ``thinwire keygen`` writes it. Raises MisuseError."""
    try:
        return parse_public(_read(Path(path)).decode("ascii", "replace"))
    except MisuseError as error:
        raise MisuseError(f"{path}: {error}", path=str(path)) from error


def _read(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(TRUST_BYTES_MAX + 1)
    except OSError as error:
        raise MisuseError(f"cannot read {path}: {error.strerror}", path=str(path)) from error


def signers_of(keys: Keys | None) -> tuple[Signer, ...]:
    """The signers that ``keys`` names. Raises MisuseError."""
    if keys is None:
        return ()
    several = [keys] if isinstance(keys, str | os.PathLike) or not isinstance(keys, Sequence) else list(keys)
    return tuple(SigningKey.load(Path(key)) if isinstance(key, str | os.PathLike) else key for key in several)


def pinned_by(trust: Pinned | None, signers: Sequence[Signer]) -> Trust | None:
    """What a publisher trusts: what it was told, else its own keys; None without any."""
    if trust is not None:
        return read_trust(trust)
    return Trust(TrustDocument.of_keys([signer.public for signer in signers])) if signers else None


# --- what was seen -------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Memory:
    """What a consumer has seen, in a file of its own: the newest version and its manifest's digest, the newest trust
    document and its digest. Nothing older is accepted after a restart, and nothing else under the same numbers.

    The file is replaced in one step, and is on the disk before what it says is used. One consumer a file.
    """

    path: Path
    version: int = 0
    manifest: str | None = None
    trust: int = 0
    trust_digest: str | None = None
    _written: tuple[object, ...] = field(default=(), repr=False)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Memory:
        """The memory in a file; an empty one if there is no file.

        Raises:
            MisuseError: the file cannot be read, or its folder is not there.
            MalformedError: it is damaged. Remove it only if the store is to be met as by a newcomer.
        """
        path = Path(path)
        memory = cls(path)
        if not path.exists():
            return memory
        try:
            value = canonical.parse(_read(path), bytes_max=TRUST_BYTES_MAX)
            if not isinstance(value, dict) or value.get("format") != _MEMORY_FORMAT:
                raise MalformedError(f"it is not of the format {_MEMORY_FORMAT!r}")
            for name in ("version", "trust"):
                if type(value.get(name)) is not int or value[name] < 0:
                    raise MalformedError(f"its {name} is not a number")
            memory.version, memory.trust = value["version"], value["trust"]
            memory.manifest = check_digest(value.get("manifest")) if memory.version else None
            memory.trust_digest = check_digest(value.get("trust_digest")) if memory.trust else None
        except MalformedError as error:
            raise MalformedError(
                f"{path}, which remembers what was seen of a store, is damaged: {error}. Remove it only if this "
                "consumer may believe the store like a newcomer",
                path=str(path),
            ) from error
        memory._written = memory._content()
        return memory

    def note(self, version: int, manifest: str) -> None:
        """Remember that this version, with a manifest of this digest, has been seen as the newest."""
        if version > self.version:
            self.version, self.manifest = version, manifest
            self.write()

    def _content(self) -> tuple[object, ...]:
        return self.version, self.manifest, self.trust, self.trust_digest

    def write(self) -> None:
        """Replace the file, if anything is new."""
        if self._content() == self._written:
            return
        value: dict[str, Any] = {
            "format": _MEMORY_FORMAT,
            "manifest": self.manifest,
            "trust": self.trust,
            "trust_digest": self.trust_digest,
            "version": self.version,
        }
        write_file(self.path, [canonical.dump(value)])
        self._written = self._content()


# --- making trust documents ----------------------------------------------------------------------------------------


def _roles(
    root: Sequence[PublicKey],
    publisher: Sequence[PublicKey],
    threshold: int,
    root_threshold: int,
    others: Mapping[str, Sequence[PublicKey]],
) -> tuple[dict[str, PublicKey], dict[str, Role]]:
    keys: dict[str, PublicKey] = {}
    roles: dict[str, Role] = {}
    needed = {"root": root_threshold, "publisher": threshold}
    for name, several in {"root": root, "publisher": publisher, **others}.items():
        if not several:
            continue
        for key in several:
            if keys.setdefault(key.id, key) != key:
                raise MisuseError(f"key {key.id[:12]} is given twice, with different ends", keyid=key.id)
        roles[name] = Role(tuple(sorted({key.id for key in several})), needed.get(name, 1))
    for name, role in roles.items():
        if not 1 <= role.threshold <= len(role.keys):
            raise MisuseError(f"a threshold of {role.threshold} for {name} needs as many keys; it has {len(role.keys)}")
    if not {"root", "publisher"} <= set(roles):
        raise MisuseError("a trust document needs at least one root key and one publisher key")
    return keys, roles


def first_document(
    *,
    root: Sequence[PublicKey],
    publisher: Sequence[PublicKey],
    signers: Sequence[Signer],
    threshold: int = 1,
    root_threshold: int = 1,
    others: Mapping[str, Sequence[PublicKey]] | None = None,
    chain: str | None = None,
    expires_ms: int | None = None,
) -> TrustDocument:
    """The first version of a trust document, signed by ``signers``, who must be enough of its root keys.

    ``others`` are keys for the roles ``compactor`` and ``heartbeat``, one of which is enough.

    Raises:
        MisuseError: no keys, a threshold that cannot be met, or too few signers.

    >>> key = SigningKey.generate()
    >>> mine = [PublicKey(key.public)]
    >>> first_document(root=mine, publisher=mine, signers=[key], chain="run-7").version
    1
    """
    keys, roles = _roles(root, publisher, threshold, root_threshold, others or {})
    made = TrustDocument(1, keys, roles, chain, expires_ms)
    made = replace(made, signatures=sign(made.signed(), signers))
    try:
        Authority(made).check(made.signed(), made.signatures, role="root", now_ms=0, what="the new trust document")
    except UntrustedError as error:
        raise MisuseError(f"{error}; give the private keys of enough root keys") from error
    return TrustDocument.parse(made.encode())


def next_document(
    held: TrustDocument,
    *,
    root: Sequence[PublicKey],
    publisher: Sequence[PublicKey],
    signers: Sequence[Signer],
    threshold: int = 1,
    root_threshold: int = 1,
    others: Mapping[str, Sequence[PublicKey]] | None = None,
    expires_ms: int | None = None,
) -> TrustDocument:
    """The version after ``held``, with these keys and no others; ``signers`` must be enough of the old root keys and of
    the new ones. Keys that are left out are revoked.

    Raises:
        MisuseError: as :func:`first_document`.
    """
    keys, roles = _roles(root, publisher, threshold, root_threshold, others or {})
    made = TrustDocument(held.version + 1, keys, roles, held.chain, expires_ms, held.extra)
    made = replace(made, signatures=sign(made.signed(), signers))
    try:
        return Authority(held).advance(made.encode())
    except UntrustedError as error:
        raise MisuseError(f"{error}; give the private keys of enough root keys, old and new") from error


class _DocumentStore(Get, Create, Protocol):
    """What publishing a trust document needs."""


def publish_document(store: _DocumentStore, document: TrustDocument, *, retry_s: float = 30.0) -> None:
    """Put a trust document beside the chain, where consumers find it: created, never replaced.

    Raises:
        ConflictError: another document of that version is there.
        MisuseError: the one before is not there, or this is not its successor.
        RetryError: the store does not answer; call it again.
    """
    data, key = document.encode(), trust_key(document.version)
    if document.version > 1:
        try:
            before = retrying(
                lambda: store.get(trust_key(document.version - 1), size_max=TRUST_BYTES_MAX), limit_s=retry_s
            )
            Authority(TrustDocument.parse(before)).advance(data)
        except (ObjectNotFoundError, RefuseError) as error:
            raise MisuseError(f"trust document {document.version} does not follow what is there: {error}") from error

    def attempt() -> bool:
        with suppress(ObjectExistsError):
            store.create(key, [data])
        return store.get(key, size_max=TRUST_BYTES_MAX) == data

    if not retrying(attempt, limit_s=retry_s):
        raise ConflictError(
            f"another trust document of version {document.version} is there already; look at it, then make version "
            f"{document.version + 1}",
            version=document.version,
        )
