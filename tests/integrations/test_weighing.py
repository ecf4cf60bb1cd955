"""Weights of workers over threads as ranks: what is weighted is kept account of, and everybody agrees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.compress.ranks import together
from tests.integrations.exchanging import SHAPES, SIZES, TOTAL, check_law, gradient
from thinwire.aggregate import (
    Agreement,
    CosineToPrevious,
    CosineToReference,
    GradientNormStability,
    HeldOutImprovement,
    LossEMA,
    SignalWeighted,
    Uniform,
)
from thinwire.compress import Compressor, ErrorFeedback, Int8, LowRank, Quantize, TopK
from thinwire.compress.group import MemoryGroup
from thinwire.errors import MisuseError
from thinwire.integrations.ddp import CompressedAllReduce

QUICK = SignalWeighted(LossEMA(decay=0.8), warmup=5, smoothing=0.0)
EVERY_SIGNAL = (
    LossEMA(0.9), GradientNormStability(0.9), CosineToPrevious(0.9), CosineToReference(0.9), HeldOutImprovement(0.9),
    Agreement(0.9),
)  # fmt: skip


class Worker:
    """One rank whose loss is ``loss`` on average, with the noise of fresh batches."""

    def __init__(self, group: MemoryGroup, compressor: Compressor | None, *, loss: float = 1.0, **options: Any) -> None:
        self.rank, self.loss = group.rank, loss
        self.exchange = CompressedAllReduce(compressor, group=group, **{"aggregate": QUICK, **options})
        self.noise = torch.Generator().manual_seed(17 + group.rank)
        self.applied = torch.zeros(TOTAL, dtype=torch.float64)
        self.weights: list[Tensor] = []

    def step(self, number: int, flat: Tensor | None = None, **said: Any) -> Tensor:
        flat = gradient(self.rank, number) if flat is None else flat
        self.exchange.observe(loss=self.loss + 0.05 * float(torch.randn((), generator=self.noise)), **said)
        mean = self.exchange.all_reduce(flat.clone(), parts=SHAPES)
        assert self.exchange.weights is not None
        self.weights.append(self.exchange.weights.clone())
        self.applied += mean.double()
        return mean

    def residual(self) -> Tensor:
        parameters = self.exchange.state_dict()["parameters"]
        if not parameters:
            return torch.zeros(TOTAL, dtype=torch.float64)
        return torch.cat([parameters[key]["residual"] for key in SHAPES]).double()


@pytest.mark.parametrize(
    ("compressor", "mode"),
    [
        (None, "auto"),
        (ErrorFeedback(TopK(0.05)), "split"),
        (ErrorFeedback(TopK(0.05, values="int8")), "gather"),
        (ErrorFeedback(TopK(0.05, values="bfloat16")), "shared"),
        (ErrorFeedback(TopK(0.05)), "dense"),
        (ErrorFeedback(Quantize(Int8())), "auto"),
        (ErrorFeedback(LowRank(2)), "auto"),
    ],
    ids=["dense", "split", "gather-int8", "shared-bf16", "plain", "int8", "low-rank"],
)  # fmt: skip
def test_what_is_applied_and_what_waits_is_the_weighted_sum(compressor: Compressor | None, mode: Any) -> None:
    size, steps = 4, 30

    def work(group: MemoryGroup) -> tuple[Worker, Tensor]:
        worker = Worker(group, compressor, loss=2.0 if group.rank == 3 else 1.0, mode=mode)
        for number in range(steps):
            worker.step(number)
        return worker, worker.residual()

    done = together(size, work)
    workers = [worker for worker, _ in done]
    weights = workers[0].weights
    for worker in workers[1:]:
        assert all(torch.equal(a, b) for a, b in zip(worker.weights, weights, strict=True)), "all ranks agree"
    assert weights[0].tolist() == [0.25] * 4, "nobody is judged before the warm-up"
    assert weights[-1][3] < 1e-3, "the worker with the high loss has lost its weight"
    assert weights[-1][:3].min() > 0.3
    true = torch.zeros(TOTAL, dtype=torch.float64)
    for number in range(steps):
        true += sum(w * gradient(rank, number).double() for rank, w in enumerate(weights[number].tolist()))
    check_law(workers[0].applied, [residual for _, residual in done], true, tolerance=1e-5)


def test_equal_workers_get_the_bits_of_the_plain_mean() -> None:
    def run(aggregate: Any) -> list[Tensor]:
        def work(group: MemoryGroup) -> Tensor:
            worker = Worker(group, ErrorFeedback(TopK(0.05)), mode="split", aggregate=aggregate)
            return torch.stack([worker.step(number) for number in range(12)])

        return together(3, work)

    for weighted, plain in zip(run(SignalWeighted(LossEMA())), run(Uniform()), strict=True):
        assert torch.equal(weighted, plain)


def test_tokens_make_the_mean_over_tokens() -> None:
    tokens = [100.0, 300.0, 200.0]

    def work(group: MemoryGroup) -> Tensor:
        worker = Worker(group, None, aggregate=Uniform())
        return worker.step(0, tokens=tokens[group.rank])

    exact = sum(n * gradient(rank, 0).double() for rank, n in enumerate(tokens)) / sum(tokens)
    for mean in together(3, work):
        assert torch.allclose(mean.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("error")
def test_micro_batches_are_averaged_and_their_tokens_added() -> None:
    def work(group: MemoryGroup) -> tuple[float, list[float]]:
        exchange = CompressedAllReduce(group=group, aggregate=SignalWeighted(LossEMA(0.5)))
        for _ in range(24):
            for loss, tokens in ((1.0, 10), (3.0, 30)) if group.rank else ((2.0, 40),):
                exchange.observe(loss=torch.tensor(loss, requires_grad=True), tokens=tokens)
            exchange.all_reduce(torch.ones(8))
        assert exchange.weights is not None
        return exchange.readings[1]["loss_ema"].value, exchange.weights.tolist()

    for value, weights in together(2, work):
        assert value == pytest.approx(2.0)
        assert weights == [0.5, 0.5]


@pytest.mark.parametrize("mode", ["split", "gather", "shared", "dense"])
def test_agreement_is_read_off_what_was_sent(mode: Any) -> None:
    """Three workers see one direction and noise, the fourth the opposite of it."""
    common = gradient(99, 0)

    def work(group: MemoryGroup) -> list[float]:
        compressor = None if mode == "dense" else ErrorFeedback(TopK(0.2))
        weighting = SignalWeighted(Agreement(0.5), warmup=1000)
        worker = Worker(group, compressor, mode=mode, aggregate=weighting)
        for number in range(24):
            flat = common + 0.3 * gradient(group.rank, number)
            worker.step(number, -flat if group.rank == 3 else flat)
        return [row["agreement"].value for row in worker.exchange.readings]

    for values in together(4, work):
        assert min(values[:3]) > 0.2
        assert values[3] < -0.5


@pytest.mark.parametrize("compressor", [None, ErrorFeedback(TopK(0.3))], ids=["dense", "top-k"])
def test_every_signal_is_fed(compressor: Compressor | None) -> None:
    """Whatever a signal needs comes from the loop or is read off the gradients."""
    references = dict(zip(SHAPES, torch.split(gradient(50, 0), list(SIZES.values())), strict=True))

    def work(group: MemoryGroup) -> dict[str, Any]:
        weighting = SignalWeighted(EVERY_SIGNAL, warmup=1000)
        worker = Worker(group, compressor, mode="split" if compressor else "auto", aggregate=weighting)
        worker.exchange.refer_to(references)
        for number in range(24):
            worker.step(number, improvement=0.1)
        return worker.exchange.readings[1 - group.rank]

    for readings in together(2, work):
        assert set(readings) == {signal.name for signal in EVERY_SIGNAL}
        assert all(reading.valid and reading.count >= 21 for reading in readings.values()), readings


def test_a_worker_that_reports_nan_is_left_out_with_its_gradient() -> None:
    def work(group: MemoryGroup) -> tuple[Tensor, list[float]]:
        exchange = CompressedAllReduce(ErrorFeedback(TopK(1.0)), mode="split", group=group, aggregate=QUICK)
        broken = group.rank == 2
        exchange.observe(loss=float("nan") if broken else 1.0)
        flat = torch.full((TOTAL,), float("nan")) if broken else gradient(group.rank, 0)
        mean = exchange.all_reduce(flat)
        assert exchange.weights is not None
        return mean, exchange.weights.tolist()

    exact = (gradient(0, 0) + gradient(1, 0)) / 2
    for mean, weights in together(3, work):
        assert weights == [0.5, 0.5, 0.0]
        assert torch.allclose(mean, exact, atol=1e-6)


def test_a_step_that_overflows_is_not_held_against_anybody() -> None:
    def work(group: MemoryGroup) -> float:
        weighting = SignalWeighted(GradientNormStability(0.9), warmup=1000)
        worker = Worker(group, ErrorFeedback(TopK(0.1)), mode="split", aggregate=weighting, rollback=True)
        for number in range(24):
            flat = gradient(group.rank, number)
            if number == 20 and group.rank == 1:
                flat[5] = float("inf")
            worker.step(number, flat)
        return float(all(row["grad_norm_stability"].valid for row in worker.exchange.readings))

    assert together(2, work) == [1.0, 1.0]


@pytest.mark.parametrize("compressor", [None, ErrorFeedback(TopK(0.05))], ids=["dense", "top-k"])
def test_a_saved_run_goes_on_bit_for_bit(compressor: Compressor | None) -> None:
    weighting = SignalWeighted(EVERY_SIGNAL, warmup=3, smoothing=0.5)
    references = dict(zip(SHAPES, torch.split(gradient(50, 0), list(SIZES.values())), strict=True))
    mode: Any = "split" if compressor else "auto"

    def make(group: MemoryGroup) -> Worker:
        worker = Worker(group, compressor, mode=mode, aggregate=weighting, loss=1.0 + group.rank)
        worker.exchange.refer_to(references)
        return worker

    def work(group: MemoryGroup) -> bool:
        whole = make(group)
        wanted = [whole.step(number) for number in range(12)][8:]
        first = make(group)
        for number in range(8):
            first.step(number)
        second = make(group)
        second.noise = first.noise
        second.exchange.load_state_dict(first.exchange.state_dict())
        got = [second.step(number) for number in range(8, 12)]
        assert second.exchange.weights is not None
        return all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))

    assert all(together(3, work))


def test_the_message_is_a_few_floats() -> None:
    size, steps = 4, 5

    def received(group: MemoryGroup, aggregate: Any) -> int:
        exchange = CompressedAllReduce(group=group, aggregate=aggregate)
        began = exchange.traffic.received_bytes
        for number in range(steps):
            exchange.observe(loss=1.0)
            exchange.all_reduce(gradient(group.rank, number))
        return exchange.traffic.received_bytes - began

    plain = together(size, lambda group: received(group, None))
    weighted = together(size, lambda group: received(group, SignalWeighted(LossEMA())))
    assert [w - p for w, p in zip(weighted, plain, strict=True)] == [steps * (size - 1) * 6 * 8] * size


def test_a_single_worker_has_all_the_weight() -> None:
    exchange = CompressedAllReduce(group=MemoryGroup.of(1)[0], aggregate=SignalWeighted(LossEMA()))
    exchange.observe(loss=float("nan"))
    assert torch.equal(exchange.all_reduce(torch.ones(3)), torch.ones(3))
    assert exchange.weights is not None
    assert exchange.weights.tolist() == [1.0]


def test_ranks_with_unlike_weightings_are_found() -> None:
    def work(group: MemoryGroup) -> str:
        with pytest.raises(MisuseError) as caught:
            CompressedAllReduce(group=group, aggregate=SignalWeighted(LossEMA(0.9 if group.rank else 0.99)))
        return str(caught.value)

    assert all("0.99" in said and "0.9" in said for said in together(2, work))


def test_another_number_of_ranks_starts_its_weights_anew() -> None:
    def train(group: MemoryGroup) -> dict[str, Any]:
        worker = Worker(group, ErrorFeedback(TopK(0.05)), mode="split", loss=1.0 + group.rank)
        for number in range(10):
            worker.step(number)
        return worker.exchange.state_dict()

    states = CompressedAllReduce.reshard(together(2, train), 3)

    def follow(group: MemoryGroup) -> list[float]:
        worker = Worker(group, ErrorFeedback(TopK(0.05)), mode="split")
        worker.exchange.load_state_dict(states[group.rank])
        worker.step(10)
        return worker.weights[0].tolist()

    assert all(weights == [1 / 3] * 3 for weights in together(3, follow))


def test_what_nobody_looks_at_is_refused() -> None:
    exchange = CompressedAllReduce(group=MemoryGroup.of(1)[0], aggregate=QUICK)
    with pytest.raises(MisuseError, match="CosineToReference"):
        exchange.refer_to({"x": torch.ones(1)})
    with pytest.raises(MisuseError, match="SignalWeighted"):
        CompressedAllReduce(group=MemoryGroup.of(1)[0], aggregate="signal")  # type: ignore[arg-type]
