"""The record of a skip delta: a patch that leads over several versions, from one straight to a later one.

It is canonical JSON, ``{"digest": ..., "signatures": [...], "signed": {...}}`` like a manifest. It proves nothing: the
states that it names must be those of the two versions' manifests, and its patch must lead to the later one. A record
that lies, or all of them being lost, costs a reader time and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from thinwire.errors import MalformedError, UnsupportedError
from thinwire.wire import canonical
from thinwire.wire.digests import check_digest, hasher
from thinwire.wire.manifest import VERSION_MAX, DeltaRef, ObjectRef

__all__ = ["SKIPS_PREFIX", "SKIP_BYTES_MAX", "Skip", "skip_folder", "skip_key", "skip_of_key"]

FORMAT_SKIP = "thinwire.skip.v1"
SKIPS_PREFIX = "skips/"
SKIP_BYTES_MAX = 64 << 10
_KEY = re.compile(r"skips/([0-9]{10})-([0-9]{10})(\.json|/.+)", re.ASCII)


def skip_folder(base: int, version: int) -> str:
    """Where the patches from ``base`` to ``version`` lie; sorts by the version that they lead to.

    >>> skip_folder(8, 12)
    'skips/0000000012-0000000008/'
    """
    return f"{SKIPS_PREFIX}{version:010d}-{base:010d}/"


def skip_key(base: int, version: int) -> str:
    """Key of the record of the skip delta from ``base`` to ``version``."""
    return skip_folder(base, version)[:-1] + ".json"


def skip_of_key(key: str) -> tuple[int, int] | None:
    """The (base, version) whose record or patch has this key, or None."""
    found = _KEY.fullmatch(key)
    if found is None:
        return None
    base, version = int(found[2]), int(found[1])
    return (base, version) if 1 <= base < version <= VERSION_MAX else None


@dataclass(frozen=True, slots=True)
class Skip:
    """A patch from version ``base``, whose state is ``base_state``, to ``version``, whose state is ``state``.

    ``changed`` counts the cells that it changes, for people.
    """

    base: int
    base_state: str
    version: int
    state: str
    hash: str
    object: ObjectRef
    changed: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)
    signatures: tuple[Any, ...] = ()

    @property
    def delta(self) -> DeltaRef:
        """It as a manifest would name it."""
        return DeltaRef(self.base, self.base_state, self.object)

    def signed(self) -> dict[str, Any]:
        """The part that digests and signatures cover, as JSON values."""
        return {
            **self.extra,
            "base": self.base,
            "base_state": self.base_state,
            "changed": self.changed,
            "format": FORMAT_SKIP,
            "hash": self.hash,
            "object": self.object.to_json(),
            "state": self.state,
            "version": self.version,
        }

    def encode(self) -> bytes:
        """The record's bytes."""
        signed = self.signed()
        digest = hasher(self.hash)(canonical.dump(signed)).digest().hex()
        return canonical.dump({"digest": digest, "signatures": list(self.signatures), "signed": signed})

    @classmethod
    def parse(cls, data: bytes) -> Skip:
        """Read a record.

        Raises:
            MalformedError: not canonical, a field is missing or of the wrong type, or its patch lies elsewhere than
                patches between these versions do.
            UnsupportedError: another format version or an unknown hash.
        """
        envelope = canonical.parse(data, bytes_max=SKIP_BYTES_MAX)
        if not isinstance(envelope, dict) or set(envelope) != {"digest", "signatures", "signed"}:
            raise MalformedError("a skip delta's record is an object of 'digest', 'signatures' and 'signed'")
        value, signatures = envelope["signed"], envelope["signatures"]
        if not isinstance(value, dict) or not isinstance(signatures, list):
            raise MalformedError("a skip delta's 'signed' or 'signatures' has the wrong type")
        if value.get("format") != FORMAT_SKIP:
            raise UnsupportedError(
                f"skip format {str(value.get('format'))[:40]!r}, known is {FORMAT_SKIP!r}; upgrade thinwire"
            )
        if envelope["digest"] != hasher(str(value.get("hash")))(canonical.dump(value)).digest().hex():
            raise MalformedError("a skip delta's record has another digest than it says; fetch it again")
        base, version, changed = (value.get(name) for name in ("base", "version", "changed"))
        if type(base) is not int or type(version) is not int or not 1 <= base < version <= VERSION_MAX:
            raise MalformedError(f"a skip delta cannot lead from {str(base)[:20]} to {str(version)[:20]}")
        if type(changed) is not int or changed < 0:
            raise MalformedError(f"a skip delta cannot change {str(changed)[:20]} cells")
        reference = ObjectRef.from_json(value.get("object"))
        if not reference.key.startswith(skip_folder(base, version)):
            raise MalformedError(f"the patch of a skip delta lies at {reference.key[:80]!r}, outside its folder")
        known = {"base", "base_state", "changed", "format", "hash", "object", "state", "version"}
        return cls(
            base=base,
            base_state=check_digest(value.get("base_state")),
            version=version,
            state=check_digest(value.get("state")),
            hash=str(value["hash"]),
            object=reference,
            changed=changed,
            extra={k: v for k, v in value.items() if k not in known},
            signatures=tuple(signatures),
        )
