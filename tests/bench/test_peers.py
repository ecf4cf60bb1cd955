"""Peers are lossless, or their figures would mean nothing; the simulated steps are what they are said to be."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from thinwire.bench.entropy import entropy_of
from thinwire.bench.peers import PATCH_FROM, PEERS, Peer, apply_all, encode_all, units_of
from thinwire.bench.weights import model_shapes, parts_of
from thinwire.bench.workloads import adam, adam_versions, ulp
from thinwire.errors import MisuseError
from thinwire.tensors.bits import cells_of

SPECIAL = [0x0000, 0x8000, 0x7FC0, 0xFFC1, 0x7F80, 0xFF80, 0x0001, 0x8001, 0x7F7F, 0xFFFF]  # ±0, NaNs, ±inf, subnormals


@st.composite
def bf16_pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    size = draw(st.sampled_from([1, 2, 63, 64, 65, 300]))
    elements = st.one_of(st.sampled_from(SPECIAL), st.integers(0, 0xFFFF))
    old = draw(hnp.arrays(np.uint16, size, elements=elements))
    new = old.copy()
    for i in draw(st.sets(st.integers(0, size - 1), max_size=30)):
        new[i] = draw(elements)
    return old, new


@pytest.mark.parametrize("peer", [*PEERS, PATCH_FROM], ids=lambda peer: peer.name)
@given(pair=bf16_pairs())
def test_a_peer_gives_every_bit_back(peer: Peer, pair: tuple[np.ndarray, np.ndarray]) -> None:
    old, new = pair
    cells = old.copy()
    peer.apply(peer.encode(old, new), cells)
    assert cells.tolist() == new.tolist()


@pytest.mark.parametrize("peer", [*PEERS, PATCH_FROM], ids=lambda peer: peer.name)
def test_a_peer_gives_a_model_of_many_tensors_back_on_two_threads(peer: Peer) -> None:
    pair = ulp(1 << 18, 0.05, seed=3)
    target = pair.old.copy()
    with ThreadPoolExecutor(2) as pool:
        data = encode_all(peer, units_of(peer, pair.old, pair.shapes), units_of(peer, pair.new, pair.shapes), pool)
        apply_all(peer, data, units_of(peer, target, pair.shapes), pool)
    assert np.array_equal(target, pair.new)


def test_gaps_beyond_16_bits_are_bridged_by_cells_that_stay() -> None:
    peer = next(peer for peer in PEERS if peer.name.startswith("u16"))
    old = np.zeros(300_000, np.uint16)
    new = old.copy()
    new[[0, 65_536, 65_537, 299_999]] = [1, 2, 3, 4]
    cells = old.copy()
    peer.apply(peer.encode(old, new), cells)
    assert np.array_equal(cells, new)


def test_a_peer_that_loses_something_is_found_out() -> None:
    from thinwire.bench.codec import NotLosslessError, _arena, _measure, _Other

    pair = ulp(1 << 14, 0.05, seed=1)
    careless = Peer("careless", "tensor", lambda _old, new: (new & 0xFFFE).tobytes(), PEERS[0].apply, "drops a bit")
    with ThreadPoolExecutor(1) as pool:
        arena = _arena(pair, 1, pool)
        with pytest.raises(NotLosslessError, match="careless"):
            _measure([_Other(arena, careless)], arena, 1, lambda _: None)


def test_ulp_steps_are_one_unit_and_as_many_as_asked_for() -> None:
    pair = ulp(1 << 21, 0.02, seed=5)
    old, new = (torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).double() for x in (pair.old, pair.new))
    changed = old != new
    assert abs(changed.double().mean().item() - 0.02) < 0.002
    unit = torch.exp2(torch.floor(torch.log2(old[changed].abs())) - 7)
    assert ((new - old)[changed].abs() <= unit).all()  # half a unit where the step crosses a power of two
    assert np.array_equal(pair.new, ulp(1 << 21, 0.02, seed=5).new)


def test_adam_changes_the_share_it_is_tuned_to_and_small_weights_most() -> None:
    pair = adam(1 << 22, 0.025, seed=5)
    changed = pair.old != pair.new
    assert abs(changed.mean() - 0.025) < 0.003
    magnitude = pair.old & 0x7FFF
    small = magnitude < np.median(magnitude)
    assert changed[small].sum() > 5 * changed[~small].sum()


def test_adam_versions_move_on_in_one_memory() -> None:
    states = adam_versions(1 << 16, 1e-4, seed=0)
    first = next(states)
    before = {name: cells_of(tensor).copy() for name, tensor in first.items()}
    second = next(states)
    assert all(first[name].data_ptr() == second[name].data_ptr() for name in first)
    assert any((cells_of(second[name]) != before[name]).any() for name in before)


@given(st.integers(1 << 10, 1 << 22))
def test_shapes_hold_exactly_the_cells_asked_for(cells: int) -> None:
    shapes = model_shapes(cells)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == cells
    assert list(shapes) == sorted(shapes)


def test_parts_must_cover_the_array() -> None:
    with pytest.raises(MisuseError):
        parts_of(np.zeros(5, np.uint16), {"a": (4,)})


def test_entropy_of_known_steps() -> None:
    random = np.random.default_rng(0)
    old = np.full(1 << 20, 0x3F80, np.uint16)
    new = old + (random.random(old.size) < 0.25)
    found = entropy_of(old, new.astype(np.uint16))
    assert found.plain == pytest.approx(0.811278 / 0.25 / 8, rel=0.01)  # H(0.25) bits a cell, 0.25 changes a cell
    assert found.exponent == pytest.approx(found.plain)
