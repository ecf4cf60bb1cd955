"""How ranks cut the state that they hold together: what each of them publishes, and what a reader of a part needs.

Pure functions of shapes: no tensor, no torch, no communication. The conventions are those of torch.distributed's
checkpoints: a shard is a box of a tensor, and what several ranks hold alike is written by one of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

from thinwire.errors import MisuseError
from thinwire.wire.chunks import Box, Chunk, ChunkedTensor, ChunkMap, overlap, partition_flaw
from thinwire.wire.spec import cell_count, dtype_of

__all__ = ["CHUNK_BYTES_MIN", "GROUP_CELLS", "Shard", "groups_for", "plan_chunks"]

_NUMBERS = re.compile(r"[0-9]+")

CHUNK_BYTES_MIN = 64 << 10
"""Shards are not sliced into chunks of fewer bytes: each has a digest, and so costs about 150 bytes a version."""

GROUP_CELLS = 1 << 22
"""A group is closed when it has this many cells."""


@dataclass(frozen=True, slots=True)
class Shard:
    """What one rank holds of one tensor: ``box`` of a tensor of this safetensors data type and ``shape``.

    ``same_as`` is the name that sorts first among those that share this memory on the rank: its own, if it is not tied;
    None if the box is empty, for then nobody can tell.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    box: Box
    same_as: str | None


def plan_chunks(ranks: Sequence[Sequence[Shard]], *, slices: int = 1, group_cells: int = GROUP_CELLS) -> ChunkMap:
    """The map of chunks for ``ranks``, one part each: who publishes which box, cut how.

    A box that several ranks hold goes to the one with the least to write so far, the largest boxes first. Boxes are
    then cut along their first two dimensions where a division of the tensor into ``slices`` equal parts cuts them, so
    that a reader with tensor parallelism of that degree (or a divisor of it) needs whole chunks only.

    Raises:
        MisuseError: ranks disagree on a tensor, or together do not hold all of it, or hold boxes that overlap.

    >>> halves = [[Shard("w", "BF16", (4,), Box((2 * rank,), (2,)), "w")] for rank in (0, 1)]
    >>> [(chunk.part, str(chunk.box)) for chunk in plan_chunks(halves).chunks()]
    [(0, '[0:2]'), (1, '[2:4]')]
    """
    if slices < 1 or group_cells < 1:
        raise MisuseError("slices and group_cells must be positive")
    facts, holders, aliases = _merged(ranks)
    owners = _owners(facts, holders, len(ranks))
    by_part: list[list[tuple[tuple[int, int], str, Box]]] = [[] for _ in ranks]
    for (name, box), rank in owners.items():
        by_part[rank] += [(key, name, piece) for key, piece in _sliced(facts[name], box, slices)]
    chunks: dict[str, list[Chunk]] = {name: [] for name in facts}
    for part, members in enumerate(by_part):
        for name, chunk in _grouped(part, members, facts, group_cells):
            chunks[name].append(chunk)
    tensors = {
        name: ChunkedTensor(dtype, shape, tuple(sorted(chunks[name], key=lambda chunk: chunk.box)))
        for name, (dtype, shape) in sorted(facts.items())
    }
    return ChunkMap(tensors, aliases, len(ranks))


Facts = dict[str, tuple[str, tuple[int, ...]]]


def _merged(ranks: Sequence[Sequence[Shard]]) -> tuple[Facts, dict[str, dict[Box, list[int]]], dict[str, str]]:
    """Data type and shape of each tensor, who holds which box of it, and further names of tied tensors."""
    facts: Facts = {}
    holders: dict[str, dict[Box, list[int]]] = {}
    same: dict[str, set[str]] = {}
    for rank, shards in enumerate(ranks):
        for shard in shards:
            fact = facts.setdefault(shard.name, (shard.dtype, shard.shape))
            if fact != (shard.dtype, shard.shape):
                raise MisuseError(
                    f"{shard.name!r} is {fact[0]} {fact[1]} on one rank and {shard.dtype} {shard.shape} on rank {rank}",
                    tensor=shard.name,
                )
            boxes = holders.setdefault(shard.name, {})
            whole = Box((0,) * len(shard.shape), shard.shape)
            if shard.box.volume or not whole.volume:
                boxes.setdefault(shard.box if whole.volume else whole, []).append(rank)
            if shard.same_as is not None:
                same.setdefault(shard.name, set()).add(shard.same_as)
    aliases = {}
    for name, others in same.items():
        if len(others) > 1:
            raise MisuseError(f"{name!r} is tied on some ranks and not, or otherwise, on others", tensor=name)
        if others != {name}:
            aliases[name] = others.pop()
    for name in aliases:
        del facts[name], holders[name]
    for name, boxes in holders.items():
        flaw = partition_flaw(Box((0,) * len(facts[name][1]), facts[name][1]), list(boxes))
        if flaw is not None:
            raise MisuseError(
                f"the ranks that publish do not hold {name!r} once and whole: {flaw}. Every rank that holds a shard "
                "must be in the group, and shards must be those of one mesh",
                tensor=name,
            )
    return facts, holders, dict(sorted(aliases.items()))


def _owners(facts: Facts, holders: Mapping[str, Mapping[Box, list[int]]], ranks: int) -> dict[tuple[str, Box], int]:
    owners: dict[tuple[str, Box], int] = {}
    shared: list[tuple[int, str, Box, list[int]]] = []
    load = [0] * ranks
    for name, boxes in holders.items():
        for box, members in boxes.items():
            size = _size(facts[name][0], box)
            if len(members) == 1:
                owners[name, box] = members[0]
                load[members[0]] += size
            else:
                shared.append((-size, name, box, members))
    for negative, name, box, members in sorted(shared):
        rank = min(members, key=lambda member: (load[member], member))
        owners[name, box] = rank
        load[rank] -= negative
    return owners


def _size(dtype: str, box: Box) -> int:
    return cell_count(dtype_of(dtype), box.sizes) * dtype_of(dtype).cell_bytes


def _sliced(fact: tuple[str, tuple[int, ...]], box: Box, slices: int) -> Iterator[tuple[tuple[int, int], Box]]:
    """The box cut where slices of the whole tensor end, and the number of each piece's slice by dimension."""
    dtype, shape = fact
    steps = [-(-size // slices) for size in shape[:2]]
    packed = dtype_of(dtype).element_bits % (8 * dtype_of(dtype).cell_bytes) != 0
    if len(shape) < 2 or slices == 1 or packed or not box.volume:
        yield (-1, -1), box
        return
    cuts = [_cut(box.offsets[d], box.sizes[d], steps[d]) for d in (0, 1)]
    if _size(dtype, box) < CHUNK_BYTES_MIN * len(cuts[0]) * len(cuts[1]):
        yield (-1, -1), box
        return
    for (start, rows), (left, columns) in product(*cuts):
        piece = Box((start, left, *box.offsets[2:]), (rows, columns, *box.sizes[2:]))
        yield (start // steps[0], left // steps[1]), piece


def _cut(offset: int, size: int, step: int) -> list[tuple[int, int]]:
    edges = [offset, *range((offset // step + 1) * step, offset + size, step), offset + size]
    return [(a, b - a) for a, b in pairwise(edges)]


def _grouped(
    part: int, members: Sequence[tuple[tuple[int, int], str, Box]], facts: Facts, group_cells: int
) -> Iterator[tuple[str, Chunk]]:
    """Chunks in groups: of one slice and one kind of tensor each (names but for their numbers), since readers that are
    parallel cut kinds along different dimensions; and of about ``group_cells`` cells, so that few layers share one."""
    group, held, last = 0, 0, None
    for slice_key, kind, name, box in sorted((key, _NUMBERS.sub("#", name), name, box) for key, name, box in members):
        key = slice_key, kind
        if last is not None and (key != last or held >= group_cells):
            group, held = group + 1, 0
        yield name, Chunk(name, box, part, group)
        held += cell_count(dtype_of(facts[name][0]), box.sizes)
        last = key


def groups_for(chunks: ChunkMap, wanted: Mapping[str, Iterable[Box]] | None) -> set[tuple[int, int]]:
    """The groups, as (part, group), that hold any of the ``wanted`` boxes of tensors; all of them for None.

    Raises:
        MisuseError: there is no such tensor, or a box is not inside it.
    """
    if wanted is None:
        return {(chunk.part, chunk.group) for chunk in chunks.chunks()}
    found: set[tuple[int, int]] = set()
    for name, boxes in wanted.items():
        tensor = chunks.tensors.get(chunks.aliases.get(name, name))
        if tensor is None:
            raise MisuseError(f"there is no tensor {name[:80]!r} in this version", tensor=name)
        for box in boxes:
            if len(box.offsets) != len(tensor.shape) or not tensor.box.contains(box):
                raise MisuseError(f"{name!r} has shape {tensor.shape}, {box} is not inside", tensor=name)
            for chunk in tensor.chunks:
                if overlap(chunk.box, box) is not None:
                    found.add((chunk.part, chunk.group))
    return found
