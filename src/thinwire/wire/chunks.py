"""The map of a sharded state: how every tensor is cut into chunks, and in which part each of them is published.

A chunk is a box of a tensor, ``offsets`` and ``sizes`` in elements by dimension, as in torch.distributed.checkpoint's
``ChunkStorageMetadata``. In its part it is a tensor like any other, called ``GGGGGG/NAME@offsets``; ``G`` is its
*group*. No segment of a patch reaches from one group into another, so that a reader can do with some groups of a part.

The file is canonical JSON: format, aliases, number of parts, and ``[name, dtype, shape, chunks]`` of each tensor, in
order of names, with ``[part, group, offsets, sizes]`` of each chunk. The chunks of a tensor are disjoint and cover it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from thinwire.errors import MalformedError, UnsupportedError
from thinwire.wire import canonical
from thinwire.wire.digests import check_name, check_shape
from thinwire.wire.manifest import PARTS_MAX
from thinwire.wire.spec import TABLE_BYTES_MAX, TENSORS_MAX, cell_count, dtype_of

__all__ = ["Box", "Chunk", "ChunkMap", "ChunkedTensor", "overlap", "partition_flaw"]

CHUNKS_FORMAT = "thinwire.chunks.v1"
GROUPS_MAX = 10**6
_CUTS_MAX = 16  # how often a tensor is cut through, one cut inside the other; sharding has one or two a dimension


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """A part of a tensor: where it begins and how far it reaches, in elements, by dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def volume(self) -> int:
        """Number of elements."""
        return prod(self.sizes)

    def slices(self, origin: Sequence[int] | None = None) -> tuple[slice, ...]:
        """The box as an index into an array whose first element is at ``origin``."""
        origin = origin or (0,) * len(self.offsets)
        return tuple(slice(o - z, o - z + n) for o, n, z in zip(self.offsets, self.sizes, origin, strict=True))

    def contains(self, other: Box) -> bool:
        """Whether ``other`` lies wholly inside."""
        axes = zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        return all(a <= b and b + m <= a + n for a, n, b, m in axes)

    def __str__(self) -> str:
        return f"[{', '.join(f'{o}:{o + n}' for o, n in zip(self.offsets, self.sizes, strict=True))}]"


def overlap(a: Box, b: Box) -> Box | None:
    """What two boxes have in common; None if that is nothing.

    >>> print(overlap(Box((0, 0), (4, 4)), Box((2, 3), (4, 4))))
    [2:4, 3:4]
    """
    offsets = tuple(map(max, a.offsets, b.offsets))
    ends = [min(o + n, p + m) for o, n, p, m in zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)]
    sizes = tuple(end - start for start, end in zip(offsets, ends, strict=True))
    return Box(offsets, sizes) if all(size > 0 for size in sizes) else None


def partition_flaw(whole: Box, boxes: Sequence[Box]) -> str | None:
    """What is wrong with ``boxes`` as the pieces of ``whole``: a hole, an overlap, one that sticks out. None: nothing.

    They must come about by cutting through, again and again, which all sharding does. An empty tensor is one box.

    >>> print(partition_flaw(Box((0,), (4,)), [Box((0,), (2,)), Box((3,), (1,))]))
    [0:4] is covered by 3 of 4 elements
    """
    if not whole.volume:
        return None if list(boxes) == [whole] else f"{whole} is empty and must be one chunk"
    for box in boxes:
        if len(box.offsets) != len(whole.offsets) or not whole.contains(box) or not box.volume:
            return f"the chunk {box} is empty, or not inside {whole}"
    todo = [(whole, sorted(boxes), 0)]
    while todo:
        region, members, depth = todo.pop()
        held = sum(box.volume for box in members)
        if held != region.volume:
            return f"{region} is covered by {held} of {region.volume} elements"
        if len(members) == 1:
            continue
        cut = next((found for d in range(len(region.sizes)) if len(found := _slabs(region, members, d)) > 1), None)
        if cut is None or depth >= _CUTS_MAX:
            return f"the chunks of {region} overlap"
        todo += [(slab, inside, depth + 1) for slab, inside in cut]
    return None


def _slabs(region: Box, members: Sequence[Box], d: int) -> list[tuple[Box, list[Box]]]:
    """``region`` cut through along ``d`` wherever that cuts no member in two."""
    found: list[tuple[Box, list[Box]]] = []
    start, end = region.offsets[d], region.offsets[d]
    inside: list[Box] = []
    for box in [*sorted(members, key=lambda box: box.offsets[d]), None]:
        if inside and (box is None or box.offsets[d] >= end):
            stop = box.offsets[d] if box is not None else region.offsets[d] + region.sizes[d]
            slab = Box(
                (*region.offsets[:d], start, *region.offsets[d + 1 :]),
                (*region.sizes[:d], stop - start, *region.sizes[d + 1 :]),
            )
            found.append((slab, inside))
            start, inside = stop, []
        if box is not None:
            inside.append(box)
            end = max(end, box.offsets[d] + box.sizes[d])
    return found


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk: the tensor that it is of, its box, and where it is published."""

    tensor: str
    box: Box
    part: int
    group: int

    @property
    def name(self) -> str:
        """Its name in its part."""
        return f"{self.group:06d}/{self.tensor}@{'.'.join(map(str, self.box.offsets))}"

    @property
    def full_name(self) -> str:
        """Its name among the chunks of all parts."""
        return f"{self.part:05d}/{self.name}"

    def to_json(self) -> list[Any]:
        return [self.part, self.group, list(self.box.offsets), list(self.box.sizes)]


@dataclass(frozen=True, slots=True)
class ChunkedTensor:
    """A tensor of the whole state: safetensors data type, shape, chunks."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def box(self) -> Box:
        """All of it."""
        return Box((0,) * len(self.shape), self.shape)


@dataclass(frozen=True, slots=True)
class ChunkMap:
    """All tensors by name, further names of tied ones, and the number of parts.

    >>> chunk = Chunk("w", Box((0,), (4,)), part=0, group=0)
    >>> whole = ChunkMap({"w": ChunkedTensor("BF16", (4,), (chunk,))}, {"head": "w"}, 1)
    >>> ChunkMap.parse(whole.encode()) == whole, chunk.full_name
    (True, '00000/000000/w@0')
    """

    tensors: Mapping[str, ChunkedTensor]
    aliases: Mapping[str, str]
    parts: int

    def chunks(self) -> Iterator[Chunk]:
        """Every chunk of every tensor."""
        for tensor in self.tensors.values():
            yield from tensor.chunks

    def encode(self) -> bytes:
        """The canonical bytes."""
        rows = [
            [
                name,
                t.dtype,
                list(t.shape),
                [[c.part, c.group, list(c.box.offsets), list(c.box.sizes)] for c in t.chunks],
            ]
            for name, t in sorted(self.tensors.items())
        ]
        return canonical.dump(
            {"aliases": dict(self.aliases), "format": CHUNKS_FORMAT, "parts": self.parts, "tensors": rows}
        )

    @classmethod
    def parse(cls, data: bytes) -> ChunkMap:
        """Read a map.

        Raises:
            MalformedError: not the canonical bytes of one; chunks of a tensor are missing or overlap.
            UnsupportedError: unknown format or data type.
        """
        value = canonical.parse(data, bytes_max=TABLE_BYTES_MAX)
        if not isinstance(value, dict) or value.get("format") != CHUNKS_FORMAT:
            raise UnsupportedError("not a map of chunks of a known format; upgrade thinwire")
        rows, aliases, parts = value.get("tensors"), value.get("aliases"), value.get("parts")
        if not isinstance(rows, list) or len(rows) > TENSORS_MAX or not isinstance(aliases, dict):
            raise MalformedError("a map of chunks lacks its tensors or aliases, or has too many")
        if type(parts) is not int or not 0 < parts <= PARTS_MAX:
            raise MalformedError(f"a map of chunks is of 1 to {PARTS_MAX} parts, not {str(parts)[:20]}")
        tensors: dict[str, ChunkedTensor] = {}
        for row in rows:
            name, tensor = _tensor(row, parts)
            tensors[name] = tensor
        for alias, name in aliases.items():
            if check_name(alias) in tensors or name not in tensors:
                raise MalformedError(f"alias {alias[:80]!r} is a tensor itself or leads to none")
        found = cls(tensors, aliases, parts)
        if sum(len(tensor.chunks) for tensor in tensors.values()) > TENSORS_MAX:
            raise MalformedError(f"a map of more than {TENSORS_MAX} chunks")
        if found.encode() != data:
            raise MalformedError("the tensors of a map of chunks are not in order, or it has more than it should")
        return found


def _tensor(row: Any, parts: int) -> tuple[str, ChunkedTensor]:
    if not isinstance(row, list) or len(row) != 4 or not isinstance(row[3], list):
        raise MalformedError("a tensor of a map of chunks is not [name, dtype, shape, chunks]")
    name, dtype, shape = check_name(row[0]), dtype_of(row[1]), check_shape(row[2])
    cell_count(dtype, shape)
    chunks = tuple(_chunk(name, value, len(shape), parts) for value in row[3])
    for chunk in chunks:
        cell_count(dtype, chunk.box.sizes)
        check_name(chunk.name)
    tensor = ChunkedTensor(dtype.name, shape, chunks)
    flaw = partition_flaw(tensor.box, [chunk.box for chunk in chunks])
    if flaw is not None:
        raise MalformedError(f"the chunks of {name[:80]!r} do not make it up: {flaw}", tensor=name)
    return name, tensor


def _chunk(tensor: str, value: Any, dimensions: int, parts: int) -> Chunk:
    if not isinstance(value, list) or len(value) != 4 or not all(type(n) is int for n in value[:2]):
        raise MalformedError("a chunk is not [part, group, offsets, sizes]")
    part, group, offsets, sizes = value[0], value[1], check_shape(value[2]), check_shape(value[3])
    if not 0 <= part < parts or not 0 <= group < GROUPS_MAX or {len(offsets), len(sizes)} != {dimensions}:
        raise MalformedError(f"a chunk of {tensor[:80]!r} is of part {part}, group {group}, {offsets}, {sizes}")
    return Chunk(tensor, Box(offsets, sizes), part, group)
