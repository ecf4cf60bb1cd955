"""One byte an element finds the changes that it says it finds, by all ways; exact snapshots find all."""

from __future__ import annotations

from math import isnan

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.probe.tensors import pairs
from thinwire.errors import MisuseError
from thinwire.probe import snapshots as snapshots_module
from thinwire.probe.change_kernels import BINS, follow_bytes
from thinwire.probe.change_torch import byte_of, follow_on_device
from thinwire.probe.changes import Limits, compare
from thinwire.probe.oracle import byte_of_cell, compare_slowly
from thinwire.probe.snapshots import ExactSnapshot, FastSnapshot
from thinwire.tensors.bits import cells_of, dtype_of_tensor

NO_WORDS = np.empty(0, np.uint64)


@given(pair=pairs(), renew=st.booleans())
def test_the_bytes_kept_are_those_of_the_oracle_on_both_ways(
    pair: tuple[torch.Tensor, torch.Tensor], renew: bool
) -> None:
    old, new = pair
    dtype = dtype_of_tensor(new)
    bytes_ = {}
    for key, tensor in (("old", old), ("new", new)):
        bytes_[key] = [byte_of_cell(c, dtype.cell_bytes, is_float=dtype.is_float) for c in cells_of(tensor).tolist()]
        assert byte_of(tensor).tolist() == bytes_[key]
    differ = [a != b for a, b in zip(bytes_["old"], bytes_["new"], strict=True)]
    outcomes = []
    for device in (False, True):
        kept = torch.tensor(bytes_["old"], dtype=torch.uint8)
        hist, words = np.zeros(BINS, np.int64), np.full(-(-old.numel() // 64), -1, np.int64).view(np.uint64)
        if device:
            changed = follow_on_device(new, kept, hist, words, renew=renew)
        else:
            changed = follow_bytes(
                cells_of(new), kept.numpy(), hist, words, is_float=dtype.is_float, renew=renew
            )  # fmt: skip
        assert changed == sum(differ)
        assert kept.tolist() == bytes_["new" if renew else "old"]
        assert np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist() == [
            i for i, d in enumerate(differ) if d
        ]
        outcomes.append(hist.tolist())
    assert outcomes[0] == outcomes[1]
    if dtype.cell_bytes != 2:
        assert sum(outcomes[0]) == 0


@given(steps=st.lists(st.integers(-127, 127), min_size=1, max_size=200), start=st.integers(-30000, 30000))
def test_short_steps_of_16_bits_are_exact(steps: list[int], start: int) -> None:
    order = np.clip(np.array(steps) + start, -32640, 32639)  # no NaN
    cells = np.where(order < 0, order ^ 0x7FFF, order).astype(np.int16)
    first = start ^ 0x7FFF if start < 0 else start
    old = torch.full((len(steps),), first, dtype=torch.int16).view(torch.bfloat16)
    new = torch.from_numpy(cells).view(torch.bfloat16)
    found, right = FastSnapshot(old, None).renew(new), compare_slowly(old, new)
    assert (found.changed, found.ulps, found.missed) == (right.changed, right.ulps, 0)


@given(pair=pairs())
def test_nothing_unchanged_is_ever_counted(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    old, new = pair
    fast, exact = FastSnapshot(old, None), ExactSnapshot(old, None)
    found, right = fast.renew(new), exact.renew(new)
    assert found.changed <= right.changed == compare(old, new).changed
    if new.element_size() == 1:
        assert found.changed == right.changed
    assert fast.renew(new).changed == exact.renew(new).changed == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("step", [1, -1, 3, 256, 65536, 1 << 20])
def test_a_hash_overlooks_one_change_in_256(dtype: torch.dtype, step: int) -> None:
    n = 200_000
    old = torch.randn(n, generator=torch.Generator().manual_seed(step % 97), dtype=dtype)
    cells = old.view(torch.int32 if dtype == torch.float32 else torch.int64)
    found = FastSnapshot(old, None).renew((cells + step).view(dtype))
    missed = n - found.changed
    assert abs(missed - n / 256) < 5 * (n / 256) ** 0.5  # five standard deviations
    assert found.density == pytest.approx(1.0, abs=5 * (n / 256) ** 0.5 / n)
    assert isnan(found.mean_abs)


@pytest.mark.parametrize("kind", [ExactSnapshot, FastSnapshot])
@pytest.mark.parametrize("view", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_a_view_is_what_the_workers_receive(
    monkeypatch: pytest.MonkeyPatch, kind: type[ExactSnapshot], view: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    masters = torch.randn(1000, generator=generator) * 0.02
    moved = masters + torch.randn(1000, generator=generator) * 1e-5
    right = compare(masters.to(view), moved.to(view))
    monkeypatch.setattr(snapshots_module, "BLOCK", 128)
    snapshot, words = kind(masters, view), np.zeros(16, np.uint64)
    assert snapshot.nbytes == 1000 * (1 if kind is FastSnapshot else view.itemsize)
    found = snapshot.compare(moved, Limits(), renew=False, words=words)
    assert (found.elements, found.changed) == (1000, right.changed)
    assert 0 < found.changed == sum(bin(word).count("1") for word in words.tolist()) < 1000
    ids = torch.arange(5)
    assert kind(ids, view).renew(ids + 1).changed == 5  # integers are never converted


@pytest.mark.parametrize("kind", [ExactSnapshot, FastSnapshot])
def test_saved_and_loaded_and_refused(kind: type[ExactSnapshot]) -> None:
    weights = torch.randn(40, 3, generator=torch.Generator().manual_seed(1)).bfloat16()
    snapshot, other = kind(weights, None), kind(weights * 2, None)
    state = snapshot.state_dict()
    other.load_state_dict(state)
    assert other.digest() == snapshot.digest()
    assert other.renew(weights).changed == 0
    state["kept"][3] += 1
    with pytest.raises(MisuseError, match="bytes"):
        other.load_state_dict(state)
    for different in (torch.ones(120).bfloat16(), torch.ones(40, 3)):
        with pytest.raises(MisuseError, match="saved snapshot is of"):
            kind(different, None).load_state_dict(snapshot.state_dict())
        with pytest.raises(MisuseError, match="kept was"):
            snapshot.renew(different)
    assert not snapshot.fits(torch.ones(40, 3))


def test_odd_tensors() -> None:
    for kind in (ExactSnapshot, FastSnapshot):
        assert kind(torch.ones(0), None).renew(torch.ones(0)).elements == 0
        assert kind(torch.tensor(1.0), None).renew(torch.tensor(2.0)).changed == 1
        assert kind(torch.ones(2, 3).t(), None).renew(torch.zeros(2, 3).t()).elements == 6
        nans = torch.full((70,), float("nan"))
        assert kind(nans, torch.bfloat16).renew(nans).changed == 0
    with pytest.raises(MisuseError, match="exact"):
        FastSnapshot(torch.ones(3), None).renew(torch.ones(3), Limits(absolute=1.0))
