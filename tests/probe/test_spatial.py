"""Random positions look random, rows look like rows, and rows of small weights do so only against a naive null."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thinwire.errors import MisuseError
from thinwire.probe import spatial as spatial_module
from thinwire.probe.spatial import mask_words, structure_of


def uniformity(p_values: list[float]) -> float:
    """The Kolmogorov-Smirnov distance from the uniform law."""
    ordered = np.sort(p_values)
    steps = np.arange(1, len(ordered) + 1) / len(ordered)
    return float(np.max(np.maximum(np.abs(ordered - steps), np.abs(ordered - steps + 1 / len(ordered)))))


def test_p_values_of_random_positions_are_uniform() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(24, 16, generator=generator)
    found: dict[str, list[float]] = {key: [] for key in ("rows", "within rows", "columns", "heads")}
    for seed in range(200):
        mask = torch.zeros(24 * 16, dtype=torch.bool)
        mask[torch.randperm(24 * 16, generator=generator)[:60]] = True
        structure = structure_of(mask_words(mask), weights, heads=6, permutations=99, seed=seed)
        assert structure.heads is not None
        found["rows"].append(structure.rows.uniform.p_value)
        found["within rows"].append(structure.rows.within_exponent.p_value)
        found["columns"].append(structure.columns.uniform.p_value)
        found["heads"].append(structure.heads.uniform.p_value)
    for key, p_values in found.items():
        assert uniformity(p_values) < 1.95 / 200**0.5, key  # 0.1 % of uniform samples are farther


def test_positions_random_within_exponents_are_structured_only_against_the_naive_null() -> None:
    generator = torch.Generator().manual_seed(1)
    scale = torch.logspace(-2, 0, 32)[:, None]  # rows of small and of large weights
    weights = torch.randn(32, 64, generator=generator) * scale
    naive, honest = [], []
    for seed in range(40):
        by_class = 2 ** -weights.abs().log2().floor() * 0.001  # as rounding has it: by the exponent alone
        mask = torch.rand(32, 64, generator=generator) < by_class.clamp(max=0.9)
        found = structure_of(mask_words(mask), weights, permutations=99, seed=seed)
        naive.append(found.rows.uniform.p_value)
        honest.append(found.rows.within_exponent.p_value)
    assert np.mean(np.array(naive) <= 0.05) > 0.9
    assert np.mean(np.array(honest) <= 0.05) < 0.2


@pytest.mark.parametrize("where", ["rows", "columns", "heads"])
def test_structure_is_found_where_it_is(where: str) -> None:
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(32, 48, generator=generator).to(torch.bfloat16)
    mask = torch.rand(32, 48, generator=generator) < 0.05
    if where == "rows":
        mask[7] = True
    elif where == "columns":
        mask[:, 11] = True
    else:
        mask[8:16] |= torch.rand(8, 48, generator=generator) < 0.2
    found = structure_of(mask_words(mask), weights, heads=4)
    axis = getattr(found, where)
    assert axis.uniform.p_value <= 0.01
    assert axis.within_exponent.p_value <= 0.01
    assert axis.uniform.dispersion > 2
    assert (found.changed, int(axis.counts.sum())) == (int(mask.sum()), int(mask.sum()))
    if where != "columns":
        assert found.columns.within_exponent.p_value > 0.01


@given(seed=st.integers(0, 1000), rows=st.integers(1, 9), columns=st.integers(1, 9))
def test_counts_are_those_of_the_mask(seed: int, rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(rows, columns, generator=generator).half()
    mask = torch.rand(rows, columns, generator=generator) < 0.4
    found = structure_of(mask_words(mask), weights, permutations=9)
    assert found.rows.counts.tolist() == mask.sum(dim=1).tolist()
    assert found.columns.counts.tolist() == mask.sum(dim=0).tolist()
    assert found.rows.sizes.tolist() == [columns] * rows
    for axis in (found.rows, found.columns):
        for pattern in (axis.uniform, axis.within_exponent):
            assert 0.1 <= pattern.p_value <= 1


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(4)
    weights, mask = torch.randn(37, 29, generator=generator), torch.rand(37, 29, generator=generator) < 0.2
    whole = structure_of(mask_words(mask), weights)
    monkeypatch.setattr(spatial_module, "_BLOCK", 128)
    assert repr(structure_of(mask_words(mask), weights)) == repr(whole)


def test_the_dispersion_of_random_positions_is_one_on_average() -> None:
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(40, 40, generator=generator)
    found = []
    for _ in range(100):
        mask = torch.rand(40, 40, generator=generator) < 0.2
        found.append(structure_of(mask_words(mask), weights, permutations=1).rows)
    assert np.mean([f.uniform.dispersion for f in found]) == pytest.approx(1.0, abs=0.1)
    assert np.mean([f.within_exponent.dispersion for f in found]) == pytest.approx(1.0, abs=0.1)


def test_odd_masks_and_misuse() -> None:
    weights = torch.ones(4, 6)
    for share in (0, 1):
        found = structure_of(mask_words(torch.full((4, 6), bool(share))), weights)
        assert np.isnan(found.rows.uniform.dispersion)
        assert found.rows.uniform.p_value == 1
    convolution = torch.ones(4, 3, 2)
    assert structure_of(mask_words(torch.zeros(24, dtype=torch.bool)), convolution).columns.counts.size == 6
    integers = structure_of(mask_words(torch.eye(4, 6, dtype=torch.bool)), torch.arange(24).view(4, 6))
    assert integers.rows.uniform.p_value == 1.0  # one in each: nothing varies less
    words = mask_words(torch.zeros(24, dtype=torch.bool))
    for bad in ((words, torch.ones(24)), (words, torch.ones(0, 3)), (words, torch.ones(40, 40))):
        with pytest.raises(MisuseError):
            structure_of(*bad)
    for options in ({"heads": 3}, {"heads": 0}, {"permutations": 0}):
        with pytest.raises(MisuseError):
            structure_of(words, weights, **options)
