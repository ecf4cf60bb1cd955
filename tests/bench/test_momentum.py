"""Predicting a step from the one before: the guess, and rows of a real and of a made-up trajectory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thinwire.bench.momentum import guess, momentum_table, run_momentum
from thinwire.errors import MisuseError

cells = st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=50)


@given(cells, cells, st.sampled_from([0.0, 0.7, 1.0]))
def test_the_guess_is_torchs_arithmetic_for_every_bit_pattern(a: list[int], b: list[int], factor: float) -> None:
    n = min(len(a), len(b))
    old, older = (torch.tensor(x[:n], dtype=torch.uint16).view(torch.bfloat16) for x in (a, b))
    found = guess(old.view(torch.uint16).numpy(), older.view(torch.uint16).numpy(), factor)
    wide = old.float() + torch.tensor(factor, dtype=torch.float32) * (old.float() - older.float())
    expected = torch.where(wide.isfinite(), wide.bfloat16(), old)
    assert (found == expected.view(torch.uint16).numpy()).all()


def _line(versions: int, noise: float) -> Iterator[dict[str, torch.Tensor]]:
    """Weights that all go straight on, by thousands of units in the last place where they began at zero."""
    random = torch.Generator().manual_seed(0)
    start = torch.randn(20_000, generator=random) * 0.02
    start[:5000] = 0
    way = torch.randn(20_000, generator=random) * 1e-5
    for step in range(versions):
        yield {"w": (start + step * way + noise * torch.randn(20_000, generator=random)).bfloat16()}


def test_steps_that_repeat_are_cheap_to_predict_and_noise_is_not() -> None:
    straight, noisy = (list(run_momentum(_line(5, noise), "made up")) for noise in (0.0, 1e-4))
    assert [row["step"] for row in straight] == [2, 3, 4]
    assert straight[-1]["share"] < 0.7
    assert noisy[-1]["share"] > 0.9
    assert 0 < straight[-1]["were_zero"] <= 5000
    assert straight[-1]["guessed"]["1.0"] <= straight[-1]["values"]
    assert momentum_table(straight).row_count == 3


def test_nothing_that_moves_gives_no_rows_and_fp32_is_refused() -> None:
    still = [{"w": torch.ones(100, dtype=torch.bfloat16)}] * 4
    assert list(run_momentum(still, "still")) == []
    with pytest.raises(MisuseError):
        list(run_momentum([{"w": np.ones(3)}, {"w": torch.ones(3)}], "wide"))  # type: ignore[dict-item]
