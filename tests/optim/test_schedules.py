"""Densities follow their schedules, and the active set follows the density."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thinwire.errors import MisuseError
from thinwire.optim import ASPG, CosineDensity, PlateauDensity


def optimizer(density: float = 0.5) -> ASPG:
    return ASPG([torch.nn.Parameter(torch.ones(100))], density=density)


@given(st.floats(0.01, 1), st.floats(0.01, 1), st.integers(1, 50))
def test_a_cosine_goes_one_way_and_ends_at_its_end(start: float, end: float, steps: int) -> None:
    sparse = optimizer(start)
    schedule, seen = CosineDensity(sparse, end=end, steps=steps), [start]
    for _ in range(steps + 2):
        schedule.step()
        seen.append(sparse.param_groups[0]["density"])
    assert seen[-3:] == [end] * 3
    assert seen[: steps + 1] == pytest.approx(sorted(seen[: steps + 1], reverse=start > end))


def test_the_active_set_follows_and_a_saved_schedule_goes_on() -> None:
    sparse = optimizer()
    schedule = CosineDensity(sparse, end=0.1, steps=4, update_every=2)
    (p,) = sparse.param_groups[0]["params"]
    sizes = []
    for step in range(4):
        p.grad = torch.arange(1.0, 101.0)
        sparse.step()
        sizes.append(sparse.active_cells())
        schedule.step()
        if step == 1:
            saved, schedule = schedule.state_dict(), CosineDensity(sparse, end=0.1, steps=4, update_every=2)
            schedule.load_state_dict(saved)
    assert sizes == [50, 50, 30, 30]
    assert sparse.param_groups[0]["density"] == 0.1


def test_a_plateau_raises_the_density_up_to_most() -> None:
    sparse = optimizer(0.1)
    schedule = PlateauDensity(sparse, patience=2, most=0.3)
    seen = []
    for loss in (1.0, 0.9, 0.9, 0.9, float("nan"), 0.5, 0.6, 0.6):
        schedule.step(loss)
        seen.append(sparse.param_groups[0]["density"])
    assert seen == [0.1, 0.1, 0.1, 0.2, 0.3, 0.3, 0.3, 0.3]


def test_misuse_is_refused() -> None:
    for bad in ({"end": 0.0, "steps": 1}, {"end": 0.1, "steps": 0}):
        with pytest.raises(MisuseError):
            CosineDensity(optimizer(), **bad)  # type: ignore[arg-type]
    with pytest.raises(MisuseError):
        PlateauDensity(optimizer(), factor=1.0)
