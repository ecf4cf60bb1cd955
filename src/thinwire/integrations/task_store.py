"""Tasks in a store: one patch file each, created once and never overwritten."""

from __future__ import annotations

import os
from typing import Protocol

from thinwire.errors import MisuseError
from thinwire.stores import open_store
from thinwire.stores.protocol import Get, List, check_key
from thinwire.sync.retrying import retrying
from thinwire.wire.patch import Patch

__all__ = ["PREFIX", "TaskStore"]

PREFIX = "tasks/"
SUFFIX = ".safetensors"


class _Reads(Get, List, Protocol): ...


class TaskStore:
    """The tasks of a store, by name: objects ``tasks/NAME.safetensors``.

    Args:
        store: a folder, ``s3://``, ``memory://`` or any other URL that :func:`thinwire.open_store` takes, or a store.
        retry_s: how long one request is retried while the store fails.

    >>> from thinwire.sync.encode import make_patch, take_snapshot
    >>> from thinwire.sync.layout import StateSource
    >>> from thinwire.tensors.tree import state_of
    >>> import torch
    >>> base, tuned = ({"w": torch.full((4,), value)} for value in (1.0, 2.0))
    >>> tasks = TaskStore("memory://doc-tasks")
    >>> tasks.put("math", make_patch(take_snapshot(StateSource(state_of(base))), StateSource(state_of(tuned))))
    >>> tasks.names(), tasks.get("math", size_max=1 << 20).changed
    (['math'], 4)
    """

    def __init__(self, store: str | os.PathLike[str] | _Reads, *, retry_s: float = 30.0) -> None:
        self.store = open_store(store) if isinstance(store, str | os.PathLike) else store
        self.retry_s = retry_s

    def _key(self, name: str) -> str:
        if not name or "/" in name:
            raise MisuseError(f"a task's name is one component of a key, not {name[:80]!r}", task=name)
        return check_key(f"{PREFIX}{name}{SUFFIX}")

    def names(self) -> list[str]:
        """The tasks that there are, sorted."""
        keys = retrying(lambda: [info.key for info in self.store.list(PREFIX)], limit_s=self.retry_s)
        return sorted(k[len(PREFIX) : -len(SUFFIX)] for k in keys if k.endswith(SUFFIX) and k.count("/") == 1)

    def get(self, name: str, *, size_max: int) -> Patch:
        """A task's patch, parsed; nothing of it is decoded yet.

        Raises:
            ObjectNotFoundError: there is none of this name.
            DamagedObjectError: it has more than ``size_max`` bytes.
            MalformedError, UnsupportedError: it is not a patch that can be read here.
            StoreUnavailableError: the store does not answer.
        """
        key = self._key(name)
        return Patch.parse(retrying(lambda: self.store.get(key, size_max=size_max), limit_s=self.retry_s))

    def put(self, name: str, patch: Patch) -> None:
        """Add a task.

        Raises:
            ObjectExistsError: there is one of this name.
            MisuseError: the name cannot be part of a key, or the store cannot create objects.
        """
        create = getattr(self.store, "create", None)
        if create is None:
            raise MisuseError("this store can only be read; give one that creates objects")
        create(self._key(name), patch.encode())
