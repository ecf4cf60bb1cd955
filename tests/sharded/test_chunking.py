"""How a state is cut: by whom each cell is published, against an oracle that counts cells."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.wire.test_chunks import cells
from thinwire.errors import MisuseError
from thinwire.sync.chunking import CHUNK_BYTES_MIN, Shard, groups_for, plan_chunks
from thinwire.wire.chunks import Box, ChunkMap

KINDS = ("rows", "columns", "grid", "replicated", "pairs", "one rank")


def torch_chunks(size: int, parts: int) -> list[tuple[int, int]]:
    """Offset and size of each part as ``torch.chunk`` and DTensor's Shard cut it; the last ones may be empty."""
    step = -(-size // parts)
    edges = [min(k * step, size) for k in range(parts + 1)]
    return [(a, b - a) for a, b in pairwise(edges)]


def held(kind: str, shape: tuple[int, ...], rank: int, ranks: int) -> Box | None:
    """What ``rank`` holds of a tensor; None: nothing, not even by name."""
    spans = [(0, n) for n in shape]
    if kind == "one rank":
        return Box((0,) * len(shape), shape) if rank == ranks - 1 else None
    if kind == "rows" and shape:
        spans[0] = torch_chunks(shape[0], ranks)[rank]
    if kind == "columns" and len(shape) > 1:
        spans[1] = torch_chunks(shape[1], ranks)[rank]
    if kind in ("pairs", "grid") and ranks % 2 == 0 and shape:
        spans[0] = torch_chunks(shape[0], ranks // 2)[rank // 2]
        if kind == "grid" and len(shape) > 1:
            spans[1] = torch_chunks(shape[1], 2)[rank % 2]
    return Box(tuple(o for o, _ in spans), tuple(n for _, n in spans))


Spec = dict[str, tuple[tuple[int, ...], str]]


def shards_of(spec: Spec, ranks: int) -> list[list[Shard]]:
    def of(rank: int) -> Iterator[Shard]:
        for name, (shape, kind) in spec.items():
            box = held(kind, shape, rank, ranks)
            if box is not None:
                yield Shard(name, "BF16", shape, box, name if box.volume else None)

    return [list(of(rank)) for rank in range(ranks)]


shapes = st.one_of(st.just(()), st.tuples(st.integers(0, 6)), st.tuples(st.integers(0, 5), st.integers(1, 5)))
specs = st.dictionaries(st.sampled_from("abcdef"), st.tuples(shapes, st.sampled_from(KINDS)), min_size=1)


@given(specs, st.sampled_from([1, 2, 3, 4]), st.integers(1, 5), st.integers(1, 30))
def test_every_cell_is_published_once_by_a_rank_that_holds_it(
    spec: Spec, ranks: int, slices: int, group_cells: int
) -> None:
    shards = shards_of(spec, ranks)
    found = plan_chunks(shards, slices=slices, group_cells=group_cells)
    assert ChunkMap.parse(found.encode()) == found
    for name, (shape, _) in spec.items():
        tensor = found.tensors[name]
        counts = Counter(cell for chunk in tensor.chunks for cell in cells(chunk.box))
        assert counts == Counter(cells(tensor.box))
        assert tensor.shape == shape
        for chunk in tensor.chunks:
            mine = next(s for s in shards[chunk.part] if s.name == name)
            assert mine.box.contains(chunk.box) or not chunk.box.volume


@given(specs, st.sampled_from([1, 2, 4]), st.data())
def test_groups_hold_what_was_asked_for_and_no_group_without(spec: Spec, ranks: int, data: st.DataObject) -> None:
    found = plan_chunks(shards_of(spec, ranks), group_cells=4)
    name = data.draw(st.sampled_from(sorted(spec)))
    spans = [sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n)))) for n in spec[name][0]]
    wanted = Box(tuple(a for a, _ in spans), tuple(b - a for a, b in spans))
    groups = groups_for(found, {name: [wanted]})
    brute = {(c.part, c.group) for c in found.tensors[name].chunks if cells(c.box) & cells(wanted)}
    assert groups == brute
    assert groups <= groups_for(found, None)


def big(rows: int, columns: int, ranks: int) -> ChunkMap:
    side = CHUNK_BYTES_MIN
    assert rows * columns * 2 >= side
    return plan_chunks(shards_of({"w": ((rows, columns), "rows")}, ranks), slices=4)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.parametrize("d", [0, 1])
def test_a_reader_with_tensor_parallelism_needs_whole_chunks_only(ranks: int, degree: int, d: int) -> None:
    found = big(1024, 2048, ranks)
    shape = (1024, 2048)
    size = shape[d] // degree
    for k in range(degree):
        mine = [slice(0, n) for n in shape]
        mine[d] = slice(k * size, (k + 1) * size)
        box = Box(tuple(s.start for s in mine), tuple(s.stop - s.start for s in mine))
        groups = groups_for(found, {"w": [box]})
        taken = [c for c in found.chunks() if (c.part, c.group) in groups]
        assert sum(c.box.volume for c in taken) == box.volume


def test_small_tensors_are_not_sliced() -> None:
    assert len(list(plan_chunks(shards_of({"w": ((8, 8), "rows")}, 2), slices=4).chunks())) == 2


def test_replicas_share_the_work_evenly() -> None:
    spec: Spec = {f"w{k}": ((64, 64), "replicated") for k in range(8)}
    found = plan_chunks(shards_of(spec, 4))
    assert Counter(c.part for c in found.chunks()) == {0: 2, 1: 2, 2: 2, 3: 2}


def shard(name: str, box: Box, same_as: str | None = None, shape: tuple[int, ...] = (4,)) -> Shard:
    return Shard(name, "F32", shape, box, same_as if same_as is not None else name)


LEFT, RIGHT, NONE = Box((0,), (2,)), Box((2,), (2,)), Box((4,), (0,))


def test_tied_tensors_become_aliases_even_where_a_rank_holds_nothing_of_them() -> None:
    ranks = [
        [shard("a", LEFT), shard("b", LEFT, "a")],
        [shard("a", RIGHT), shard("b", RIGHT, "a")],
        [Shard("a", "F32", (4,), NONE, None), Shard("b", "F32", (4,), NONE, None)],
    ]
    found = plan_chunks(ranks)
    assert list(found.tensors) == ["a"]
    assert found.aliases == {"b": "a"}


def test_ranks_that_disagree_are_told_so() -> None:
    with pytest.raises(MisuseError, match="tied on some ranks"):
        plan_chunks([[shard("a", LEFT), shard("b", LEFT, "a")], [shard("a", RIGHT), shard("b", RIGHT)]])
    with pytest.raises(MisuseError, match=r"covered by 2 of 4"):
        plan_chunks([[shard("a", LEFT)], []])
    with pytest.raises(MisuseError, match="once and whole"):
        plan_chunks([[shard("a", LEFT)], [shard("a", Box((1,), (2,)))]])
    with pytest.raises(MisuseError, match="on one rank"):
        plan_chunks([[shard("a", LEFT)], [shard("a", RIGHT, shape=(5,))]])
    with pytest.raises(MisuseError, match="no tensor"):
        groups_for(plan_chunks([[shard("a", LEFT), shard("a", RIGHT)]]), {"x": []})
    with pytest.raises(MisuseError, match="not inside"):
        groups_for(plan_chunks([[shard("a", LEFT), shard("a", RIGHT)]]), {"a": [Box((3,), (2,))]})
