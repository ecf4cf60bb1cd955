"""Local steps keep their laws: the paper's algorithm, one model on all ranks, nothing lost, exact resumption."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from tests.compress.ranks import together
from tests.integrations.local_training import COMPRESSORS, STEPS, Worker, adamw, make, same, sgd
from tests.integrations.pool import RankPool
from thinwire.compress import ErrorFeedback, TopK
from thinwire.compress.group import MemoryGroup
from thinwire.integrations.ddp import CompressedAllReduce
from thinwire.integrations.local_steps import LocalSteps

# --- the algorithm ---------------------------------------------------------------------------------------------------


def readable_diloco(
    size: int, rounds: int, every: int, lr: float, momentum: float, nesterov: bool
) -> dict[str, Tensor]:
    """Algorithm 1 of the paper, said with torch's own SGD as the outer optimiser, in one process."""
    anchor = make()
    outer = torch.optim.SGD(
        [p for p in anchor.parameters() if p.requires_grad], lr=lr, momentum=momentum, nesterov=nesterov, foreach=False
    )
    models = [make() for _ in range(size)]
    optimizers = [sgd(model.parameters()) for model in models]
    for number in range(rounds):
        for rank, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            for step in range(number * every, (number + 1) * every):
                generator = torch.Generator().manual_seed(1000 * rank + step)
                optimizer.zero_grad()
                model(torch.randn(8, 12, generator=generator)).backward()
                optimizer.step()
        for name, parameter in anchor.named_parameters():
            if parameter.requires_grad:
                moved = [parameter.detach() - model.get_parameter(name).detach() for model in models]
                parameter.grad = torch.stack(moved).sum(0) / size
        outer.step()
        for model in models:
            with torch.no_grad():
                for name, parameter in anchor.named_parameters():
                    model.get_parameter(name).copy_(parameter)
    return {name: p.detach() for name, p in anchor.named_parameters()}


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(
    ("every", "lr", "momentum", "nesterov"), [(3, 0.7, 0.9, True), (4, 0.5, 0.8, False), (1, 1.0, 0.0, False)]
)
def test_uncompressed_it_is_the_papers_algorithm_bit_for_bit(
    size: int, every: int, lr: float, momentum: float, nesterov: bool
) -> None:
    options = {"every": every, "outer_lr": lr, "outer_momentum": momentum, "nesterov": nesterov, "chunk_numel": 300}
    expected = readable_diloco(size, STEPS // every, every, lr, momentum, nesterov)
    for worker in together(size, lambda group: Worker(group, **options).train()):
        assert same(worker.parameters(), expected)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", COMPRESSORS)
def test_nothing_is_lost_and_all_ranks_hold_one_model(name: str, device: str) -> None:
    compressor, mode = COMPRESSORS[name]
    size = 3

    def work(group: MemoryGroup) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        options: dict[str, Any] = {"outer_lr": 1.0, "outer_momentum": 0.0, "chunk_numel": 400}
        worker = Worker(group, compressor, mode=mode, device=device, **options)
        moved = {name: torch.zeros_like(p).double() for name, p in worker.parameters().items()}
        before = worker.parameters()
        for step in range(STEPS):
            worker.inner(step)
            proposed = worker.parameters()
            if worker.outer.step():
                for key in moved:
                    moved[key] += proposed[key].double() - before[key].double()
                before = worker.parameters()
        return before, moved, worker.waiting()

    results = together(size, work)
    assert all(same(parameters, results[0][0]) for parameters, _, _ in results)
    start, waiting_somewhere = make(device=device).state_dict(), False
    for key, now in results[0][0].items():
        mean = sum(moved[key] for _, moved, _ in results) / size
        if key.startswith("frozen"):
            assert torch.equal(now, start[key])
            continue
        waits = sum(waiting[key] for _, _, waiting in results).view_as(mean) / size
        # A residual is what has still to be subtracted.
        torch.testing.assert_close(now.double() - start[key] - waits, mean, rtol=1e-4, atol=2e-7)
        waiting_somewhere |= bool(waits.any())
    assert waiting_somewhere, "something waits, or nothing was compressed"


def test_chunks_bound_what_is_exchanged_at_once() -> None:
    def chunks(chunk_numel: int) -> list[int]:
        def one(group: MemoryGroup) -> list[int]:
            worker = Worker(group, ErrorFeedback(TopK(0.1)), chunk_numel=chunk_numel).train()
            sizes = {name: p.numel() for name, p in worker.model.named_parameters()}
            return [sum(sizes[key] for key in unit["keys"]) for unit in worker.exchange.state_dict()["units"]]

        return together(2, one)[0]

    whole, parts = chunks(1 << 20), chunks(200)
    assert len(whole) == 1
    assert sum(parts) == whole[0]
    assert sorted(parts, reverse=True)[:1] == [256], "the largest parameter goes alone"
    assert sorted(parts, reverse=True)[1] <= 200


def test_a_bf16_model_accumulates_in_float32_what_it_cannot_show() -> None:
    """One of four ranks moves by one unit in the last place each round: their mean is a quarter of it."""

    def work(group: MemoryGroup) -> tuple[list[float], float]:
        model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
        nn.init.ones_(model.weight)
        outer = LocalSteps(
            model, sgd(model.parameters()), CompressedAllReduce(group=group), every=1, outer_lr=1.0, outer_momentum=0.0
        )
        seen = []
        for _ in range(8):
            if group.rank == 2:
                with torch.no_grad():
                    model.weight += 2.0**-7
            outer.step()
            seen.append((model.weight.item() - 1) * 2**7)
        return seen, float(outer.state_dict()["anchor"]["weight"])

    for seen, anchor in together(4, work):
        assert seen == [0, 0, 1, 1, 1, 2, 2, 2]  # 0.5 and 1.5 units round to the even neighbour
        assert anchor == 1 + 2 * 2.0**-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats_train_and_stay_one_model(dtype: torch.dtype) -> None:
    workers = together(2, lambda group: Worker(group, ErrorFeedback(TopK(0.1)), dtype=dtype).train())
    assert same(workers[0].parameters(), workers[1].parameters())
    assert not same(workers[0].parameters(), {name: p.detach() for name, p in make(dtype).named_parameters()})
    anchor = workers[0].outer.state_dict()["anchor"]["first.weight"]
    assert anchor.dtype == torch.float32
    assert torch.equal(anchor.to(dtype).view(16, 12), workers[0].model.first.weight)


def test_buffers_stay_with_their_rank() -> None:
    first, second = together(2, lambda group: Worker(group).train())
    assert not torch.equal(first.model.norm.running_mean, second.model.norm.running_mean)


# --- Adam ------------------------------------------------------------------------------------------------------------


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(data.data, dtype=torch.float32)[order] / 16, torch.tensor(data.target)[order]


def classify(group: MemoryGroup, how: str, seed: int, images: Tensor, labels: Tensor) -> float:
    """AdamW on handwritten digits, iid shards, 1 % of the elements sent. Returns the loss over all of them."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((torch.rand(p.shape, generator=generator) * 2 - 1) / 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)  # of 0.001 to 0.03 the best for both ways
    compressor = None if how == "everything" else ErrorFeedback(TopK(0.01))
    exchange = CompressedAllReduce(compressor, group=group, mode="gather" if compressor else "auto")
    outer = LocalSteps(model, optimizer, exchange, every=1, outer_lr=1.0, outer_momentum=0.0)
    mine = torch.arange(group.rank, len(labels), group.size)
    generator.manual_seed(1000 + 10 * seed + group.rank)
    for _ in range(60):
        batch = mine[torch.randint(len(mine), (32,), generator=generator)]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        if how != "updates":  # as the DDP hook does it with one bucket
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            flat = exchange.all_reduce(torch.cat([g.view(-1) for g in gradients]))
            for g, mean in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
                g.copy_(mean.view_as(g))
        optimizer.step()
        if how == "updates":
            outer.step()
    exchange.close()
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(images), labels))


def test_adam_learns_from_compressed_updates_better_than_from_compressed_gradients() -> None:
    """Each proposed update is of the learning rate's size wherever a rank's gradient is steady, and so is what waits;
    a gradient that comes once in a hundred steps leaves Adam's running mean of squares at the mercy of the last one."""
    images, labels = digits()
    for seed in range(3):
        loss = {
            how: together(4, lambda group, how=how, seed=seed: classify(group, how, seed, images, labels))[0]
            for how in ("everything", "gradients", "updates")
        }
        assert loss["everything"] < loss["updates"] < 0.75 * loss["gradients"], loss


# --- processes -------------------------------------------------------------------------------------------------------


def over_sockets() -> tuple[dict[str, Tensor], int, int, int]:
    worker = Worker(None, ErrorFeedback(TopK(0.01)), optimizer=adamw, mode="split").train()
    traffic = worker.exchange.traffic
    parameters = worker.parameters()
    worker.exchange.close()
    return parameters, traffic.exchanges, traffic.received_bytes, traffic.dense_bytes


def test_processes_agree_and_send_little(ranks: RankPool) -> None:
    results = ranks.run(3, over_sockets)
    assert all(same(parameters, results[0][0]) for parameters, *_ in results)
    for _, exchanges, received, _ in results:
        assert exchanges == STEPS // 3
        assert received > 0
