"""Which version is the newest, for who drives the workers that hold them. Imports nothing heavy before it is asked."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from thinwire.errors import StoreUnavailableError

if TYPE_CHECKING:
    from thinwire.sync.remote import ReadableStore
    from thinwire.wire.manifest import Manifest

__all__ = ["Newest"]


class Newest:
    """A store's newest version, whole or in parts. Of ``settings`` it takes ``trust`` and ``retry_s``."""

    def __init__(self, store: str | ReadableStore, settings: Mapping[str, Any]) -> None:
        from thinwire.stores import open_store
        from thinwire.sync.remote import Remote
        from thinwire.sync.trust import read_trust

        trust = settings.get("trust")
        self._remote = Remote(
            open_store(store) if isinstance(store, str) else store,
            retry_s=settings.get("retry_s", 30.0),
            trust=None if trust is None else read_trust(trust),
            in_parts=True,
        )
        self._newest: Manifest | None = None

    def __call__(self, *, timeout_s: float = 60.0) -> int:
        """Its number; waits for the first one."""
        return self.manifest(timeout_s=timeout_s).version

    def manifest(self, *, timeout_s: float = 60.0) -> Manifest:
        """Its manifest; waits for the first one.

        Raises:
            StoreUnavailableError: none has appeared in time.
        """
        deadline = time.monotonic() + timeout_s
        while self._newest is None:
            found = self._remote.newest()
            if found is not None:
                self._newest = found
            elif time.monotonic() >= deadline:
                raise StoreUnavailableError(
                    f"no version has appeared in the store within {timeout_s:g} s; is the publisher running?"
                )
            else:
                time.sleep(min(0.2, max(deadline - time.monotonic(), 0.0)))
        self._newest = self._remote.after(self._newest.version) or self._newest
        return self._newest
