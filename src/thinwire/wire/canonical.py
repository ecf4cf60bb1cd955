"""Canonical JSON: one byte string for one value, and a parser that accepts only that one.

Objects have sorted keys, no blanks, ASCII with ``\\u`` escapes; numbers are integers. Two documents are equal if and
only if their bytes are, so a digest over the bytes is a digest of the content.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

from thinwire.errors import MalformedError
from thinwire.wire.spec import JSON_DEPTH_MAX

__all__ = ["dump", "parse"]


def dump(value: Any) -> bytes:
    """The canonical bytes of a value made of dict, list, str, int, bool and None.

    >>> dump({"b": 1, "a": [True, None]})
    b'{"a":[true,null],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode("ascii")


def _no_float(text: str) -> NoReturn:
    raise MalformedError(f"numbers must be integers, not {text[:40]}")


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise MalformedError("a JSON object names a key twice")
    return found


def _check_depth(data: bytes) -> None:
    depth = 0
    for byte in data:  # strings may hold brackets too: that only makes the check stricter, by the depth they fake
        if byte in b"[{":
            depth += 1
            if depth > JSON_DEPTH_MAX:
                raise MalformedError(f"JSON is nested deeper than {JSON_DEPTH_MAX}")
        elif byte in b"]}":
            depth -= 1


def parse(data: bytes, *, bytes_max: int, canonical: bool = True) -> Any:
    """Parse JSON, by default only in its canonical form.

    Raises:
        MalformedError: too long, too deep, not JSON, not canonical, or with a number that is no integer.
    """
    if len(data) > bytes_max:
        raise MalformedError(f"JSON of {len(data)} bytes is beyond the bound of {bytes_max}", bytes=len(data))
    if data.count(b"[") + data.count(b"{") > JSON_DEPTH_MAX:
        _check_depth(data)
    try:
        value = json.loads(data, parse_float=_no_float, parse_constant=_no_float, object_pairs_hook=_pairs)
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"not JSON: {error}") from error
    if canonical and dump(value) != data:
        raise MalformedError("JSON is not in canonical form")
    return value
