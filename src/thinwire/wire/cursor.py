"""Numbers of variable length, and a reader that checks every length against what is left.

>>> out = bytearray()
>>> put_varint(out, 300)
>>> Cursor(memoryview(bytes(out)), "a page").varint(1000)
300
"""

from __future__ import annotations

from thinwire.errors import MalformedError

__all__ = ["Cursor", "put_varint"]

_SHIFT_MAX = 56


def put_varint(out: bytearray, value: int) -> None:
    """Append ``value``, seven bits a byte, the lowest first; all bytes but the last have their highest bit set."""
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)


class Cursor:
    """Reads ``data``, which ``what`` names in errors, from its beginning on; ``at`` is how far it has come."""

    def __init__(self, data: memoryview, what: str) -> None:
        self.data, self.what = data, what
        self.at = 0

    def varint(self, maximum: int) -> int:
        """The next number.

        Raises:
            MalformedError: it has no end, or is larger than ``maximum``.
        """
        value = shift = 0
        while True:
            if self.at >= len(self.data) or shift > _SHIFT_MAX:
                raise MalformedError(f"{self.what} ends inside a number")
            byte = self.data[self.at]
            self.at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        if value > maximum:
            raise MalformedError(f"a number in {self.what} is {value}, at most {maximum} is possible here")
        return value

    def take(self, length: int) -> memoryview:
        """The next ``length`` bytes, which are not copied.

        Raises:
            MalformedError: there are fewer.
        """
        if length > len(self.data) - self.at:
            raise MalformedError(f"{self.what} has {len(self.data) - self.at} bytes left where {length} are announced")
        part = self.data[self.at : self.at + length]
        self.at += length
        return part

    def end(self) -> None:
        """Raises MalformedError if anything is left."""
        if self.at != len(self.data):
            raise MalformedError(f"{self.what} has {len(self.data) - self.at} bytes too many")
