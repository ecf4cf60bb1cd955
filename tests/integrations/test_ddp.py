"""The hook on a real DistributedDataParallel, in processes."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.integrations.pool import RankPool
from thinwire.compress import Compressor, ErrorFeedback, Int8, LowRank, Quantize, RandomK, TopK, Warmup
from thinwire.errors import MisuseError, RetryError
from thinwire.integrations.ddp import CompressedAllReduce


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(20, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 100), nn.ReLU(), nn.Linear(100, 5)
    )


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    x = torch.randn(16, 20, generator=generator)
    return x, (x[:, :5] * 3).argmax(1)


def loss_of(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step)
    return nn.functional.cross_entropy(model(x), y)


def wrap(model: nn.Module, exchange: CompressedAllReduce | None, attach: bool = True, **options: Any) -> Any:
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.1, **options)  # several buckets
    if exchange is not None and attach:
        exchange.attach(ddp)
    elif exchange is not None:
        ddp.register_comm_hook(exchange, CompressedAllReduce.hook)
    return ddp


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone().double() for name, p in model.named_parameters() if p.grad is not None}


def mean_over_ranks(values: dict[str, Tensor]) -> dict[str, Tensor]:
    for value in values.values():
        dist.all_reduce(value)
    return {name: value / dist.get_world_size() for name, value in values.items()}


def train(ddp: Any, steps: range, rate: float = 0.1) -> float:
    optimizer = torch.optim.SGD(ddp.parameters(), lr=rate)
    loss = torch.zeros(())
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(ddp, step)
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def weights(model: nn.Module) -> bytes:
    return b"".join(p.detach().numpy().tobytes() for p in model.parameters())


# --- the same as DDP, and the law ------------------------------------------------------------------------------------


def dense_equals_ddp(attach: bool) -> float:
    ours, theirs = network(), network()
    exchange = CompressedAllReduce()
    train(wrap(ours, exchange, attach), range(4))
    train(wrap(theirs, None), range(4))
    exchange.close()
    return max(float((a - b).abs().max()) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("attach", [True, False])
def test_without_a_compressor_it_trains_as_ddp_does(ranks: RankPool, attach: bool) -> None:
    assert max(ranks.run(2, dense_equals_ddp, attach)) < 1e-6


def law(compressor: Compressor, mode: str, steps: int, accumulate: int = 1) -> tuple[float, bytes, int]:
    """How far applied + mean residual is from the sum of true gradients, relative to the latter."""
    model, plain = network(), network()
    exchange = CompressedAllReduce(ErrorFeedback(compressor), mode=mode)  # type: ignore[arg-type]
    ddp = wrap(model, exchange)
    applied: dict[str, Tensor] = {}
    true: dict[str, Tensor] = {}
    for step in range(steps):
        model.zero_grad()
        plain.zero_grad()
        for part in range(accumulate):
            loss_of(plain, step * accumulate + part).backward()
            if part < accumulate - 1:
                with ddp.no_sync():
                    loss_of(ddp, step * accumulate + part).backward()
            else:
                loss_of(ddp, step * accumulate + part).backward()
        for total, new in ((applied, gradients(model)), (true, gradients(plain))):
            for name, value in new.items():
                total[name] = total.get(name, 0) + value
    true = mean_over_ranks(true)
    parameters = exchange.state_dict()["parameters"]
    waiting = mean_over_ranks({name: part["residual"].double() for name, part in parameters.items()})
    received = exchange.traffic.received_bytes
    exchange.close()
    worst = max(
        float((applied[n] + waiting[n].view_as(true[n]) - true[n]).abs().max() / true[n].abs().max()) for n in true
    )
    return worst, b"".join(value.numpy().tobytes() for value in applied.values()), received


@pytest.mark.parametrize(
    ("compressor", "mode"),
    [
        (TopK(0.02), "auto"),
        (TopK(0.02, "bfloat16"), "split"),
        (TopK(0.02), "gather"),
        (TopK(0.02), "shared"),
        (RandomK(0.02), "auto"),
        (Quantize(Int8()), "auto"),
        (LowRank(2), "auto"),
    ],
    ids=str,
)
def test_what_ddp_applied_and_what_waits_make_up_the_true_gradients(
    ranks: RankPool, compressor: Compressor, mode: str
) -> None:
    results = ranks.run(3, law, compressor, mode, 5)
    assert max(worst for worst, _, _ in results) < 1e-5
    assert len({applied for _, applied, _ in results}) == 1, "every rank applies the same bits"


def test_gradient_accumulation_sends_the_sum_once(ranks: RankPool) -> None:
    results = ranks.run(2, law, TopK(0.02), "split", 3, 3)
    once = ranks.run(2, law, TopK(0.02), "split", 3, 1)
    assert max(worst for worst, _, _ in results) < 1e-5
    assert results[0][2] < 1.2 * once[0][2]


def learns(compressor: Compressor | None, **options: Any) -> tuple[float, bytes, float]:
    model = network()
    exchange = CompressedAllReduce(compressor, **options)
    final = train(wrap(model, exchange), range(150), rate=0.2)
    traffic = exchange.traffic
    exchange.close()
    return final, weights(model), traffic.received_bytes / traffic.dense_bytes


def learns_by_split(compressor: Compressor) -> tuple[float, bytes, float]:
    return learns(compressor, mode="split")


def test_it_learns_with_a_fiftieth_of_the_bytes(ranks: RankPool) -> None:
    dense = ranks.run(2, learns, None)
    sparse = ranks.run(2, learns_by_split, ErrorFeedback(TopK(0.02, "bfloat16")))
    assert len({w for _, w, _ in sparse}) == 1
    assert dense[0][0] < 0.6
    assert sparse[0][0] < 0.9
    assert sparse[0][2] < 0.05


# --- resuming --------------------------------------------------------------------------------------------------------


def resumed(split_at: int, steps: int, attach: bool) -> tuple[bytes, bytes]:
    """The weights of a run, and of the same one stopped and resumed in the middle."""

    def build() -> tuple[nn.Module, CompressedAllReduce, Any]:
        model = network()
        exchange = CompressedAllReduce(
            ErrorFeedback(TopK(0.05), momentum=0.5), mode="split", schedule=Warmup(0.5, 0.05, 6)
        )
        return model, exchange, wrap(model, exchange, attach)

    model, exchange, ddp = build()
    train(ddp, range(split_at))
    saved, state = {k: v.clone() for k, v in model.state_dict().items()}, exchange.state_dict()
    train(ddp, range(split_at, steps))
    exchange.close()
    whole = weights(model)

    model, exchange, ddp = build()
    exchange.prime(ddp, lambda: loss_of(ddp, 0).backward())
    model.load_state_dict(saved)
    exchange.load_state_dict(state)
    train(ddp, range(split_at, steps))
    exchange.close()
    return whole, weights(model)


@pytest.mark.parametrize("attach", [True, False])
def test_a_resumed_run_is_the_same_bit_for_bit(ranks: RankPool, attach: bool) -> None:
    for whole, again in ranks.run(2, resumed, 5, 9, attach):
        assert whole == again


# --- awkward models --------------------------------------------------------------------------------------------------


class Forking(nn.Module):
    """One of two branches is used in a step."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(20, 50), nn.Linear(20, 50), nn.Linear(50, 5)
        self.use_left = True

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.left if self.use_left else self.right)(x))


def unused() -> float:
    torch.manual_seed(0)
    model, plain = Forking(), Forking()
    plain.load_state_dict(model.state_dict())
    exchange = CompressedAllReduce(ErrorFeedback(TopK(0.05)), mode="split")
    ddp = wrap(model, exchange, find_unused_parameters=True)
    applied: dict[str, Tensor] = {}
    true: dict[str, Tensor] = {}
    for step in range(6):
        model.use_left = plain.use_left = step % 3 != 1
        model.zero_grad()
        plain.zero_grad()
        loss_of(ddp, step).backward()
        loss_of(plain, step).backward()
        for total, new in ((applied, gradients(model)), (true, gradients(plain))):
            for name, value in new.items():
                total[name] = total.get(name, 0) + value
    true = mean_over_ranks(true)
    waiting = mean_over_ranks({n: p["residual"].double() for n, p in exchange.state_dict()["parameters"].items()})
    exchange.close()
    return max(float((applied[n] + waiting[n].view_as(true[n]) - true[n]).abs().max()) for n in true)


def test_nothing_is_lost_of_parameters_that_some_steps_do_not_use(ranks: RankPool) -> None:
    assert max(ranks.run(2, unused)) < 1e-5


def mixed_types() -> set[str]:
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(20, 40), nn.Linear(40, 40).bfloat16(), nn.Linear(40, 5).double()])
    model.forward = lambda x: model[2](model[1](model[0](x).relu().bfloat16()).relu().double())
    exchange = CompressedAllReduce(ErrorFeedback(TopK(0.1)), mode="split")
    ddp = wrap(model, exchange)
    for step in range(3):
        model.zero_grad()
        loss_of(ddp, step).backward()
    exchange.close()
    every: list[Any] = [None] * 2
    dist.all_gather_object(every, b"".join(p.grad.float().numpy().tobytes() for p in model.parameters()))
    assert every[0] == every[1]
    return {str(p.grad.dtype) for p in model.parameters() if p.grad.any()}


def test_a_model_of_several_types_works(ranks: RankPool) -> None:
    assert ranks.run(2, mixed_types)[0] == {"torch.float32", "torch.bfloat16", "torch.float64"}


def sparse_gradients() -> str:
    model = nn.Sequential(nn.Embedding(50, 20, sparse=True), nn.Linear(20, 5))
    exchange = CompressedAllReduce(ErrorFeedback(TopK(0.1)))
    ddp = DistributedDataParallel(model)
    try:
        exchange.attach(ddp)
        ddp(torch.arange(8)).sum().backward()
    except (MisuseError, RuntimeError) as error:
        return str(error)
    finally:
        exchange.close()
    return "trained"


def test_modules_with_sparse_gradients_are_refused_with_what_to_do(ranks: RankPool) -> None:
    for said in ranks.run(2, sparse_gradients):
        assert "sparse=False" in said, said


def alone() -> tuple[bytes, bytes, int]:
    ours, theirs = network(), network()
    exchange = CompressedAllReduce(ErrorFeedback(TopK(0.01)))
    train(wrap(ours, exchange), range(3))
    train(theirs, range(3))
    exchange.close()
    return weights(ours), weights(theirs), exchange.traffic.received_bytes


def test_a_single_worker_trains_as_if_there_were_no_exchange(ranks: RankPool) -> None:
    ours, theirs, received = ranks.run(1, alone)[0]
    assert ours == theirs
    assert received == 0


# --- what goes wrong -------------------------------------------------------------------------------------------------


def unlike() -> str:
    try:
        CompressedAllReduce(ErrorFeedback(TopK(0.01 + 0.01 * dist.get_rank())))
    except MisuseError as error:
        return str(error)
    return "accepted"


def test_unlike_compressors_are_refused_before_training(ranks: RankPool) -> None:
    assert all("rank 1" in said and "0.02" in said for said in ranks.run(2, unlike))


def dying() -> tuple[str, str]:
    model = network()
    exchange = CompressedAllReduce(ErrorFeedback(TopK(0.05)), mode="split", timeout_s=30.0)
    ddp = wrap(model, exchange)
    train(ddp, range(2))
    if dist.get_rank() == 2:
        parameter = list(model.parameters())[-1]
        parameter.register_hook(lambda _: os._exit(1))  # in the middle of backward
    try:
        train(ddp, range(2, 4))
    except RuntimeError as error:
        assert isinstance(exchange.error, RetryError)
        return "error", str(error)
    return "no error", ""


def test_a_worker_that_dies_is_an_error_on_all_others(ranks: RankPool) -> None:
    *others, dead = ranks.run(3, dying, lost=1)
    assert dead is None
    for kind, said in others:
        assert kind == "error"
        assert "checkpoint" in said, said


def overflowing(with_scaler: bool) -> tuple[bool, bool, float]:
    model = network()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12) if with_scaler else None
    exchange = CompressedAllReduce(ErrorFeedback(TopK(0.05)), scaler=scaler, rollback=True)
    ddp = wrap(model, exchange)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)

    def step(number: int, factor: float = 1.0) -> None:
        optimizer.zero_grad()
        loss = loss_of(ddp, number) * factor
        if scaler:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        else:
            loss.backward()

    def residual() -> bytes:
        return b"".join(p["residual"].numpy().tobytes() for p in exchange.state_dict()["parameters"].values())

    step(0)
    step(1)
    before, weights_before = residual(), weights(model)
    step(2, factor=float("inf") if dist.get_rank() == 1 else 1.0)
    poisoned = any(not p.grad.isfinite().all() for p in model.parameters())
    untouched = residual() == before and weights(model) == weights_before
    if scaler:
        step(3)
    exchange.close()
    return poisoned, untouched, float(scaler.get_scale()) if scaler else 0.0


@pytest.mark.parametrize("with_scaler", [True, False])
def test_an_overflow_on_one_rank_is_seen_by_all_and_changes_no_residual(ranks: RankPool, with_scaler: bool) -> None:
    for poisoned, untouched, scale in ranks.run(2, overflowing, with_scaler):
        assert poisoned
        assert untouched
        assert scale == (2.0**11 if with_scaler else 0.0)


def outside_ddp() -> tuple[list[float], int]:
    exchange = CompressedAllReduce(ErrorFeedback(TopK(0.5)), mode="split")
    values = torch.tensor([[4.0, 1.0], [0.5, 3.0]]) * (1 + dist.get_rank())
    out = exchange.all_reduce(values, name="weights")
    assert out is values
    exchange.observe(loss=1.0)
    exchange.close()
    return values.flatten().tolist(), exchange.traffic.exchanges


def test_any_tensor_can_be_reduced_without_ddp(ranks: RankPool) -> None:
    assert ranks.run(2, outside_ddp) == [([6.0, 0.0, 0.0, 4.5], 1)] * 2
