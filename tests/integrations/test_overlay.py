"""What tasks put on a model is what a dense copy would hold; the base comes back bit for bit, whatever happens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.merge.states import State, pairs, patch_between, random_state, tuned
from thinwire.errors import MalformedError, MisuseError, WrongBaseError
from thinwire.integrations import overlay as module
from thinwire.integrations.overlay import Overlay
from thinwire.tensors.bits import cells_of
from thinwire.wire.patch import Patch


def copy(state: State) -> State:
    return {name: tensor.clone() for name, tensor in state.items()}


def equal(a: State, b: State) -> bool:
    return set(a) == set(b) and all(np.array_equal(cells_of(a[n]), cells_of(b[n])) for n in a)


def loaded(base: State, tasks: dict[str, State], **options: object) -> Overlay:
    overlay = Overlay(base, **options)  # type: ignore[arg-type]
    for name, state in tasks.items():
        overlay.tasks[name] = overlay.read(patch_between(copy(base), state))
    return overlay


def dense(base: State, tasks: list[State]) -> State:
    """The readable oracle: each task in turn overwrites what differs from the base, in bits."""
    found = {name: cells_of(tensor).copy() for name, tensor in base.items()}
    for task in tasks:
        for name, cells in found.items():
            old, new = cells_of(base[name]), cells_of(task[name])
            cells[old != new] = new[old != new]
    return {n: torch.from_numpy(c.view(f"i{c.itemsize}")) for n, c in found.items()}


def bits(state: State) -> State:
    return {n: torch.from_numpy(cells_of(t).copy().view(f"i{cells_of(t).itemsize}")) for n, t in state.items()}


@given(pair=pairs(), seed=st.integers(0, 9), walk=st.lists(st.lists(st.sampled_from("abc"), max_size=3), max_size=6))
def test_any_walk_over_stacks_holds_what_dense_copies_would_hold(
    pair: tuple[State, State], seed: int, walk: list[list[str]]
) -> None:
    base, first = pair
    tasks = {"a": first, "b": tuned(base, seed, 0.3), "c": tuned(base, seed + 1, 0.01)}
    model = copy(base)
    overlay = loaded(model, tasks)
    for stack in walk:
        overlay.switch(tuple(stack))
        assert equal(bits(model), dense(base, [tasks[name] for name in stack]))
    overlay.switch(())
    assert equal(model, base)


def test_a_task_tells_the_digest_that_the_model_then_has() -> None:
    base = random_state(0)
    overlay = loaded(base, {"a": tuned(base, 1)})
    before = overlay.base_tree().digest
    overlay.switch(("a",))
    assert overlay.tree().digest == overlay.tasks["a"].result != before
    overlay.switch(())
    assert overlay.tree().digest == before


def test_a_switch_broken_off_anywhere_is_mended_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    base = random_state(0)
    model = copy(base)
    tasks = {name: tuned(base, seed, 0.5) for seed, name in enumerate("abc", start=1)}
    overlay = loaded(model, tasks)
    whole = module._Prepared.write
    for stop in range(12):
        overlay.switch(("a", "b"))
        left = stop

        def broken(self: module._Prepared, which: int) -> None:
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            whole(self, which)

        monkeypatch.setattr(module._Prepared, "write", broken)
        with pytest.raises(KeyboardInterrupt):
            overlay.switch(("c", "b"))
        monkeypatch.setattr(module._Prepared, "write", whole)
        overlay.switch(overlay.stack)
        assert equal(bits(model), dense(base, [tasks["a"], tasks["b"]]))
    overlay.switch(())
    assert equal(model, base)


def test_odd_bits_survive_where_arithmetic_would_lose_them() -> None:
    special = torch.tensor([0x7FC1, 0xFFC2, 0x8000, 0x0000, 0x7F80, 0x0001], dtype=torch.int32).to(torch.int16)
    base = {"w": special.view(torch.bfloat16).clone()}
    new = {"w": special.flip(0).view(torch.bfloat16).clone()}
    model = copy(base)
    overlay = loaded(model, {"a": new})
    overlay.switch(("a",))
    assert equal(model, new)
    overlay.switch(())
    assert equal(model, base)


@pytest.mark.parametrize("make", [lambda t: t.t().contiguous().t(), lambda t: t[None].expand(1, *t.shape)[0]])
def test_tensors_that_lie_otherwise_are_written_in_place(make: object) -> None:
    base = {"w": torch.arange(12.0).reshape(3, 4), "conv": torch.randn(2, 3, 4, 4)}
    new = tuned(base, 1)
    model = {"w": make(base["w"].clone()), "conv": base["conv"].clone(memory_format=torch.channels_last)}  # type: ignore[operator]
    overlay = loaded(model, {"a": new})
    overlay.switch(("a",))
    assert equal(model, new)
    overlay.switch(())
    assert equal(model, base)


def test_tied_weights_are_written_once_and_untied_copies_all() -> None:
    embed = torch.randn(6, 4)
    tied = {"embed": embed, "head": embed}
    moved = torch.where(torch.rand(6, 4) < 0.5, embed + 1, embed)
    patch = patch_between(tied, {"embed": moved, "head": moved})
    assert patch.aliases == {"head": "embed"}
    for model, sites in (({"embed": embed.clone()}, 1), ({"embed": embed.clone(), "head": embed.clone()}, 2)):
        overlay = Overlay(model)
        overlay.tasks["a"] = task = overlay.read(patch)
        assert len(task.prepared) == sites
        overlay.switch(("a",))
        assert all(torch.equal(t, moved) for t in model.values())
        overlay.switch(())
        assert all(torch.equal(t, embed) for t in model.values())
    one = torch.nn.Parameter(embed.clone())
    overlay = Overlay({"embed": one, "head": one})
    assert len(overlay.read(patch).prepared) == 1
    with pytest.raises(WrongBaseError, match="tied"):
        Overlay({"embed": embed.clone(), "head": moved}).read(patch)
    with pytest.raises(MisuseError, match="share memory"):
        Overlay(tied).read(patch_between({n: t.clone() for n, t in tied.items()}, {"embed": moved, "head": moved + 1}))


def test_names_can_be_mapped() -> None:
    base = random_state(0)
    new = tuned(base, 1)
    for names in (lambda n: f"model.{n}", {n: f"model.{n}" for n in base}):
        model = {f"model.{n}": t.clone() for n, t in base.items()}
        overlay = Overlay(model, names)
        overlay.tasks["a"] = overlay.read(patch_between(base, new))
        overlay.switch(("a",))
        assert equal(model, {f"model.{n}": t for n, t in new.items()})


def test_what_does_not_fit_is_refused_before_anything_is_written() -> None:
    base = random_state(0)
    patch, model = patch_between(base, tuned(base, 1)), copy(base)
    other = tuned(base, 7)
    with pytest.raises(WrongBaseError) as error:
        Overlay(copy(other)).read(patch)
    assert patch.parent in str(error.value)
    with pytest.raises(MisuseError, match=r"a\.weight"):
        Overlay({n: t for n, t in model.items() if n != "a.weight"}).read(patch)
    with pytest.raises(MisuseError, match="does not know"):
        Overlay(model | {"extra": torch.ones(3)}).read(patch)
    with pytest.raises(WrongBaseError):
        Overlay(model | {"a.weight": torch.ones(3)}).read(patch)
    with pytest.raises(MisuseError, match="gaps"):
        Overlay(model | {"a.weight": torch.ones(40, 60).bfloat16()[:, ::2]}).read(patch)
    overlay = loaded(model, {"a": tuned(base, 1)})
    with pytest.raises(MisuseError, match="no task 'b'"):
        overlay.switch(("a", "b"))
    assert equal(model, base)


def test_a_patch_that_leads_elsewhere_than_it_promises_is_refused() -> None:
    base = random_state(0)
    patch = patch_between(base, tuned(base, 1))
    fields = {name: getattr(patch, name) for name in Patch.__slots__}
    with pytest.raises(MalformedError, match="leads to"):
        Overlay(copy(base)).read(Patch(**{**fields, "result": "00" * 32}))


def test_a_model_that_was_moved_is_not_written_behind_its_back() -> None:
    model = torch.nn.Linear(4, 4)
    base = copy(model.state_dict())
    overlay = Overlay(model)
    overlay.tasks["a"] = overlay.read(patch_between(base, tuned(base, 1)))
    model.to(torch.float64)
    with pytest.raises(MisuseError, match="lies elsewhere"):
        overlay.switch(("a",))


def test_a_backward_pass_across_a_switch_fails_instead_of_being_wrong() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    base = copy(model.state_dict())
    overlay = Overlay(model)
    overlay.tasks["a"] = overlay.read(patch_between(base, tuned(base, 1, 1.0)))
    loss = model(torch.ones(1, 4)).sum()
    overlay.switch(("a",))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8, torch.bool, torch.complex64])
def test_the_way_for_devices_is_the_same(dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_host_view", lambda tensor: False)
    base = {"w": (torch.rand(70, 50) * 50).to(dtype), "c": torch.randn(2, 3, 4, 4)}
    new = {"w": base["w"].clone(), "c": base["c"] + 1}
    new["w"][::7] = 0
    model = {n: t.to(device, copy=True) for n, t in base.items()}
    model["c"] = model["c"].to(memory_format=torch.channels_last)
    overlay = loaded(model, {})
    overlay.tasks["a"] = overlay.read(patch_between(base, new))
    for _ in range(2):
        overlay.switch(("a",))
        assert equal(model, new)
        overlay.switch(())
        assert equal(model, base)
