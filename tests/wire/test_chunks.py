"""The map of chunks and manifests in parts: they come back as they were, and what is wrong is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinwire.chain.trusted import TrustedChain
from thinwire.errors import MalformedError, RefuseError, UnsupportedError
from thinwire.wire import canonical
from thinwire.wire.chunks import Box, Chunk, ChunkedTensor, ChunkMap, overlap, partition_flaw
from thinwire.wire.manifest import DeltaRef, Manifest, ObjectRef, Parent, Part, state_of_parts

Edit = Callable[[dict[str, Any]], object]


# --- boxes ---------------------------------------------------------------------------------------------------------


def cells(box: Box) -> set[tuple[int, ...]]:
    found: set[tuple[int, ...]] = {()}
    for offset, size in zip(box.offsets, box.sizes, strict=True):
        found = {(*cell, i) for cell in found for i in range(offset, offset + size)}
    return found


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    spans = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in shape]
    return Box(tuple(a for a, _ in spans), tuple(b - a for a, b in spans))


SHAPE = (3, 4)


@given(boxes(SHAPE), boxes(SHAPE))
def test_the_overlap_of_two_boxes_is_that_of_their_cells(a: Box, b: Box) -> None:
    found = overlap(a, b)
    assert (cells(found) if found else set()) == cells(a) & cells(b)
    assert a.contains(b) == (cells(b) <= cells(a)) or not b.volume


@st.composite
def cut_up(draw: st.DrawFn) -> tuple[Box, list[Box]]:
    """A box, cut through again and again."""
    whole = Box((0, 0), (draw(st.integers(1, 4)), draw(st.integers(1, 4))))
    found = [whole]
    for _ in range(draw(st.integers(0, 4))):
        box = found.pop(draw(st.integers(0, len(found) - 1)))
        d = draw(st.integers(0, 1))
        at = draw(st.integers(0, box.sizes[d]))
        for start, size in ((0, at), (at, box.sizes[d] - at)):
            if size:
                offsets, sizes = list(box.offsets), list(box.sizes)
                offsets[d], sizes[d] = offsets[d] + start, size
                found.append(Box(tuple(offsets), tuple(sizes)))
    return whole, draw(st.permutations(found))


@given(cut_up(), st.data())
def test_what_is_cut_up_is_a_partition_and_nothing_else_is(cut: tuple[Box, list[Box]], data: st.DataObject) -> None:
    whole, pieces = cut
    assert partition_flaw(whole, pieces) is None
    lost = data.draw(st.sampled_from(pieces))
    assert partition_flaw(whole, [box for box in pieces if box != lost]) is not None
    assert partition_flaw(whole, [*pieces, lost]) is not None
    other = data.draw(boxes(whole.sizes))
    changed = [other if box == lost else box for box in pieces]
    covered = [cell for box in changed for cell in cells(box)]
    exact = len(covered) == len(set(covered)) and set(covered) == cells(whole) and all(b.volume for b in changed)
    assert (partition_flaw(whole, changed) is None) == exact


def test_a_pinwheel_is_refused_though_it_covers_all() -> None:
    pieces = [Box((0, 0), (1, 2)), Box((0, 2), (2, 1)), Box((2, 1), (1, 2)), Box((1, 0), (2, 1)), Box((1, 1), (1, 1))]
    assert partition_flaw(Box((0, 0), (3, 3)), pieces) is not None


# --- the map -------------------------------------------------------------------------------------------------------


def small_map() -> ChunkMap:
    w = tuple(Chunk("w", Box((2 * k, 0), (2, 3)), part=k, group=k) for k in range(2))
    empty, scalar = Chunk("e", Box((0,), (0,)), 1, 0), Chunk("s", Box((), ()), 0, 0)
    tensors = {
        "e": ChunkedTensor("F32", (0,), (empty,)),
        "s": ChunkedTensor("I64", (), (scalar,)),
        "w": ChunkedTensor("BF16", (4, 3), w),
    }
    return ChunkMap(tensors, {"head": "w"}, 2)


def test_a_map_comes_back_as_it_was() -> None:
    assert ChunkMap.parse(small_map().encode()) == small_map()
    assert [c.full_name for c in small_map().chunks()][2:] == ["00000/000000/w@0.0", "00001/000001/w@2.0"]


WRONG: dict[str, Edit] = {
    "a chunk is missing": lambda v: v["tensors"][2][3].pop(),
    "a chunk is there twice": lambda v: v["tensors"][2][3].append(v["tensors"][2][3][0]),
    "chunks overlap": lambda v: v["tensors"][2][3][1].__setitem__(2, [1, 0]),
    "a chunk sticks out": lambda v: v["tensors"][2][3][1].__setitem__(3, [3, 3]),
    "a chunk of other dimensions": lambda v: v["tensors"][2][3][1].__setitem__(2, [2]),
    "a negative offset": lambda v: v["tensors"][2][3][0].__setitem__(2, [-1, 0]),
    "a part too many": lambda v: v["tensors"][2][3][0].__setitem__(0, 2),
    "a group beyond the bound": lambda v: v["tensors"][2][3][0].__setitem__(1, 10**6),
    "True for a part": lambda v: v["tensors"][2][3][0].__setitem__(0, True),
    "no parts": lambda v: v.update(parts=0),
    "a million parts": lambda v: v.update(parts=10**6),
    "an alias to nowhere": lambda v: v["aliases"].update(x="y"),
    "an alias that is a tensor": lambda v: v["aliases"].update(w="s"),
    "tensors out of order": lambda v: v["tensors"].reverse(),
    "another format": lambda v: v.update(format="thinwire.chunks.v9"),
    "an unknown data type": lambda v: v["tensors"][2].__setitem__(1, "F2"),
    "a shape beyond the bound": lambda v: v["tensors"][2].__setitem__(2, [1 << 40, 1 << 40]),
    "a field too many": lambda v: v.update(more=1),
    "a row too short": lambda v: v["tensors"][0].pop(),
    "no tensors": lambda v: v.pop("tensors"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_map_is_refused(name: str) -> None:
    value = json.loads(small_map().encode())
    WRONG[name](value)
    with pytest.raises((MalformedError, UnsupportedError)):
        ChunkMap.parse(canonical.dump(value))


@given(st.binary(max_size=80), st.integers(0, 400))
def test_noise_is_refused(noise: bytes, at: int) -> None:
    data = small_map().encode()
    data = data[:at] + noise + data[at + len(noise) :]
    try:
        found = ChunkMap.parse(data)
    except RefuseError:
        return
    assert found.encode() == data


# --- the manifest --------------------------------------------------------------------------------------------------

A, B, C, D = ("ab" * 32, "bc" * 32, "cd" * 32, "de" * 32)


def ref(name: str, digest: str = A) -> ObjectRef:
    return ObjectRef(f"objects/0000000002-ff/{name}", 10, digest)


def in_parts(*, anchor: bool = False) -> Manifest:
    parts = tuple(
        Part(
            state,
            ref(f"{k}/tree.json", state),
            (DeltaRef(1, D, ref(f"{k}/delta.safetensors")),),
            (ref(f"{k}/model.safetensors"),) if anchor else (),
        )
        for k, state in enumerate((A, B))
    )
    tree = ref("chunks.json", C)
    return Manifest(
        version=2, state=state_of_parts("blake3", C, [A, B]), hash="blake3", parent=Parent(1, D), tree=tree,
        deltas=(), anchor=(), anchor_version=2 if anchor else 1, step=7, facts={"elements": 3}, parts=parts,
    )  # fmt: skip


@pytest.mark.parametrize("anchor", [False, True])
def test_a_manifest_in_parts_comes_back_as_it_was(anchor: bool) -> None:
    manifest = in_parts(anchor=anchor)
    assert Manifest.parse(manifest.encode()) == manifest
    assert len(manifest.objects()) == 1 + 2 * (3 if anchor else 2)
    assert manifest.kind == ("delta+anchor" if anchor else "delta")
    assert manifest.anchor_bytes == (20 if anchor else 0)
    assert TrustedChain().accept(manifest.encode(), version=2) == manifest


WRONG_MANIFESTS: dict[str, Edit] = {
    "no parts": lambda v: v.update(parts=[]),
    "parts that are no list": lambda v: v.update(parts={}),
    "a part is missing": lambda v: v["parts"].pop(),
    "parts in another order": lambda v: v["parts"].reverse(),
    "a part's state is another": lambda v: v["parts"][0].update(state=C),
    "another map": lambda v: v["tree"].update(digest=D),
    "one part without its delta": lambda v: v["parts"][1].update(deltas=[]),
    "deltas from two versions": lambda v: v["parts"][1]["deltas"][0].update(base=2),
    "one part with an anchor": lambda v: v["parts"][0].update(anchor=v["parts"][0]["anchor"] + [v["tree"]]),
    "neither delta nor anchor": lambda v: [part.update(deltas=[]) for part in v["parts"]],
    "an anchor version that has none": lambda v: v.update(anchor_version=2),
    "a field too many in a part": lambda v: v["parts"][0].update(more=1),
    "the other format": lambda v: v.update(format="thinwire.manifest.v1"),
    "a format of the future": lambda v: v.update(format="thinwire.manifest.v3"),
}


@pytest.mark.parametrize("name", WRONG_MANIFESTS)
def test_a_wrong_manifest_in_parts_is_refused(name: str) -> None:
    value = in_parts().signed()
    WRONG_MANIFESTS[name](value)
    from thinwire.wire.digests import hasher

    digest = hasher("blake3")(canonical.dump(value)).digest().hex()
    with pytest.raises((MalformedError, UnsupportedError)):
        Manifest.parse(canonical.dump({"digest": digest, "signatures": [], "signed": value}))


def test_a_part_that_is_swapped_changes_the_digest() -> None:
    manifest = in_parts()
    other = replace(manifest, parts=(manifest.parts[0], replace(manifest.parts[1], tree=ref("x", B))))
    assert other.digest != manifest.digest
