"""The description of an object for a swarm: a ``.torrent`` file of one fixed form (BEP 3, and BEP 27's private flag).

Only the one way in which :func:`encode` writes a description is read back: one file, named after the object's key, its
size, and the SHA-1 of every piece. Trackers, web seeds, nodes, paths and whatever else a torrent can hold cannot occur,
so that a description made by an attacker can name no host and no file. SHA-1 is what version 1 of BitTorrent has; here
it only tells early which peer lies. What arrives is proved by the manifest's digest.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from thinwire.errors import MalformedError
from thinwire.peers.protocol import Blob

__all__ = ["DESCRIPTION_SUFFIX", "Description", "describe", "description_bytes_max", "piece_bytes_for"]

DESCRIPTION_SUFFIX = ".torrent"
PIECE_BYTES_MIN, PIECE_BYTES_MAX = 16 << 10, 16 << 20
_PIECES_WANTED = 256
_HASH_BYTES = 20
_FORM = re.compile(
    rb"d4:infod6:lengthi([1-9][0-9]{0,15})e4:name40:([0-9a-f]{40})"
    rb"12:piece lengthi([1-9][0-9]{0,8})e6:pieces([1-9][0-9]{0,9}):"
)


def piece_bytes_for(size: int) -> int:
    """Bytes of a piece: a power of two, so that an object has some hundreds of pieces.

    >>> piece_bytes_for(1), piece_bytes_for(100 << 20), piece_bytes_for(100 << 30) == PIECE_BYTES_MAX
    (16384, 524288, True)
    """
    piece = PIECE_BYTES_MIN
    while piece < PIECE_BYTES_MAX and size > piece * _PIECES_WANTED:
        piece *= 2
    return piece


def description_bytes_max(size: int) -> int:
    """The most bytes that the description of an object of up to ``size`` bytes may have."""
    return 256 + _HASH_BYTES * (-(-size // PIECE_BYTES_MIN))


def name_of(key: str) -> str:
    """The file's name inside the swarm, which binds the description to the object's key (and so to the run)."""
    return hashlib.sha256(b"thinwire swarm v1\n" + key.encode()).hexdigest()[:40]


@dataclass(frozen=True, slots=True)
class Description:
    """What a swarm is told of an object: ``name`` from its key, ``size`` and ``piece_bytes``, SHA-1 of every piece."""

    name: str
    size: int
    piece_bytes: int
    hashes: bytes

    @property
    def pieces(self) -> int:
        """How many pieces there are."""
        return len(self.hashes) // _HASH_BYTES

    def span(self, first: int, count: int = 1) -> tuple[int, int]:
        """Where ``count`` pieces begin in the object, and their bytes."""
        start = first * self.piece_bytes
        return start, min(count * self.piece_bytes, self.size - start)

    def agrees(self, piece: int, data: bytes | memoryview) -> bool:
        """Whether ``data`` is this piece."""
        wanted = self.hashes[piece * _HASH_BYTES : (piece + 1) * _HASH_BYTES]
        return len(data) == self.span(piece)[1] and hashlib.sha1(data, usedforsecurity=False).digest() == wanted

    def first_wrong(self, data: bytes) -> int | None:
        """The first piece in which ``data`` is not the object; None if it is."""
        if len(data) != self.size:
            return 0
        view = memoryview(data)
        for piece in range(self.pieces):
            start, length = self.span(piece)
            if not self.agrees(piece, view[start : start + length]):
                return piece
        return None

    def info(self) -> bytes:
        """The part of the file whose SHA-1 names the swarm."""
        return b"d6:lengthi%de4:name%d:%s12:piece lengthi%de6:pieces%d:%s7:privatei1ee" % (
            self.size, len(self.name), self.name.encode(), self.piece_bytes, len(self.hashes), self.hashes,
        )  # fmt: skip

    def encode(self) -> bytes:
        """The ``.torrent`` file, which any BitTorrent client can read."""
        return b"d4:info%se" % self.info()

    @classmethod
    def parse(cls, data: bytes, *, key: str, size_max: int) -> Description:
        """The inverse of :meth:`encode`, for the object ``key`` of at most ``size_max`` bytes.

        Raises:
            MalformedError: it has another form, is of another object, or of a larger one.
        """
        if len(data) > description_bytes_max(size_max):
            raise MalformedError(f"the swarm's description of {key} has {len(data)} bytes", key=key)
        head = _FORM.match(data)
        if head is None:
            raise MalformedError(f"what lies beside {key} is not a swarm's description", key=key)
        size, piece_bytes, length = int(head[1]), int(head[3]), int(head[4])
        found = cls(head[2].decode(), size, piece_bytes, data[head.end() : head.end() + length])
        if found.name != name_of(key):
            raise MalformedError(f"the swarm's description beside {key} is of another object, or another run", key=key)
        power_of_two = piece_bytes & (piece_bytes - 1) == 0
        if size > size_max or not power_of_two or not PIECE_BYTES_MIN <= piece_bytes <= PIECE_BYTES_MAX:
            raise MalformedError(f"the swarm's description of {key} has a size or pieces out of bounds", key=key)
        if length != _HASH_BYTES * (-(-size // piece_bytes)) or found.encode() != data:
            raise MalformedError(f"the swarm's description of {key} contradicts itself", key=key)
        return found


def describe(key: str, data: Blob, *, piece_bytes: int | None = None) -> Description:
    """The description of an object, which has at least one byte.

    >>> found = describe("objects/1/delta", [b"weights" * 5000])
    >>> Description.parse(found.encode(), key="objects/1/delta", size_max=35000) == found
    True
    """
    views = [memoryview(buffer).cast("B") for buffer in data if memoryview(buffer).nbytes]
    size = sum(len(view) for view in views)
    piece_bytes = piece_bytes or piece_bytes_for(size)
    hashes = b"".join(_hashes(views, piece_bytes))
    return Description(name_of(key), size, piece_bytes, hashes)


def _hashes(views: Sequence[memoryview], piece_bytes: int) -> Iterator[bytes]:
    current, left = hashlib.sha1(usedforsecurity=False), piece_bytes
    for view in views:
        at = 0
        while at < len(view):
            taken = view[at : at + left]
            current.update(taken)
            at, left = at + len(taken), left - len(taken)
            if left == 0:
                yield current.digest()
                current, left = hashlib.sha1(usedforsecurity=False), piece_bytes
    if left < piece_bytes:
        yield current.digest()
