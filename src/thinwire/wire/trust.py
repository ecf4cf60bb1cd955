"""Small signed files beside a chain: who may sign (the *trust document*), and that it is not stale (the *heartbeat*).

Both are canonical JSON, ``{"digest", "signatures", "signed"}`` like a manifest; their digests are SHA-256. The model is
The Update Framework (https://theupdateframework.io): its root and timestamp roles, kept small.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from thinwire.errors import MalformedError, MisuseError, UnsupportedError
from thinwire.wire import canonical
from thinwire.wire.digests import check_digest
from thinwire.wire.manifest import VERSION_MAX
from thinwire.wire.signing import PUBLIC_BYTES, key_id, unhex

__all__ = [
    "HEARTBEAT_KEY", "ROLES", "TRUST_BYTES_MAX", "TRUST_PREFIX", "Heartbeat", "PublicKey", "Role", "TrustDocument",
    "trust_key", "trust_version_of_key",
]  # fmt: skip

FORMAT_TRUST = "thinwire.trust.v1"
FORMAT_HEARTBEAT = "thinwire.heartbeat.v1"
TRUST_PREFIX = "trust/"
HEARTBEAT_KEY = "heartbeat.json"
TRUST_BYTES_MAX = 64 << 10
KEYS_MAX = 64
TIME_MAX = 1 << 53
ROLES = ("root", "publisher", "compactor", "heartbeat")
"""Who signs trust documents; manifests; records of skip deltas; heartbeats. The last two default to the publisher."""


def trust_key(version: int) -> str:
    """Key of a version of the trust document.

    >>> trust_key(2)
    'trust/0000000002.json'
    """
    return f"{TRUST_PREFIX}{version:010d}.json"


def trust_version_of_key(key: str) -> int | None:
    """The version of the trust document that has this key, or None."""
    name = key.removeprefix(TRUST_PREFIX).removesuffix(".json")
    if len(name) == 10 and name.isascii() and name.isdigit() and key == trust_key(int(name)):
        return int(name)
    return None


def _int(value: Any, what: str, minimum: int, maximum: int) -> int:
    if type(value) is not int or not minimum <= value <= maximum:
        raise MalformedError(f"{what} must be an integer from {minimum} to {maximum}, not {str(value)[:40]}")
    return value


def _time(value: Any, what: str) -> int | None:
    return None if value is None else _int(value, what, 0, TIME_MAX)


def _digest(signed: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical.dump(dict(signed))).hexdigest()


def _open(data: bytes, known: str, what: str) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """``signed`` and ``signatures`` of an envelope whose digest fits."""
    envelope = canonical.parse(data, bytes_max=TRUST_BYTES_MAX)
    if not isinstance(envelope, dict) or set(envelope) != {"digest", "signatures", "signed"}:
        raise MalformedError(f"a {what} is an object of 'digest', 'signatures' and 'signed'")
    value, signatures = envelope["signed"], envelope["signatures"]
    if not isinstance(value, dict) or not isinstance(signatures, list):
        raise MalformedError(f"the 'signed' or 'signatures' of a {what} has the wrong type")
    if value.get("format") != known:
        raise UnsupportedError(
            f"{what} of format {str(value.get('format'))[:40]!r}, known is {known!r}; upgrade thinwire"
        )
    if envelope["digest"] != _digest(value):
        raise MalformedError(f"a {what} has another digest than it says; fetch it again")
    return value, tuple(signatures)


@dataclass(frozen=True, slots=True)
class PublicKey:
    """An Ed25519 key, 32 bytes, and when it ends (milliseconds since the epoch; None: never)."""

    public: bytes
    expires_ms: int | None = None

    @property
    def id(self) -> str:
        """Its name."""
        return key_id(self.public)


@dataclass(frozen=True, slots=True)
class Role:
    """Who may act in a role, by key id, and how many of them it takes."""

    keys: tuple[str, ...]
    threshold: int = 1


@dataclass(frozen=True, slots=True)
class TrustDocument:
    """Which keys sign what, from some moment on. Each version is signed by the root keys of the one before and its own.

    ``chain``, if given, is the name that manifests must carry, so that one run of a publisher is not passed off as
    another. ``expires_ms``: after it nothing is believed until a newer document is there. Version 0 is one that was
    made of bare keys (:meth:`of_keys`): it is never stored and has no successor.
    """

    version: int
    keys: Mapping[str, PublicKey]
    roles: Mapping[str, Role]
    chain: str | None = None
    expires_ms: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    signatures: tuple[Any, ...] = ()

    @classmethod
    def of_keys(cls, publics: Sequence[bytes], threshold: int = 1) -> TrustDocument:
        """Trust in bare public keys, of which ``threshold`` must sign; no rotation.

        Raises:
            MisuseError: no key, a key of another size, or a threshold that cannot be met.
        """
        if any(len(public) != PUBLIC_BYTES for public in publics):
            raise MisuseError(f"a public key has {PUBLIC_BYTES} bytes")
        keys = {key.id: key for key in map(PublicKey, publics)}
        if not 1 <= threshold <= len(keys):
            raise MisuseError(f"a threshold of {threshold} needs as many keys; there are {len(keys)} different ones")
        role = Role(tuple(sorted(keys)), threshold)
        return cls(0, keys, {"root": role, "publisher": role})

    def role(self, name: str) -> Role:
        """Who may act as ``name``; the publisher's keys where the document does not say."""
        return self.roles.get(name) or self.roles["publisher"]

    def signed(self) -> dict[str, Any]:
        """The part that digest and signatures cover, as JSON values."""
        return {
            **self.extra,
            "chain": self.chain,
            "expires_ms": self.expires_ms,
            "format": FORMAT_TRUST,
            "keys": {
                name: {"expires_ms": key.expires_ms, "public": key.public.hex(), "type": "ed25519"}
                for name, key in self.keys.items()
            },
            "roles": {name: {"keys": sorted(r.keys), "threshold": r.threshold} for name, r in self.roles.items()},
            "version": self.version,
        }

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical bytes of what is signed, in hexadecimal."""
        return _digest(self.signed())

    def encode(self) -> bytes:
        """The file's bytes."""
        return canonical.dump({"digest": self.digest, "signatures": list(self.signatures), "signed": self.signed()})

    @classmethod
    def parse(cls, data: bytes) -> TrustDocument:
        """Read a trust document; whether its signatures are good is not looked at.

        Raises:
            MalformedError: not canonical, a field is missing or of the wrong type, a key under another id than its
                own, a role with a key that is not there or a threshold that cannot be met.
            UnsupportedError: another format version, or a key of an unknown type.
        """
        value, signatures = _open(data, FORMAT_TRUST, "trust document")
        rows, roles, chain = value.get("keys"), value.get("roles"), value.get("chain")
        if not isinstance(rows, dict) or not isinstance(roles, dict) or not 1 <= len(rows) <= KEYS_MAX:
            raise MalformedError(f"a trust document needs roles and from 1 to {KEYS_MAX} keys")
        if chain is not None and (not isinstance(chain, str) or not 1 <= len(chain) <= 256):
            raise MalformedError("a chain's name in a trust document must be null or a text of 1 to 256 characters")
        keys = {name: _key(name, row) for name, row in rows.items()}
        known = {"chain", "expires_ms", "format", "keys", "roles", "version"}
        document = cls(
            version=_int(value.get("version"), "a trust document's version", 1, VERSION_MAX),
            keys=keys,
            roles={name: _role(name, row, keys) for name, row in roles.items()},
            chain=chain,
            expires_ms=_time(value.get("expires_ms"), "a trust document's end"),
            extra={k: v for k, v in value.items() if k not in known},
            signatures=signatures,
        )
        if not {"root", "publisher"} <= set(document.roles):
            raise MalformedError("a trust document must say who is root and who publisher")
        if document.signed() != value:
            raise MalformedError("the keys or roles of a trust document have unknown fields, or another order")
        return document


def _key(name: str, row: Any) -> PublicKey:
    if not isinstance(row, dict) or row.get("type") != "ed25519":
        raise UnsupportedError(f"key {name[:12]} of a trust document is not of type 'ed25519'; upgrade thinwire")
    key = PublicKey(unhex(row.get("public"), PUBLIC_BYTES, "a public key"), _time(row.get("expires_ms"), "a key's end"))
    if key.id != name:
        raise MalformedError(f"a trust document has key {key.id[:12]} under the id {name[:12]}")
    return key


def _role(name: str, row: Any, keys: Mapping[str, PublicKey]) -> Role:
    names = row.get("keys") if isinstance(row, dict) else None
    if not isinstance(names, list) or not names or not all(isinstance(k, str) and k in keys for k in names):
        raise MalformedError(f"role {name[:40]!r} of a trust document names no keys, or one that is not there")
    if len(set(names)) != len(names):
        raise MalformedError(f"role {name[:40]!r} of a trust document names a key twice")
    return Role(tuple(names), _int(row.get("threshold"), f"the threshold of role {name[:40]!r}", 1, len(names)))


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A signed word that at ``signed_ms`` (since the epoch) the newest version was ``version``, with that manifest.

    It is replaced again and again; one that is older than a consumer's patience means that somebody holds versions
    back, or that nobody signs any more.

    >>> beat = Heartbeat(3, "ab" * 32, 1_800_000_000_000)
    >>> Heartbeat.parse(beat.encode()) == beat
    True
    """

    version: int
    manifest: str
    signed_ms: int
    extra: Mapping[str, Any] = field(default_factory=dict)
    signatures: tuple[Any, ...] = ()

    def signed(self) -> dict[str, Any]:
        """The part that digest and signatures cover, as JSON values."""
        return {
            **self.extra,
            "format": FORMAT_HEARTBEAT,
            "manifest": self.manifest,
            "signed_ms": self.signed_ms,
            "version": self.version,
        }

    def encode(self) -> bytes:
        """The file's bytes."""
        signed = self.signed()
        return canonical.dump({"digest": _digest(signed), "signatures": list(self.signatures), "signed": signed})

    @classmethod
    def parse(cls, data: bytes) -> Heartbeat:
        """Read a heartbeat, without looking at its signatures. Raises MalformedError, UnsupportedError."""
        value, signatures = _open(data, FORMAT_HEARTBEAT, "heartbeat")
        known = {"format", "manifest", "signed_ms", "version"}
        return cls(
            version=_int(value.get("version"), "a heartbeat's version", 1, VERSION_MAX),
            manifest=check_digest(value.get("manifest")),
            signed_ms=_int(value.get("signed_ms"), "a heartbeat's time", 0, TIME_MAX),
            extra={k: v for k, v in value.items() if k not in known},
            signatures=signatures,
        )
