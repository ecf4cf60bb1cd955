"""ASPG with cells that are drawn: exactly so many, the same on all ranks, kept, and nested when the density moves."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.optim.test_aspg import gradients, parameters
from thinwire.errors import MisuseError, RefuseError
from thinwire.optim import ASPG
from thinwire.optim.selection import draw

NONE = torch.empty(0, dtype=torch.int32)


def after(active: list[torch.Tensor], parts: list[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
    return [torch.cat([a[stay], new]).sort().values for a, (stay, new) in zip(active, parts, strict=True)]


@given(st.lists(st.integers(0, 60), min_size=1, max_size=5), st.data())
def test_exactly_so_many_and_by_the_fewest_changes(sizes: list[int], data: st.DataObject) -> None:
    random = np.random.default_rng(data.draw(st.integers(0, 9)))
    active = [NONE for _ in sizes]
    for _ in range(3):
        k = data.draw(st.integers(0, sum(sizes)))
        parts = draw(sizes, active, k, random)
        before, active = active, after(active, parts)
        assert sum(map(len, active)) == k
        for size, positions, (_, new), old in zip(sizes, active, parts, before, strict=True):
            assert positions.dtype == torch.int32
            assert bool((positions[1:] > positions[:-1]).all())
            assert not len(positions) or 0 <= int(positions[0]) <= int(positions[-1]) < size
            assert not set(new.tolist()) & set(old.tolist())
        grew = k >= sum(map(len, before))
        for old, new in zip(before, active, strict=True):
            small, large = (old, new) if grew else (new, old)
            assert set(small.tolist()) <= set(large.tolist())


def test_every_cell_is_as_likely_as_any_other() -> None:
    """Also of those that enter later: 3 of 12 cells in two tensors, then 6. Chi-squared over 12 cells, 11 degrees."""
    for k, start in ((3, 0), (6, 3)):
        counts = np.zeros(12)
        for seed in range(2000):
            random = np.random.default_rng(seed)
            active = [NONE, NONE]
            for wanted in (start, k) if start else (k,):
                active = after(active, draw([5, 7], active, wanted, random))
            counts[active[0].numpy()] += 1
            counts[5 + active[1].numpy()] += 1
        share = k / 12
        assert ((counts - 2000 * share) ** 2 / (2000 * share * (1 - share))).sum() < 31.3  # p = 0.001


def test_more_cells_than_numpy_draws_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thinwire.optim.selection._HYPERGEOMETRIC_MAX", 4)
    for seed in range(50):
        parts = draw([10, 0, 3, 20], [NONE] * 4, 30, np.random.default_rng(seed))
        assert sum(len(new) for _, new in parts) == 30


def test_only_drawn_cells_ever_move_and_ranks_draw_the_same() -> None:
    ranks = []
    for _ in range(2):
        params = parameters((40, 25), (33,))
        start = [p.detach().clone() for p in params]
        optimizer = ASPG(params, lr=0.1, density=0.05, choice="random", seed=3, refresh_every=2, warmup_steps=3)
        for step in range(7):
            gradients(params, step)
            optimizer.step()
            if step == 0:
                chosen = [optimizer.state[p]["positions"].clone() for p in params]
        for p, old, cells in zip(params, start, chosen, strict=True):
            moved = (p.detach() != old).flatten().nonzero().flatten()
            assert moved.tolist() == cells.tolist() == optimizer.state[p]["positions"].tolist()
        ranks.append(chosen)
    assert optimizer.active_cells() == round(0.05 * 1033)
    assert all(torch.equal(a, b) for a, b in zip(*ranks, strict=True))


def test_steps_are_adamws_of_the_drawn_cells() -> None:
    ours, theirs = parameters((30, 30)), parameters((30, 30))
    mine = ASPG(ours, lr=0.01, density=0.1, choice="random", weight_decay=0.1)
    adamw = torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.1)
    for step in range(20):
        gradients(ours, step)
        gradients(theirs, step)
        mine.step()
        adamw.step()
    cells = mine.state[ours[0]]["positions"].long()
    ours_, theirs_ = ours[0].detach().flatten(), theirs[0].detach().flatten()
    torch.testing.assert_close(ours_[cells], theirs_[cells], rtol=1e-6, atol=1e-7)


def test_the_density_moves_nested_sets_and_their_moments_stay() -> None:
    params = parameters((50, 40))
    optimizer = ASPG(params, density=0.1, choice="random")
    sets = []
    for density in (0.1, 0.03, 0.2):
        optimizer.param_groups[0]["density"] = density
        gradients(params, len(sets))
        optimizer.step()
        state = optimizer.state[params[0]]
        sets.append(set(state["positions"].tolist()))
        assert len(sets[-1]) == density * 2000
    assert sets[1] < sets[0]
    assert sets[1] < sets[2]
    survivors = torch.tensor([p in sets[1] for p in state["positions"].tolist()])
    assert bool((state["entered"][survivors] == 1).all())


def test_gradients_of_other_cells_are_not_looked_at() -> None:
    params = parameters((50, 40))
    optimizer = ASPG(params, density=0.1, choice="random")
    gradients(params, 0)
    optimizer.step()
    needed = optimizer.needed(params[0])
    assert needed is not None
    other = int(next(n for n in range(2000) if n not in set(needed.tolist())))
    params[0].grad.view(-1)[other] = float("nan")
    optimizer.step()
    params[0].grad.view(-1)[int(needed[0])] = float("nan")
    with pytest.raises(RefuseError):
        optimizer.step()


def test_a_saved_state_goes_on_and_one_of_before_there_was_a_choice_is_by_gradients() -> None:
    params = parameters((50, 40))
    optimizer = ASPG(params, density=0.1, choice="random", seed=5)
    gradients(params, 0)
    optimizer.step()
    again = parameters((50, 40))
    for p, q in zip(params, again, strict=True):
        q.data.copy_(p.data)
    loaded = ASPG(again, density=0.5)
    saved = copy.deepcopy(optimizer.state_dict())
    loaded.load_state_dict(saved)
    for one, held in ((optimizer, params), (loaded, again)):
        for step in range(1, 4):
            gradients(held, step)
            one.step()
    assert torch.equal(params[0], again[0])
    for name in ("choice", "seed"):
        del saved["param_groups"][0][name]
    loaded.load_state_dict(saved)
    assert loaded.param_groups[0]["choice"] == "gradient"


@pytest.mark.parametrize("wrong", [{"choice": "best"}, {"choice": "random", "error_feedback": True}])
def test_misuse(wrong: dict) -> None:
    with pytest.raises(MisuseError):
        ASPG(parameters((4, 4)), **wrong)
