"""Kernels equal the readable oracle bit for bit, for every data type and bit pattern."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from thinwire.errors import UnsupportedError
from thinwire.tensors import kernels, oracle
from thinwire.tensors.bits import cells_of, dtype_of_tensor, shape_of, tensor_of
from thinwire.wire.spec import DTYPES


@st.composite
def cell_pairs(draw: st.DrawFn) -> tuple[str, np.ndarray, np.ndarray]:
    kind = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    size = draw(st.sampled_from([0, 1, 5, 63, 64, 65, 127, 200]))
    top = 2 ** (8 * kind.cell_bytes) - 1
    special = [0, 1, top, top // 2, top // 2 + 1, top // 2 + 2]
    elements = st.one_of(st.sampled_from(special), st.integers(0, top))
    old = draw(hnp.arrays(kind.cells, size, elements=elements))
    new = old.copy()
    for i in draw(st.sets(st.integers(0, max(size - 1, 0)), max_size=20)) if size else ():
        new[i] = draw(elements)
    return kind.name, old, new


def find(name: str, old: np.ndarray, new: np.ndarray, mode: str, offset: int = 0) -> tuple[np.ndarray, np.ndarray]:
    positions, codes = np.empty(old.size, np.uint32), np.empty(old.size, old.dtype)
    n = kernels.find_changed(old, new, offset, positions, codes, 0, is_float=DTYPES[name].is_float, values=mode)
    return positions[:n], codes[:n]


@given(cell_pairs())
def test_diff_equals_the_oracle(pair: tuple[str, np.ndarray, np.ndarray]) -> None:
    name, old, new = pair
    kind = DTYPES[name]
    positions, codes = find(name, old, new, "ulp")
    expected = [i for i in range(old.size) if old[i] != new[i]]
    assert positions.tolist() == expected
    before, after = [int(old[i]) for i in expected], [int(new[i]) for i in expected]
    assert codes.tolist() == oracle.steps(before, after, 8 * kind.cell_bytes, is_float=kind.is_float)
    assert oracle.apply_steps(before, codes.tolist(), 8 * kind.cell_bytes, is_float=kind.is_float) == after
    assert find(name, old, new, "absolute")[1].tolist() == after
    assert kernels.count_changed(old, new) == len(expected)


@given(cell_pairs(), st.integers(0, 1000))
def test_swap_applies_and_swapping_back_undoes(pair: tuple[str, np.ndarray, np.ndarray], offset: int) -> None:
    name, old, new = pair
    cells = old.copy()
    positions, codes = find(name, old, new, "ulp", offset)
    kernels.swap_steps(cells, offset, positions, codes, 0, is_float=DTYPES[name].is_float)
    assert (cells == new).all()
    kernels.swap_absolute(cells, offset, positions, codes, 0)
    assert (cells == old).all()


@given(cell_pairs(), st.sampled_from(["ulp", "absolute"]))
def test_advance_reaches_the_new_cells_and_keeps_the_codes(pair: tuple[str, np.ndarray, np.ndarray], mode: str) -> None:
    name, old, new = pair
    cells = old.copy()
    positions, codes = find(name, old, new, mode)
    kept = codes.copy()
    is_float = DTYPES[name].is_float
    kernels.advance(cells, 0, positions, codes, 0, positions.size, is_float=is_float, values=mode)
    assert (cells == new).all()
    assert (codes == kept).all()


@pytest.mark.parametrize("mode", ["ulp", "absolute"])
@given(cell_pairs(), st.integers(0, 1000))
def test_taking_is_finding_and_advancing_at_once(
    mode: str, pair: tuple[str, np.ndarray, np.ndarray], offset: int
) -> None:
    name, old, new = pair
    cells, positions, codes = old.copy(), np.empty(old.size, np.uint32), np.empty(old.size, old.dtype)
    how = {"is_float": DTYPES[name].is_float, "values": mode}
    n = kernels.take_changed(cells, new, offset, positions, codes, 0, **how)
    found = find(name, old, new, mode, offset)
    assert (positions[:n].tolist(), codes[:n].tolist()) == (found[0].tolist(), found[1].tolist())
    assert (cells == new).all()


def test_one_unit_in_the_last_place_is_a_step_of_one() -> None:
    values = torch.tensor([1.0, -1.0, 0.0, -0.0, 1e-30, torch.inf], dtype=torch.float32)
    up = torch.nextafter(values, torch.full_like(values, torch.inf))
    old, new = cells_of(values), cells_of(up)
    positions, codes = find("F32", old, new, "ulp")
    # from -0.0 the next number up is the least positive one: two steps of bits, past +0.0; infinity stays
    assert positions.tolist() == [0, 1, 2, 3, 4]
    assert codes.tolist() == [2, 2, 2, 4, 2]


ALL_DTYPES = [d for d in (getattr(torch, n, None) for n in (
    "bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float8_e4m3fn", "float8_e5m2",
    "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2", "float16", "bfloat16", "float32",
    "float64", "complex64",
)) if d is not None]  # fmt: skip


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (7,), (4, 6)], ids=str)
def test_every_dtype_and_shape_survives_as_cells(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    size = int(np.prod(shape)) * torch.empty(0, dtype=dtype).element_size()
    noise = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8)
    tensor = noise.view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)
    if shape == () and dtype == getattr(torch, "float4_e2m1fn_x2", None):
        with pytest.raises(UnsupportedError):
            shape_of(tensor)
        return
    cells = cells_of(tensor)
    again = tensor_of(cells.copy(), dtype_of_tensor(tensor).name, shape_of(tensor))
    assert again.dtype == dtype
    assert again.shape == tensor.shape
    assert (cells_of(again) == cells).all()
    if size:
        assert bytes(cells.tobytes()) == noise.numpy().tobytes()


def test_cells_of_a_contiguous_host_tensor_are_a_view_and_others_are_copies() -> None:
    tensor = torch.zeros(4, 4, dtype=torch.bfloat16)
    cells_of(tensor)[5] = 0x3F80
    assert tensor[1, 1] == 1.0
    cells_of(tensor.t())[0] = 0x3F80
    assert tensor[0, 0] == 0.0
    transposed = cells_of(torch.arange(6, dtype=torch.int32).reshape(2, 3).t())
    assert transposed.tolist() == [0, 3, 1, 4, 2, 5]


def test_bits_that_values_cannot_tell_apart_are_told_apart() -> None:
    nan, other = torch.tensor([0x7FC0, 0x0000], dtype=torch.int16), torch.tensor([0x7FC1, -0x8000], dtype=torch.int16)
    old, new = nan.view(torch.bfloat16), other.view(torch.bfloat16)  # two NaNs; +0.0 and -0.0
    assert oracle.changed_positions(old, new) == [0, 1]
    assert find("BF16", cells_of(old), cells_of(new), "ulp")[0].tolist() == [0, 1]
