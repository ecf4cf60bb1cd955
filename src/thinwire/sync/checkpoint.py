"""Checkpoints on disk: a safetensors file, or a folder as Hugging Face lays it out; opened by mapping, written whole.

========================================  =============================================================================
a file                                    its tensors
a folder with ``model.safetensors``       those of this file
with ``model.safetensors.index.json``     those of the shards that the index names
with other ``*.safetensors``              those of all of them
========================================  =============================================================================

Names of tied tensors are read from the metadata key ``thinwire.aliases``, as anchors have it. Headers are read without
torch; it is imported by what touches tensors.

A file that is open must not be changed in place by anyone else. Replacing it (as everything here does) is harmless.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from thinwire.errors import DamagedObjectError, MalformedError, MisuseError, ObjectNotFoundError, RefuseError
from thinwire.sync.files import Stages, map_private, stage_of
from thinwire.wire.container import PREFIX_BYTES, Entry, Header, header_length, parse_header
from thinwire.wire.digests import Tree, check_name, tensor_digest
from thinwire.wire.spec import FORMAT_PATCH, HEADER_BYTES_MAX, dtype_of

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from thinwire.sync.encode import Options
    from thinwire.sync.layout import MemorySource
    from thinwire.wire.patch import Patch

__all__ = [
    "ALIASES_KEY",
    "INDEX_NAME",
    "Checkpoint",
    "WeightFile",
    "cells_in",
    "diff_checkpoints",
    "open_checkpoint",
    "read_header",
    "tensors_of",
    "tree_of_checkpoint",
]

ALIASES_KEY = "thinwire.aliases"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A safetensors file and its parsed header."""

    path: Path
    header: Header

    @property
    def names(self) -> list[str]:
        """The tensors in the order of their bytes."""
        entries = self.header.entries
        return sorted(entries, key=lambda name: (entries[name].start, entries[name].stop))


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The headers of a checkpoint. ``index`` is the parsed index file of a sharded one, else None."""

    path: Path
    files: tuple[WeightFile, ...]
    aliases: Mapping[str, str]
    index: Mapping[str, Any] | None = None

    @property
    def is_folder(self) -> bool:
        """Whether ``path`` is a folder."""
        return not (len(self.files) == 1 and self.files[0].path == self.path)

    @property
    def tensors(self) -> dict[str, Entry]:
        """All tensors by name, in order of their names."""
        found = {name: entry for file in self.files for name, entry in file.header.entries.items()}
        return dict(sorted(found.items()))

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.stop - entry.start for entry in self.tensors.values())

    def map(self) -> MemorySource:
        """The tensors' cells as memory. They may be written: that stays in this process.

        Raises:
            DamagedObjectError: a file has another size than when it was opened.
        """
        from thinwire.sync.layout import Layout, MemorySource

        cells: dict[str, npt.NDArray[np.unsignedinteger]] = {}
        for file in self.files:
            data = map_private(file.path)
            if len(data) != file.header.file_bytes:
                raise DamagedObjectError(f"{file.path} was changed while it was being read", path=str(file.path))
            for name in file.header.entries:
                found = cells_in(data, file.header, name)
                cells[name] = found if found.flags.aligned else found.copy()
        layouts = {name: Layout(dtype_of(entry.dtype), entry.shape) for name, entry in self.tensors.items()}
        return MemorySource(layouts, cells, self.aliases)


def cells_in(data: Any, header: Header, name: str) -> npt.NDArray[np.unsignedinteger]:
    """A tensor's cells as a view of its file's bytes; not aligned if its bytes are not."""
    import numpy as np

    entry = header.entries[name]
    kind = dtype_of(entry.dtype).cells
    count = (entry.stop - entry.start) // kind.itemsize
    if count == 0:
        return np.empty(0, kind)
    return np.frombuffer(data, kind, count=count, offset=header.data_start + entry.start)


@contextmanager
def _about(path: Path) -> Iterator[None]:
    """Say which file a refusal is about."""
    try:
        yield
    except RefuseError as error:
        raise type(error)(f"{path}: {error}", **{**error.facts, "path": str(path)}) from error


def read_header(path: Path) -> Header:
    """The header of a safetensors file, read as hostile input.

    Raises:
        MisuseError: there is no such file, or it is something else than a file.
        MalformedError: it is not a safetensors file, or a damaged one.
        UnsupportedError: a tensor has a data type unknown here.
    """
    if not path.exists():
        raise MisuseError(f"there is no file {path}", path=str(path))
    with _about(path), open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise MisuseError(f"{path} is not a file", path=str(path))
        length = header_length(file.read(PREFIX_BYTES), found.st_size)
        return parse_header(file.read(length), found.st_size)


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read the headers of a checkpoint; no tensor is read yet.

    Raises:
        MisuseError: there is no such file or folder, it holds no safetensors file, or is a patch.
        ObjectNotFoundError: the index names a shard that is not there.
        MalformedError: a file is damaged, two hold a tensor of the same name, or the index contradicts its shards.
        UnsupportedError: a tensor has a data type unknown here.

    >>> import tempfile, torch
    >>> from safetensors.torch import save_file
    >>> name = tempfile.mkdtemp() + "/model.safetensors"
    >>> save_file({"w": torch.ones(3, dtype=torch.bfloat16)}, name)
    >>> checkpoint = open_checkpoint(name)
    >>> checkpoint.size, checkpoint.tensors["w"].shape, checkpoint.map().cells["w"].tolist()
    (6, (3,), [16256, 16256, 16256])
    """
    where = Path(path)
    if not where.is_dir():
        files: tuple[WeightFile, ...] = (WeightFile(where, read_header(where)),)
        index = None
    else:
        files, index = _open_folder(where)
    for file in files:
        if file.header.metadata.get("format") == FORMAT_PATCH:
            raise MisuseError(f"{file.path} is a patch, not a checkpoint", path=str(file.path))
    holders: dict[str, Path] = {}
    aliases: dict[str, str] = {}
    for file in files:
        for name in file.header.entries:
            if name in holders:
                raise MalformedError(f"{holders[name]} and {file.path} both hold a tensor {name[:80]!r}", tensor=name)
            holders[name] = file.path
        with _about(file.path):
            aliases.update(_read_aliases(file.header.metadata.get(ALIASES_KEY, "{}")))
    for alias, name in aliases.items():
        if alias in holders or name not in holders:
            raise MalformedError(f"{where}: alias {alias[:80]!r} is a tensor itself or leads to none")
    if index is not None:
        _check_index(where / INDEX_NAME, index["weight_map"], holders)
    return Checkpoint(where, files, aliases, index)


def _open_folder(folder: Path) -> tuple[tuple[WeightFile, ...], dict[str, Any] | None]:
    single, index_path = folder / SINGLE_NAME, folder / INDEX_NAME
    if single.exists():
        return (WeightFile(single, read_header(single)),), None
    if not index_path.exists():
        paths = sorted(p for p in folder.iterdir() if p.name.endswith(SUFFIX) and not p.name.startswith("."))
        if not paths:
            raise MisuseError(f"{folder} is a folder without *.safetensors, so not a checkpoint", path=str(folder))
        return tuple(WeightFile(p, read_header(p)) for p in paths), None
    with _about(index_path):
        index = _read_index(index_path)
    files = []
    for name in sorted(set(index["weight_map"].values())):
        if not (folder / name).exists():
            raise ObjectNotFoundError(
                f"{index_path} names the shard {name}, which is not there; get it again", path=str(folder / name)
            )
        files.append(WeightFile(folder / name, read_header(folder / name)))
    return tuple(files), index


def _read_index(path: Path) -> dict[str, Any]:
    if path.stat().st_size > HEADER_BYTES_MAX:
        raise MalformedError("the index is too large")
    try:
        index = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"the index is not JSON: {error}") from error
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise MalformedError("the index has no weight_map")
    for name in shards.values():
        plain = isinstance(name, str) and name.endswith(SUFFIX) and name == os.path.basename(name)
        if not plain or name.startswith(".") or "\\" in name or "\0" in name:
            raise MalformedError(f"the index names a shard {str(name)[:80]!r}, which is no file beside it")
    return dict(index)


def _check_index(path: Path, shards: Mapping[str, str], holders: Mapping[str, Path]) -> None:
    for name, shard in shards.items():
        if name not in holders or holders[name].name != shard:
            raise MalformedError(f"{path}: {shard} does not hold the tensor {name[:80]!r}", tensor=name)


def _read_aliases(text: str) -> dict[str, str]:
    def refuse(error: Exception | None = None) -> NoReturn:
        raise MalformedError(f"the metadata {ALIASES_KEY!r} are not an object of names in JSON") from error

    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        refuse(error)
    if not isinstance(value, dict):
        refuse()
    return {check_name(k): check_name(v) for k, v in value.items()}


# --- working on one ------------------------------------------------------------------------------------------------


def tensors_of(source: MemorySource) -> dict[str, torch.Tensor]:
    """A state dict over mapped cells, aliases included: nothing is copied or read.

    Raises:
        UnsupportedError: this torch release lacks a data type.
    """
    from thinwire.tensors.bits import tensor_of

    found = {n: tensor_of(source.cells[n], x.dtype.name, x.shape) for n, x in source.layouts.items()}
    return {**found, **{alias: found[name] for alias, name in source.aliases.items()}}


def _leaves(source: MemorySource, hash_name: str, threads: int, stages: Stages | None) -> dict[str, list[bytes]]:
    """The digests of all blocks."""
    from concurrent.futures import ThreadPoolExecutor

    from thinwire.sync.encode import thread_count
    from thinwire.sync.layout import Stripe, stripes
    from thinwire.tensors.digest import hash_block

    progress = stage_of(stages, "hash")
    total, done = sum(layout.size for layout in source.layouts.values()), 0

    def work(stripe: Stripe) -> list[tuple[str, bytes]]:
        nonlocal done
        found = [(b.name, hash_block(hash_name, source.read(b.name, b.start, b.stop))) for b in stripe.blocks]
        done += stripe.cells * stripe.dtype.cell_bytes
        if progress is not None:
            progress(min(done, total), total)
        return found

    leaves: dict[str, list[bytes]] = {name: [] for name in source.layouts}
    with ThreadPoolExecutor(thread_count(threads)) as pool:
        for found in pool.map(work, stripes(source.layouts.items())):
            for name, leaf in found:
                leaves[name].append(leaf)
    return leaves


def _tree(source: MemorySource, leaves: Mapping[str, list[bytes]], hash_name: str) -> Tree:
    from thinwire.wire.digests import TensorInfo

    infos = {
        name: TensorInfo(x.dtype.name, x.shape, tensor_digest(hash_name, x.dtype.name, x.shape, leaves[name]))
        for name, x in source.layouts.items()
    }
    return Tree(hash_name, infos, dict(source.aliases))


def tree_of_checkpoint(
    checkpoint: Checkpoint, *, hash_name: str = "blake3", threads: int = 0, stages: Stages | None = None
) -> Tree:
    """Hash all tensors; the tree's ``digest`` is the state's."""
    source = checkpoint.map()
    return _tree(source, _leaves(source, hash_name, threads, stages), hash_name)


def diff_checkpoints(
    base: Checkpoint,
    new: Checkpoint,
    options: Options | None = None,
    *,
    hash_name: str = "blake3",
    stages: Stages | None = None,
) -> Patch:
    """The patch from one checkpoint to another.

    Reads the base twice (its digest first) and the other once. Memory: the patch, tensors that are new or have another
    shape, and for each thread up to 2^25 cells; pages of the mapped files can be dropped by the system at any time.

    Raises:
        DamagedObjectError: a file was changed meanwhile.
    """
    from thinwire.sync.encode import Options, make_patch
    from thinwire.sync.lending import LendingSnapshot

    options = options or Options()
    source = base.map()
    leaves = _leaves(source, hash_name, options.threads, stages)
    snapshot = LendingSnapshot(source, leaves, _tree(source, leaves, hash_name))
    report = stage_of(stages, "diff")

    def progress(done: int, total: int) -> None:
        snapshot.give_back()
        if report is not None:
            report(done, total)

    return make_patch(snapshot, new.map(), options, progress=progress)
