"""Files written whole or not at all, copied in the kernel, and mapped into memory.

Imports no torch, so that what only looks at headers starts fast.
"""

from __future__ import annotations

import mmap
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from thinwire.errors import MisuseError

__all__ = [
    "Stages",
    "check_target",
    "copy_bytes",
    "map_private",
    "map_shared",
    "stage_of",
    "staged_file",
    "staged_folder",
    "write_bytes",
    "write_file",
]

Stages = Callable[[str, int, int], None]
"""Called with the name of a stage (``hash``, ``diff``, ``copy``, ``apply``, ``write``, ``fetch``), the bytes of it that
are done, and the bytes in all; from any thread."""

_PIECE_BYTES = 32 << 20
# Not in Python 3.11's mmap. Without it Linux refuses a private map of a file that is larger than the memory, though
# only the pages that are written ever need any.
_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0


def stage_of(stages: Stages | None, name: str) -> Callable[[int, int], None] | None:
    """The callback for one stage: called with bytes done and bytes in all."""
    return None if stages is None else partial(stages, name)


def map_private(path: Path) -> mmap.mmap:
    """The file as memory; what is written to it stays in this process. The file must not shrink meanwhile."""
    with open(path, "rb") as file:
        if os.name != "posix":
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        flags = mmap.MAP_PRIVATE | _NO_RESERVE
        return mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def map_shared(path: Path) -> mmap.mmap:
    """The file as memory; what is written to it is written to the file (``flush()`` waits for the disk)."""
    with open(path, "r+b") as file:
        return mmap.mmap(file.fileno(), 0)


def check_target(out: Path) -> None:
    """Find out now, and not after minutes of work, that ``out`` cannot be written.

    Raises:
        MisuseError: it is a folder, its own folder is not there, or may not be written to.
    """
    parent = out.absolute().parent
    if not parent.is_dir():
        raise MisuseError(f"cannot write {out}: there is no folder {parent}", path=str(out))
    if not os.access(parent, os.W_OK | os.X_OK):
        raise MisuseError(f"cannot write {out}: no permission to write in {parent}", path=str(out))


@contextmanager
def staged_file(out: Path) -> Iterator[Path]:
    """A path beside ``out`` to write to, which takes its place at the end; on any error it is removed instead.

    Whoever writes it also syncs it (:func:`write_bytes` does); here only the name is synced.
    """
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(6)}.tmp")
    try:
        yield temporary
        os.replace(temporary, out)
        _sync_folder(out.absolute().parent)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


@contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """A new folder beside ``out`` to fill, which takes its place at the end; on any error it is removed instead.

    An ``out`` that is there with something in it is first renamed to ``.NAME.<random>.old`` and then deleted: for a
    moment there is no ``out``, but never a mixture.
    """
    out = out.resolve()
    mark = secrets.token_hex(6)
    temporary, aside = out.with_name(f".{out.name}.{mark}.tmp"), out.with_name(f".{out.name}.{mark}.old")
    temporary.mkdir()
    try:
        yield temporary
        for folder, _, _ in os.walk(temporary):
            _sync_folder(Path(folder))
        if out.is_dir() and any(out.iterdir()):
            out.rename(aside)
        try:
            temporary.rename(out)
        except BaseException:
            if aside.exists():
                aside.rename(out)
            raise
        _sync_folder(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def write_bytes(
    path: Path, buffers: Sequence[bytes | memoryview], *, progress: Callable[[int, int], None] | None = None
) -> None:
    """Write a new file and wait until it is on the disk."""
    total, done = sum(len(b) for b in buffers), 0
    with open(path, "xb") as file:
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            for start in range(0, len(view), _PIECE_BYTES):
                done += file.write(view[start : start + _PIECE_BYTES])
                if progress is not None:
                    progress(done, total)
        file.flush()
        os.fsync(file.fileno())


def write_file(out: Path, buffers: Sequence[bytes | memoryview], *, stages: Stages | None = None) -> None:
    """Write ``out`` whole or not at all.

    Raises:
        MisuseError: its folder is not there, or may not be written to.
    """
    check_target(out)
    with staged_file(out) as temporary:
        write_bytes(temporary, buffers, progress=stage_of(stages, "write"))


def copy_bytes(source: Path, target: Path, *, progress: Callable[[int, int], None] | None = None) -> None:
    """Copy a file's bytes to a new file, without passing them through this process where the system can.

    File systems that share blocks between files copy nothing. The caller syncs.
    """
    with open(source, "rb") as reader, open(target, "xb") as writer:
        total, done, in_kernel = os.fstat(reader.fileno()).st_size, 0, hasattr(os, "copy_file_range")
        while True:
            count = 0
            if in_kernel:
                try:
                    count = os.copy_file_range(reader.fileno(), writer.fileno(), _PIECE_BYTES, done, done)
                except OSError:
                    in_kernel = False  # between file systems, or one that cannot
            if not in_kernel:
                reader.seek(done)
                writer.seek(done)
                count = writer.write(reader.read(_PIECE_BYTES))
                writer.flush()
            done += count
            if progress is not None:
                progress(done, max(total, done))
            if count == 0:
                return


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
