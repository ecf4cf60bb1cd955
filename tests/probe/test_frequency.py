"""Counters and overlaps agree with sets of positions; masks come back from files as they were, or not at all."""

from __future__ import annotations

from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinwire.errors import MalformedError, MisuseError
from thinwire.probe.frequency import (
    ChangeFrequency,
    expected_jaccard,
    jaccard,
    load_masks,
    positions_in,
    save_masks,
    words_of,
)

SIZE = 150
sets = st.sets(st.integers(0, SIZE - 1))


def mask(positions: set[int], elements: int = SIZE) -> np.ndarray:
    return words_of(np.array(sorted(positions), np.int64), elements)


@given(steps=st.lists(sets, max_size=6), share=st.floats(0, 0.99))
def test_counters_are_those_of_sets(steps: list[set[int]], share: float) -> None:
    counter = ChangeFrequency(SIZE)
    for positions in steps:
        counter.update(mask(positions))
    counts = [sum(i in positions for positions in steps) for i in range(SIZE)]
    assert counter.counts.tolist() == counts
    assert counter.hot(share).tolist() == [i for i in range(SIZE) if counts[i] > share * len(steps)]
    pairs = list(pairwise(steps))
    again, possible = sum(len(a & b) for a, b in pairs), sum(len(a) for a, _ in pairs)
    assert counter.recurrence == (again / possible if possible else 0.0)
    if pairs:
        assert counter.consecutive_jaccard == jaccard(mask(steps[-2]), mask(steps[-1]))
    other = ChangeFrequency(SIZE)
    other.load_state_dict(counter.state_dict())
    other.update(mask({1, 2}))
    counter.update(mask({1, 2}))
    assert other.state_dict()["numbers"] == counter.state_dict()["numbers"]


def test_counters_stay_at_their_largest_value() -> None:
    counter = ChangeFrequency(3)
    counter.counts[:] = 65534
    for _ in range(3):
        counter.update(mask({1}, 3))
    assert counter.counts.tolist() == [65534, 65535, 65534]
    with pytest.raises(MisuseError):
        counter.update(mask({1}))
    with pytest.raises(MisuseError):
        counter.load_state_dict(ChangeFrequency(4).state_dict())
    assert ChangeFrequency(0).hot().tolist() == []


@given(a=sets, b=sets)
def test_overlap_is_that_of_sets(a: set[int], b: set[int]) -> None:
    assert jaccard(mask(a), mask(b)) == (len(a & b) / len(a | b) if a | b else 1.0)
    assert positions_in(mask(a), SIZE).tolist() == sorted(a)
    with pytest.raises(MisuseError):
        jaccard(mask(a), mask(set(), 5))
    with pytest.raises(MisuseError):
        positions_in(mask(a), 5)


@given(n=st.integers(1, 7), data=st.data())
def test_the_expected_overlap_is_the_mean_over_all_pairs_of_sets(n: int, data: st.DataObject) -> None:
    a, b = data.draw(st.integers(0, n)), data.draw(st.integers(0, n))
    first = set(range(a))
    overlaps = [
        len(first & set(second)) / len(first | set(second)) if first or second else 1.0
        for second in combinations(range(n), b)
    ]
    assert expected_jaccard(n, a, b) == pytest.approx(sum(overlaps) / len(overlaps))


def test_the_expected_overlap_of_large_sets() -> None:
    assert expected_jaccard(10**9, 10**7, 2 * 10**7) == pytest.approx(2e5 / (3e7 - 2e5), rel=1e-6)
    random = np.random.default_rng(0)
    masks = [mask(set(random.choice(5000, 400, replace=False).tolist()), 5000) for _ in range(40)]
    found = [jaccard(x, y) for x, y in combinations(masks, 2)]
    assert np.mean(found) == pytest.approx(expected_jaccard(5000, 400, 400), rel=0.02)
    with pytest.raises(MisuseError):
        expected_jaccard(3, 4, 1)


@given(a=sets, dense=st.booleans(), far=st.booleans())
def test_masks_are_saved_and_loaded(a: set[int], dense: bool, far: bool) -> None:
    elements = SIZE if dense else 100_000
    positions = {p * 600 for p in a} if far and not dense else a
    path = Path("masks.npz")
    masks = {"a.weight": (mask(positions, elements), elements), "empty": (mask(set(), 0), 0)}
    save_masks(path, masks)
    found = load_masks(path)
    assert list(found) == list(masks)
    for name, (words, size) in found.items():
        assert size == masks[name][1]
        assert np.array_equal(words, masks[name][0])


def test_a_sparse_mask_takes_about_a_byte_a_change(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    positions = np.sort(random.choice(1_000_000, 10_000, replace=False))
    save_masks(tmp_path / "m.npz", {"w": (words_of(positions, 1_000_000), 1_000_000)})
    assert (tmp_path / "m.npz").stat().st_size < 12_500


@given(at=st.integers(0, 10**6), bit=st.integers(0, 7), cut=st.booleans())
def test_damaged_masks_are_refused_or_valid(at: int, bit: int, cut: bool) -> None:
    path = Path("damaged.npz")
    save_masks(path, {"w": (mask({1, 5, 60}), SIZE), "v": (mask(set(range(0, SIZE, 2))), SIZE)})
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1 << bit
    path.write_bytes(bytes(data[: at % len(data)] if cut else data))
    try:
        for words, elements in load_masks(path).values():
            assert positions_in(words, elements).size <= elements
    except MalformedError:
        pass


def test_no_file_is_no_damage(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_masks(tmp_path / "none.npz")
    with pytest.raises(MisuseError, match="words"):
        save_masks(tmp_path / "m.npz", {"w": (mask({1}), 5)})
