"""Deltas hold exact bits; those read from a patch are those between the states, whatever the patch is made of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.merge.states import State, pairs, patch_between, random_state, source_of_state, tuned
from thinwire.errors import MalformedError, MisuseError, RefuseError, ThinwireError, WrongBaseError
from thinwire.integrations.patch_deltas import PatchReader, check_parent, read_deltas
from thinwire.merge.delta import MERGEABLE, TensorDelta, cells_from, delta_between, floats_of
from thinwire.sync import encode as encode_module
from thinwire.sync import layout as layout_module
from thinwire.tensors.bits import cells_of, tensor_of, torch_dtype
from thinwire.wire.patch import Patch
from thinwire.wire.spec import dtype_of


def same(a: TensorDelta, b: TensorDelta) -> bool:
    arrays = zip((a.positions, a.base, a.new), (b.positions, b.base, b.new), strict=True)
    return (a.dtype, a.shape) == (b.dtype, b.shape) and all(
        np.array_equal(x, y) and x.dtype == y.dtype for x, y in arrays
    )


@given(pair=pairs(), level=st.sampled_from(["fast", "small", "smallest"]), values=st.sampled_from(["ulp", "absolute"]))
def test_a_patch_read_as_deltas_is_the_difference_of_the_states(
    pair: tuple[State, State], level: str, values: str
) -> None:
    base, new = pair
    patch = patch_between(base, new, level=level, values=values)
    reader = PatchReader(patch, source_of_state(base))
    for name, tensor in base.items():
        delta = reader.delta(name).check()
        assert same(delta, delta_between(tensor, new[name]))
        assert np.array_equal(delta.written_to(cells_of(tensor).copy()), cells_of(new[name]))
    assert {name for name, _ in read_deltas(patch, source_of_state(base))} == set(reader.changed)


@pytest.mark.parametrize("level", ["small", "smallest"])
def test_tensors_that_lie_in_several_segments_are_put_together(monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    monkeypatch.setattr(encode_module, "SEGMENT_CHANGES", 1000)
    monkeypatch.setattr(layout_module, "STRIPE_CELLS", 1 << 19)
    generator = torch.Generator().manual_seed(0)
    base = {n: torch.randn(700_001, generator=generator).bfloat16() for n in "abc"}
    new = tuned(base, 1, 0.01)
    patch = patch_between(base, new, level=level)
    assert len(patch.segment_rows) > 3
    reader = PatchReader(patch, source_of_state(base))
    for name in ("c", "a", "b"):  # in any order
        assert same(reader.delta(name), delta_between(base[name], new[name]))


@given(at=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_damage_is_refused_or_read_as_some_valid_delta(at: int, bit: int) -> None:
    base = random_state(0)
    data = bytearray(b"".join(patch_between(base, tuned(base, 1)).encode()))
    data[at % len(data)] ^= 1 << bit
    try:
        for _, delta in read_deltas(Patch.parse(bytes(data)), source_of_state(base)):
            delta.check()
    except ThinwireError:
        pass


def test_what_has_no_sparse_delta_is_refused_by_name() -> None:
    base = random_state(0)
    added = patch_between(base, base | {"new.weight": torch.ones(3)})
    with pytest.raises(MisuseError, match=r"new\.weight"):
        PatchReader(added, source_of_state(base))
    with pytest.raises(MisuseError, match=r"removes 'a\.bias'"):
        PatchReader(patch_between(base, {n: t for n, t in base.items() if n != "a.bias"}), source_of_state(base))
    patch = patch_between(base, tuned(base, 1))
    with pytest.raises(WrongBaseError, match=r"a\.weight"):
        PatchReader(patch, source_of_state(base | {"a.weight": torch.ones(3)}))
    with pytest.raises(MisuseError, match="nothing"):
        PatchReader(patch, source_of_state(base)).delta("nothing")
    with pytest.raises(WrongBaseError) as error:
        check_parent(patch, "00" * 32)
    assert patch.parent in str(error.value)
    assert "00" * 32 in str(error.value)


@pytest.mark.parametrize("name", MERGEABLE)
def test_numbers_are_read_and_rounded_as_torch_does(name: str) -> None:
    kind, width = torch_dtype(name), dtype_of(name).cells
    random = np.random.default_rng(0)
    cells = (
        random.integers(0, 1 << 8 * width.itemsize, 70_000, width, endpoint=False)
        if width.itemsize < 8
        else (random.integers(0, 1 << 63, 70_000, np.uint64))
    )
    if width.itemsize <= 2:
        cells = np.arange(1 << 8 * width.itemsize, dtype=np.uint32).astype(width)
    tensor = tensor_of(cells.copy(), name, (cells.size,))
    work = torch.float64 if name == "F64" else torch.float32
    assert np.array_equal(floats_of(cells, name), tensor.to(work).numpy(), equal_nan=True)
    numbers = np.float32(random.standard_normal(200_000)) * np.float32(2.0) ** random.integers(-140, 129, 200_000)
    halves = (np.arange(1 << 16, dtype=np.uint32) << np.uint32(16) | np.uint32(0x8000)).view(np.float32)  # bf16's ties
    numbers = np.concatenate([numbers, halves]).astype(np.float64 if name == "F64" else np.float32)
    numbers = numbers[~np.isnan(numbers)]
    assert np.array_equal(cells_from(numbers, name), cells_of(torch.from_numpy(numbers).to(kind)))


def test_deltas_from_elsewhere_are_checked() -> None:
    delta = delta_between(torch.zeros(4), torch.tensor([1.0, 0, 2, 0]))
    fields = (delta.dtype, delta.shape)
    cells = np.array([1, 2], np.uint32)
    for positions in ([2, 0], [0, 4], [-1, 0], [1, 1]):
        with pytest.raises(MalformedError):
            TensorDelta(*fields, np.array(positions, np.int32), delta.base, delta.new).check()
    with pytest.raises(MalformedError):
        TensorDelta(*fields, delta.positions, cells, cells).check()
    with pytest.raises(RefuseError):
        TensorDelta(*fields, delta.positions, delta.base.astype(np.uint16), delta.new).check()
    with pytest.raises(WrongBaseError):
        delta.written_to(np.ones(4, np.uint32))
    with pytest.raises(MisuseError, match="float32"):
        delta_between(torch.zeros(4), torch.zeros(4, dtype=torch.bfloat16))
