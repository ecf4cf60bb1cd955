"""A store on any file system that fsspec has an adapter for: hf://, ssh://, smb:// and thirty more.

The file systems behind fsspec have little in common, so this store promises less than the others:

- *create is not atomic.* It looks, then writes; ``create_is_atomic`` is False, and a publisher wants to be told that it
  is the only one. S3, Google Cloud Storage, Azure and local folders have stores of their own that do better.
- *Writes are atomic where the adapter's are* (the object stores) *or its rename is* (ssh). On the others a reader may
  see the old object, the new one, or for a moment none; digests in the manifests tell a half one.
- *Several requests a call*: size first, then bytes.
"""

from __future__ import annotations

import posixpath
import re
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, TypeVar, final

from thinwire.errors import MisuseError, ObjectNotFoundError, StoreUnavailableError, ThinwireError
from thinwire.stores.checks import (
    already_there,
    check_list,
    check_range,
    is_key,
    not_there,
    too_large,
    too_short,
    views,
)
from thinwire.stores.protocol import Blob, ObjectInfo, check_key

__all__ = ["FsspecStore"]

RENAMING = {"arrow_hdfs", "file", "ftp", "hdfs", "local", "sftp", "smb", "ssh", "webhdfs"}
"""Protocols whose files are seen while they grow, so that they are written under another name and renamed."""

T = TypeVar("T")


@final
class FsspecStore:
    """Objects as files of an fsspec file system.

    Args:
        url: as fsspec takes it, such as ``hf://datasets/me/weights`` or ``ssh://host/folder``.
        timeout_s: for each call of the adapter, with all its bytes.
        rename: write under a temporary name and rename; by default for the protocols in ``RENAMING``.
        options: the adapter's own arguments (``token``, ``username``, ``key_filename``, ...).

    Raises:
        MisuseError: fsspec or the package of this protocol is not installed, or an argument is wrong.

    >>> store = FsspecStore("memory://docs")
    >>> store.put("a/b", [b"hello"])
    >>> store.get_range("a/b", 1, 3)
    b'ell'
    >>> store.create_is_atomic
    False
    """

    create_is_atomic = False

    def __init__(self, url: str, *, timeout_s: float = 300.0, rename: bool | None = None, **options: Any) -> None:
        scheme = url.partition("://")[0].partition("::")[0]
        self._timeout_s = timeout_s
        self._url = _without_credentials(url)
        try:
            import fsspec
        except ImportError as error:
            raise _unknown(scheme, "and fsspec is not installed: pip install 'thinwire[fsspec]'") from error
        try:
            self._files, root = fsspec.core.url_to_fs(url, **options)
        except ImportError as error:
            raise _unknown(scheme, f"because a package is missing: {error}") from error
        except Exception as error:
            if scheme not in fsspec.available_protocols():
                raise _unknown(scheme, "and fsspec does not know it either") from error
            raise MisuseError(f"cannot open {self._url}: {error}", store=self._url) from error
        self._root = root.rstrip("/")
        self._rename = scheme in RENAMING if rename is None else rename

    @property
    def url(self) -> str:
        return self._url

    def get(self, key: str, *, size_max: int) -> bytes:
        path = self._path(key)
        return self._call(key, lambda: self._read_whole(key, path, self._size(key, path, size_max)))

    def get_range(self, key: str, start: int, length: int) -> bytes:
        path = self._path(key)
        check_range(start, length)

        def read() -> bytes:
            size = self._size(key, path)
            if start + length > size:
                raise too_short(self._url, key, size, start, length)
            return self._read_part(key, path, start, length)

        return self._call(key, read)

    def put(self, key: str, data: Blob) -> None:
        path = self._path(key)
        flat = views(data)
        self._call(key, lambda: self._write_and_rename(key, path, flat) if self._rename else self._write(path, flat))

    def create(self, key: str, data: Blob) -> None:
        """Write an object if none is there: right for one publisher, not for two at once (``create_is_atomic``)."""
        with suppress(ObjectNotFoundError):
            self.head(key)
            raise already_there(self._url, key)
        self.put(key, data)

    def head(self, key: str) -> ObjectInfo:
        path = self._path(key)
        return self._call(key, lambda: _object_info(key, self._info(key, path)))

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        check_list(prefix, start_after)
        folder = posixpath.join(self._root, prefix.rpartition("/")[0]).rstrip("/")

        def find() -> dict[str, dict[str, Any]]:
            self._files.invalidate_cache()
            try:
                found: dict[str, dict[str, Any]] = self._files.find(folder, withdirs=False, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return {}
            return found

        start = len(self._root) + 1
        infos = [_object_info(path[start:], info) for path, info in self._call(prefix, find).items()]
        fitting = (i for i in infos if i.key.startswith(prefix) and i.key > start_after and is_key(i.key))
        return iter(sorted(fitting, key=lambda info: info.key))

    def delete(self, key: str) -> None:
        path = self._path(key)

        def remove() -> None:
            self._info(key, path)
            self._files.rm_file(path)

        with suppress(ObjectNotFoundError):
            self._call(key, remove)

    # --- inside the time limit ---------------------------------------------------------------------------------------

    def _path(self, key: str) -> str:
        return f"{self._root}/{check_key(key)}"

    def _info(self, key: str, path: str) -> dict[str, Any]:
        self._files.invalidate_cache()  # adapters remember listings; another machine writes here
        info: dict[str, Any] = self._files.info(path)
        if info.get("type") != "file":
            raise not_there(self._url, key)
        return info

    def _size(self, key: str, path: str, size_max: int | None = None) -> int:
        size = self._info(key, path).get("size")
        if size is None:
            raise MisuseError(f"{self._url} does not tell the size of {key}; it cannot be read safely", key=key)
        if size_max is not None and size > size_max:
            raise too_large(self._url, key, size, size_max)
        return int(size)

    def _read_whole(self, key: str, path: str, size: int) -> bytes:
        # One byte more than there should be: without it, an object replaced by a longer one since its size was asked
        # would come back cut off, and with no end at all a lying server could fill the memory.
        data = bytes(self._files.cat_file(path, start=0, end=size + 1)) if size else b""
        return self._checked(key, data, size)

    def _read_part(self, key: str, path: str, start: int, length: int) -> bytes:
        data = bytes(self._files.cat_file(path, start=start, end=start + length)) if length else b""
        return self._checked(key, data, length)

    def _checked(self, key: str, data: bytes, expected: int) -> bytes:
        if len(data) != expected:
            raise StoreUnavailableError(
                f"{key} in {self._url} was replaced while being read ({len(data)} bytes, not {expected}); try again",
                key=key,
                actual=len(data),
                expected=expected,
            )
        return data

    def _write(self, path: str, flat: Sequence[memoryview]) -> None:
        # Joined, because an adapter's file object that fails half-way writes what it has when it is closed.
        self._files.pipe_file(path, b"".join(flat))

    def _write_and_rename(self, key: str, path: str, flat: Sequence[memoryview]) -> None:
        temporary = f"{self._root}/~tmp/{secrets.token_hex(16)}"
        for folder in (posixpath.dirname(temporary), posixpath.dirname(path)):
            self._files.makedirs(folder, exist_ok=True)
        if self._files.isdir(path):  # a rename onto a folder would put the file into it
            raise MisuseError(f"{key} in {self._url} is a folder; objects lie below it", key=key)
        try:
            with self._files.open(temporary, "wb") as file:
                for view in flat:
                    file.write(view)
            self._files.mv(temporary, path)
        except BaseException:
            with suppress(Exception):
                self._files.rm_file(temporary)
            raise

    def _call(self, key: str, work: Callable[[], T]) -> T:
        """``work`` in a thread of its own, as few adapters have time-outs: a stuck one must not hold the caller."""
        results: list[T] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                results.append(work())
            except BaseException as error:  # handed to the caller below
                errors.append(error)

        thread = threading.Thread(target=run, name=f"thinwire {self._url}", daemon=True)
        thread.start()
        thread.join(self._timeout_s)
        if errors:
            raise self._translated(key, errors[0]) from errors[0]
        if not results:
            raise StoreUnavailableError(
                f"{key} in {self._url}: no answer within {self._timeout_s} s; try again", key=key
            )
        return results[0]

    def _translated(self, key: str, error: BaseException) -> BaseException:
        if isinstance(error, ThinwireError) or not isinstance(error, Exception):
            return error
        if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
            return not_there(self._url, key)
        what = f"{type(error).__name__}: {str(error)[:300]}"
        if isinstance(error, PermissionError | NotImplementedError | FileExistsError):
            return MisuseError(f"cannot use {key} in {self._url}; check permissions and names ({what})", key=key)
        return StoreUnavailableError(f"{key} in {self._url}: try again ({what})", key=key)

    def __repr__(self) -> str:
        return f"FsspecStore({self._url!r})"


def _object_info(key: str, info: dict[str, Any]) -> ObjectInfo:
    when: Any = 0.0
    for name in ("mtime", "LastModified", "last_modified", "updated", "created", "modified"):
        if info.get(name) is not None:
            when = info[name]
            break
    if isinstance(when, str):
        when = datetime.fromisoformat(when)
    if isinstance(when, datetime):
        when = (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
    return ObjectInfo(key, int(info.get("size") or 0), float(when))


def _without_credentials(url: str) -> str:
    return re.sub(r"://[^/]*@", "://", re.sub(r"[?#].*", "", url))


def _unknown(scheme: str, why: str) -> MisuseError:
    from thinwire.stores.opening import KNOWN

    return MisuseError(f"no store for '{scheme}://', {why}; known: {KNOWN}", scheme=scheme)
