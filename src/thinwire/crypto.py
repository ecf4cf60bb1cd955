"""The arithmetic of keys: Ed25519 signatures and AES-256-GCM, by the package ``cryptography``.

The only file that imports it, and only when a key is used. What is signed is in :mod:`thinwire.wire.signing`, how
objects are sealed in :mod:`thinwire.stores.encrypted`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, final

from thinwire.errors import MisuseError

__all__ = ["Sealer", "SigningKey", "verified"]


def _need() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        raise MisuseError("keys need the package cryptography: pip install 'thinwire[trust]'") from error


@final
class SigningKey:
    """An Ed25519 private key (RFC 8032). Signing the same bytes twice gives the same signature.

    Raises:
        MisuseError: the package ``cryptography`` is missing.

    >>> key = SigningKey.generate()
    >>> verified(key.public, key.sign(b"weights"), b"weights"), verified(key.public, key.sign(b"weights"), b"other")
    (True, False)
    """

    def __init__(self, private: Any) -> None:
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

        self._private = private
        self._public: bytes = private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)

    @classmethod
    def generate(cls) -> SigningKey:
        """A new key, from the system's randomness."""
        _need()
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_pem(cls, data: bytes, *, password: bytes | None = None) -> SigningKey:
        """The key in a PEM file's bytes (PKCS 8).

        Raises:
            MisuseError: it is something else, of another kind than Ed25519, or the password is missing or wrong.
        """
        _need()
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        try:
            found = load_pem_private_key(data, password)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise MisuseError(f"not a private key in PEM form, or another password: {error}") from error
        if not isinstance(found, Ed25519PrivateKey):
            raise MisuseError("this private key is not an Ed25519 one; make one with: thinwire keygen")
        return cls(found)

    @classmethod
    def load(cls, path: str | Path, *, password: bytes | None = None) -> SigningKey:
        """The key in a file.

        Raises:
            MisuseError: there is no such file, others than its owner may read it, or as :meth:`from_pem`.
        """
        path = Path(path)
        try:
            data = path.read_bytes()
            mode = path.stat().st_mode
        except OSError as error:
            raise MisuseError(f"cannot read the private key {path}: {error.strerror}", path=str(path)) from error
        if os.name == "posix" and mode & 0o077:
            raise MisuseError(f"others may read the private key {path}; run: chmod 600 {path}", path=str(path))
        try:
            return cls.from_pem(data, password=password)
        except MisuseError as error:
            raise MisuseError(f"{path}: {error}", path=str(path)) from error

    def pem(self) -> bytes:
        """The private key in PEM form (PKCS 8), not encrypted."""
        from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

        made: bytes = self._private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return made

    @property
    def public(self) -> bytes:
        """The public key, 32 bytes."""
        return self._public

    def sign(self, message: bytes) -> bytes:
        """The signature of ``message``, 64 bytes."""
        made: bytes = self._private.sign(message)
        return made

    def __repr__(self) -> str:
        return f"SigningKey(public={self._public.hex()[:12]}...)"


def verified(public: bytes, signature: bytes, message: bytes) -> bool:
    """Whether ``signature`` (64 bytes) is that of ``message`` by the key ``public`` (32 bytes)."""
    _need()
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


@final
class Sealer:
    """AES-256-GCM (NIST SP 800-38D) under one key of 32 bytes: tags of 16 bytes, nonces of 12, never one twice."""

    def __init__(self, key: bytes) -> None:
        _need()
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self._cipher = AESGCM(key)

    def seal(self, nonce: bytes, data: bytes | memoryview, bound: bytes) -> bytes:
        """``data`` encrypted, and a tag over it and ``bound``."""
        return self._cipher.encrypt(nonce, data, bound)

    def open(self, nonce: bytes, data: bytes | memoryview, bound: bytes) -> bytes | None:
        """What was sealed; None if a bit of it, of ``bound`` or of ``nonce`` is another."""
        from cryptography.exceptions import InvalidTag

        try:
            return self._cipher.decrypt(nonce, data, bound)
        except InvalidTag:
            return None
