"""Patches compose exactly: one patch for many has their effect, bit for bit, or is refused with the reason."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.sync.checkpoints import lively
from tests.sync.test_apply import NAMES, State, same, snapshot
from thinwire.errors import MalformedError, MisuseError, WrongBaseError
from thinwire.sync import compose as compose_module
from thinwire.sync import encode as encode_module
from thinwire.sync import layout as layout_module
from thinwire.sync.apply import apply_patch
from thinwire.sync.compose import compose, in_context, without_context
from thinwire.sync.encode import Options, make_patch
from thinwire.sync.layout import StateSource
from thinwire.tensors.composing import merge_changes
from thinwire.tensors.tree import state_of
from thinwire.wire.patch import Patch

DTYPES = [
    torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu,
]  # fmt: skip
WIDTHS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def bits(random: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Any bit patterns at all: infinities, NaNs with payloads, both zeros."""
    if dtype == torch.bool:
        return torch.from_numpy(random.integers(0, 2, shape).astype(bool))
    size = torch.empty(0, dtype=dtype).element_size()
    raw = random.integers(0, 256, (*shape, size), dtype=np.uint8)
    return torch.from_numpy(raw).reshape(-1).view(dtype).reshape(shape)


def mixed(old: torch.Tensor, new: torch.Tensor, where: np.ndarray) -> torch.Tensor:
    """``new`` at ``where``, else ``old``; by bytes, so that it works for every data type."""
    if not old.numel():
        return old.clone()
    a, b = (t.reshape(-1).view(torch.uint8).numpy().reshape(t.numel(), -1) for t in (old, new))
    return torch.from_numpy(np.where(where[:, None], b, a)).reshape(-1).view(old.dtype).reshape(old.shape)


@st.composite
def runs(draw: st.DrawFn, *, fixed: bool = False, length: int = 4) -> list[State]:
    """States one after another; cells move, some come back. Unless ``fixed``, tensors come, go, change shape, move."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    dtypes = {name: draw(st.sampled_from(DTYPES)) for name in NAMES}
    shapes = {name: draw(st.sampled_from([(), (0,), (5,), (40, 30), (2, 1, 3)])) for name in NAMES}
    state = {name: bits(random, shapes[name], dtypes[name]) for name in draw(st.sets(st.sampled_from(NAMES)))}
    found = [state]
    for _ in range(length - 1):
        new = {}
        for name, tensor in found[-1].items():
            source = found[0].get(name) if random.random() < 0.3 else None
            if source is None or source.shape != tensor.shape or source.dtype != tensor.dtype:
                source = bits(random, tuple(tensor.shape), tensor.dtype)
            new[name] = mixed(tensor, source, random.random(tensor.numel()) < draw(st.sampled_from([0.05, 0.2, 1.0])))
        if not fixed:
            name = draw(st.sampled_from(NAMES))
            what = draw(st.sampled_from(["stay", "drop", "reshape", "move", "bring", "tie"]))
            if what == "drop":
                new.pop(name, None)
            elif what == "reshape" and name in new:
                new[name] = new[name].reshape(-1)
            elif what == "move" and name in new:
                new[f"{name}.moved"] = new.pop(name)
            elif what == "bring":
                new[name] = bits(random, shapes[name], dtypes[name])
            elif what == "tie" and name in new:
                new["tied"] = new[name]
        found.append(new)
    return found


def chain_of(states: list[State], level: str = "small", values: str = "ulp", hash_name: str = "blake3") -> list[Patch]:
    held = snapshot(states[0], hash_name)
    steps = (make_patch(held, StateSource(state_of(state)), Options(level, values, 1)) for state in states[1:])
    return list(map(through_bytes, steps))  # at once: tensors sent whole are views of what the next step moves on


def stored_whole(patch: Patch) -> bool:
    return any(row.changed and data[0] == 0 for row, data in zip(patch.segment_rows, patch.segments, strict=True))


def through_bytes(patch: Patch) -> Patch:
    return Patch.parse(b"".join(patch.encode()))


def applied(state: State, *patches: Patch) -> dict[str, np.ndarray]:
    held = snapshot(state, patches[0].hash)
    aliases = held.aliases
    for patch in patches:
        report = apply_patch(through_bytes(patch), held.layouts, held.cells, aliases=aliases, threads=1)
        aliases = report.tree.aliases
        assert report.tree.digest == patch.result
    return held.cells


@given(
    states=runs(),
    level=st.sampled_from(["fast", "small", "smallest"]),
    values=st.sampled_from(["ulp", "absolute"]),
    hash_name=st.sampled_from(["blake3", "sha256"]),
)
def test_one_patch_does_what_many_do(states: list[State], level: str, values: str, hash_name: str) -> None:
    patches = chain_of(states, level, values, hash_name)
    base = StateSource(state_of(states[0]))
    both = compose(*map(through_bytes, patches), base=base, options=Options(level, values, 1))
    assert (both.parent, both.result) == (patches[0].parent, patches[-1].result)
    assert same(applied(states[0], both), states[-1])
    assert same(applied(states[0], *patches), states[-1])
    try:
        alone = compose(*patches)
    except MisuseError:  # never silently wrong
        return
    assert same(applied(states[0], alone), states[-1])


@given(states=runs(fixed=True), values=st.sampled_from(["ulp", "absolute"]))
def test_where_only_cells_change_no_base_is_needed_and_the_order_does_not_matter(
    states: list[State], values: str
) -> None:
    a, b, c = chain_of(states, values=values)
    left, right, at_once = compose(compose(a, b), c), compose(a, compose(b, c)), compose(a, b, c)
    assert left.encode() == right.encode() == at_once.encode()
    assert same(applied(states[0], left), states[-1])
    direct = chain_of([states[0], states[-1]])[0]
    if values == "ulp" and not any(map(stored_whole, (a, b, c, direct))):
        # cells that came back are found, too: nothing is sent but what a direct diff sends
        assert b"".join(left.encode()) == b"".join(direct.encode())


@given(
    width=st.sampled_from([1, 2, 4, 8]),
    absolute=st.booleans(),
    lists=st.tuples(*[st.dictionaries(st.integers(0, 30), st.integers(0, 2**64 - 1), max_size=12)] * 2),
)
def test_merged_changes_are_those_of_two_dictionaries(
    width: int, absolute: bool, lists: tuple[dict[int, int], dict[int, int]]
) -> None:
    size = 1 << (8 * width)
    first, second = ({k: v % size for k, v in sorted(d.items())} for d in lists)

    def step(code: int) -> int:
        return code // 2 if code % 2 == 0 else -(code + 1) // 2

    expected = {}
    for k in sorted(first | second):
        if k in first and k in second and not absolute:
            total = (step(first[k]) + step(second[k]) + size // 2) % size - size // 2
            if total:
                expected[k] = 2 * total if total >= 0 else -2 * total - 1
        else:
            expected[k] = second.get(k, first.get(k, 0))
    columns = []
    for changes in (first, second):
        columns += [np.array(list(changes), np.int64), np.array(list(changes.values()), WIDTHS[width])]
    positions, codes = merge_changes(*columns, absolute=absolute)
    assert dict(zip(positions.tolist(), codes.tolist(), strict=True)) == expected


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many stripes, blocks and segments even for small states."""
    for module in (layout_module, encode_module, compose_module):
        for name, value in (("STRIPE_CELLS", 1 << 11), ("SEGMENT_CHANGES", 100)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(layout_module, "block_cells", lambda cell_bytes: 256)


@pytest.mark.usefixtures("small_parts")
def test_many_segments_compose_to_the_bytes_of_a_direct_diff() -> None:
    torch.manual_seed(1)
    states = [{f"w{i}": (torch.randn(37, 41) * 0.02).bfloat16() for i in range(7)}]
    for _ in range(4):
        moved = {name: t.clone() for name, t in states[-1].items()}
        for tensor in moved.values():
            tensor[torch.rand(tensor.shape) < 0.1] *= 1.01
        states.append(moved)
    held = snapshot(states[0])
    patches = [make_patch(held, StateSource(state_of(s)), Options(threads=1)) for s in states[1:]]
    composed, direct = compose(*patches), chain_of([states[0], states[-1]])[0]
    assert len(composed.segment_rows) > 10
    assert b"".join(composed.encode()) == b"".join(direct.encode())


def test_patches_in_context_need_the_base_or_are_turned_into_plain_ones() -> None:
    states = [lively({}, seed) for seed in range(3)]
    a, b = chain_of(states, "smallest")
    assert in_context(a)
    with pytest.raises(MisuseError, match="context"):
        compose(a, b)
    middle = snapshot(states[1])
    plain_a, plain_b = (without_context(a, snapshot(states[0]).cells), without_context(b, middle.cells))
    assert not in_context(plain_a)
    assert same(applied(states[0], plain_a), states[1])
    assert same(applied(states[0], compose(plain_a, plain_b)), states[2])
    small = compose(a, b, base=StateSource(state_of(states[0])), options=Options("smallest", threads=1))
    assert sum(map(len, small.encode())) < sum(map(len, compose(plain_a, plain_b).encode()))
    assert same(applied(states[0], small), states[2])


def test_a_tied_tensor_that_parts_is_followed_or_refused() -> None:
    tied = torch.arange(6000.0)
    spot = torch.zeros(6000)
    spot[7] = 1
    states = [{"a": tied, "b": tied}, {"a": tied, "b": tied.clone()}, {"a": tied, "b": tied + spot}]
    patches = chain_of(states)
    base = StateSource(state_of(states[0]))
    assert same(applied(states[0], compose(*patches, base=base)), states[-1])
    with pytest.raises(MisuseError, match="a copy of 'a' is changed"):
        compose(*patches)


def test_what_does_not_belong_together_is_refused() -> None:
    states = [{"w": torch.arange(500.0) + (torch.arange(500.0) % 50 < k)} for k in range(4)]
    a, b, c = chain_of(states)
    with pytest.raises(MisuseError, match="no patch"):
        compose()
    with pytest.raises(WrongBaseError, match="starts from"):
        compose(a, c)
    with pytest.raises(MisuseError, match="sha256"):
        compose(a, replace(b, hash="sha256"))
    with pytest.raises(WrongBaseError, match="the base is"):
        compose(replace(a, values="absolute"), b, base=StateSource(state_of(states[1])))
    with pytest.raises(MisuseError, match="mix"):
        compose(replace(a, values="absolute"), b)
    other = chain_of([{"x": torch.zeros(2)}, {"x": torch.ones(2)}])[0]
    with pytest.raises(WrongBaseError, match="'x'"):
        compose(a, replace(other, parent=a.result))
    row = a.rows[0]
    with pytest.raises(MalformedError, match="table"):
        compose(replace(a, rows=(replace(row, changed=row.changed - 1),)), b)


def test_one_patch_composes_to_itself() -> None:
    states = [{"w": torch.randn(50)}, {"w": torch.randn(50)}]
    (patch,) = chain_of([*states])
    assert same(applied(states[0], compose(patch)), states[1])
    nothing = chain_of([states[0], states[0]])[0]
    assert compose(nothing, patch, base=StateSource(state_of(states[0]))).result == patch.result
