"""Which version is the newest, for who drives the workers that hold them. Imports nothing heavy before it is asked."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from thinwire.errors import StoreUnavailableError

__all__ = ["Newest"]


class Newest:
    """The number of a store's newest version. ``settings`` may have ``trust`` and ``retry_s``; others are let be."""

    def __init__(self, store: str, settings: Mapping[str, Any]) -> None:
        from thinwire.stores import open_store
        from thinwire.sync.remote import Remote
        from thinwire.sync.trust import read_trust

        trust = settings.get("trust")
        self._remote = Remote(
            open_store(store),
            retry_s=settings.get("retry_s", 30.0),
            trust=None if trust is None else read_trust(trust),
        )
        self._newest: int | None = None

    def __call__(self, *, timeout_s: float = 60.0) -> int:
        """Its number; waits for the first one."""
        deadline = time.monotonic() + timeout_s
        while self._newest is None:
            found = self._remote.newest()
            if found is not None:
                self._newest = found.version
            elif time.monotonic() > deadline:
                raise StoreUnavailableError(
                    f"no version has appeared within {timeout_s:g} s; is the publisher running?"
                )
            else:
                time.sleep(0.2)
        later = self._remote.after(self._newest)
        if later is not None:
            self._newest = later.version
        return self._newest
