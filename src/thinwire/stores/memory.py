"""A store in this process's memory: for tests, examples and threads of one program."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import final

from thinwire.errors import MisuseError
from thinwire.stores.checks import already_there, check_list, check_range, not_there, too_large, too_short, views
from thinwire.stores.protocol import Blob, ObjectInfo, check_key

__all__ = ["MemoryStore"]


@dataclass(slots=True)
class _Shelf:
    """The objects of one store: bytes and time of last change by key."""

    lock: threading.Condition = field(default_factory=threading.Condition)
    objects: dict[str, tuple[bytes, float]] = field(default_factory=dict)


# Module state, against the rule of the house: "memory://name" means the same objects wherever it is opened in this
# process, so that a publisher and a consumer configured by URL alone can meet.
_shelves: dict[str, _Shelf] = {}
_shelves_lock = threading.Lock()


@final
class MemoryStore:
    """Objects in memory; safe to use from several threads.

    Stores with the same ``name`` share their objects inside this process and keep them until it ends; a store
    without a name is its own, and its objects go with it.

    >>> MemoryStore("docs").put("a/b", [b"hello, ", b"world"])
    >>> MemoryStore("docs").get("a/b", size_max=100)
    b'hello, world'
    >>> [info.key for info in MemoryStore().list("")]
    []
    """

    def __init__(self, name: str = "") -> None:
        if name:
            check_key(name)
            with _shelves_lock:
                self._shelf = _shelves.setdefault(name, _Shelf())
        else:
            self._shelf = _Shelf()
        self._url = f"memory://{name}"

    @property
    def url(self) -> str:
        return self._url

    def get(self, key: str, *, size_max: int) -> bytes:
        data, _ = self._find(key)
        if len(data) > size_max:
            raise too_large(self._url, key, len(data), size_max)
        return data

    def get_range(self, key: str, start: int, length: int) -> bytes:
        check_range(start, length)
        data, _ = self._find(key)
        if start + length > len(data):
            raise too_short(self._url, key, len(data), start, length)
        return data[start : start + length]

    def put(self, key: str, data: Blob) -> None:
        check_key(key)
        joined = b"".join(views(data))
        with self._shelf.lock:
            self._shelf.objects[key] = (joined, time.time())
            self._shelf.lock.notify_all()

    def create(self, key: str, data: Blob) -> None:
        check_key(key)
        joined = b"".join(views(data))
        with self._shelf.lock:
            if key in self._shelf.objects:
                raise already_there(self._url, key)
            self._shelf.objects[key] = (joined, time.time())
            self._shelf.lock.notify_all()

    def wait_for(self, key: str, *, timeout_s: float) -> bool:
        check_key(key)
        with self._shelf.lock:
            return self._shelf.lock.wait_for(lambda: key in self._shelf.objects, timeout=timeout_s)

    def head(self, key: str) -> ObjectInfo:
        data, modified_s = self._find(key)
        return ObjectInfo(key, len(data), modified_s)

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        check_list(prefix, start_after)
        with self._shelf.lock:
            found = [
                ObjectInfo(key, len(data), modified_s)
                for key, (data, modified_s) in self._shelf.objects.items()
                if key.startswith(prefix) and key > start_after
            ]
        return iter(sorted(found, key=lambda info: info.key))

    def delete(self, key: str) -> None:
        check_key(key)
        with self._shelf.lock:
            self._shelf.objects.pop(key, None)

    def _find(self, key: str) -> tuple[bytes, float]:
        check_key(key)
        with self._shelf.lock:
            found = self._shelf.objects.get(key)
        if found is None:
            raise not_there(self._url, key)
        return found

    def __reduce__(self) -> tuple[object, ...]:
        raise MisuseError("a MemoryStore cannot go to another process; use a LocalStore on a shared folder")

    def __repr__(self) -> str:
        return f"MemoryStore({self._url!r})"
