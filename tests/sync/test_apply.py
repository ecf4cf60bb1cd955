"""Patches of whole states: every kind of change is exact, and a patch that does not fit changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thinwire.errors import DamagedObjectError, RefuseError, ThinwireError, WrongBaseError
from thinwire.sync import apply as apply_module
from thinwire.sync import encode as encode_module
from thinwire.sync import layout as layout_module
from thinwire.sync.apply import apply_patch, tree_of
from thinwire.sync.encode import Options, Snapshot, make_patch, take_snapshot
from thinwire.sync.layout import StateSource
from thinwire.tensors.tree import state_of
from thinwire.wire.patch import Patch

State = dict[str, torch.Tensor]
NAMES = ["a", "b.weight", "c", "d"]


@st.composite
def states(draw: st.DrawFn) -> State:
    found: State = {}
    for name in draw(st.sets(st.sampled_from(NAMES))):
        dtype = draw(
            st.sampled_from([torch.bfloat16, torch.float32, torch.float16, torch.int64, torch.bool, torch.uint8])
        )
        shape = draw(st.sampled_from([(), (0,), (5,), (40, 30), (2, 1, 3)]))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 3)))
        if dtype.is_floating_point:
            found[name] = (torch.randn(shape, generator=generator) * 0.02).to(dtype)
        else:
            found[name] = torch.randint(0, 2, shape, generator=generator).to(dtype)
    return found


def snapshot(state: State, hash_name: str = "blake3") -> Snapshot:
    return take_snapshot(StateSource(state_of(state)), hash_name=hash_name)


def same(cells: dict[str, np.ndarray], state: State) -> bool:
    expected = snapshot(state)
    return set(cells) == set(expected.cells) and all((cells[n] == c).all() for n, c in expected.cells.items())


MODES = {
    "level": st.sampled_from(["fast", "small", "smallest"]),
    "values": st.sampled_from(["ulp", "absolute"]),
    "hash_name": st.sampled_from(["blake3", "sha256"]),
}


@given(old=states(), new=states(), **MODES)
def test_any_state_becomes_any_other(old: State, new: State, level: str, values: str, hash_name: str) -> None:
    sender, receiver = snapshot(old, hash_name), snapshot(old, hash_name)
    patch = make_patch(sender, StateSource(state_of(new)), Options(level, values, 2))
    assert same(sender.cells, new)
    parsed = Patch.parse(b"".join(patch.encode()))
    report = apply_patch(parsed, receiver.layouts, receiver.cells)
    assert same(receiver.cells, new)
    assert receiver.layouts == snapshot(new).layouts
    assert report.tree.digest == snapshot(new, hash_name).tree.digest == patch.result
    assert tree_of(receiver.layouts, receiver.cells, {}, hash_name=hash_name) == report.tree


def test_a_renamed_tensor_is_not_sent_again() -> None:
    state = {"old.name": torch.randn(1000)}
    sender, receiver = snapshot(state), snapshot(state)
    patch = make_patch(sender, StateSource(state_of({"new.name": state["old.name"]})))
    assert sum(map(len, patch.encode())) < 1000
    apply_patch(Patch.parse(b"".join(patch.encode())), receiver.layouts, receiver.cells)
    assert list(receiver.cells) == ["new.name"]


def test_a_change_of_everything_costs_no_more_than_the_state() -> None:
    generator = torch.Generator().manual_seed(0)
    old, new = (torch.randint(-(2**62), 2**62, (50_000,), generator=generator) for _ in range(2))
    patch = make_patch(snapshot({"w": old}), StateSource(state_of({"w": new})))
    assert sum(map(len, patch.encode())) <= 400_000 + 1000


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many stripes, blocks and segments even for small states."""
    for module in (layout_module, encode_module, apply_module):
        for name, value in (
            ("STRIPE_CELLS", 1 << 10),
            ("SEGMENT_CHANGES", 100),
            ("block_cells", lambda cell_bytes: 256),
        ):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    from thinwire.tensors import digest

    monkeypatch.setattr(digest, "block_cells", lambda cell_bytes: 256)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("level", ["small", "smallest"])
@pytest.mark.parametrize("values", ["ulp", "absolute"])
def test_many_stripes_and_segments(level: str, values: str) -> None:
    torch.manual_seed(1)
    old = {f"w{i}": (torch.randn(37, 41) * 0.02).bfloat16() for i in range(7)} | {"s": torch.randn(3)}
    new = {k: v.clone() for k, v in old.items()}
    for tensor in new.values():
        where = torch.rand(tensor.shape) < 0.2
        tensor[where] = tensor[where] * 1.01
    sender, receiver = snapshot(old), snapshot(old)
    patch = make_patch(sender, StateSource(state_of(new)), Options(level, values, 2))
    assert len(patch.segment_rows) > 10
    apply_patch(Patch.parse(b"".join(patch.encode())), receiver.layouts, receiver.cells, threads=2)
    assert same(receiver.cells, new)


def pair() -> tuple[State, State]:
    torch.manual_seed(2)
    old = {"w": (torch.randn(300, 200) * 0.02).bfloat16(), "b": torch.randn(50)}
    new = {k: v.clone() for k, v in old.items()}
    new["w"][::7] *= 1.01
    new["b"][3] = -0.0
    return old, new


@pytest.mark.parametrize("level", ["small", "smallest"])
@pytest.mark.parametrize("values", ["ulp", "absolute"])
def test_on_a_wrong_base_nothing_changes_and_both_digests_are_named(level: str, values: str) -> None:
    old, new = pair()
    patch = make_patch(snapshot(old), StateSource(state_of(new)), Options(level, values))
    wrong = {k: v.clone() for k, v in old.items()}
    wrong["b"][0] += 1
    receiver = snapshot(wrong)
    with pytest.raises(WrongBaseError) as caught:
        apply_patch(patch, receiver.layouts, receiver.cells)
    assert same(receiver.cells, wrong)
    assert caught.value.facts == {"expected": patch.parent, "actual": receiver.tree.digest}
    assert patch.parent in str(caught.value)
    assert receiver.tree.digest in str(caught.value)


@pytest.mark.parametrize("change", ["dtype", "shape", "missing", "additional"])
def test_a_base_with_other_tensors_is_refused(change: str) -> None:
    old, new = pair()
    patch = make_patch(snapshot(old), StateSource(state_of(new)))
    other = dict(old)
    if change == "dtype":
        other["w"] = old["w"].half()
    elif change == "shape":
        other["w"] = old["w"].t()
    elif change == "missing":
        del other["b"]
    else:
        other["x"] = torch.zeros(1)
    receiver = snapshot(other)
    with pytest.raises(WrongBaseError):
        apply_patch(patch, receiver.layouts, receiver.cells)
    assert same(receiver.cells, other)


def test_a_patch_that_lies_about_its_result_changes_nothing() -> None:
    old, new = pair()
    patch = make_patch(snapshot(old), StateSource(state_of(new)))
    data = b"".join(patch.encode()).replace(patch.result.encode(), b"0" * 64)
    receiver = snapshot(old)
    with pytest.raises(DamagedObjectError, match="nothing was changed"):
        apply_patch(Patch.parse(data), receiver.layouts, receiver.cells)
    assert same(receiver.cells, old)


@given(
    where=st.integers(0, 10**9), flip=st.integers(1, 255),
    level=st.sampled_from(["small", "smallest"]), values=st.sampled_from(["ulp", "absolute"]),
)  # fmt: skip
def test_a_flipped_byte_anywhere_changes_nothing_or_is_harmless(where: int, flip: int, level: str, values: str) -> None:
    old, new = pair()
    data = bytearray(b"".join(make_patch(snapshot(old), StateSource(state_of(new)), Options(level, values)).encode()))
    data[where % len(data)] ^= flip
    receiver = snapshot(old)
    try:
        apply_patch(Patch.parse(bytes(data)), receiver.layouts, receiver.cells)
    except ThinwireError:
        assert same(receiver.cells, old)
    else:  # in a byte that nothing depends on, such as the level's name
        assert same(receiver.cells, new)


@pytest.mark.parametrize("stage", ["hash_block", "swap_steps"])
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_an_error_in_the_middle_of_an_apply_is_undone(stage: str, nth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = pair()
    old["v"] = torch.randn(300_000)
    new["v"] = old["v"] * 1.5
    patch = make_patch(snapshot(old), StateSource(state_of(new)))
    receiver = snapshot(old)
    calls = 0
    real = getattr(apply_module, stage)

    def failing(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == nth:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(apply_module, stage, failing)
    with pytest.raises(KeyboardInterrupt):
        apply_patch(patch, receiver.layouts, receiver.cells, threads=1)
    assert same(receiver.cells, old)


def test_a_snapshot_left_half_way_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = pair()
    sender = snapshot(old)

    def failing(*args: object) -> bytes:
        raise MemoryError

    monkeypatch.setattr(encode_module, "hash_block", failing)
    with pytest.raises(MemoryError):
        make_patch(sender, StateSource(state_of(new)))
    monkeypatch.undo()
    with pytest.raises(RefuseError):
        make_patch(sender, StateSource(state_of(new)))
