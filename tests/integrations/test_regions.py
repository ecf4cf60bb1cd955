"""Aggregators of whole gradients, spread over ranks: what the oracle makes of all updates in one place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.compress.ranks import together
from tests.integrations.exchanging import SHAPES, TOTAL, gradient
from thinwire.aggregate import (
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
)
from thinwire.compress import ErrorFeedback, TopK
from thinwire.compress.group import MemoryGroup
from thinwire.errors import MisuseError
from thinwire.integrations.ddp import CompressedAllReduce

SIZE = 5
AGGREGATORS: dict[str, Aggregator] = {
    "mean": Mean(),
    "weighted": Weighted((3.0, 1.0, 0.0, 2.0, 2.0)),
    "adacons": AdaCons(),
    "adasum": AdaSum(),
    "krum": Krum(faulty=1),
    "multi-krum": MultiKrum(faulty=1),
    "clipping": CentredClipping(radius=20.0),
    "outlier-skip": OutlierSkip(),
    "median": CoordinateMedian(),
    "trimmed": TrimmedMean(trim=1),
}


def updates(step: int, broken: int | None = None) -> Tensor:
    """``[P, n]`` with something in common; ``broken`` has a NaN in the last region, far from its own."""
    rows = torch.stack([gradient(50, step) + gradient(rank, step) for rank in range(SIZE)])
    if broken is not None:
        rows[broken, -1] = float("nan")
    return rows


@pytest.mark.parametrize("broken", [None, 1], ids=["finite", "one-broken"])
@pytest.mark.parametrize("name", AGGREGATORS)
def test_spread_over_ranks_it_is_the_oracle(name: str, broken: int | None) -> None:
    aggregator = AGGREGATORS[name]

    def work(group: MemoryGroup) -> list[Tensor]:
        exchange = CompressedAllReduce(group=group, aggregate=aggregator)
        return [exchange.all_reduce(updates(step, broken)[group.rank].clone(), parts=SHAPES) for step in range(4)]

    found = together(SIZE, work)
    state = aggregator.init(SIZE)
    for step in range(4):
        wanted, state = aggregate(updates(step, broken), aggregator, state)
        assert all(torch.equal(results[step], found[0][step]) for results in found), "all ranks hold the same bits"
        assert torch.allclose(found[0][step], wanted, rtol=1e-5, atol=1e-6)


def test_buckets_are_aggregated_as_one() -> None:
    """Krum chooses one worker for the whole model, not one for each bucket."""

    def work(group: MemoryGroup) -> Tensor:
        exchange = CompressedAllReduce(group=group, aggregate=Krum(faulty=1))._exchange
        whole = updates(0)[group.rank].clone()
        pieces = torch.split(whole, [500, TOTAL - 500])
        for name, piece in zip("ab", pieces, strict=True):
            exchange.add(piece, [name], [tuple(piece.shape)])
        exchange.flush()
        return whole

    rows = updates(0)
    for result in together(SIZE, work):
        assert any(torch.equal(result, row) for row in rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_and_scaled_gradients(dtype: torch.dtype) -> None:
    class Scaler:
        def get_scale(self) -> float:
            return 64.0

    def work(group: MemoryGroup) -> Tensor:
        exchange = CompressedAllReduce(group=group, aggregate=CentredClipping(radius=5.0), scaler=Scaler())  # type: ignore[arg-type]
        flat = (updates(0)[group.rank] * 64).to(dtype)
        return exchange.all_reduce(flat).float() / 64

    aggregator = CentredClipping(radius=5.0)
    rows = (updates(0) * 64).to(dtype).float() / 64
    wanted, _ = aggregate(rows, aggregator, aggregator.init(SIZE))
    for result in together(SIZE, work):
        assert torch.allclose(result, wanted, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", ["median", "krum"])
def test_without_a_finite_update_all_ranks_see_nan(name: str) -> None:
    def work(group: MemoryGroup) -> Tensor:
        exchange = CompressedAllReduce(group=group, aggregate=AGGREGATORS[name])
        exchange.all_reduce(torch.full((TOTAL,), float("inf")), parts=SHAPES)
        bad = exchange.all_reduce(torch.full((TOTAL,), float("inf")), parts=SHAPES)
        good = exchange.all_reduce(updates(1)[group.rank].clone(), parts=SHAPES)
        assert good.isfinite().all(), "the next step is as if nothing had happened"
        return bad

    assert all(bad.isnan().all() for bad in together(SIZE, work))


def test_a_ring_s_bytes() -> None:
    def work(group: MemoryGroup) -> tuple[int, int]:
        exchange = CompressedAllReduce(group=group, aggregate=CoordinateMedian())
        began = exchange.traffic.received_bytes
        exchange.all_reduce(updates(0)[group.rank].clone())
        return exchange.traffic.received_bytes - began, exchange.traffic.dense_bytes

    for received, dense in together(SIZE, work):
        assert received <= dense + 16 * SIZE


def test_a_saved_run_goes_on_bit_for_bit() -> None:
    aggregator = CentredClipping(radius=20.0)

    def work(group: MemoryGroup) -> bool:
        def run(exchange: CompressedAllReduce, steps: range) -> list[Tensor]:
            return [exchange.all_reduce(updates(step)[group.rank].clone()) for step in steps]

        wanted = run(CompressedAllReduce(group=group, aggregate=aggregator), range(8))[4:]
        first = CompressedAllReduce(group=group, aggregate=aggregator)
        run(first, range(4))
        second = CompressedAllReduce(group=group, aggregate=aggregator)
        second.load_state_dict(first.state_dict())
        return all(torch.equal(a, b) for a, b in zip(wanted, run(second, range(4, 8)), strict=True))

    assert all(together(SIZE, work))


def test_coefficients_are_shown() -> None:
    def work(group: MemoryGroup) -> Tensor:
        exchange = CompressedAllReduce(group=group, aggregate=Weighted((1.0, 1.0, 0.0, 1.0, 1.0)))
        exchange.all_reduce(updates(0)[group.rank].clone())
        assert exchange.weights is not None
        return exchange.weights

    assert all(weights.tolist() == [0.25, 0.25, 0.0, 0.25, 0.25] for weights in together(SIZE, work))


@pytest.mark.parametrize(
    ("compressor", "options"), [(ErrorFeedback(TopK(0.1)), {}), (None, {"mode": "split"})], ids=["compressed", "mode"]
)
def test_it_does_not_go_with_compression(compressor: Any, options: dict[str, Any]) -> None:
    with pytest.raises(MisuseError):
        CompressedAllReduce(compressor, group=MemoryGroup.of(1)[0], aggregate=CoordinateMedian(), **options)


def test_too_few_workers_are_refused_at_once() -> None:
    with pytest.raises(MisuseError):
        CompressedAllReduce(group=MemoryGroup.of(1)[0], aggregate=Krum(faulty=1))
