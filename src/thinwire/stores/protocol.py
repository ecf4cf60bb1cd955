"""What thinwire asks of a store: seven verbs, one protocol each.

A store maps keys to immutable bytes. Keys are relative, ``/``-separated paths of ``[A-Za-z0-9._-]`` components
(:func:`check_key`). A function asks for the protocols it uses and no more, so that its signature shows which
requests it can make; no implementation caches or makes requests that were not asked for.

A store that knows it does not enforce create-only says so with an attribute ``create_is_atomic = False``. Listings skip
objects whose names are not valid keys.

Only one verb must be atomic between machines: :meth:`Create.create`. Everything that two writers may race for rests
on it, because compare-and-swap is missing or broken on real servers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from thinwire.errors import MisuseError

__all__ = [
    "Blob",
    "Create",
    "Delete",
    "Distrust",
    "Get",
    "GetRange",
    "Head",
    "List",
    "Notify",
    "ObjectInfo",
    "Put",
    "Store",
    "check_key",
]

Blob = Sequence[bytes | bytearray | memoryview]
"""An object's bytes as consecutive buffers, so that large ones need not be joined in memory first."""

KEY_LENGTH_MAX = 512
_COMPONENT = re.compile(r"[A-Za-z0-9._-]+", re.ASCII)


def check_key(key: str) -> str:
    """Return ``key`` if it is a valid object key.

    Raises:
        MisuseError: it is empty, too long, absolute, or has a component that is empty, ``.``, ``..`` or has other
            characters than ``[A-Za-z0-9._-]``.

    >>> check_key("manifests/0000000012.json")
    'manifests/0000000012.json'
    """
    components = key.split("/")
    fine = len(key) <= KEY_LENGTH_MAX and all(_COMPONENT.fullmatch(c) and c not in {".", ".."} for c in components)
    if not fine:
        raise MisuseError(
            f"not a valid object key: {key[:80]!r}; use '/'-separated components of A-Z a-z 0-9 . _ -", key=key[:80]
        )
    return key


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object in a listing: its key, size in bytes and time of last change in seconds since the epoch."""

    key: str
    size: int
    modified_s: float


class Get(Protocol):
    def get(self, key: str, *, size_max: int) -> bytes:
        """The whole object, in one request.

        Raises:
            ObjectNotFoundError: no such object.
            DamagedObjectError: it has more than ``size_max`` bytes; at most that many were read into memory.
            StoreUnavailableError: the store did not answer in time or failed inside.
        """
        ...


class GetRange(Protocol):
    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Bytes ``start`` to ``start + length`` of the object; exactly ``length`` of them.

        Raises:
            ObjectNotFoundError: no such object.
            DamagedObjectError: the object ends before ``start + length``.
            StoreUnavailableError: the store did not answer in time or failed inside.
        """
        ...


class Put(Protocol):
    def put(self, key: str, data: Blob) -> None:
        """Write an object whole or not at all, replacing one that is there. Large objects go up in parts."""
        ...


class Create(Protocol):
    def create(self, key: str, data: Blob) -> None:
        """Write an object whole if no object has this key; of any number of racing callers exactly one succeeds.

        Raises:
            ObjectExistsError: the key is taken.
            UnsafeStoreError: the store is known not to enforce this.
            StoreUnavailableError: it is not known whether the object was written (a lost reply): the caller reads it
                back to find out.
        """
        ...


class Head(Protocol):
    def head(self, key: str) -> ObjectInfo:
        """Size and time of one object. Raises ObjectNotFoundError, StoreUnavailableError."""
        ...


class List(Protocol):
    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        """Objects whose key begins with ``prefix`` and sorts after ``start_after``, in order of their keys.

        A listing may be stale (a new object missing, a deleted one still there); no decision that must be right rests
        on one alone.
        """
        ...


class Delete(Protocol):
    def delete(self, key: str) -> None:
        """Remove the object; one that is not there is no error."""
        ...


@runtime_checkable
class Notify(Protocol):
    """An extra that some stores have: to be woken instead of asking again and again."""

    def wait_for(self, key: str, *, timeout_s: float) -> bool:
        """Block until an object has this key, at most ``timeout_s``; whether it has. A hint: ``get`` decides."""
        ...


@runtime_checkable
class Distrust(Protocol):
    """An extra of stores that give copies of another's objects: to be told of a bad one."""

    def distrust(self, key: str) -> None:
        """What ``get`` gave under this key was wrong: give no copy of it again, ask further back the next time."""
        ...


@runtime_checkable
class Store(Get, GetRange, Put, Create, Head, List, Delete, Protocol):
    """All seven verbs. ``url`` names the store in messages, without credentials."""

    @property
    def url(self) -> str: ...
