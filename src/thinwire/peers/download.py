"""An object on its way through a swarm, and its rescue: what no peer sends is read from the store, piece by piece."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import Any, final

from thinwire.errors import RetryError, ThinwireError
from thinwire.peers.metainfo import Description
from thinwire.peers.protocol import Origin, Progress

__all__ = ["LOOK_S", "Download", "Torrent"]

LOOK_S = 0.02
"""How often what libtorrent has done is looked at, in seconds."""

_log = logging.getLogger(__name__)
_RESCUE_BYTES_MIN, _RESCUE_BYTES, _RESCUE_BYTES_MAX = 64 << 10, 1 << 20, 8 << 20
_SLOW_BYTES_S, _SLOW_S = 64 << 10, 4.0


@final
class Torrent:
    """An object in the swarm, whole or on its way; ``handle`` is libtorrent's, ``waiting`` says how many want it."""

    def __init__(self, key: str, description: Description, handle: Any) -> None:
        self.key, self.description, self.handle = key, description, handle
        self.whole = False
        self.waiting = 0


@final
class Download:
    """One object on its way: waits, and reads from the store what does not come.

    ``left`` tells whether the swarm was left meanwhile; ``rescued`` is told of bytes that came from the store.
    """

    def __init__(
        self,
        torrent: Torrent,
        origin: Origin,
        *,
        rescue_s: float,
        stall_s: float,
        progress: Progress,
        left: Callable[[], bool],
        rescued: Callable[[int], None],
    ) -> None:
        self._torrent, self._origin, self._progress = torrent, origin, progress
        self._rescue_s, self._stall_s, self._left, self._rescued = rescue_s, stall_s, left, rescued
        self._rescue: threading.Thread | None = None
        self._rescue_bytes = min(max(torrent.description.size // 16, _RESCUE_BYTES_MIN), _RESCUE_BYTES)
        self._next_rescue_s = rescue_s

    def wait(self) -> None:
        """Until it is whole.

        Raises:
            RetryError: nothing comes any more, or this swarm was left.
        """
        handle, done, moved = self._torrent.handle, -1, time.monotonic()
        slow_since, slow_from = moved, 0
        while True:
            if self._left():
                raise RetryError("this swarm was left")
            status = handle.status(0)
            now = time.monotonic()
            if status.errc.value():
                raise RetryError(f"{self._torrent.key} was not got from the swarm: {status.errc.message()}")
            if status.is_seeding or self._torrent.whole:
                return
            if status.total_done > done:
                done, moved = status.total_done, now
                self._progress(done)
            if now - slow_since > _SLOW_S:
                too_slow = done - slow_from < _SLOW_BYTES_S * _SLOW_S
                slow_since, slow_from = now, done
            else:
                too_slow = False
            if now - moved > self._stall_s:
                raise RetryError(f"nothing of {self._torrent.key} has come for {self._stall_s:g} s")
            if (now - moved > self._next_rescue_s or too_slow) and not self._rescuing():
                self._begin_rescue(nobody_else=now - moved > 2 * self._rescue_s or too_slow)
            time.sleep(LOOK_S)

    def _rescuing(self) -> bool:
        return self._rescue is not None and self._rescue.is_alive()

    def _begin_rescue(self, *, nobody_else: bool) -> None:
        """Read some missing pieces from the store: those that no peer has, or any if who has them does not send."""
        handle = self._torrent.handle
        have = handle.status(handle.query_pieces).pieces
        missing = [n for n, there in enumerate(have) if not there]
        held = handle.piece_availability()
        lonely = missing if nobody_else or not held else [n for n in missing if not held[n]]
        if not lonely:
            return
        chosen, wanted = [random.choice(lonely)], set(lonely)
        while len(chosen) * self._torrent.description.piece_bytes < self._rescue_bytes and chosen[-1] + 1 in wanted:
            chosen.append(chosen[-1] + 1)
        self._rescue = threading.Thread(target=self._read_pieces, args=(chosen,), name="thinwire-rescue", daemon=True)
        self._rescue.start()

    def _read_pieces(self, pieces: list[int]) -> None:
        description = self._torrent.description
        start, length = description.span(pieces[0], len(pieces))
        try:
            data = memoryview(self._origin.get_range(self._torrent.key, start, length))
            for piece in pieces:
                at, size = description.span(piece)
                part = data[at - start : at - start + size]
                if not description.agrees(piece, part):
                    raise RetryError("the store's bytes are not what the publisher described")
                self._torrent.handle.add_piece(piece, bytes(part), 0)
            self._rescued(length)
            self._rescue_bytes = min(2 * self._rescue_bytes, _RESCUE_BYTES_MAX)
            self._next_rescue_s = LOOK_S * 5  # nobody has it: no use in waiting as long for the next
        except (ThinwireError, RuntimeError) as error:
            _log.info("pieces of %s were not to be had from the store: %s", self._torrent.key, error)
            self._next_rescue_s = self._rescue_s
