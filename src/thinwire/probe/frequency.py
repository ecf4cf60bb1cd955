"""How often each weight changes, and whether the same ones do: counters, masks, and the overlap of masks.

A mask is a bit an element in words of 64, the lowest bit first, as :func:`thinwire.probe.changes.compare` fills them.

>>> counts = ChangeFrequency(5)
>>> for positions in ([0, 1], [1, 2], [1]):
...     counts.update(words_of(np.array(positions), 5))
>>> counts.counts.tolist(), counts.hot(0.5).tolist(), counts.recurrence
([1, 3, 1, 0, 0], [1], 0.5)
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from thinwire.errors import MalformedError, MisuseError
from thinwire.probe.changes import Words
from thinwire.wire.positions import gaps_of, positions_of

__all__ = [
    "ChangeFrequency", "expected_jaccard", "jaccard", "load_masks", "positions_in", "save_masks", "words_of",
]  # fmt: skip

_MOST = np.iinfo(np.uint16).max
_DENSE = 8  # elements a change below which a bit for each is smaller than gaps
_BLOCK = 1 << 20
_EXPANSION_MAX = 1 << 31


def _bits(words: Words, elements: int) -> npt.NDArray[np.bool_]:
    return np.unpackbits(words.view(np.uint8), count=elements, bitorder="little").view(np.bool_)


def positions_in(words: Words, elements: int) -> npt.NDArray[np.int64]:
    """The positions set in a mask, increasing.

    Raises:
        MisuseError: the mask is not of so many elements.
    """
    if words.size != -(-elements // 64):
        raise MisuseError(f"{elements} elements take {-(-elements // 64)} words, not {words.size}")
    return np.flatnonzero(_bits(words, elements)) if elements else np.empty(0, np.int64)


def words_of(positions: npt.NDArray[np.integer[Any]], elements: int) -> Words:
    """The mask of increasing positions below ``elements``: the inverse of :func:`positions_in`."""
    bits = np.zeros(-(-elements // 64) * 64, np.bool_)
    bits[positions] = True
    return np.packbits(bits, bitorder="little").view(np.uint64)


def _ones(words: Words) -> int:
    return int(np.bitwise_count(words).sum())


def jaccard(a: Words, b: Words) -> float:
    """The share of the elements set in either mask that are set in both; 1 of two empty masks.

    Raises:
        MisuseError: masks of different lengths.

    >>> jaccard(words_of(np.array([1, 2]), 9), words_of(np.array([2, 3]), 9))
    0.3333333333333333
    """
    if a.size != b.size:
        raise MisuseError(f"masks of {a.size} and {b.size} words are of different tensors")
    union = _ones(a | b)
    return _ones(a & b) / union if union else 1.0


def expected_jaccard(elements: int, a: int, b: int) -> float:
    """The mean of :func:`jaccard` over independent random sets of ``a`` and ``b`` of the elements.

    Exact: the intersection is hypergeometric. Terms beyond 12 standard deviations of it are left out.

    >>> round(expected_jaccard(3, 1, 2), 4), round(expected_jaccard(10**9, 10**7, 10**7), 4)
    (0.3333, 0.005)
    """
    if not 0 <= a <= elements or not 0 <= b <= elements:
        raise MisuseError(f"sets of {a} and {b} do not lie in {elements} elements")
    if not a or not b:
        return 1.0 if a == b else 0.0
    mean = a * b / elements
    spread = 12 * (mean * (1 - a / elements) * (1 - b / elements)) ** 0.5 + 12
    low, high = max(0, a + b - elements, int(mean - spread)), min(a, b, int(mean + spread) + 1)
    shared = np.arange(low, high + 1, dtype=np.float64)
    x = shared[:-1]
    ratios = np.log((a - x) * (b - x)) - np.log((x + 1) * (elements - a - b + x + 1))
    logs = np.concatenate([[0.0], np.cumsum(ratios)])
    weights = np.exp(logs - logs.max())
    return float((weights * shared / (a + b - shared)).sum() / weights.sum())


class ChangeFrequency:
    """How often each of ``elements`` changed: ``counts`` [n, uint16], which stay at 65,535, in ``steps`` steps."""

    def __init__(self, elements: int) -> None:
        self.elements, self.steps = elements, 0
        self.counts: npt.NDArray[np.uint16] = np.zeros(elements, np.uint16)
        self._last: Words = np.zeros(-(-elements // 64), np.uint64)
        self._last_size = self._repeated = self._repeatable = 0
        self.consecutive_jaccard = 0.0
        """The overlap of the last two steps' changes."""

    def update(self, words: Words) -> None:
        """Count the changes of a step, given as a mask of the elements."""
        if words.size != self._last.size:
            raise MisuseError(f"{self.elements} elements take {self._last.size} words, not {words.size}")
        for start in range(0, self.elements, _BLOCK):
            size = min(_BLOCK, self.elements - start)
            bits = _bits(words[start // 64 : -(-(start + size) // 64)], size)
            part = self.counts[start : start + size]
            part += bits & (part < _MOST)
        if self.steps:
            self.consecutive_jaccard = jaccard(words, self._last)
            self._repeated += _ones(words & self._last)
            self._repeatable += self._last_size
        np.copyto(self._last, words)
        self._last_size = _ones(words)
        self.steps += 1

    def hot(self, share: float = 0.5) -> npt.NDArray[np.int64]:
        """The positions that changed in more than ``share`` of the steps."""
        return np.flatnonzero(self.counts > share * self.steps)

    @property
    def recurrence(self) -> float:
        """The probability that a weight that changed changes again in the next step; 0 if none was followed."""
        return self._repeated / self._repeatable if self._repeatable else 0.0

    @property
    def nbytes(self) -> int:
        """Bytes kept."""
        return self.counts.nbytes + self._last.nbytes

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` takes."""
        numbers = [self.steps, self._last_size, self._repeated, self._repeatable]
        return {"counts": self.counts.copy(), "last": self._last.copy(), "numbers": numbers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another was.

        Raises:
            MisuseError: it counted another number of elements.
        """
        if state["counts"].shape != self.counts.shape or state["last"].shape != self._last.shape:
            raise MisuseError(f"the saved counters are of {state['counts'].shape}, these of {self.counts.shape}")
        self.counts, self._last = state["counts"].copy(), state["last"].copy()
        self.steps, self._last_size, self._repeated, self._repeatable = state["numbers"]


# --- files ------------------------------------------------------------------------------------------------------------


def _gap_bytes(positions: npt.NDArray[np.int64]) -> bytes:
    """Gaps as bytes, 255 standing for 255 and more to come."""
    gaps = gaps_of(positions.astype(np.uint32), 0).astype(np.int64)
    whole, rest = gaps // 255, gaps % 255
    out = np.full(int((whole + 1).sum()), 255, np.uint8)
    out[np.cumsum(whole + 1) - 1] = rest
    return out.tobytes()


def save_masks(path: str | os.PathLike[str], masks: Mapping[str, tuple[Words, int]]) -> None:
    """Save masks, with their numbers of elements, by name; sparse ones take about a byte a change. One rename ends it.

    Raises:
        MisuseError: a mask not of its number of elements, or of 2^32 elements or more.
    """
    arrays: dict[str, Any] = {"names": np.array(list(masks), dtype=np.str_)}
    for k, (words, elements) in enumerate(masks.values()):
        if elements >= 1 << 32:
            raise MisuseError(f"{elements} elements are too many for one mask; split the tensor")
        positions = positions_in(words, elements)
        dense = positions.size * _DENSE > elements
        data = np.packbits(_bits(words, elements), bitorder="little").tobytes() if dense else _gap_bytes(positions)
        arrays[f"{k}.about"] = np.array([elements, positions.size, dense, len(data)], np.int64)
        arrays[f"{k}.data"] = np.frombuffer(zstandard.compress(data, 3), np.uint8)
    target = Path(path)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            np.savez(file, **arrays)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def load_masks(path: str | os.PathLike[str]) -> dict[str, tuple[Words, int]]:
    """The masks that :func:`save_masks` saved.

    Raises:
        MalformedError: the file is not one of masks, or is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {str(name): _mask(file[f"{k}.about"], file[f"{k}.data"]) for k, name in enumerate(file["names"])}
    except (ValueError, KeyError, OSError, EOFError, zstandard.ZstdError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise MalformedError(f"{path} holds no masks: {error}") from error
    except Exception as error:  # zipfile's own
        raise MalformedError(f"{path} holds no masks: {error}") from error


def _mask(about: npt.NDArray[np.int64], packed: npt.NDArray[np.uint8]) -> tuple[Words, int]:
    elements, changed, dense, size = (int(value) for value in about)
    if not 0 <= changed <= elements < 1 << 32 or not 0 <= size < _EXPANSION_MAX:
        raise MalformedError(f"a mask of {changed} changes in {elements} elements")
    data = np.frombuffer(zstandard.decompress(packed.tobytes(), max_output_size=size), np.uint8)
    if data.size != size:
        raise MalformedError(f"a mask of {data.size} bytes instead of {size}")
    if dense:
        if size != -(-elements // 8):
            raise MalformedError(f"a mask of {size} bytes for {elements} elements")
        positions = np.flatnonzero(np.unpackbits(data, count=elements, bitorder="little"))
    else:
        ends = np.flatnonzero(data != 255)
        sums = np.concatenate([[0], np.cumsum(data.astype(np.int64))])
        gaps = np.diff(np.concatenate([[0], sums[ends + 1]]))
        if ends.size != changed or (size and data[-1] == 255) or (gaps >= 1 << 32).any():
            raise MalformedError(f"a mask of {ends.size} changes instead of {changed}")
        positions = positions_of(gaps.astype(np.uint32), 0, elements).astype(np.int64)
    if positions.size != changed:
        raise MalformedError(f"a mask of {positions.size} changes instead of {changed}")
    return words_of(positions, elements), elements
