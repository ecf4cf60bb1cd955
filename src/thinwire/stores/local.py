"""A store in a folder: one file per object, written whole or not at all.

How each promise is kept:

- *Whole or not at all.* Bytes go to a file in ``~tmp`` at the root of the store, are synced to disk, and get their
  name in one step. A crash leaves a file in ``~tmp``, which no key can name and no listing shows; the first write
  of a later store on the folder removes those that are more than a day old.
- *Create-only.* The name is given by a hard link, which the file system refuses when the name is taken. File systems
  without hard links (FAT, some FUSE) are asked for a rename that does not replace; where that is missing too, create
  raises UnsafeStoreError. A lock file or ``O_EXCL`` on the final name would not do: a crash in between would block
  the key or show half an object.
- *No way out.* Symbolic links below the root are not followed: a key that leads through one is refused, a listing
  skips it. The root itself may be a link.

Names that differ only by case are one object on file systems that ignore case, and ``a`` and ``a/b`` cannot both be
objects. Use neither.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, final

from thinwire.errors import MisuseError, StoreUnavailableError, ThinwireError, UnsafeStoreError
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

__all__ = ["LocalStore"]

_TEMPORARY = "~tmp"  # "~" is in no key, so no key can name it
_LEFTOVER_AGE_S = 86400.0
_LOOK_EVERY_S = 0.02
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL}
_CALLERS_FAULT = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EXDEV,
}
_RENAME_NOREPLACE = 1
_AT_FDCWD = -100


@final
class LocalStore:
    """Objects as files below ``root``, which the first write makes.

    Any number of processes, on one machine or over a shared file system, may use the same folder.

    Args:
        root: the folder.
        fsync: wait until written objects are on the disk (about 1-10 ms each). Without it, a power cut can lose or
            empty objects that were already acknowledged; a crash of the process alone cannot.

    >>> import tempfile
    >>> store = LocalStore(tempfile.mkdtemp())
    >>> store.create("manifests/1.json", [b"{}"])
    >>> store.create("manifests/1.json", [b"other"])
    Traceback (most recent call last):
    thinwire.errors.ObjectExistsError: manifests/1.json is already in file:///...; it was not written
    >>> [(info.key, info.size) for info in store.list("manifests/")]
    [('manifests/1.json', 2)]
    """

    def __init__(self, root: str | os.PathLike[str], *, fsync: bool = True) -> None:
        self._root = os.path.realpath(root)
        self._fsync = fsync
        self._swept = False

    @property
    def url(self) -> str:
        return Path(self._root).as_uri()

    def get(self, key: str, *, size_max: int) -> bytes:
        with self._opened(key) as (file, size):
            if size > size_max:
                raise too_large(self.url, key, size, size_max)
            return file.read(size)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        check_range(start, length)
        with self._opened(key) as (file, size):
            if start + length > size:
                raise too_short(self.url, key, size, start, length)
            file.seek(start)
            return file.read(length)

    def put(self, key: str, data: Blob) -> None:
        path = self._path(key)
        with self._staged(key, path, data) as temporary:
            os.replace(temporary, path)

    def create(self, key: str, data: Blob) -> None:
        path = self._path(key)
        if os.path.isfile(path):  # spares writing the bytes; the link below is what decides
            raise already_there(self.url, key)
        with self._staged(key, path, data) as temporary:
            try:
                self._name_once(temporary, path)
            except FileExistsError as error:
                if os.path.isdir(path):
                    raise IsADirectoryError(errno.EISDIR, "objects lie below this key", path) from error
                if not os.path.samefile(temporary, path):  # NFS: the link was made, its reply was lost
                    raise already_there(self.url, key) from error

    def wait_for(self, key: str, *, timeout_s: float) -> bool:
        """Looks every few milliseconds: of a folder that is cheap, and it works on network file systems too."""
        path = self._path(key)
        deadline = time.monotonic() + timeout_s
        while not os.path.exists(path):
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(_LOOK_EVERY_S, left))
        return True

    def head(self, key: str) -> ObjectInfo:
        path = self._path(key)
        try:
            found = os.lstat(path)
        except OSError as error:
            raise self._read_error(key, error) from error
        if not stat.S_ISREG(found.st_mode):
            raise not_there(self.url, key)
        return ObjectInfo(key, found.st_size, found.st_mtime)

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        check_list(prefix, start_after)
        return self._walk("", prefix, start_after)

    def delete(self, key: str) -> None:
        path = self._path(key)
        try:
            if stat.S_ISREG(os.lstat(path).st_mode):
                os.unlink(path)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            raise self._write_error(key, error) from error

    # --- reading -----------------------------------------------------------------------------------------------------

    def _path(self, key: str) -> str:
        path = self._root
        for component in check_key(key).split("/"):
            path = os.path.join(path, component)
            if os.path.islink(path):
                raise MisuseError(
                    f"{key} in {self.url} leads through a symbolic link, which is not followed; put the folder itself"
                    " there, or open the store at the link's target",
                    key=key,
                    store=self.url,
                )
        return path

    @contextmanager
    def _opened(self, key: str) -> Iterator[tuple[BinaryIO, int]]:
        """The open file and its size in bytes; what replaces it meanwhile is not seen."""
        # O_NONBLOCK: opening a named pipe somebody left in the folder must not wait for its writer
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        path = self._path(key)
        try:
            with open(os.open(path, flags), "rb") as file:
                found = os.fstat(file.fileno())
                if not stat.S_ISREG(found.st_mode):
                    raise not_there(self.url, key)
                yield file, found.st_size
        except OSError as error:
            raise self._read_error(key, error) from error

    def _walk(self, folder: str, prefix: str, start_after: str) -> Iterator[ObjectInfo]:
        """Objects below ``folder`` ("" or ending in "/") in order of their keys, without entering what cannot match."""
        try:
            with os.scandir(os.path.join(self._root, folder)) as entries:
                # a folder sorts as "name/", which puts what is in it where the keys belong: a-b, a/b, a0
                named = sorted((e.name + "/" if e.is_dir(follow_symlinks=False) else e.name, e) for e in entries)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise self._read_error(folder, error) from error
        for name, entry in named:
            key = folder + name
            if name.endswith("/"):
                may_match = key.startswith(prefix) or prefix.startswith(key)
                may_follow = key > start_after or start_after.startswith(key)
                if may_match and may_follow and is_key(key[:-1]):
                    yield from self._walk(key, prefix, start_after)
            elif key.startswith(prefix) and key > start_after and is_key(key):
                with suppress(FileNotFoundError):  # deleted since the folder was read
                    found = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(found.st_mode):
                        yield ObjectInfo(key, found.st_size, found.st_mtime)

    # --- writing -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _staged(self, key: str, path: str, data: Blob) -> Iterator[str]:
        """A synced temporary file with the bytes, which the caller gives its name; the name is synced afterwards."""
        flat = views(data)
        temporary = os.path.join(self._root, _TEMPORARY, secrets.token_hex(16))
        try:
            self._make_folder(os.path.dirname(temporary))
            self._make_folder(os.path.dirname(path))
            # mode 0o666 less the umask, as for any file: mkstemp's 0o600 would shut other users out of a shared folder
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
            with open(os.open(temporary, flags, 0o666), "wb") as file:
                for view in flat:
                    file.write(view)
                file.flush()
                if self._fsync:
                    os.fsync(file.fileno())
            self._sweep(now_s=os.stat(temporary).st_mtime)
            yield temporary
            self._sync_folder(os.path.dirname(path))
        except OSError as error:
            raise self._write_error(key, error) from error
        finally:
            with suppress(OSError):
                os.unlink(temporary)

    @staticmethod
    def _name_once(temporary: str, path: str) -> None:
        """Give the file its name if the name is free. Raises FileExistsError, UnsafeStoreError."""
        try:
            os.link(temporary, path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            _rename_without_replacing(temporary, path)

    def _make_folder(self, folder: str) -> None:
        missing = []
        while not os.path.isdir(folder):
            missing.append(folder)
            folder = os.path.dirname(folder)
        for folder in reversed(missing):
            try:
                os.mkdir(folder)
            except FileExistsError as error:
                if not os.path.isdir(folder):
                    raise NotADirectoryError(errno.ENOTDIR, "an object has the name of this folder", folder) from error
            self._sync_folder(os.path.dirname(folder))

    def _sync_folder(self, folder: str) -> None:
        if self._fsync and os.name == "posix":
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _sweep(self, now_s: float) -> None:
        """Remove what crashed writers left, once. ``now_s`` is the file system's clock, not ours: it may be remote."""
        if self._swept:
            return
        self._swept = True
        with os.scandir(os.path.join(self._root, _TEMPORARY)) as entries:
            for entry in entries:
                with suppress(OSError):
                    if entry.stat(follow_symlinks=False).st_mtime < now_s - _LEFTOVER_AGE_S:
                        os.unlink(entry.path)

    # --- errors ------------------------------------------------------------------------------------------------------

    def _read_error(self, key: str, error: OSError) -> ThinwireError:
        if error.errno in {errno.ENOENT, errno.ENOTDIR, errno.EISDIR}:
            return not_there(self.url, key)
        return self._write_error(key, error)

    def _write_error(self, key: str, error: OSError) -> ThinwireError:
        what = error.strerror or str(error)
        if error.errno in _CALLERS_FAULT:
            return MisuseError(
                f"cannot use {key} in {self.url}: {what}; check the folder's permissions and names", key=key
            )
        return StoreUnavailableError(f"{key} in {self.url}: {what}; check the disk, then try again", key=key)

    def __repr__(self) -> str:
        return f"LocalStore({self._root!r})"


def _rename_without_replacing(source: str, target: str) -> None:
    """Linux's renameat2 with RENAME_NOREPLACE; on Windows a plain rename already refuses.

    Raises:
        FileExistsError: the target exists.
        UnsafeStoreError: the system or the file system has no such rename.
    """
    if os.name == "nt":
        os.rename(source, target)
        return
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None:
        if rename(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE) == 0:
            return
        number = ctypes.get_errno()
        if number not in {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}:
            raise OSError(number, os.strerror(number), target)
    raise UnsafeStoreError(
        "this file system has neither hard links nor a rename that does not replace, so two publishers could both win"
        " a version; keep the store on another file system",
        path=target,
    )
