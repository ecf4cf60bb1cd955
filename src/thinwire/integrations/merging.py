"""Merging patches of one base, tensor by tensor: to a patch, a checkpoint, or a model in memory.

>>> base = {"w": torch.tensor([1.0, 2.0, 3.0])}
>>> tuned = [{"w": torch.tensor([2.0, 2.0, 3.0])}, {"w": torch.tensor([3.0, 2.0, 5.0])}]
>>> patches = [patch_between(base, new) for new in tuned]
>>> merge(base, patches, weights=[0.5, 0.5], method="task_arithmetic")["w"]
tensor([2.5000, 2.0000, 4.0000])
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from thinwire.errors import MisuseError
from thinwire.integrations.patch_deltas import PatchReader, check_parent, source_of_state
from thinwire.merge.combine import Counts, count_overlap
from thinwire.merge.delta import MERGEABLE, TensorDelta
from thinwire.merge.recipe import Recipe, layers_of, recipe_of
from thinwire.merge.tensor import merge_tensor, surveyed, vector_of
from thinwire.sync.checkpoint import Checkpoint, open_checkpoint, tree_of_checkpoint
from thinwire.sync.encode import Options, make_patch, thread_count
from thinwire.sync.files import Stages, map_private, stage_of
from thinwire.sync.layout import CellSource, Layout, MemorySource, StateSource
from thinwire.sync.lending import LendingSnapshot
from thinwire.sync.rewrite import Patched, patch_checkpoint
from thinwire.tensors.bits import tensor_of
from thinwire.tensors.digest import block_cells, hash_block
from thinwire.tensors.tree import state_of
from thinwire.wire.digests import TensorInfo, Tree, tensor_digest
from thinwire.wire.patch import Patch

__all__ = [
    "MergedSource",
    "merge",
    "merge_checkpoint",
    "merge_to_patch",
    "merged_deltas",
    "open_readers",
    "overlap",
    "patch_between",
    "patch_of_source",
]

Cells = npt.NDArray[np.unsignedinteger]
State = Mapping[str, torch.Tensor] | torch.nn.Module
PatchLike = Patch | str | os.PathLike[str]

_KEPT_BYTES = 256 << 20  # merged tensors that are read again soon


def _parsed(patch: PatchLike) -> Patch:
    if isinstance(patch, Patch):
        return patch
    path = Path(patch)
    if not path.is_file():
        raise MisuseError(f"there is no patch {path}", path=str(path))
    return Patch.parse(map_private(path) if path.stat().st_size else b"")  # type: ignore[arg-type]


def _leaves(source: MemorySource, hash_name: str, threads: int) -> tuple[dict[str, list[bytes]], Tree]:
    leaves: dict[str, list[bytes]] = {}
    infos: dict[str, TensorInfo] = {}
    with ThreadPoolExecutor(thread_count(threads)) as pool:
        for name, layout in source.layouts.items():
            step = block_cells(layout.dtype.cell_bytes)
            parts = [source.cells[name][i : i + step] for i in range(0, layout.cells, step)]
            leaves[name] = list(pool.map(lambda part: hash_block(hash_name, part), parts))
            digest = tensor_digest(hash_name, layout.dtype.name, layout.shape, leaves[name])
            infos[name] = TensorInfo(layout.dtype.name, layout.shape, digest)
    return leaves, Tree(hash_name, infos, dict(source.aliases))


def _readers(
    patches: Sequence[Patch], source: MemorySource, digests: Callable[[str], str], *, threads: int = 1
) -> list[PatchReader]:
    for i, patch in enumerate(patches):
        check_parent(patch, digests(patch.hash), f"patch {i + 1} of {len(patches)}")
    return [PatchReader(patch, source, segments_kept=threads + 1) for patch in patches]


def merged_deltas(readers: Sequence[PatchReader], recipe: Recipe) -> Iterator[tuple[str, TensorDelta]]:
    """The merged delta of every tensor that a patch changes, one after another.

    Each thread decodes and merges a tensor, and one more is begun ahead; so memory holds a tensor's changes for each
    thread and two more, and of each patch a segment for each thread and one more.
    """
    changed = {name for reader in readers for name in reader.changed}
    queue = [name for name in readers[0].names if name in changed] if readers else []
    threads = thread_count(0)

    def decode(name: str, first: int = 0) -> list[TensorDelta]:
        found = {i: readers[i].delta(name) for i in (*range(first, len(readers)), *range(first))}
        return [found[i] for i in range(len(readers))]

    recipe = surveyed(recipe, ((name, decode(name)) for name in queue))
    with ThreadPoolExecutor(threads) as pool:

        def merged(name: str, first: int) -> TensorDelta:
            return merge_tensor(name, decode(name, first), recipe)

        waiting: deque[tuple[str, Future[TensorDelta]]] = deque()
        for i, name in enumerate(queue):  # tensors share segments: threads that began with one reader would wait for it
            waiting.append((name, pool.submit(merged, name, i % threads * len(readers) // threads)))
            if len(waiting) > threads:
                first, found = waiting.popleft()
                yield first, found.result()
        for first, found in waiting:
            yield first, found.result()


class MergedSource:
    """A base with ``changes`` applied as it is read: ``changes(name)`` gives a tensor's delta, or None.

    A :class:`~thinwire.sync.layout.CellSource`, so that whatever makes patches of states makes them of merges without
    the merged state ever being in memory. Deltas are computed when a tensor is first read, and kept while they are
    among the last 256 MiB.
    """

    def __init__(self, base: MemorySource, changes: Callable[[str], TensorDelta | None]) -> None:
        self._base, self._changes = base, changes
        self._kept: OrderedDict[str, TensorDelta | None] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def layouts(self) -> Mapping[str, Layout]:
        return self._base.layouts

    @property
    def aliases(self) -> Mapping[str, str]:
        return self._base.aliases

    def read(self, name: str, start: int, stop: int) -> Cells:
        delta = self._delta(name)
        part = self._base.read(name, start, stop)
        if delta is None or not delta.changed:
            return part
        first, last = np.searchsorted(delta.positions, [start, stop])
        if first == last:
            return part
        found = part.copy()
        found[delta.positions[first:last] - start] = delta.new[first:last]
        return found

    def _delta(self, name: str) -> TensorDelta | None:
        with self._lock:
            if name not in self._kept:
                self._kept[name] = self._changes(name)
                while len(self._kept) > 1 and sum(_bytes(d) for d in self._kept.values()) > _KEPT_BYTES:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(name)
            return self._kept[name]


def _bytes(delta: TensorDelta | None) -> int:
    return 0 if delta is None else delta.positions.nbytes + delta.base.nbytes + delta.new.nbytes


def _changes_of(readers: Sequence[PatchReader], recipe: Recipe, pool: ThreadPoolExecutor) -> Callable[[str], Any]:
    changed = {name for reader in readers for name in reader.changed}

    def decode(name: str) -> list[TensorDelta]:
        return list(pool.map(lambda reader: reader.delta(name), readers))

    known = surveyed(recipe, ((name, decode(name)) for name in sorted(changed)))

    def changes(name: str) -> TensorDelta | None:
        return merge_tensor(name, decode(name), known) if name in changed else None

    return changes


def patch_of_source(
    source: MemorySource, new: CellSource, options: Options, hash_name: str, stages: Stages | None,
    known: tuple[dict[str, list[bytes]], Tree] | None = None,
) -> Patch:  # fmt: skip
    """The patch from a base in memory (or mapped) to any other source of cells; ``known`` are the base's digests."""
    leaves, tree = known or _leaves(source, hash_name, options.threads)
    snapshot = LendingSnapshot(source, leaves, tree)
    report = stage_of(stages, "diff")

    def progress(done: int, total: int) -> None:
        snapshot.give_back()
        if report is not None:
            report(done, total)

    return make_patch(snapshot, new, options, progress=progress)


def patch_between(base: State, new: State, options: Options | None = None, *, hash_name: str = "blake3") -> Patch:
    """The patch from one model or state dict in memory to another.

    Raises:
        MisuseError, UnsupportedError: an entry is no tensor, or has no safetensors data type.
    """
    source = source_of_state(base)
    patch = patch_of_source(source, StateSource(state_of(new)), options or Options(), hash_name, None)
    return Patch.parse(b"".join(patch.encode()))


def _recipe(method: str, count: int, names: Sequence[str], weights: Any, settings: Mapping[str, Any]) -> Recipe:
    given = dict(settings)
    if weights is not None:
        if "weight" in given:
            raise MisuseError("give weights or weight, not both")
        if isinstance(weights, list | tuple) and len(weights) != count:
            raise MisuseError(f"{len(weights)} weights were given for {count} patches; give one for each")
        given["weight"] = weights
    return recipe_of(method, count, layers=layers_of(names), **given)


def merge(
    base: State,
    patches: Sequence[PatchLike],
    *,
    weights: Sequence[float] | float | None = None,
    method: str = "task_arithmetic",
    **settings: Any,
) -> dict[str, torch.Tensor]:
    """Merge patches of ``base`` in memory, checked by the base's digest.

    The state dict that comes back shares the memory of tensors that no patch changes; ``base`` is left as it is.
    ``settings`` are the method's parameters by mergekit's names (``density``, ``normalize``, ``lambda_``, ...); see
    :mod:`thinwire.merge.recipe` for what a setting may be.

    Raises:
        WrongBaseError: a patch starts from another base; both digests are named.
        MisuseError: an unknown method or parameter, a wrong number of weights, or what cannot be merged.
        MalformedError, UnsupportedError: a patch is damaged.
    """
    parsed = [_parsed(patch) for patch in patches]
    source = source_of_state(base)
    recipe = _recipe(method, len(parsed), list(source.layouts), weights, settings)
    trees: dict[str, str] = {}

    def digest(hash_name: str) -> str:
        if hash_name not in trees:
            trees[hash_name] = _leaves(source, hash_name, 0)[1].digest
        return trees[hash_name]

    readers = _readers(parsed, source, digest, threads=thread_count(0))
    found = {n: tensor_of(source.cells[n], x.dtype.name, x.shape) for n, x in source.layouts.items()}
    for name, delta in merged_deltas(readers, recipe):
        cells = source.cells[name].copy()
        cells[delta.positions] = delta.new
        found[name] = tensor_of(cells, delta.dtype, delta.shape)
    return {**found, **{alias: found[name] for alias, name in source.aliases.items()}}


def merge_to_patch(
    base: Checkpoint | str | os.PathLike[str],
    patches: Sequence[PatchLike],
    recipe: Recipe,
    *,
    options: Options | None = None,
    hash_name: str = "",
    stages: Stages | None = None,
) -> Patch:
    """One patch from ``base`` to the merge of ``patches``, which start from it. Neither it nor they are ever in memory
    as a whole: the base is mapped, and merged tensor by tensor as the patch is made. Memory: one tensor's changes for
    each patch, and the new patch.

    ``hash_name`` is that of the first patch if none is given.

    Raises: as :func:`merge`.
    """
    parsed = [_parsed(patch) for patch in patches]
    if len(parsed) != len(recipe.tasks):
        raise MisuseError(f"{len(parsed)} patches for a recipe of {len(recipe.tasks)} tasks")
    checkpoint = base if isinstance(base, Checkpoint) else open_checkpoint(base)
    source, chosen = checkpoint.map(), options or Options()
    name = hash_name or parsed[0].hash
    known = _leaves(source, name, chosen.threads)
    digests = {name: known[1].digest}

    def digest(wanted: str) -> str:
        if wanted not in digests:
            digests[wanted] = tree_of_checkpoint(checkpoint, hash_name=wanted).digest
        return digests[wanted]

    threads = thread_count(chosen.threads)
    readers = _readers(parsed, source, digest, threads=threads)
    with ThreadPoolExecutor(threads) as pool:
        merged = MergedSource(source, _changes_of(readers, recipe, pool))
        return patch_of_source(source, merged, chosen, name, stages, known)


def open_readers(checkpoint: Checkpoint, patches: Sequence[PatchLike], *, threads: int = 0) -> list[PatchReader]:
    """Readers of patches that start from ``checkpoint``, which is hashed once for each kind of hash.

    Raises:
        WrongBaseError: a patch starts from another base; both digests are named.
    """
    source = checkpoint.map()
    digests: dict[str, str] = {}

    def digest(wanted: str) -> str:
        if wanted not in digests:  # of the same mapping that is read afterwards: pages are touched once
            digests[wanted] = _leaves(source, wanted, threads)[1].digest
        return digests[wanted]

    parsed = [_parsed(patch) for patch in patches]
    return _readers(parsed, source, digest, threads=thread_count(threads))


def overlap(readers: Sequence[PatchReader]) -> Iterator[tuple[str, int, Counts]]:
    """How the changes of tasks meet in each tensor of numbers: its name, its cells, and the counts."""
    for name in sorted({name for reader in readers for name in reader.changed}):
        deltas = [reader.delta(name) for reader in readers]
        if deltas[0].dtype in MERGEABLE:
            yield name, deltas[0].size, count_overlap([vector_of(delta, name) for delta in deltas])


def merge_checkpoint(
    base: Checkpoint | str | os.PathLike[str],
    patches: Sequence[PatchLike],
    recipe: Recipe,
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    threads: int = 0,
    stages: Stages | None = None,
) -> Patched:
    """Write the merge as a checkpoint laid out as ``base`` is; whole or not at all, and proved by its digest.

    Raises: as :func:`merge`, and as :func:`~thinwire.sync.rewrite.patch_checkpoint`.
    """
    checkpoint = base if isinstance(base, Checkpoint) else open_checkpoint(base)
    patch = merge_to_patch(checkpoint, patches, recipe, options=Options("fast", threads=threads), stages=stages)
    return patch_checkpoint(
        checkpoint, [Patch.parse(b"".join(patch.encode()))], out, overwrite=overwrite, threads=threads, stages=stages
    )
