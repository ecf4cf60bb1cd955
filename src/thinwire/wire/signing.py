"""Signatures over what a chain's files say: keys' names, the bytes that are signed, the list beside them.

Nothing here computes a signature: the arithmetic is in :mod:`thinwire.crypto`, and whether a signature is believed is
decided in :mod:`thinwire.chain.authority`. All keys are Ed25519 (RFC 8032).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from thinwire.errors import MalformedError, MisuseError
from thinwire.wire import canonical

__all__ = [
    "PUBLIC_BYTES",
    "SIGNATURES_MAX",
    "Signature",
    "Signer",
    "key_id",
    "message",
    "parse_public",
    "parse_signatures",
    "public_text",
    "sign",
]

PUBLIC_BYTES = 32
SIGNATURE_BYTES = 64
SIGNATURES_MAX = 64
_HEX = re.compile(r"[0-9a-f]*", re.ASCII)
_PUBLIC_MARK = "thinwire-ed25519"


class Signer(Protocol):
    """Somebody who holds a private key: a file's (:class:`thinwire.crypto.SigningKey`), or a service's."""

    @property
    def public(self) -> bytes:
        """The public key, 32 bytes."""
        ...

    def sign(self, message: bytes) -> bytes:
        """The Ed25519 signature of ``message``, 64 bytes."""
        ...


def key_id(public: bytes) -> str:
    """The name of a key: a digest of the public one, in hexadecimal.

    >>> key_id(bytes(32))[:12]
    '799089e304b2'
    """
    return hashlib.sha256(b"thinwire key v1\ned25519\n" + public).hexdigest()


def message(signed: Mapping[str, Any]) -> bytes:
    """What a signature covers: a prefix that names the format, so that nothing signed can pass for anything else, and
    the canonical bytes of ``signed``.

    >>> message({"format": "thinwire.skip.v1", "base": 1})
    b'thinwire signature v1\\nthinwire.skip.v1\\n{"base":1,"format":"thinwire.skip.v1"}'
    """
    return b"thinwire signature v1\n" + str(signed["format"]).encode() + b"\n" + canonical.dump(dict(signed))


@dataclass(frozen=True, slots=True)
class Signature:
    """One signature and the name of the key that is said to have made it."""

    keyid: str
    sig: bytes


def unhex(value: object, count: int, what: str) -> bytes:
    """``count`` bytes from lower-case hexadecimal digits. Raises MalformedError."""
    if not isinstance(value, str) or len(value) != 2 * count or not _HEX.fullmatch(value):
        raise MalformedError(f"{what} must be {2 * count} lower-case hexadecimal digits, not {str(value)[:40]!r}")
    return bytes.fromhex(value)


def parse_signatures(values: Sequence[Any]) -> tuple[Signature, ...]:
    """The ``signatures`` of an envelope: ``{"keyid", "sig"}`` each, no key twice.

    Raises:
        MalformedError: anything else, or more than 64.
    """
    if len(values) > SIGNATURES_MAX:
        raise MalformedError(f"{len(values)} signatures are beyond the bound of {SIGNATURES_MAX}")
    found: dict[str, Signature] = {}
    for value in values:
        if not isinstance(value, dict) or set(value) != {"keyid", "sig"}:
            raise MalformedError("a signature is an object of 'keyid' and 'sig'")
        name = unhex(value["keyid"], 32, "a key's id").hex()
        if name in found:
            raise MalformedError(f"key {name[:12]} has signed twice")
        found[name] = Signature(name, unhex(value["sig"], SIGNATURE_BYTES, "a signature"))
    return tuple(found.values())


def sign(signed: Mapping[str, Any], signers: Sequence[Signer]) -> tuple[dict[str, str], ...]:
    """The ``signatures`` for an envelope, in order of the keys' ids.

    Raises:
        MisuseError: a key was given twice, or a signer returns something that is no signature.
    """
    data = message(signed)
    found: dict[str, str] = {}
    for signer in signers:
        name, made = key_id(signer.public), signer.sign(data)
        if name in found:
            raise MisuseError(f"key {name[:12]} was given twice; give each key once", keyid=name)
        if not isinstance(made, bytes) or len(made) != SIGNATURE_BYTES:
            raise MisuseError(f"the signer of key {name[:12]} must return {SIGNATURE_BYTES} bytes", keyid=name)
        found[name] = made.hex()
    return tuple({"keyid": name, "sig": found[name]} for name in sorted(found))


def public_text(public: bytes) -> str:
    """A public key as a line of text, as ``thinwire keygen`` writes it.

    >>> public_text(bytes(32))[:24]
    'thinwire-ed25519 0000000'
    """
    return f"{_PUBLIC_MARK} {public.hex()}\n"


def parse_public(text: str) -> bytes:
    """The public key in a line of text.

    Raises:
        MisuseError: it is something else, such as a private key.
    """
    words = text.split()
    if len(words) != 2 or words[0] != _PUBLIC_MARK or len(words[1]) != 2 * PUBLIC_BYTES or not _HEX.fullmatch(words[1]):
        raise MisuseError(
            f"not a public key: it is one line, '{_PUBLIC_MARK}' and 64 hexadecimal digits, as thinwire keygen writes "
            "it to NAME.pub"
        )
    return bytes.fromhex(words[1])
