"""Does a store really refuse to create an object twice? Many servers answer as if, and overwrite it."""

from __future__ import annotations

import secrets
import threading
from contextlib import suppress
from typing import Protocol

from thinwire.errors import ObjectExistsError, ThinwireError, UnsafeStoreError
from thinwire.stores.protocol import Create, Delete, Get

__all__ = ["enforces_create"]

_RACERS = 4
_RACE_TIMEOUT_S = 300.0
_BODY_BYTES_MAX = 64


class _Probed(Get, Create, Delete, Protocol):
    """What the probe does to a store."""


def enforces_create(store: _Probed) -> bool:
    """Whether ``store`` keeps the first object when a second one is created under the same key.

    Three things are tried, on keys ``probe/<random>`` that are deleted afterwards (a store that does not let this
    caller delete keeps two objects of a few bytes): what the store says of itself (an attribute ``create_is_atomic``
    that is False ends it), a second create after the first, and four at once. About nine requests.

    True means that nothing contradicted the promise, False that it is broken: two publishers could both win a
    version.

    Raises:
        StoreUnavailableError, MisuseError: the store could not be tried.

    >>> from thinwire.stores.memory import MemoryStore
    >>> enforces_create(MemoryStore())
    True
    """
    if not getattr(store, "create_is_atomic", True):
        return False
    try:
        return _second_is_refused(store) and _one_of_several_wins(store)
    except UnsafeStoreError:
        return False


def _second_is_refused(store: _Probed) -> bool:
    key = f"probe/{secrets.token_hex(16)}"
    try:
        store.create(key, [b"first"])
        try:
            store.create(key, [b"second"])
        except ObjectExistsError:
            return store.get(key, size_max=_BODY_BYTES_MAX) == b"first"
        return False
    finally:
        with suppress(ThinwireError):
            store.delete(key)


def _one_of_several_wins(store: _Probed) -> bool:
    key = f"probe/{secrets.token_hex(16)}"
    won: list[bytes] = []
    failed: list[BaseException] = []
    barrier = threading.Barrier(_RACERS)

    def race(body: bytes) -> None:
        try:
            barrier.wait(timeout=_RACE_TIMEOUT_S)
            store.create(key, [body])
            won.append(body)
        except ObjectExistsError:
            pass
        except BaseException as error:  # handed to the caller's thread below
            failed.append(error)

    racers = [threading.Thread(target=race, args=(b"racer %d" % n,), daemon=True) for n in range(_RACERS)]
    try:
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join(timeout=_RACE_TIMEOUT_S)
        # A racer without an answer may have won unknown to itself; only two known winners, or one whose bytes are
        # not there, are a proof. With no proof and a failure, nothing was learnt.
        if len(won) > 1 or (won and store.get(key, size_max=_BODY_BYTES_MAX) != won[0]):
            return False
        if failed:
            raise failed[0]
        return len(won) == 1
    finally:
        with suppress(ThinwireError):
            store.delete(key)
