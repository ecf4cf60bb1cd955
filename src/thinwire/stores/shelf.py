"""A folder of answers that the processes of one machine share: entries, locks that end with their holder, eviction.

One entry is one file, written aside and given its name in one step, so that a reader finds it whole or not at all::

    "twcache1"    8 bytes
    kind          u64        1 an object, 2 there is no such object, 3 an object too large to keep, 4 a listing
    asked         f64        when the origin was asked, in seconds since the epoch
    size          u64        bytes of the body
    name         32 bytes    SHA-256 of the name
    digest       32 bytes    SHA-256 of the body, zeros for one of more than 4 MiB
    body

All numbers are little-endian. File names are digests, so no key can lead out of the folder or clash with another. Who
reads an entry has it open: that it is evicted, replaced or dropped meanwhile does not matter to him.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import BinaryIO, Final, final

__all__ = ["ABSENT", "CHECKED_BYTES", "LISTING", "OBJECT", "UNKEPT", "Entry", "Shelf"]

OBJECT, ABSENT, UNKEPT, LISTING = 1, 2, 3, 4
CHECKED_BYTES: Final = 4 << 20
"""Bodies up to this size carry a digest; who reads larger ones must know theirs."""

_MAGIC = b"twcache1"
_HEAD = struct.Struct("<8sQdQ32s32s")
_NO_DIGEST = bytes(32)
_LEFTOVER_AGE_S, _UNUSED_AGE_S = 3600.0, 7 * 86400.0
_TOUCH_EVERY_S = 1.0
_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Entry:
    """An answer, and when it was asked for. ``data`` is empty for ABSENT and UNKEPT."""

    kind: int
    asked_s: float
    data: bytes = b""


@final
class Shelf:
    """Entries below ``folder``, of ``bytes_max`` bytes together, about: each process looks after a sixteenth of that.

    Nothing here raises for what lies in the folder: what is damaged, foreign or unreadable is not there. Writing raises
    OSError.
    """

    def __init__(self, folder: str | os.PathLike[str], *, bytes_max: int) -> None:
        self._root = os.path.join(os.path.realpath(folder), "v1")
        self.bytes_max = bytes_max
        self._unseen_bytes = bytes_max  # written since this process last counted: at first it knows nothing

    def _paths(self, name: str) -> tuple[str, bytes]:
        digest = hashlib.sha256(name.encode()).digest()
        text = digest.hex()
        return os.path.join(self._root, "entries", text[:2], text[2:]), digest

    # --- reading ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _opened(self, name: str) -> Iterator[tuple[BinaryIO, Entry, int, bytes] | None]:
        """The open file behind its head, what the head says, the body's size and digest."""
        path, digest = self._paths(name)
        try:
            file = open(os.open(path, os.O_RDONLY | _FLAGS), "rb")  # noqa: SIM115 (closed below)
        except OSError:
            yield None
            return
        with file:
            found = os.fstat(file.fileno())
            head = file.read(_HEAD.size) if stat.S_ISREG(found.st_mode) else b""
            if len(head) < _HEAD.size:
                yield None
                return
            magic, kind, asked_s, size, named, body = _HEAD.unpack(head)
            if (magic, named, size) != (_MAGIC, digest, found.st_size - _HEAD.size):
                yield None
                return
            if found.st_mtime < time.time() - _TOUCH_EVERY_S:
                with suppress(OSError):  # used last: now. A folder that is only read has no order
                    os.utime(path)
            yield file, Entry(kind, asked_s), size, body

    def read(self, name: str, *, size_max: int | None = None) -> Entry | None:
        """The entry with its body, or None. With ``size_max`` a body of more bytes is not read (UNKEPT)."""
        with self._opened(name) as opened:
            if opened is None:
                return None
            file, entry, size, digest = opened
            if size_max is not None and size > size_max:
                return Entry(UNKEPT, entry.asked_s)
            try:
                data = file.read(size)
            except OSError:
                return None
            sound = digest == (hashlib.sha256(data).digest() if size <= CHECKED_BYTES else _NO_DIGEST)
            return Entry(entry.kind, entry.asked_s, data) if sound and len(data) == size else None

    def look(self, name: str) -> Entry | None:
        """The entry without its body, or None."""
        with self._opened(name) as opened:
            return None if opened is None else opened[1]

    def read_range(self, name: str, start: int, length: int) -> tuple[Entry, bytes] | None:
        """Some bytes of an object's body; None without an entry, or where the body ends before."""
        with self._opened(name) as opened:
            if opened is None or opened[1].kind != OBJECT or start + length > opened[2]:
                return None
            file, entry, _, _ = opened
            try:
                file.seek(_HEAD.size + start)
                data = file.read(length)
            except OSError:
                return None
            return (entry, data) if len(data) == length else None

    # --- writing ---------------------------------------------------------------------------------------------------

    def write(self, name: str, entry: Entry) -> None:
        """Make ``entry`` the one of this name; what is used least goes if there is too much. Raises OSError."""
        path, digest = self._paths(name)
        size = len(entry.data)
        body = hashlib.sha256(entry.data).digest() if size <= CHECKED_BYTES else _NO_DIGEST
        temporary = os.path.join(self._root, "tmp", secrets.token_hex(16))
        for folder in (os.path.dirname(temporary), os.path.dirname(path)):
            os.makedirs(folder, exist_ok=True)
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "wb") as file:
                file.write(_HEAD.pack(_MAGIC, entry.kind, entry.asked_s, size, digest, body))
                file.write(entry.data)
            os.replace(temporary, path)
        except OSError as error:
            with suppress(OSError):
                os.unlink(temporary)
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                self.evict(self.bytes_max // 2)
            raise
        self._unseen_bytes += size
        if self._unseen_bytes > self.bytes_max // 16:
            self.evict(self.bytes_max)

    def drop(self, name: str) -> None:
        """Remove an entry."""
        with suppress(OSError):
            os.unlink(self._paths(name)[0])

    def evict(self, bytes_max: int) -> None:
        """Remove entries, those used longest ago first, until all have nine tenths of ``bytes_max`` bytes, if they have
        more than that; those not used for a week; and what killed writers and holders of locks left behind."""
        self._unseen_bytes = 0
        found = []
        for folder in _below(os.path.join(self._root, "entries")):
            for item in _below(folder.path):
                with suppress(OSError):
                    facts = item.stat(follow_symlinks=False)
                    found.append((facts.st_mtime, facts.st_size, item.path))
        total = sum(size for _, size, _ in found)
        enough = bytes_max * 9 // 10 if total > bytes_max else total
        for used_s, size, path in sorted(found):
            if total <= enough and used_s > time.time() - _UNUSED_AGE_S:
                break
            with suppress(OSError):
                os.unlink(path)
                total -= size
        self._sweep()

    def _sweep(self) -> None:
        old = time.time() - _LEFTOVER_AGE_S
        for item in _below(os.path.join(self._root, "tmp")):
            with suppress(OSError):
                if item.stat(follow_symlinks=False).st_mtime < old:
                    os.unlink(item.path)
        for item in _below(os.path.join(self._root, "locks")):
            with suppress(OSError):
                if item.stat(follow_symlinks=False).st_mtime < old:
                    with _taken(item.path):
                        pass

    # --- locks -----------------------------------------------------------------------------------------------------

    @contextmanager
    def locked(self, name: str) -> Iterator[bool]:
        """Whether this caller, of all threads and processes, now holds the lock of this name. It does not wait.

        The lock is the kernel's, on a file: it ends with the process that holds it, however that ends. Raises OSError
        where no such file can be made.
        """
        folder = os.path.join(self._root, "locks")
        os.makedirs(folder, exist_ok=True)
        with _taken(os.path.join(folder, hashlib.sha256(name.encode()).hexdigest())) as taken:
            yield taken


def _below(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as items:
            return list(items)
    except OSError:
        return []


@contextmanager
def _taken(path: str) -> Iterator[bool]:
    """The lock on a file that is there only while it is held."""
    try:
        import fcntl
    except ImportError:  # pragma: no cover - Windows: everybody may, and the origin is asked more often
        yield True
        return
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _FLAGS, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        mine = os.fstat(descriptor)
        try:
            there = os.stat(path, follow_symlinks=False)
        except FileNotFoundError:
            yield False  # its last holder removed it between our open and our lock: this lock is of no file
            return
        if (mine.st_ino, mine.st_dev) != (there.st_ino, there.st_dev):
            yield False
            return
        try:
            yield True
        finally:
            with suppress(OSError):
                os.unlink(path)
    finally:
        os.close(descriptor)
