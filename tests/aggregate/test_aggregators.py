"""Every aggregator keeps its contract: one row each. And the linear ones are what their papers say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.aggregate.oracles import adacons, adasum, centred_clipping, krum_order
from thinwire.aggregate import (
    AGGREGATORS,
    AdaCons,
    AdaSum,
    Aggregator,
    CentredClipping,
    CoordinateMedian,
    Krum,
    Mean,
    MultiKrum,
    OutlierSkip,
    TrimmedMean,
    Weighted,
    aggregate,
    gram_matrix,
    weighted_sum,
)
from thinwire.aggregate.coordinatewise import network
from thinwire.errors import MisuseError
from thinwire.testing.aggregators import AggregatorClaims, AggregatorContract, update_sets

WEIGHTS = (1.0, 2.0, 3.0, 0.5, 1.0, 4.0, 0.25)

MINORITY = AggregatorClaims(survives=3, breaks_at=4)
KRUM = AggregatorClaims(survives=2, breaks_at=4)

AGGREGATORS_AND_CLAIMS: list[tuple[Aggregator, AggregatorClaims]] = [
    (Mean(), AggregatorClaims()),
    (Weighted(WEIGHTS), AggregatorClaims(permutation=False)),
    (AdaCons(), AggregatorClaims(translation=False)),
    (AdaCons(momentum=0.0), AggregatorClaims(translation=False)),
    (AdaSum(), AggregatorClaims(permutation=False, translation=False)),
    (Krum(faulty=1), KRUM),
    (Krum(faulty=2), KRUM),
    (MultiKrum(faulty=2), KRUM),
    (MultiKrum(faulty=1, keep=5), replace(KRUM, breaks_at=3)),
    (CentredClipping(), replace(MINORITY, within=5.0, translation=False)),
    (
        CentredClipping(radius=4.0, iterations=2),  # its pull is bounded, step by step
        replace(MINORITY, within=5.0, breaks_at=None, scale=False, translation=False, identity=False),
    ),
    (OutlierSkip(), AggregatorClaims()),
    (OutlierSkip(warmup=2, threshold=2.0), AggregatorClaims()),
    (CoordinateMedian(), MINORITY),
    (TrimmedMean(trim=1), AggregatorClaims(survives=1, breaks_at=2)),
    (TrimmedMean(trim=3), MINORITY),
]


class TestAggregators(AggregatorContract):
    @pytest.fixture(params=AGGREGATORS_AND_CLAIMS, ids=lambda row: repr(row[0]))
    def row(self, request: pytest.FixtureRequest) -> Any:
        return request.param

    @pytest.fixture
    def aggregator(self, row: tuple[Aggregator, AggregatorClaims]) -> Aggregator:
        return row[0]

    @pytest.fixture
    def claims(self, row: tuple[Aggregator, AggregatorClaims]) -> AggregatorClaims:
        return row[1]


def test_the_table_has_them_all() -> None:
    assert set(AGGREGATORS.values()) == {type(aggregator) for aggregator, _ in AGGREGATORS_AND_CLAIMS}
    assert all(AGGREGATORS[kind.name] is kind for kind in AGGREGATORS.values())


# --- the linear ones are what their papers say, on whole vectors -----------------------------------------------------


def close(result: Tensor, expected: Tensor, updates: Tensor) -> bool:
    return torch.allclose(result.double(), expected, rtol=1e-5, atol=1e-6 * float(updates.abs().max()))


@given(update_sets())
def test_adacons_is_its_formula(updates: Tensor) -> None:
    aggregator = AdaCons(momentum=0.9)
    state, smoothed = aggregator.init(7), None
    for step in range(3):
        moved = updates.roll(step, 0) * (1 + step)
        result, state = aggregate(moved, aggregator, state)
        expected, smoothed = adacons(list(moved.double()), smoothed, 0.9)
        assert close(result, expected, moved)


@given(update_sets(workers=5) | update_sets(workers=8) | update_sets(workers=1))
def test_adasum_is_its_formula(updates: Tensor) -> None:
    result, _ = aggregate(updates, AdaSum(), {})
    assert close(result, adasum(list(updates.double())), updates)


def test_adasum_adds_what_is_orthogonal_and_averages_what_is_parallel() -> None:
    assert aggregate(torch.eye(4), AdaSum(), {})[0].tolist() == [1.0] * 4
    assert aggregate(torch.ones(4, 3), AdaSum(), {})[0].tolist() == [1.0] * 3


@given(update_sets())
def test_krum_is_its_formula(updates: Tensor) -> None:
    order = krum_order(list(updates.double()), 2)
    one, _ = aggregate(updates, Krum(faulty=2), {})
    assert torch.equal(one, updates[order[0]])
    several, _ = aggregate(updates, MultiKrum(faulty=2, keep=3), {})
    assert close(several, updates.double()[order[:3]].mean(0), updates)


@pytest.mark.parametrize("relative", [None, 0.3, 1.0, 100.0])
def test_centred_clipping_is_its_formula(relative: float | None) -> None:
    @given(update_sets())
    def law(updates: Tensor) -> None:
        radius = None if relative is None else relative * float(updates.norm(dim=1).median())
        aggregator = CentredClipping(radius, iterations=3)
        state, previous = aggregator.init(7), torch.zeros(updates.shape[1], dtype=torch.float64)
        for step in range(3):
            result, state = aggregate(updates.roll(step, 0), aggregator, state)
            previous = centred_clipping(list(updates.roll(step, 0).double()), previous, radius, 3)
            assert torch.allclose(result.double(), previous, rtol=1e-3, atol=1e-4 * float(updates.abs().max()))
            previous = result.double()

    law()


def test_weights_are_for_those_who_take_part() -> None:
    updates = torch.tensor([[1.0], [10.0], [torch.nan]])
    result, _ = aggregate(updates, Weighted((3.0, 1.0, 4.0)), {})
    assert result.tolist() == [(3 * 1.0 + 10.0) / 4]


# --- outliers in time ------------------------------------------------------------------------------------------------


def norms_of(steps: int, seed: int = 0) -> Tensor:
    return 1 + 0.1 * torch.randn(steps, 3, generator=torch.Generator().manual_seed(seed))


def test_a_worker_that_jumps_is_skipped_until_it_is_usual_again() -> None:
    skip = OutlierSkip(warmup=50)
    state = skip.init(3)
    for row in norms_of(200):
        _, state = aggregate(row.reshape(3, 1), skip, state)
    result, after = aggregate(torch.tensor([[1.0], [1.0], [50.0]]), skip, state)
    assert result.tolist() == [1.0]
    assert aggregate(torch.tensor([[1.0], [1.0], [1.1]]), skip, after)[0].item() == pytest.approx(3.1 / 3)
    assert aggregate(torch.tensor([[1.0], [1.0], [0.0]]), skip, state)[0].item() == pytest.approx(2 / 3), (
        "short is fine"
    )


def test_a_lasting_change_is_got_used_to_and_a_common_one_is_taken() -> None:
    skip = OutlierSkip(warmup=50)
    state = skip.init(3)
    for row in norms_of(200):
        _, state = aggregate(row.reshape(3, 1), skip, state)
    assert aggregate(torch.full((3, 1), 9.0), skip, state)[0].item() == 9.0
    taken = []
    for _ in range(400):
        result, state = aggregate(torch.tensor([[1.0], [1.0], [3.0]]), skip, state)
        taken.append(result.item() > 1.5)
    assert not taken[0]
    assert taken[-1]


# --- misuse ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: Weighted((1.0, -1.0)), lambda: Weighted((0.0, 0.0)), lambda: Weighted((float("nan"),)),
        lambda: Weighted((1.0,)).init(2), lambda: AdaCons(momentum=1.0), lambda: Krum(faulty=-1),
        lambda: Krum(faulty=2).init(6), lambda: MultiKrum(faulty=1, keep=0),
        lambda: MultiKrum(faulty=1, keep=5).init(5), lambda: CentredClipping(radius=0.0),
        lambda: CentredClipping(radius=float("nan")),
        lambda: CentredClipping(iterations=0), lambda: OutlierSkip(decay=1.0), lambda: OutlierSkip(threshold=-1),
        lambda: OutlierSkip(warmup=0), lambda: TrimmedMean(trim=-1), lambda: TrimmedMean(trim=2).init(4),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(make: Any) -> None:
    with pytest.raises(MisuseError):
        make()


def test_a_gram_matrix_is_square_and_double() -> None:
    for wrong in (torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 2), torch.zeros(0, 0, dtype=torch.float64)):
        with pytest.raises(MisuseError, match="Gram"):
            Mean().coefficients(wrong, {})
    with pytest.raises(MisuseError, match="state"):
        OutlierSkip().coefficients(torch.eye(3, dtype=torch.float64), OutlierSkip().init(2))


# --- the sums themselves ---------------------------------------------------------------------------------------------


@given(update_sets())
def test_gram_matrices_of_slices_add_up(updates: Tensor) -> None:
    parts = sum(gram_matrix(part) for part in torch.tensor_split(updates, 3, dim=1))
    whole = updates.double() @ updates.double().T
    scale = float(whole.abs().max())
    assert torch.allclose(parts, whole, rtol=1e-9, atol=1e-12 * scale)
    assert torch.equal(gram_matrix(updates), gram_matrix(updates).T)


@given(update_sets())
def test_sums_of_slices_are_slices_of_sums_bit_for_bit(updates: Tensor) -> None:
    coefficients = torch.linspace(-1, 2, 7, dtype=torch.float64)
    parts = [weighted_sum(part, coefficients) for part in torch.tensor_split(updates, 4, dim=1)]
    assert torch.equal(torch.cat(parts), weighted_sum(updates, coefficients))


def test_a_coefficient_of_zero_is_not_multiplied_by() -> None:
    rows = torch.tensor([[1.0, 2.0], [torch.nan, torch.inf]])
    assert weighted_sum(rows, torch.tensor([1.0, 0.0], dtype=torch.float64)).tolist() == [1.0, 2.0]


def test_large_updates_go_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    updates = torch.randn(3, 1000, generator=torch.Generator().manual_seed(1))
    whole = gram_matrix(updates)
    monkeypatch.setattr("thinwire.aggregate.base._BLOCK", 7)
    assert torch.allclose(gram_matrix(updates), whole, rtol=1e-12)


@pytest.mark.parametrize("rows", range(1, 12))
def test_the_network_sorts(rows: int) -> None:
    """What sorts all sequences of zeros and ones sorts everything (Knuth, theorem 5.3.4Z)."""
    for bits in range(2**rows):
        values = [bits >> i & 1 for i in range(rows)]
        for low, high in network(rows):
            values[low], values[high] = min(values[low], values[high]), max(values[low], values[high])
        assert values == sorted(values)


@given(st.integers(1, 70), st.integers(0, 9), st.integers(0, 2**32 - 1))
def test_the_middle_is_what_sorting_finds(workers: int, columns: int, seed: int) -> None:
    slices = torch.randn(workers, columns, generator=torch.Generator().manual_seed(seed)).mul_(3).round_()
    ordered = slices.double().sort(0).values
    trim = (workers - 1) // 3
    expected = ordered[trim : workers - trim].mean(0).float()
    assert torch.allclose(TrimmedMean(trim).combine(slices), expected, rtol=1e-6)
    middle = ordered[(workers - 1) // 2 : workers // 2 + 1].mean(0).float()
    assert torch.equal(CoordinateMedian().combine(slices), middle)


def test_columns_are_sorted_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    slices = torch.randn(5, 1000, generator=torch.Generator().manual_seed(2))
    whole = CoordinateMedian().combine(slices)
    monkeypatch.setattr("thinwire.aggregate.coordinatewise._BLOCK", 33)
    assert torch.equal(CoordinateMedian().combine(slices), whole)
