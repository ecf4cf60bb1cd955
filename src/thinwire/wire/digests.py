"""Digests: a tree of hashes over fixed-size blocks of each tensor, up to one for the whole state.

======================  ============================================================================================
leaf                    hash of one block: 1 MiB of a tensor's bytes in C order (the last may be shorter)
tensor                  hash of ``"thinwire tensor v1\\n"``, the canonical JSON ``[dtype, shape]``, a newline, leaves
state                   hash of the *tree*: canonical JSON of format, hash, aliases and ``[name, dtype, shape, digest]``
======================  ============================================================================================

Leaves need no prefix of their own: the depth of every leaf is fixed by the shape that the tensor's hash contains. The
tree is an object of its own in a store; whoever has it can check one tensor, or one block, against a state's digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import blake3

from thinwire.errors import MalformedError, UnsupportedError
from thinwire.wire import canonical
from thinwire.wire.spec import (
    CELLS_MAX,
    DIGEST_BYTES,
    DIMENSIONS_MAX,
    HASHES,
    NAME_BYTES_MAX,
    TABLE_BYTES_MAX,
    TENSORS_MAX,
    cell_count,
    dtype_of,
)

__all__ = ["BLOCK_BYTES", "TensorInfo", "Tree", "check_digest", "check_name", "check_shape", "hasher", "tensor_digest"]

BLOCK_BYTES = 1 << 20
TREE_FORMAT = "thinwire.tree.v1"


class Hasher(Protocol):
    def update(self, data: Any, /) -> Any: ...
    def digest(self) -> bytes: ...


def hasher(name: str) -> Callable[[Any], Hasher]:
    """The hash function called ``name``, as ``f(data) -> object with update and digest``.

    Raises:
        UnsupportedError: an unknown hash.
    """
    if name == "blake3":
        return blake3.blake3
    if name == "sha256":
        return hashlib.sha256
    raise UnsupportedError(f"unknown hash {name[:40]!r}; known are {', '.join(HASHES)}", hash=name[:40])


def check_digest(value: object) -> str:
    """``value`` if it is 64 lower-case hexadecimal digits. Raises MalformedError."""
    if not isinstance(value, str) or len(value) != 2 * DIGEST_BYTES or not set(value) <= set("0123456789abcdef"):
        raise MalformedError(f"not a digest: {str(value)[:80]!r}")
    return value


def check_name(value: object) -> str:
    """``value`` if it can name a tensor. Raises MalformedError."""
    if not isinstance(value, str) or not value or len(value.encode("utf-8", "replace")) > NAME_BYTES_MAX:
        raise MalformedError(f"not a tensor name: {str(value)[:80]!r}")
    if value == "__metadata__" or not value.isprintable():
        raise MalformedError(f"not a tensor name: {value[:80]!r}")
    return value


def check_shape(value: object) -> tuple[int, ...]:
    """``value`` as a shape. Raises MalformedError."""
    fine = isinstance(value, list | tuple) and len(value) <= DIMENSIONS_MAX
    if not fine or not all(type(n) is int and 0 <= n <= CELLS_MAX for n in value):  # type: ignore[attr-defined]
        raise MalformedError(f"not a shape: {str(value)[:80]}")
    return tuple(value)  # type: ignore[arg-type]


def tensor_digest(hash_name: str, dtype: str, shape: tuple[int, ...], leaves: Iterable[bytes]) -> str:
    """Digest of a tensor from the digests of its blocks, in hexadecimal."""
    h = hasher(hash_name)(b"thinwire tensor v1\n" + canonical.dump([dtype, list(shape)]) + b"\n")
    h.update(b"".join(leaves))
    return h.digest().hex()


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor's safetensors dtype, shape and digest (hexadecimal)."""

    dtype: str
    shape: tuple[int, ...]
    digest: str


@dataclass(frozen=True, slots=True)
class Tree:
    """All tensors of a state with their digests, and which names share one tensor.

    ``tensors`` maps each canonical name; ``aliases`` maps every further name of a tied tensor to its canonical one.

    >>> tree = Tree("blake3", {"w": TensorInfo("BF16", (2,), "00" * 32)}, {"head": "w"})
    >>> Tree.parse(tree.encode()) == tree
    True
    """

    hash: str
    tensors: Mapping[str, TensorInfo]
    aliases: Mapping[str, str]

    def encode(self) -> bytes:
        """The canonical bytes; their hash is the state's digest."""
        rows = [[name, t.dtype, list(t.shape), t.digest] for name, t in sorted(self.tensors.items())]
        return canonical.dump(
            {"aliases": dict(self.aliases), "format": TREE_FORMAT, "hash": self.hash, "tensors": rows}
        )

    @property
    def digest(self) -> str:
        """The state's digest, in hexadecimal."""
        return hasher(self.hash)(self.encode()).digest().hex()

    @classmethod
    def parse(cls, data: bytes) -> Tree:
        """Read a tree.

        Raises:
            MalformedError: not the canonical bytes of a tree.
            UnsupportedError: unknown format, hash or data type.
        """
        value = canonical.parse(data, bytes_max=TABLE_BYTES_MAX)
        if not isinstance(value, dict) or value.get("format") != TREE_FORMAT:
            raise UnsupportedError("not a tree of a known format; upgrade thinwire")
        rows, aliases = value.get("tensors"), value.get("aliases")
        if not isinstance(rows, list) or len(rows) > TENSORS_MAX or not isinstance(aliases, dict):
            raise MalformedError("a tree lacks its tensors or aliases, or has too many")
        hasher(str(value.get("hash")))
        tensors: dict[str, TensorInfo] = {}
        for row in rows:
            if not isinstance(row, list) or len(row) != 4:
                raise MalformedError("a tree's row is not [name, dtype, shape, digest]")
            name, shape = check_name(row[0]), check_shape(row[2])
            cell_count(dtype_of(row[1]), shape)
            tensors[name] = TensorInfo(row[1], shape, check_digest(row[3]))
        for alias, name in aliases.items():
            if check_name(alias) in tensors or name not in tensors:
                raise MalformedError(f"alias {alias[:80]!r} is a tensor itself or leads to none")
        tree = cls(str(value["hash"]), tensors, aliases)
        if tree.encode() != data:
            raise MalformedError("a tree's rows are not in order")
        return tree
