"""A store whose objects are encrypted before they leave this process: AES-256-GCM, chunk by chunk.

Layout of a sealed object, which the specification repeats::

    "thinwire-sealed1"    16 bytes
    key id                 8 bytes   the first of SHA-256("thinwire object key v1\\n" || key)
    zero                   8 bytes
    salt                  32 bytes   random, for each write
    chunks                           1 MiB of plaintext each, the last one shorter or as long, each with a tag of 16

The chunks' key is HMAC-SHA-256(key, "thinwire object v1\\n" || salt), so that no two writes share one; the nonce is the
chunk's number (11 bytes, big-endian) and 1 for the last chunk, else 0 (the STREAM construction of Hoang, Reyhanitabar,
Rogaway and Vizár, 2015). Header and object key are bound to every chunk: an object under another key, chunks in another
order, and an object cut off at a chunk's border are refused.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import final

from thinwire.crypto import Sealer
from thinwire.errors import DamagedObjectError, MisuseError, UntrustedError
from thinwire.stores.checks import check_range, too_large, too_short, views
from thinwire.stores.protocol import Blob, Distrust, Notify, ObjectInfo, Store, check_key

__all__ = ["CHUNK_BYTES", "EncryptedStore", "object_key_text", "read_object_keys", "sealed_size"]

CHUNK_BYTES = 1 << 20
KEY_BYTES = 32
_MAGIC = b"thinwire-sealed1"
_HEADER_BYTES = 64
_TAG_BYTES = 16
_STRIDE = CHUNK_BYTES + _TAG_BYTES
_KEY_MARK = "thinwire-aes256"


def sealed_size(size: int) -> int:
    """Bytes of an object of ``size`` bytes when it is sealed.

    >>> sealed_size(0), sealed_size(1 << 20), sealed_size((1 << 20) + 1)
    (80, 1048656, 1048673)
    """
    return _HEADER_BYTES + size + _TAG_BYTES * max(1, -(-size // CHUNK_BYTES))


def _plain_size(sealed: int) -> int | None:
    """Bytes inside a sealed object of that size; None if none has it."""
    body = sealed - _HEADER_BYTES
    chunks = -(-body // _STRIDE)
    size = body - _TAG_BYTES * chunks
    return size if chunks > 0 and size >= 0 and sealed_size(size) == sealed else None


def object_key_text(key: bytes) -> str:
    """An object key as a line of text, as ``thinwire keygen --objects`` writes it."""
    return f"{_KEY_MARK} {key.hex()}\n"


def read_object_keys(paths: Sequence[str | os.PathLike[str]]) -> list[bytes]:
    """The object keys in files, one in each.

    Raises:
        MisuseError: a file cannot be read, others than its owner may read it, or it is not an object key's.
    """
    found = []
    for path in map(Path, paths):
        try:
            text, mode = path.read_bytes()[:200].decode("ascii", "replace"), path.stat().st_mode
        except OSError as error:
            raise MisuseError(f"cannot read the object key {path}: {error.strerror}", path=str(path)) from error
        if os.name == "posix" and mode & 0o077:
            raise MisuseError(f"others may read the object key {path}; run: chmod 600 {path}", path=str(path))
        match = re.fullmatch(rf"{_KEY_MARK} ([0-9a-f]{{{2 * KEY_BYTES}}})\s*", text)
        if match is None:
            raise MisuseError(f"{path} is no object key; make one with: thinwire keygen --objects", path=str(path))
        found.append(bytes.fromhex(match[1]))
    return found


def _key_id(key: bytes) -> bytes:
    return hashlib.sha256(b"thinwire object key v1\n" + key).digest()[:8]


@final
class EncryptedStore:
    """``inner``, with every object's bytes encrypted and authenticated under the first of ``keys``.

    Objects sealed under any of the ``keys`` can be read: to rotate, put the new key first, and drop the old one when
    nothing sealed with it is needed any more. Names, sizes and times of objects are not hidden, and an object that was
    under a key once may be put back there: signatures and the memory of consumers are for that.

    Ranged reads decrypt the chunks that they touch, and need the object's size for that, so one more request. What a
    listing or :meth:`head` says of sizes is the inner store's word.

    Raises:
        MisuseError: no key, or one that is not of 32 bytes; the package ``cryptography`` is missing.
        DamagedObjectError: (any read) the object is not a sealed one, was altered, cut off, or moved to another key.
        UntrustedError: (any read) it was sealed under a key that was not given.

    >>> from thinwire.stores.memory import MemoryStore
    >>> inner = MemoryStore()
    >>> store = EncryptedStore(inner, [bytes(32)])
    >>> store.put("a", [b"weights"])
    >>> store.get("a", size_max=7), b"weights" in inner.get("a", size_max=1000)
    (b'weights', False)
    """

    def __init__(self, inner: Store, keys: Sequence[bytes]) -> None:
        if not keys or not all(isinstance(key, bytes) and len(key) == KEY_BYTES for key in keys):
            raise MisuseError(f"an encrypted store needs a list of keys of {KEY_BYTES} bytes, that to write with first")
        Sealer(keys[0])
        self.inner = inner
        self._keys = {_key_id(key): key for key in keys}
        self._writing = _key_id(keys[0])
        self.create_is_atomic: bool = getattr(inner, "create_is_atomic", True)
        if isinstance(inner, Notify):
            self.wait_for = inner.wait_for
        if isinstance(inner, Distrust):
            self.distrust = inner.distrust

    def around(self, inner: Store) -> EncryptedStore:
        """Another store, ``inner``, sealed with the same keys."""
        return EncryptedStore(inner, [self._keys[self._writing], *self._keys.values()])

    @property
    def url(self) -> str:
        return self.inner.url

    # --- writing ---------------------------------------------------------------------------------------------------

    def put(self, key: str, data: Blob) -> None:
        self.inner.put(key, self._seal(key, data))

    def create(self, key: str, data: Blob) -> None:
        self.inner.create(key, self._seal(key, data))

    def _seal(self, key: str, data: Blob) -> list[bytes]:
        check_key(key)
        header = _MAGIC + self._writing + bytes(8) + secrets.token_bytes(32)
        sealer, bound = self._opened(header), header + key.encode()
        chunks = list(_chunks(views(data)))
        sealed = [sealer.seal(_nonce(n, n + 1 == len(chunks)), chunk, bound) for n, chunk in enumerate(chunks)]
        return [header, *sealed]

    def _opened(self, header: bytes) -> Sealer:
        """The cipher of the object with this header, whose key must be there."""
        key = self._keys[header[16:24]]
        return Sealer(hmac.new(key, b"thinwire object v1\n" + header[32:64], hashlib.sha256).digest())

    # --- reading ---------------------------------------------------------------------------------------------------

    def get(self, key: str, *, size_max: int) -> bytes:
        sealed = memoryview(self.inner.get(key, size_max=sealed_size(size_max)))
        size = _plain_size(len(sealed))
        if size is None:
            raise self._damaged(key, "it is not a sealed object, or was cut off")
        if size > size_max:
            raise too_large(self.url, key, size, size_max)
        header, count = bytes(sealed[:_HEADER_BYTES]), max(1, -(-size // CHUNK_BYTES))
        return b"".join(self._open(key, header, sealed[_HEADER_BYTES:], range(count), count))

    def get_range(self, key: str, start: int, length: int) -> bytes:
        check_key(key)
        check_range(start, length)
        sealed = self.inner.head(key).size
        size = _plain_size(sealed)
        if size is None:
            raise self._damaged(key, "it is not a sealed object, or was cut off")
        if start + length > size:
            raise too_short(self.url, key, size, start, length)
        if length == 0:
            return b""
        first, last = start // CHUNK_BYTES, (start + length - 1) // CHUNK_BYTES
        header = self.inner.get_range(key, 0, _HEADER_BYTES)
        begin = _HEADER_BYTES + first * _STRIDE
        body = self.inner.get_range(key, begin, min(_HEADER_BYTES + (last + 1) * _STRIDE, sealed) - begin)
        count = max(1, -(-size // CHUNK_BYTES))
        whole = b"".join(self._open(key, header, memoryview(body), range(first, last + 1), count))
        return whole[start - first * CHUNK_BYTES :][:length]

    def _open(self, key: str, header: bytes, body: memoryview, numbers: range, count: int) -> Iterator[bytes]:
        """The plaintext of some of an object's ``count`` chunks, of which ``body`` is the sealed form."""
        if header[:16] != _MAGIC or header[24:32] != bytes(8):
            raise self._damaged(key, "it is not a sealed object")
        if header[16:24] not in self._keys:
            raise UntrustedError(
                f"{key} in {self.url} was sealed under the object key {header[16:24].hex()}, which was not given; add "
                "it to the keys, or do not use this object",
                key=key,
                keyid=header[16:24].hex(),
            )
        sealer, bound = self._opened(header), header + key.encode()
        for n in numbers:
            at = (n - numbers.start) * _STRIDE
            opened = sealer.open(_nonce(n, n + 1 == count), body[at : at + _STRIDE], bound)
            if opened is None:
                raise self._damaged(key, "it was altered, cut off, or moved here from another key")
            yield opened

    def _damaged(self, key: str, why: str) -> DamagedObjectError:
        return DamagedObjectError(f"{key} in {self.url} is not what was written there: {why}", key=key, store=self.url)

    # --- the rest --------------------------------------------------------------------------------------------------

    def head(self, key: str) -> ObjectInfo:
        info = self.inner.head(key)
        return replace(info, size=_plain_size(info.size) or 0)

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        found = self.inner.list(prefix, start_after=start_after)  # here, so that a bad prefix is refused at once
        return (replace(info, size=_plain_size(info.size) or 0) for info in found)

    def delete(self, key: str) -> None:
        self.inner.delete(key)

    def __repr__(self) -> str:
        return f"EncryptedStore({self.inner!r})"


def _nonce(number: int, last: bool) -> bytes:
    return number.to_bytes(11, "big") + (b"\1" if last else b"\0")


def _chunks(flat: Sequence[memoryview]) -> Iterator[bytes | memoryview]:
    """The same bytes in chunks of exactly 1 MiB, but for the last; one empty chunk if there are none."""
    total, done, rest = sum(len(view) for view in flat), 0, bytearray()
    if total == 0:
        yield b""
    for view in flat:
        at = 0
        while at < len(view):
            if not rest and len(view) - at >= CHUNK_BYTES:  # no copy of what lies in one piece
                yield view[at : at + CHUNK_BYTES]
                at, done = at + CHUNK_BYTES, done + CHUNK_BYTES
                continue
            taken = min(CHUNK_BYTES - len(rest), len(view) - at)
            rest += view[at : at + taken]
            at, done = at + taken, done + taken
            if len(rest) == CHUNK_BYTES or done == total:
                yield bytes(rest)
                rest.clear()
