"""The level that brings a version over soonest: ``level="auto"``.

What costs time is making a patch and sending it: ``smallest`` takes longest to make and has the fewest bytes, ``fast``
is the other end. From which link on which pays depends on the model, the optimiser and the machine, so all three are
measured, on the patches themselves: bytes and seconds of each, and the rate at which objects went up. A reader decodes
about as fast as a publisher encodes, and reads what was written, so twice the publisher's time stands for both.

>>> chooser = LevelChooser()
>>> for level, seconds, size in (("small", 1.0, 4_000_000), ("smallest", 1.5, 2_000_000), ("fast", 0.9, 8_000_000)) * 2:
...     assert chooser.choose() == level
...     chooser.encoded(level, state_bytes=10**9, changed=10**6, patch_bytes=size, seconds=seconds)
>>> chooser.sent(10_000_000, 10.0)  # at 1 MB/s, 2 MB less are worth more than half a second
>>> chooser.choose()
'smallest'
>>> chooser.sent(10_000_000, 0.5)
>>> chooser.choose()
'small'
>>> chooser.sent(10_000_000, 0.01)
>>> chooser.choose()
'fast'
"""

from __future__ import annotations

import math
from collections import deque

from thinwire.errors import MisuseError

__all__ = ["AUTO", "CANDIDATES", "LevelChooser"]

AUTO = "auto"
CANDIDATES = ("small", "smallest", "fast")
"""In the order in which they are tried; the first is used while nothing is known."""
_TRIALS = 2  # of each level, before any is preferred; the first compiles kernels
_AGAIN = 32  # patches after which another level is tried once more, the one that was tried least
_KEEP = 8
_LARGE = 1 << 16  # smaller uploads tell of latency, not of the link


class LevelChooser:
    """Learns what each level costs, and chooses.

    ``link_bits_s`` is the rate of the link that counts, in bits a second, if it is known; otherwise it is the best of
    the last uploads of 64 KiB and more.

    Raises:
        MisuseError: ``link_bits_s`` is not a positive number.
    """

    def __init__(self, link_bits_s: float | None = None) -> None:
        if link_bits_s is not None and not (math.isfinite(link_bits_s) and link_bits_s > 0):
            raise MisuseError(f"the link's rate is {link_bits_s!r} bits a second; give a positive number, or None")
        self._given = None if link_bits_s is None else link_bits_s / 8
        self._rates: deque[float] = deque(maxlen=_KEEP)
        self._each: dict[str, deque[float]] = {level: deque(maxlen=_KEEP) for level in CANDIDATES}
        self._bytes: dict[str, deque[float]] = {level: deque(maxlen=_KEEP) for level in CANDIDATES}
        self._used = dict.fromkeys(CANDIDATES, 0)
        self._since = 0
        self._state_bytes = self._changed = 0

    @property
    def link_bytes_s(self) -> float | None:
        """The link's rate, given or measured; None if nothing large has gone up yet."""
        return self._given if self._given is not None else max(self._rates, default=None)

    def encoded(self, level: str, *, state_bytes: int, changed: int, patch_bytes: int, seconds: float) -> None:
        """Note a patch of ``level``: how large the state, how many cells changed, what it took."""
        self._used[level] += 1
        self._since = 0 if level != self._best() else self._since + 1
        self._state_bytes, self._changed = state_bytes, changed
        if state_bytes:
            self._each[level].append(seconds / state_bytes)
        if changed:
            self._bytes[level].append(patch_bytes / changed)

    def sent(self, nbytes: int, seconds: float) -> None:
        """Note that ``nbytes`` went up in ``seconds``."""
        if nbytes >= _LARGE and seconds > 0:
            self._rates.append(nbytes / seconds)

    def expected_s(self, level: str) -> float | None:
        """Seconds from the trainer's call to a reader's verified weights, of a patch like the last; None: unknown."""
        rate = self.link_bytes_s
        if rate is None or not self._each[level] or not self._bytes[level]:
            return None
        size = self._changed * sum(self._bytes[level]) / len(self._bytes[level])
        return 2 * (self._state_bytes * min(self._each[level]) + size / rate)

    def _best(self) -> str:
        known = {level: s for level in CANDIDATES if (s := self.expected_s(level)) is not None}
        return min(known, key=lambda level: known[level]) if len(known) == len(CANDIDATES) else CANDIDATES[0]

    def choose(self) -> str:
        """The level for the next patch."""
        least = min(CANDIDATES, key=lambda level: self._used[level])
        if self._used[least] < _TRIALS:
            return least
        best = self._best()
        if self._since < _AGAIN:
            return best
        return min((level for level in CANDIDATES if level != best), key=lambda level: self._used[level])
