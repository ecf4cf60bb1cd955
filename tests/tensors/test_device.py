"""The torch path equals the kernels bit for bit. It runs on any device; on the CPU here, on a GPU with ``-m gpu``."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tensors.test_kernels import cell_pairs, find
from thinwire.tensors import device
from thinwire.tensors.bits import cells_of, tensor_of
from thinwire.wire.spec import DTYPES

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]


def tensors(name: str, cells: np.ndarray, where: str) -> torch.Tensor:
    kind = DTYPES[name]
    if name == "BOOL":
        cells = cells & 1
    count = cells.size * 8 * kind.cell_bytes // kind.element_bits
    if name == "C64":
        cells, count = cells[: cells.size // 2 * 2], cells.size // 2
    return tensor_of(cells.copy(), name, (count,)).to(where)


@pytest.mark.parametrize("where", DEVICES)
@given(pair=cell_pairs())
def test_diff_and_step_equal_the_kernels(where: str, pair: tuple[str, np.ndarray, np.ndarray]) -> None:
    name = pair[0]
    old, new = tensors(name, pair[1], where), tensors(name, pair[2], where)
    positions, codes = device.find_changed(old, new)
    expected, expected_codes = find(name, cells_of(old), cells_of(new), "ulp")
    assert positions.tolist() == expected.tolist()
    assert [c % 2**64 for c in codes.tolist()] == expected_codes.tolist()
    kind = DTYPES[name]
    before, after = device.bits_of(old)[positions], device.bits_of(new)[positions]
    moved = device.unstep(before, codes, width=kind.cell_bytes, is_float=kind.is_float)
    assert torch.equal(moved, after)


@pytest.mark.parametrize("where", DEVICES)
@given(pair=cell_pairs(), share=st.floats(0, 1))
def test_scatter_writes_these_cells_and_no_others(
    where: str, pair: tuple[str, np.ndarray, np.ndarray], share: float
) -> None:
    name = pair[0]
    old, new = tensors(name, pair[1], where), tensors(name, pair[2], where)
    positions = np.flatnonzero(np.random.default_rng(0).random(cells_of(old).size) < share)
    expected = cells_of(old).copy()
    expected[positions] = cells_of(new)[positions]
    target = old.clone()
    device.scatter_(target, positions, cells_of(new)[positions])
    assert (cells_of(target) == expected).all()
