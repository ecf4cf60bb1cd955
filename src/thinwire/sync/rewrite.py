"""From a checkpoint on disk and patches to the next one on disk, which appears whole or not at all."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from thinwire.errors import DamagedObjectError, MisuseError
from thinwire.sync.apply import ApplyReport, apply_patch
from thinwire.sync.checkpoint import ALIASES_KEY, INDEX_NAME, Checkpoint, WeightFile, cells_in, read_header
from thinwire.sync.files import (
    Stages,
    check_target,
    copy_bytes,
    map_shared,
    stage_of,
    staged_file,
    staged_folder,
    write_bytes,
)
from thinwire.sync.layout import Layout, MemorySource
from thinwire.wire.container import PREFIX_BYTES, Entry, Header, header_bytes
from thinwire.wire.patch import Patch
from thinwire.wire.spec import dtype_of

__all__ = ["Patched", "change_file", "left_out", "padded", "patch_checkpoint"]

T = TypeVar("T")

_STALE = ("thinwire.version", "thinwire.state")  # what a chain said of the base is not true of the result
_WEIGHTS = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".gguf", ".ggml",
    ".h5", ".msgpack", ".onnx", ".onnx_data", ".npz", ".distcp", ".tar", ".tmp",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Patched:
    """What was written: the last patch's report, the files' bytes, and files of the base that were not copied."""

    report: ApplyReport
    size: int
    left_out: tuple[str, ...]


def padded(header: bytes, length: int) -> bytes:
    """A file's start (length and header) with its header filled up with blanks to ``length`` bytes."""
    text = header[PREFIX_BYTES:]
    assert len(text) <= length
    return struct.pack("<Q", length) + text.ljust(length)


def left_out(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Files of a checkpoint's folder that are other weights, or hidden: a patch does not bring them up to date."""
    if not checkpoint.is_folder:
        return ()
    ours = {file.path.name for file in checkpoint.files} | {INDEX_NAME}
    found = []
    for folder, folders, names in os.walk(checkpoint.path):
        here = Path(folder)
        mine = ours if here == checkpoint.path else set()
        found += [here / name for name in names if not _is_companion(name) and name not in mine]
        found += [here / name for name in folders if not _enters(here / name)]
        folders[:] = [name for name in folders if _enters(here / name)]
    return tuple(sorted(str(path.relative_to(checkpoint.path)) for path in found))


def patch_checkpoint(
    base: Checkpoint,
    patches: Sequence[Patch],
    out: str | os.PathLike[str],
    *,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    threads: int = 0,
    stages: Stages | None = None,
) -> Patched:
    """Apply ``patches``, one after another, to a copy of ``base`` and give that copy the name ``out``.

    ``out`` is what ``base`` is, a file or a folder, with the same shards, metadata and, in a folder, the files that are
    not weights. It may be ``base`` itself. ``metadata`` are set in every weight file. ``overwrite`` replaces a folder
    that is not empty; a file is always replaced. Until the very end ``out`` is untouched, whatever happens.

    Where only cells change, they are changed in a mapped copy of the files, so that memory holds the patches' changes
    and no more. Where tensors come, go or change their shape, memory may hold the whole state.

    Raises:
        WrongBaseError: a patch is for other weights.
        DamagedObjectError: a patch does not lead where it says.
        MalformedError: a patch is damaged.
        MisuseError: ``out`` cannot be written, or is a folder with something in it.
    """
    if not patches:
        raise MisuseError("there is no patch to apply")
    target = Path(out)
    check_target(target)
    if not base.is_folder:
        if target.is_dir():
            raise MisuseError(f"{target} is a folder, and the base is a file; name a file", path=str(target))
        with staged_file(target) as temporary:
            report, size = _fill(base, patches, {base.files[0].path: temporary}, metadata, threads, stages)
        return Patched(report, size, ())
    if target.exists() and not target.is_dir():
        raise MisuseError(f"{target} is a file, and the base is a folder; name a folder", path=str(target))
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise MisuseError(f"{target} is there and not empty; remove it, or pass --overwrite", path=str(target))
    with staged_folder(target) as temporary:
        names = {file.path: temporary / file.path.name for file in base.files}
        report, size = _fill(base, patches, names, metadata, threads, stages)
        if base.index is not None:
            _write_index(base.index, temporary)
        _copy_companions(base.path, temporary)
    return Patched(report, size, left_out(base))


def change_file(
    base: Checkpoint,
    change: Callable[[MemorySource], T],
    out: str | os.PathLike[str],
    *,
    metadata: Mapping[str, str] | None = None,
    stages: Stages | None = None,
) -> T:
    """Copy ``base``, a file, let ``change`` change the copy's cells in place, and give the copy the name ``out``; what
    ``change`` returns. Whatever it raises leaves ``out`` as it was. Tensors stay as many and as large as they are.

    Raises:
        MisuseError: ``base`` is a folder, or ``out`` cannot be written.
        DamagedObjectError: the file was changed by somebody else meanwhile.
    """
    target = Path(out)
    check_target(target)
    if base.is_folder or target.is_dir():
        raise MisuseError("one file is changed into one file; name files, not folders", path=str(target))
    with staged_file(target) as temporary:
        return _changed(base, (), change, {base.files[0].path: temporary}, metadata, stages)


def _fill(
    base: Checkpoint,
    patches: Sequence[Patch],
    targets: Mapping[Path, Path],
    metadata: Mapping[str, str] | None,
    threads: int,
    stages: Stages | None,
) -> tuple[ApplyReport, int]:
    report = _changed(base, patches, lambda source: _apply(patches, source, threads, stages), targets, metadata, stages)
    return report, sum(path.stat().st_size for path in targets.values() if path.exists())


def _changed(
    base: Checkpoint,
    patches: Sequence[Patch],
    change: Callable[[MemorySource], T],
    targets: Mapping[Path, Path],
    metadata: Mapping[str, str] | None,
    stages: Stages | None,
) -> T:
    """Write the files as ``change`` leaves them: in place in copies, if ``patches`` let all tensors stay."""
    headers = _same_size_headers(base, patches, metadata)
    if headers is not None:
        return _change_copies(base, change, targets, headers, stages)
    return _write_anew(base, change, targets, metadata, stages)


def _same_size_headers(
    base: Checkpoint, patches: Sequence[Patch], metadata: Mapping[str, str] | None
) -> dict[Path, bytes] | None:
    """The start of each file of the result, if all tensors stay where they are in the files; else None."""
    for patch in patches:
        if patch.removed or patch.aliases != base.aliases or any(row.kind != "sparse" for row in patch.rows):
            return None
    found = {}
    for file in base.files:
        header = file.header
        if not all(_is_aligned(header, entry) for entry in header.entries.values()):
            return None
        meta = _metadata_of(file, None, metadata)
        if meta == header.metadata:
            found[file.path] = b""  # as it is
            continue
        start = _header(meta, file.names, {n: (e.dtype, e.shape, e.stop - e.start) for n, e in header.entries.items()})
        text = start[PREFIX_BYTES:].rstrip(b" ")
        if PREFIX_BYTES + len(text) > header.data_start:
            return None
        found[file.path] = padded(start[:PREFIX_BYTES] + text, header.data_start - PREFIX_BYTES)
    return found


def _is_aligned(header: Header, entry: Entry) -> bool:
    return entry.start == entry.stop or (header.data_start + entry.start) % dtype_of(entry.dtype).cell_bytes == 0


def _metadata_of(
    file: WeightFile, aliases: Mapping[str, str] | None, extra: Mapping[str, str] | None
) -> dict[str, str]:
    """A file's metadata with ``extra``; ``aliases`` of None leaves those that it names."""
    meta = {k: v for k, v in file.header.metadata.items() if k not in _STALE}
    if aliases is not None:
        meta.pop(ALIASES_KEY, None)
        if aliases:
            meta[ALIASES_KEY] = json.dumps(dict(aliases), sort_keys=True)
    return {**meta, **(extra or {})}


def _header(
    meta: Mapping[str, str], names: Sequence[str], rows: Mapping[str, tuple[str, tuple[int, ...], int]]
) -> bytes:
    return header_bytes(meta, [(name, *rows[name]) for name in names])


def _change_copies(
    base: Checkpoint,
    change: Callable[[MemorySource], T],
    targets: Mapping[Path, Path],
    headers: Mapping[Path, bytes],
    stages: Stages | None,
) -> T:
    total, done = sum(file.header.file_bytes for file in base.files), 0

    def copied(in_file: int, _: int) -> None:
        if stages is not None:
            stages("copy", done + in_file, total)

    maps: list[mmap.mmap] = []
    cells = {}
    for file in base.files:
        copy_bytes(file.path, targets[file.path], progress=copied)
        done += file.header.file_bytes
        mapped = map_shared(targets[file.path])
        if len(mapped) != file.header.file_bytes:
            raise DamagedObjectError(f"{file.path} was changed while it was being read", path=str(file.path))
        maps.append(mapped)
        mapped[: len(headers[file.path])] = headers[file.path]
        cells.update({name: cells_in(mapped, file.header, name) for name in file.header.entries})
    layouts = {name: Layout(dtype_of(entry.dtype), entry.shape) for name, entry in base.tensors.items()}
    result = change(MemorySource(layouts, cells, base.aliases))
    for mapped in maps:
        mapped.flush()
    for path in targets.values():
        _sync(path)
    return result


def _apply(patches: Sequence[Patch], source: MemorySource, threads: int, stages: Stages | None) -> ApplyReport:
    report: ApplyReport | None = None
    for patch in patches:
        report = apply_patch(
            patch, source.layouts, source.cells,
            aliases=source.aliases, threads=threads, progress=stage_of(stages, "apply"),
        )  # fmt: skip
        source.aliases = dict(report.tree.aliases)
    assert report is not None
    return report


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


# --- where tensors come and go -------------------------------------------------------------------------------------


def _write_anew(
    base: Checkpoint,
    change: Callable[[MemorySource], T],
    targets: Mapping[Path, Path],
    metadata: Mapping[str, str] | None,
    stages: Stages | None,
) -> T:
    source = base.map()
    result = change(source)
    members = _members(base, source)
    rows = {n: (x.dtype.name, x.shape, x.size) for n, x in source.layouts.items()}
    for file in base.files:
        names = members[file.path]
        if not names and source.layouts:  # a shard that all tensors have left
            continue
        start = _header(_metadata_of(file, source.aliases, metadata), names, rows)
        bodies = [source.cells[name].data.cast("B") for name in names if source.cells[name].size]
        write_bytes(targets[file.path], [start, *bodies], progress=stage_of(stages, "write"))
    return result


def _members(base: Checkpoint, source: MemorySource) -> dict[Path, list[str]]:
    """Which tensors each file holds, in order: as before; new ones join the last file."""
    found = {file.path: [name for name in file.names if name in source.layouts] for file in base.files}
    known = base.tensors
    changed = {name for name, x in source.layouts.items() if name not in known or known[name].dtype != x.dtype.name}
    last = base.files[-1].path
    found[last] += sorted(changed - set(known))
    for path, names in found.items():
        if changed & set(names):  # keeps every tensor aligned
            found[path] = sorted(names, key=lambda name: (-source.layouts[name].dtype.cell_bytes, name))
    return found


# --- the rest of a folder ------------------------------------------------------------------------------------------


def _write_index(before: Mapping[str, Any], folder: Path) -> None:
    """The index of the shards in ``folder``, laid out as Hugging Face writes it."""
    shards: dict[str, str] = {}
    size = 0
    for path in sorted(folder.iterdir()):
        header = read_header(path)
        shards.update(dict.fromkeys(header.entries, path.name))
        size += sum(entry.stop - entry.start for entry in header.entries.values())
    facts = before.get("metadata")
    facts = {**(facts if isinstance(facts, dict) else {}), "total_size": size}
    index = {**before, "metadata": facts, "weight_map": shards}
    write_bytes(folder / INDEX_NAME, [(json.dumps(index, indent=2, sort_keys=True) + "\n").encode()])


def _is_companion(name: str) -> bool:
    return not name.lower().endswith(_WEIGHTS)


def _enters(folder: Path) -> bool:
    return not folder.name.startswith(".") and not folder.is_symlink()


def _copy_companions(source: Path, target: Path) -> None:
    """Configuration, tokenizer and the like: every file that is not weights, folders below included."""
    for folder, folders, names in os.walk(source):
        here = Path(folder)
        folders[:] = [name for name in folders if _enters(here / name)]
        there = target / here.relative_to(source)
        for name in filter(_is_companion, names):
            if not (here / name).is_file():
                continue
            there.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(here / name, there / name)
            shutil.copymode(here / name, there / name)
            _sync(there / name)
