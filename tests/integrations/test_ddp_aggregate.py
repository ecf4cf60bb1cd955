"""Weights and aggregators behind a real DistributedDataParallel, in processes, over several buckets."""

from __future__ import annotations

from typing import Any

import torch

from tests.integrations.pool import RankPool
from tests.integrations.test_ddp import gradients, loss_of, network, weights, wrap
from thinwire.aggregate import Agreement, CoordinateMedian, LossEMA, SignalWeighted
from thinwire.compress import ErrorFeedback, TopK
from thinwire.integrations.ddp import CompressedAllReduce


def train(exchange: CompressedAllReduce, steps: int, bad: int) -> tuple[bytes, list[float], float]:
    """Rank ``bad`` learns labels that are noise. Returns the model, the weights and the loss of what is true."""
    model = network()
    ddp = wrap(model, exchange)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    noise = torch.Generator().manual_seed(5)
    for step in range(steps):
        optimizer.zero_grad()
        if torch.distributed.get_rank() == bad:
            x = torch.randn(16, 20, generator=noise)
            loss = torch.nn.functional.cross_entropy(ddp(x), torch.randint(5, (16,), generator=noise))
        else:
            loss = loss_of(ddp, step)
        exchange.observe(loss=loss)
        loss.backward()
        optimizer.step()
    found = exchange.weights.tolist() if exchange.weights is not None else []
    exchange.close()
    return weights(model), found, float(sum(loss_of(model, 1000 + step).detach() for step in range(20)) / 20)


def weighted(compressed: bool) -> tuple[bytes, list[float], float]:
    weighting = SignalWeighted((LossEMA(0.9), Agreement(0.9)), warmup=20)
    compressor = ErrorFeedback(TopK(0.1)) if compressed else None
    exchange = CompressedAllReduce(
        compressor, aggregate=weighting, mode="split" if compressed else "auto", together_mb=0.05
    )
    return train(exchange, 120, bad=2)


def test_a_worker_with_noisy_labels_loses_its_weight(ranks: RankPool) -> None:
    for compressed in (False, True):
        done = ranks.run(3, weighted, compressed)
        assert len({model for model, _, _ in done}) == 1, "one model on all ranks"
        assert len({tuple(found) for _, found, _ in done}) == 1
        found = done[0][1]
        assert abs(sum(found) - 1) < 1e-12
        assert found[2] < 0.05
        assert min(found[:2]) > 0.3


def median() -> tuple[bytes, Any]:
    model, plain = network(), network()
    exchange = CompressedAllReduce(aggregate=CoordinateMedian())
    ddp = wrap(model, exchange)
    for _ in range(2):  # the second time with DDP's final buckets
        ddp.zero_grad()
        plain.zero_grad()
        loss_of(ddp, 0).backward()
        loss_of(plain, 0).backward()
    mine, ours = gradients(plain), gradients(model)
    error = 0.0
    for name, value in mine.items():
        everyone = [torch.empty_like(value) for _ in range(3)]
        torch.distributed.all_gather(everyone, value)
        error = max(error, float((torch.stack(everyone).median(0).values - ours[name]).abs().max()))
    exchange.close()
    return b"".join(value.numpy().tobytes() for value in ours.values()), error


def test_the_median_of_all_buckets(ranks: RankPool) -> None:
    done = ranks.run(3, median)
    assert len({bits for bits, _ in done}) == 1
    assert max(error for _, error in done) < 1e-6
