"""A manifest: the commit of one version. It names its parent, its state's digest and every object with size and digest.

The file is canonical JSON, ``{"digest": ..., "signatures": [...], "signed": {...}}``; the digest of a manifest is the
hash of the canonical bytes of ``signed``. It stands in the file so that a mangled reply is told from a forged one.
Fields this version does not know are kept as they are, so that a tool that copies a
manifest never drops what a newer publisher wrote.

A sharded trainer publishes its state *in parts*, one of each rank. The manifests are of format version 2: ``tree`` is
then the map of all chunks (:mod:`thinwire.wire.chunks`), and each :class:`Part` has its own tree, delta and anchor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from thinwire.errors import MalformedError, UnsupportedError
from thinwire.wire import canonical
from thinwire.wire.digests import check_digest, hasher
from thinwire.wire.spec import MANIFEST_BYTES_MAX

__all__ = [
    "DeltaRef", "Manifest", "ObjectRef", "Parent", "Part", "manifest_key", "state_of_parts", "version_of_key",
]  # fmt: skip

FORMAT_MANIFEST = "thinwire.manifest.v1"
FORMAT_IN_PARTS = "thinwire.manifest.v2"
PARTS_MAX = 1 << 16
VERSION_MAX = 10**10 - 1
SHARDS_MAX = 100_000
PREFIX = "manifests/"


def manifest_key(version: int) -> str:
    """Key of a version's manifest; keys sort like versions.

    >>> manifest_key(12)
    'manifests/0000000012.json'
    """
    return f"{PREFIX}{version:010d}.json"


def version_of_key(key: str) -> int | None:
    """The version whose manifest has this key, or None."""
    name = key.removeprefix(PREFIX).removesuffix(".json")
    if len(name) == 10 and name.isascii() and name.isdigit() and key == manifest_key(int(name)):
        return int(name)
    return None


def _int(value: Any, what: str, minimum: int = 0, maximum: int = 1 << 62) -> int:
    if type(value) is not int or not minimum <= value <= maximum:
        raise MalformedError(f"{what} must be an integer from {minimum} to {maximum}, not {str(value)[:40]}")
    return value


@dataclass(frozen=True, slots=True)
class ObjectRef:
    """An immutable object: key, size in bytes, digest of its bytes."""

    key: str
    size: int
    digest: str

    def to_json(self) -> dict[str, Any]:
        return {"digest": self.digest, "key": self.key, "size": self.size}

    @classmethod
    def from_json(cls, value: Any) -> ObjectRef:
        if not isinstance(value, dict) or not isinstance(value.get("key"), str) or len(value["key"]) > 512:
            raise MalformedError(f"not an object's reference: {str(value)[:80]}")
        return cls(value["key"], _int(value.get("size"), "an object's size"), check_digest(value.get("digest")))


@dataclass(frozen=True, slots=True)
class DeltaRef:
    """A patch that leads to this version from version ``base``, whose state has digest ``base_state``."""

    base: int
    base_state: str
    object: ObjectRef

    def to_json(self) -> dict[str, Any]:
        return {"base": self.base, "base_state": self.base_state, "object": self.object.to_json()}


@dataclass(frozen=True, slots=True)
class Part:
    """One rank's part of a version: the digest of its own tree, the tree, and what leads there."""

    state: str
    tree: ObjectRef
    deltas: tuple[DeltaRef, ...]
    anchor: tuple[ObjectRef, ...]

    def objects(self) -> tuple[ObjectRef, ...]:
        """Every object that this part names."""
        return (self.tree, *(d.object for d in self.deltas), *self.anchor)

    def to_json(self) -> dict[str, Any]:
        return {
            "anchor": [ref.to_json() for ref in self.anchor],
            "deltas": [delta.to_json() for delta in self.deltas],
            "state": self.state,
            "tree": self.tree.to_json(),
        }

    @classmethod
    def from_json(cls, value: Any, version: int) -> Part:
        """A part of ``version``. Raises MalformedError."""
        if not isinstance(value, dict) or set(value) != {"anchor", "deltas", "state", "tree"}:
            raise MalformedError("a part of a version is an object of 'anchor', 'deltas', 'state' and 'tree'")
        deltas, anchor = _lists(value)
        return cls(check_digest(value["state"]), ObjectRef.from_json(value["tree"]), _deltas(deltas, version), anchor)


def state_of_parts(hash_name: str, chunks: str, states: Iterable[str]) -> str:
    """The state digest of a version in parts, from that of its map of chunks and those of its parts, in order."""
    value = {"chunks": chunks, "format": FORMAT_IN_PARTS, "parts": list(states)}
    return hasher(hash_name)(canonical.dump(value)).digest().hex()


@dataclass(frozen=True, slots=True)
class Parent:
    """The version before: its number and its manifest's digest."""

    version: int
    manifest: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """One version. ``anchor`` holds the shards of a full checkpoint, if this version has one.

    ``anchor_version`` is the newest version at or before this one that has an anchor. ``facts`` are integers for
    people and planners (state_bytes, elements, changed, created_ms); ``metadata`` is the user's.

    With ``parts``, ``tree`` is the map of chunks, ``deltas`` and ``anchor`` are empty, all parts have an anchor or none
    has, and ``state`` is :func:`state_of_parts`.
    """

    version: int
    state: str
    hash: str
    parent: Parent | None
    tree: ObjectRef
    deltas: tuple[DeltaRef, ...]
    anchor: tuple[ObjectRef, ...]
    anchor_version: int
    step: int | None = None
    facts: Mapping[str, int] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    signatures: tuple[Any, ...] = ()
    parts: tuple[Part, ...] = ()

    def signed(self) -> dict[str, Any]:
        """What digests and signatures cover, as JSON values."""
        if self.parts:
            body: dict[str, Any] = {"format": FORMAT_IN_PARTS, "parts": [part.to_json() for part in self.parts]}
        else:
            deltas, anchor = [delta.to_json() for delta in self.deltas], [ref.to_json() for ref in self.anchor]
            body = {"anchor": anchor, "deltas": deltas, "format": FORMAT_MANIFEST}
        parent = self.parent and {"manifest": self.parent.manifest, "version": self.parent.version}
        return {
            **self.extra,
            **body,
            "anchor_version": self.anchor_version,
            "facts": dict(self.facts),
            "hash": self.hash,
            "metadata": dict(self.metadata),
            "parent": parent,
            "state": self.state,
            "step": self.step,
            "tree": self.tree.to_json(),
            "version": self.version,
        }

    @property
    def digest(self) -> str:
        """Digest of the manifest, in hexadecimal."""
        return hasher(self.hash)(canonical.dump(self.signed())).digest().hex()

    @property
    def anchor_bytes(self) -> int:
        """Size of the full checkpoint, 0 if there is none."""
        return sum(ref.size for ref in self.every_anchor())

    @property
    def kind(self) -> str:
        """``delta``, ``anchor`` or ``delta+anchor``."""
        first = self.parts[0] if self.parts else self
        return "+".join(name for name, there in (("delta", first.deltas), ("anchor", first.anchor)) if there)

    def every_anchor(self) -> tuple[ObjectRef, ...]:
        """The files of the full checkpoint, of all parts."""
        return (*self.anchor, *(ref for part in self.parts for ref in part.anchor))

    def every_delta(self) -> tuple[DeltaRef, ...]:
        """The deltas, of all parts."""
        return (*self.deltas, *(delta for part in self.parts for delta in part.deltas))

    def objects(self) -> tuple[ObjectRef, ...]:
        """Every object this manifest names."""
        own = (self.tree, *(d.object for d in self.deltas), *self.anchor)
        return (*own, *(ref for part in self.parts for ref in part.objects()))

    def encode(self) -> bytes:
        """The file's bytes."""
        return canonical.dump({"digest": self.digest, "signatures": list(self.signatures), "signed": self.signed()})

    @classmethod
    def parse(cls, data: bytes) -> Manifest:
        """Read a manifest.

        Raises:
            MalformedError: not canonical, or a field is missing or of the wrong type.
            UnsupportedError: another format version or an unknown hash.
        """
        envelope = canonical.parse(data, bytes_max=MANIFEST_BYTES_MAX)
        if not isinstance(envelope, dict) or set(envelope) != {"digest", "signatures", "signed"}:
            raise MalformedError("a manifest is an object of 'digest', 'signatures' and 'signed'")
        value, signatures = envelope["signed"], envelope["signatures"]
        if not isinstance(value, dict) or not isinstance(signatures, list):
            raise MalformedError("a manifest's 'signed' or 'signatures' has the wrong type")
        if value.get("format") not in (FORMAT_MANIFEST, FORMAT_IN_PARTS):
            raise UnsupportedError(
                f"manifest format {str(value.get('format'))[:40]!r}, known are {FORMAT_MANIFEST!r} and "
                f"{FORMAT_IN_PARTS!r}; upgrade thinwire"
            )
        actual = hasher(str(value.get("hash")))(canonical.dump(value)).digest().hex()
        if envelope["digest"] != actual:
            raise MalformedError(
                f"a manifest says its digest is {str(envelope['digest'])[:64]}, but it is {actual}; fetch it again"
            )
        return _from_signed(value, tuple(signatures))


def _from_signed(value: dict[str, Any], signatures: tuple[Any, ...]) -> Manifest:
    version = _int(value.get("version"), "version", 1, VERSION_MAX)
    parent = None
    if value.get("parent") is not None:
        if not isinstance(value["parent"], dict):
            raise MalformedError("a manifest's parent is not an object")
        before = _int(value["parent"].get("version"), "parent's version", 1, version - 1)
        parent = Parent(before, check_digest(value["parent"].get("manifest")))
    in_parts = value["format"] == FORMAT_IN_PARTS
    deltas, anchor = ([], ()) if in_parts else _lists(value)
    facts, metadata = value.get("facts"), value.get("metadata")
    if not isinstance(facts, dict) or not isinstance(metadata, dict):
        raise MalformedError("a manifest's facts or metadata is not an object")
    if not all(isinstance(v, str) for v in metadata.values()):
        raise MalformedError("a manifest's metadata are not strings")
    step = value.get("step")
    known = {"anchor_version", "facts", "format", "hash", "metadata", "parent", "state", "step", "tree", "version"}
    known |= {"parts"} if in_parts else {"anchor", "deltas"}
    manifest = Manifest(
        version=version,
        state=check_digest(value.get("state")),
        hash=str(value["hash"]),
        parent=parent,
        tree=ObjectRef.from_json(value.get("tree")),
        deltas=_deltas(deltas, version),
        anchor=anchor,
        anchor_version=_int(value.get("anchor_version"), "anchor_version", 1, version),
        step=None if step is None else _int(step, "step", -(1 << 62)),
        facts={str(k): _int(v, f"fact {k}") for k, v in facts.items()},
        metadata=metadata,
        extra={k: v for k, v in value.items() if k not in known},
        signatures=signatures,
        parts=_parts(value.get("parts"), version) if in_parts else (),
    )
    if in_parts:
        _check_parts(manifest)
    elif (manifest.anchor_version == version) != bool(manifest.anchor) or not (manifest.anchor or manifest.deltas):
        raise MalformedError(f"version {version} has neither anchor nor delta, or misstates its anchor")
    return manifest


def _lists(value: Mapping[str, Any]) -> tuple[list[Any], tuple[ObjectRef, ...]]:
    anchor, deltas = value.get("anchor"), value.get("deltas")
    if not isinstance(anchor, list) or not isinstance(deltas, list) or len(anchor) + len(deltas) > SHARDS_MAX:
        raise MalformedError("a manifest's anchor or deltas is not a list, or is too long")
    return deltas, tuple(ObjectRef.from_json(ref) for ref in anchor)


def _parts(values: Any, version: int) -> tuple[Part, ...]:
    if not isinstance(values, list) or not 0 < len(values) <= PARTS_MAX:
        raise MalformedError(f"a version in parts has from 1 to {PARTS_MAX} of them in a list")
    return tuple(Part.from_json(value, version) for value in values)


def _check_parts(manifest: Manifest) -> None:
    version, parts = manifest.version, manifest.parts
    anchored = {bool(part.anchor) for part in parts}
    bases = {tuple(delta.base for delta in part.deltas) for part in parts}
    if len(anchored) > 1 or len(bases) > 1:
        raise MalformedError(f"the parts of version {version} do not all have an anchor, or deltas from one version")
    if anchored != {manifest.anchor_version == version} or not (parts[0].anchor or parts[0].deltas):
        raise MalformedError(f"version {version} has neither anchor nor delta, or misstates its anchor")
    actual = state_of_parts(manifest.hash, manifest.tree.digest, (part.state for part in parts))
    if actual != manifest.state:
        raise MalformedError(f"the parts of version {version} make the state {actual}, it says {manifest.state}")


def _deltas(values: Sequence[Any], version: int) -> tuple[DeltaRef, ...]:
    return tuple(_delta(value, version) for value in values)


def _delta(value: Any, version: int) -> DeltaRef:
    if not isinstance(value, dict):
        raise MalformedError("a delta's reference is not an object")
    base = _int(value.get("base"), "delta's base", 1, version - 1)
    return DeltaRef(base, check_digest(value.get("base_state")), ObjectRef.from_json(value.get("object")))
