"""What every store checks alike, before it touches anything: prefixes, ranges, size limits, the buffers of a blob."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from thinwire.errors import DamagedObjectError, MisuseError, ObjectExistsError, ObjectNotFoundError
from thinwire.stores.protocol import KEY_LENGTH_MAX, Blob, check_key

__all__ = [
    "already_there",
    "check_list",
    "check_range",
    "is_key",
    "not_there",
    "slices",
    "too_large",
    "too_short",
    "views",
]

_PREFIX = re.compile(r"[A-Za-z0-9._/-]*", re.ASCII)


def is_key(name: str) -> bool:
    """Whether ``name`` is a valid key. A listing skips what is not: nothing of ours can be stored under it.

    >>> is_key("manifests/12.json"), is_key("my notes.txt")
    (True, False)
    """
    try:
        check_key(name)
    except MisuseError:
        return False
    return True


def check_list(prefix: str, start_after: str) -> None:
    """Refuse a listing of what no key can begin with (``../``, ``/etc``, ``a//``) or sort after.

    Raises:
        MisuseError: ``prefix`` or ``start_after`` is not the beginning of a valid key.
    """
    for text in (prefix, start_after):
        folders = text.split("/")[:-1]
        fine = len(text) <= KEY_LENGTH_MAX and _PREFIX.fullmatch(text) and not {"", ".", ".."} & set(folders)
        if not fine:
            raise MisuseError(
                f"no valid key begins with {text[:80]!r}; use '/'-separated components of A-Z a-z 0-9 . _ -",
                prefix=text[:80],
            )


def check_range(start: int, length: int) -> None:
    """Raises MisuseError when ``start`` or ``length`` is negative."""
    if start < 0 or length < 0:
        raise MisuseError(f"a range needs start >= 0 and length >= 0, not {start} and {length}")


def views(data: Blob) -> list[memoryview]:
    """The buffers of a blob as flat views of bytes, without the empty ones. Nothing is copied.

    Raises:
        MisuseError: ``data`` is one buffer instead of a sequence of them, or a buffer is not contiguous.

    >>> [bytes(view) for view in views([b"ab", b"", bytearray(b"c")])]
    [b'ab', b'c']
    """
    if isinstance(data, bytes | bytearray | memoryview | str):
        raise MisuseError(f"an object's data is a sequence of buffers: write [data] instead of a {type(data).__name__}")
    flat = []
    for buffer in data:
        try:
            view = memoryview(buffer)
            if view.nbytes:
                flat.append(view.cast("B"))
        except TypeError as error:
            raise MisuseError(f"not a contiguous buffer of bytes: {type(buffer).__name__} ({error})") from error
    return flat


def slices(flat: Sequence[memoryview], slice_bytes: int) -> Iterator[memoryview]:
    """The same bytes in views of at most ``slice_bytes`` each, so that a huge buffer is never copied whole.

    >>> [bytes(piece) for piece in slices([memoryview(b"abcde"), memoryview(b"f")], 2)]
    [b'ab', b'cd', b'e', b'f']
    """
    for view in flat:
        for start in range(0, len(view), slice_bytes):
            yield view[start : start + slice_bytes]


# --- one wording for every store ---------------------------------------------------------------------------------


def not_there(url: str, key: str) -> ObjectNotFoundError:
    return ObjectNotFoundError(f"no object {key} in {url}", key=key, store=url)


def already_there(url: str, key: str) -> ObjectExistsError:
    return ObjectExistsError(f"{key} is already in {url}; it was not written", key=key, store=url)


def too_large(url: str, key: str, size: int, size_max: int) -> DamagedObjectError:
    return DamagedObjectError(
        f"{key} in {url} has {size} bytes, {size_max} were expected at most; it was not read",
        key=key,
        store=url,
        actual=size,
        expected=size_max,
    )


def too_short(url: str, key: str, size: int | None, start: int, length: int) -> DamagedObjectError:
    has = "fewer bytes" if size is None else f"{size} bytes"
    return DamagedObjectError(
        f"{key} in {url} has {has}; bytes {start} to {start + length} were asked for",
        key=key,
        store=url,
        actual=size,
        expected=start + length,
    )
