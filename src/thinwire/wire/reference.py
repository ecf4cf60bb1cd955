"""The readable decoder: the format of ``docs/spec/v1.md`` in plain Python, with no NumPy, no kernels and no speed.

It is the oracle that the fast decoder must equal, and a starting point for other languages. It trusts its input: the
checks of a hostile one are the fast decoder's.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Bits", "DecodedSegment", "apply_code", "decode_segment", "decode_stream"]

CHUNK = 65_536
LOW = 1 << 15


@dataclass
class Bits:
    """Reads bits from bytes, the lowest bit of each byte first."""

    data: bytes
    at: int

    def take(self, count: int) -> int:
        value = 0
        for j in range(count):
            value |= (self.data[self.at >> 3] >> (self.at & 7) & 1) << j
            self.at += 1
        return value

    def unary(self) -> int:
        zeros = 0
        while self.take(1) == 0:
            zeros += 1
        return zeros


def _table(data: bytes, at: int) -> tuple[int, int, list[int], int]:
    """Mantissa bits, precision, frequencies, and the byte behind the table."""
    bits = Bits(data, at * 8)
    mantissa, precision, k = bits.take(3), bits.take(4), bits.take(3)
    frequencies = []
    for _ in range(bits.take(10) + 1):
        n = bits.unary()
        high = (1 << n) + bits.take(n) - 1
        frequencies.append(high << k | bits.take(k))
    return mantissa, precision, frequencies, (bits.at + 7) // 8


def _chunk(data: bytes, at: int, count: int) -> tuple[list[int], int]:
    mantissa, precision, frequencies, at = _table(data, at)
    lanes = 8 if count >= 2048 else 1
    words = int.from_bytes(data[at : at + 3], "little")
    at += 3
    states = [int.from_bytes(data[at + 4 * lane : at + 4 * lane + 4], "little") for lane in range(lanes)]
    at += 4 * lanes
    starts: list[int] = []
    slots: list[int] = []
    for symbol, frequency in enumerate(frequencies):
        starts.append(len(slots))
        slots += [symbol] * frequency
    symbols = []
    for i in range(count):
        x = states[i % lanes]
        slot = x % (1 << precision)
        symbol = slots[slot]
        x = frequencies[symbol] * (x >> precision) + slot - starts[symbol]
        if x < LOW:
            x = x << 16 | int.from_bytes(data[at : at + 2], "little")
            at += 2
            words -= 1
        states[i % lanes] = x
        symbols.append(symbol)
    if words or states != [LOW] * lanes:
        raise ValueError("damaged chunk")
    bits = Bits(data, at * 8)
    values = []
    for symbol in symbols:
        extra = max((symbol >> mantissa) - 1, 0)
        values.append((symbol - (extra << mantissa)) << extra | bits.take(extra))
    return values, (bits.at + 7) // 8


def decode_stream(data: bytes, count: int) -> list[int]:
    """``count`` unsigned integers from an entropy-coded stream.

    >>> from thinwire.wire import rans
    >>> import numpy as np
    >>> decode_stream(rans.encode(np.array([5, 0, 1 << 40], np.uint64)), 3)
    [5, 0, 1099511627776]
    """
    values: list[int] = []
    at = 0
    while len(values) < count:
        chunk, at = _chunk(data, at, min(CHUNK, count - len(values)))
        values += chunk
    if at != len(data):
        raise ValueError("bytes behind the stream")
    return values


@dataclass
class DecodedSegment:
    """Changed positions with their stored integers, or all new cells as bytes (``raw``)."""

    positions: list[int]
    codes: list[int]
    raw: bytes | None = None


class _Parts:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 1

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.data[self.at]
            self.at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    def stream(self, count: int) -> list[int]:
        length = self.varint()
        self.at += length
        return decode_stream(self.data[self.at - length : self.at], count)

    def number(self, width: int) -> int:
        self.at += width
        return int.from_bytes(self.data[self.at - width : self.at], "little")

    def packed(self, count: int, item: int) -> list[int]:
        self.varint()  # the length, which the rest says as well
        width = self.number(1)
        exceptions = self.varint()
        values = [self.number(width) for _ in range(count)]
        indices = [self.number(4) for _ in range(exceptions)]
        for index in indices:
            values[index] = self.number(item)
        return values


def decode_segment(data: bytes, changed: int, base: list[int], cell_bits: int, mantissa_bits: int) -> DecodedSegment:
    """A segment over the old cells ``base``; ``mantissa_bits`` is that of its float type (context only)."""
    if data[0] == 0:
        return DecodedSegment([], [], data[1:])
    parts = _Parts(data)
    if data[0] == 1:
        return DecodedSegment(_places(parts.stream(changed)), parts.stream(changed))
    if data[0] == 3:
        return DecodedSegment(_places(parts.packed(changed, 4)), parts.packed(changed, cell_bits // 8))
    bounds = [parts.varint() for _ in range(parts.varint())]
    counts = [parts.varint() for _ in range(len(bounds) + 1)]
    streams = [(parts.stream(n), parts.stream(n)) for n in counts]
    cold_gaps, cold_codes = streams.pop()
    found = dict(zip(_places(cold_gaps), cold_codes, strict=True))
    members: list[list[int]] = [[] for _ in bounds]
    for position, cell in enumerate(base):
        exponent = (cell & ((1 << (cell_bits - 1)) - 1)) >> mantissa_bits
        if exponent <= bounds[-1]:
            members[next(k for k, bound in enumerate(bounds) if exponent <= bound)].append(position)
    for member, (gaps, codes) in zip(members, streams, strict=True):
        found.update({member[i]: code for i, code in zip(_places(gaps), codes, strict=True)})
    return DecodedSegment(sorted(found), [found[p] for p in sorted(found)])


def _places(gaps: list[int]) -> list[int]:
    places, following = [], 0
    for gap in gaps:
        places.append(following + gap)
        following += gap + 1
    return places


def apply_code(old: int, code: int, bits: int, *, is_float: bool, values: str) -> int:
    """The new cell from the old one and the stored integer."""
    if values == "absolute":
        return code if not is_float else code >> 1 | (code & 1) << (bits - 1)
    sign, all_bits = 1 << (bits - 1), 1 << bits

    def flipped(cell: int) -> int:
        return cell ^ (sign - 1) if is_float and cell & sign else cell

    step = code // 2 if code % 2 == 0 else -(code // 2) - 1
    return flipped((flipped(old) + step) % all_bits)
