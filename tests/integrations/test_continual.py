"""The history of patches: what is left of each, and any of them taken back as if it had never been."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.integrations.test_overlay import bits, copy, dense, equal
from tests.merge.states import State, made, patch_between, random_state, tuned
from thinwire.errors import MisuseError, WrongBaseError
from thinwire.integrations.continual import COMPACTED, Continual, backward_transfer, forgetting
from thinwire.integrations.overlay import Overlay
from thinwire.sync.encode import make_patch, take_snapshot
from thinwire.sync.layout import StateSource
from thinwire.tensors.bits import cells_of
from thinwire.tensors.tree import state_of


def changed(base: State, new: State) -> set[tuple[str, int]]:
    return {(n, int(i)) for n in base for i in np.flatnonzero(cells_of(base[n]) != cells_of(new[n]))}


@given(
    densities=st.lists(st.sampled_from([0.0, 0.01, 0.3, 1.0]), min_size=1, max_size=5),
    order=st.randoms(use_true_random=False),
    keep=st.integers(0, 5),
)
def test_any_patch_can_be_taken_back_as_if_it_had_never_been(densities: list[float], order: object, keep: int) -> None:
    base = random_state(0)
    model, history = copy(base), None
    experts = {f"patch-{i}": tuned(base, i, d) for i, d in enumerate(densities, start=1)}
    history = Continual(model)
    for state in experts.values():
        history.add(patch_between(base, state))
    assert history.names == list(experts)
    assert equal(bits(model), dense(base, list(experts.values())))
    left = list(experts)
    order.shuffle(left)  # type: ignore[attr-defined]
    while len(left) > keep:
        history.undo(left.pop())
        assert equal(bits(model), dense(base, [experts[n] for n in experts if n in left]))
    before = bits(model)
    history.compact()
    assert equal(bits(model), before)


def test_patches_made_one_from_another_come_off_in_any_order() -> None:
    base = random_state(0)
    first, model = tuned(base, 1, 0.5), copy(base)
    second = tuned(first, 2, 0.5)
    second["a.bias"] = base["a.bias"].clone()  # what the first had changed is set back: that is a change, too
    history = Continual(model)
    history.add(patch_between(base, first), "first")
    history.add(patch_between(first, second), "second")
    assert equal(model, second)
    history.undo("second")
    assert equal(model, first)
    history.add(patch_between(first, second), "second")
    history.undo("first")
    assert changed(base, model) <= changed(first, second)
    assert not {name for name, _ in changed(base, model)} & {"a.bias"}
    history.undo("second")
    assert equal(model, base)


def test_the_report_counts_what_sets_of_changed_cells_say() -> None:
    base = random_state(0)
    experts = [tuned(base, seed, 0.3) for seed in (1, 2, 3)]
    history = Continual(copy(base))
    for i, state in enumerate(experts):
        history.add(patch_between(base, state), scores={"patch-1": 0.9 - 0.1 * i})
    cells = [changed(base, state) for state in experts]
    report = history.report()
    assert [p.changed for p in report.patches] == [len(c) for c in cells]
    assert [p.kept for p in report.patches] == [len(c.difference(*cells[i + 1 :])) for i, c in enumerate(cells)]
    assert report.shared.tolist() == [[len(a & b) for b in cells] for a in cells]
    assert report.changed == len(set().union(*cells))
    np.testing.assert_allclose(report.jaccard(), [[len(a & b) / len(a | b) for b in cells] for a in cells])
    opposite = 0
    for name, i in cells[0] & cells[1]:
        moves = [float(e[name].flatten()[i]) - float(base[name].flatten()[i]) for e in experts[:2]]
        opposite += moves[0] * moves[1] < 0
    assert report.conflicts[0, 1] == report.conflicts[1, 0] == opposite > 0
    assert report.conflicts.diagonal().tolist() == [0, 0, 0]
    assert report.forgetting["patch-1"] == pytest.approx(0.2)
    assert report.backward_transfer == pytest.approx(-0.2)
    assert 0 < report.patches[0].overwritten < 1
    assert report.patches[-1].overwritten == 0


def test_forgetting_is_measured_against_the_best_score_before() -> None:
    rows = [{"a": 0.5}, {"a": 0.75, "b": 0.5}, {"a": 0.5, "b": 0.75}]
    assert forgetting(rows) == {"a": 0.25, "b": -0.25}
    assert forgetting([]) == {}
    assert backward_transfer(["a", "b", "c"], rows) == pytest.approx((0.0 + 0.25) / 2)
    assert backward_transfer([], []) is None


def test_compaction_keeps_the_weights_and_frees_what_cannot_be_undone() -> None:
    base, model = random_state(0), random_state(0)
    experts = [tuned(base, seed, 0.3) for seed in range(1, 8)]
    history = Continual(model, undo_last=2, compact_every=3)
    for i, state in enumerate(experts, start=1):
        history.add(patch_between(base, state))
        assert equal(bits(model), dense(base, experts[:i]))
        assert len(history.names) <= 1 + 2 + 3
    assert history.names == [COMPACTED, "patch-4", "patch-5", "patch-6", "patch-7"]
    size = sum(p.size for p in history.report().patches)
    history.compact(keep_last=1)
    assert history.names == [COMPACTED, "patch-7"]
    assert sum(p.size for p in history.report().patches) < size
    assert [p.undoable for p in history.report().patches] == [False, True]
    history.undo("patch-7")
    assert equal(bits(model), dense(base, experts[:6]))
    for name in (COMPACTED, "patch-1", "nothing"):
        with pytest.raises(MisuseError, match="cannot be undone"):
            history.undo(name)
    history.compact()
    assert history.names == [COMPACTED]


@pytest.mark.parametrize("hash_name", ["blake3", "sha256"])
def test_the_whole_history_can_be_written_as_one_patch(hash_name: str) -> None:
    base, model = random_state(0), random_state(0)
    history = Continual(model)
    for seed in (1, 2):
        snapshot = take_snapshot(StateSource(state_of(base)), hash_name=hash_name if seed == 2 else "blake3")
        history.add(made(make_patch(snapshot, StateSource(state_of(tuned(base, seed, 0.3))))))
    before = bits(model)
    patch = made(history.patch())
    assert equal(bits(model), before)
    assert (patch.parent, patch.result) == (patch_between(base, base).parent, history.digest())
    other = copy(base)
    overlay = Overlay(other)
    overlay.tasks["all"] = overlay.read(patch)
    overlay.switch(("all",))
    assert equal(other, model)


def test_patches_of_another_state_are_refused_and_all_digests_named() -> None:
    base, model = random_state(0), random_state(0)
    history = Continual(model)
    with pytest.raises(MisuseError):
        history.patch()
    history.add(patch_between(base, tuned(base, 1)), "first")
    before, names = bits(model), history.names
    stranger = patch_between(tuned(base, 5), tuned(base, 6))
    with pytest.raises(WrongBaseError) as error:
        history.add(stranger)
    for digest in (stranger.parent, history.digest(), patch_between(base, base).parent):
        assert digest in str(error.value)
    for name in ("first", COMPACTED):
        with pytest.raises(MisuseError, match="already"):
            history.add(patch_between(base, tuned(base, 2)), name)
    assert (history.names, equal(bits(model), before)) == (names, True)
    for bad in ({"undo_last": -1}, {"compact_every": 0}):
        with pytest.raises(MisuseError):
            Continual(model, **bad)
    with pytest.raises(MisuseError):
        history.compact(-1)


def test_tensors_that_hold_no_numbers_are_kept_apart_as_others_are() -> None:
    base = {"w": torch.zeros(4), "ids": torch.arange(4)}
    history = Continual(copy(base))
    history.add(patch_between(base, {"w": torch.ones(4), "ids": torch.arange(4).flip(0)}))
    history.add(patch_between(base, {"w": torch.full((4,), float("nan")), "ids": torch.arange(4).flip(0)}))
    report = history.report()
    assert (report.shared[0, 1], report.conflicts[0, 1], report.patches[0].kept) == (8, 0, 0)
