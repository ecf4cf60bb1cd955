"""Predictive backward: the rows that are delivered are those of the dense gradient, the rest is not computed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from thinwire.errors import MisuseError, RefuseError
from thinwire.optim import PredictiveBackward, RowAdamW


def network(seed: int = 0, width: int = 24) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(8, width), torch.nn.Tanh(), torch.nn.Linear(width, width), torch.nn.Tanh()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(width, 5, bias=False))


def batch(seed: int = 0, rows: tuple[int, ...] = (7,)) -> torch.Tensor:
    return torch.randn(*rows, 8, generator=torch.Generator().manual_seed(seed))


def run(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    out: torch.Tensor = model(x)
    out.square().mean().backward()
    return out.detach()


def pairs(model: torch.nn.Module, dense: torch.nn.Module) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
    found = []
    for p, q in zip(model.parameters(), dense.parameters(), strict=True):
        assert q.grad is not None
        found.append((p, q.grad))
    return found


@settings(max_examples=10)
@given(
    st.floats(0.01, 1.0), st.integers(1, 4), st.sampled_from([0.0, 0.3]), st.sampled_from(["row", "module"]),
    st.sampled_from([(7,), (2, 3), (1, 2, 2)]),
)  # fmt: skip
def test_rows_are_those_of_the_dense_gradient(
    rows: float, every: int, explore: float, unit: str, shape: tuple[int, ...]
) -> None:
    model, random = network(), torch.Generator().manual_seed(0)
    dense = copy.deepcopy(model)
    predictive = PredictiveBackward(model, rows=rows, every=every, explore=explore, unit=unit, generator=random)
    for step in range(5):
        x = batch(step, shape)
        active = predictive.active_rows()
        assert torch.equal(run(model, x), run(dense, x))
        for p, grad in pairs(model, dense):
            if p.dim() == 1:
                assert p.grad is not None
                assert torch.equal(p.grad, grad)
            elif active[p].numel() == 0:
                assert p.grad is None
            else:
                assert p.grad is not None
                assert torch.equal(p.grad.coalesce().indices()[0], active[p])
                assert torch.allclose(p.grad.coalesce().values(), grad[active[p]], atol=1e-7)
        count = sum(r.numel() for r in active.values())
        assert count == 0 if step == 0 else count > 0
        if unit == "row" and step:
            assert count == max(1, round(rows * 53))
        predictive.update()


def test_the_largest_rows_are_chosen_after_a_full_pass() -> None:
    model = network()
    dense = copy.deepcopy(model)
    predictive = PredictiveBackward(model, rows=0.2, every=100, explore=0.0)
    run(model, batch())
    run(dense, batch())
    predictive.update()
    scores, chosen = [], []
    for p, grad in pairs(model, dense):
        if p.dim() == 2:
            scores.append(grad.square().mean(1))
            mask = torch.zeros(len(grad), dtype=torch.bool)
            mask[predictive.active_rows()[p]] = True
            chosen.append(mask)
    score, mask = torch.cat(scores), torch.cat(chosen)
    assert mask.sum() == 11
    assert score[mask].min() > score[~mask].max()


def test_exploration_finds_a_row_that_has_become_large() -> None:
    layer, random = torch.nn.Linear(4, 40, bias=False), torch.Generator().manual_seed(0)
    predictive = PredictiveBackward(layer, rows=0.1, every=10_000, explore=0.2, generator=random)
    size = torch.linspace(1, 2, 40)
    for step in range(60):
        if step == 10:
            size[0] = 100.0
        layer.zero_grad()
        (layer(torch.ones(1, 4)) * size).sum().backward()
        predictive.update()
    assert 0 in predictive.active_rows()[layer.weight].tolist()


def test_fewer_operations_and_less_memory() -> None:
    sizes, flops = {}, {}
    for name in ("dense", "row", "module"):
        model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(10)))
        predictive = None if name == "dense" else PredictiveBackward(model, rows=0.1, every=9, explore=0.0, unit=name)
        x = torch.randn(32, 64)
        if predictive is not None:
            run(model, x)
            predictive.update()
        kept: dict[int, int] = {}
        weights = {p.data_ptr() for p in model.parameters()}

        def keep(t: torch.Tensor, kept: dict[int, int] = kept, weights: set[int] = weights) -> torch.Tensor:
            if t.data_ptr() not in weights:
                kept[t.data_ptr()] = t.numel() * t.element_size()
            return t

        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = model(x).square().mean()
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        flops[name] = counter.get_total_flops()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        gradient_bytes = sum((g._values() if g.is_sparse else g).numel() * 4 for g in grads)
        sizes[name] = (sum(kept.values()), gradient_bytes)
    assert flops["row"] <= 0.6 * flops["dense"]
    assert flops["module"] <= 0.6 * flops["dense"]
    assert sizes["row"][1] < 0.15 * sizes["dense"][1]
    assert sizes["module"][0] < 0.4 * sizes["dense"][0]


def test_accumulation_and_checkpoints() -> None:
    model = network()
    dense = copy.deepcopy(model)
    predictive = PredictiveBackward(model, rows=0.3, every=5)
    run(model, batch())
    predictive.update()
    model.zero_grad()
    for seed in (1, 2):
        for net in (model, dense):
            checkpoint(net, batch(seed), use_reentrant=False).square().mean().backward()
    for p, grad in pairs(model, dense):
        if p.grad is not None and p.grad.is_sparse:
            found = p.grad.coalesce()
            assert torch.allclose(found.values(), grad[found.indices()[0]], atol=1e-6)


def test_autocast_no_grad_and_frozen_layers() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    dense = copy.deepcopy(model)
    with PredictiveBackward(model, rows=1.0, every=3) as predictive:
        run(model, batch())
        predictive.update()
        for net in (model, dense):
            net.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = net(batch(1))
            out.float().square().mean().backward()
        assert model[0].weight.grad is None
        for i in (2, 4):
            got, want = model[i].weight.grad, dense[i].weight.grad
            assert got is not None
            assert got.dtype == torch.float32
            assert torch.allclose(got.to_dense(), want, atol=2e-3)
        with torch.no_grad():
            assert torch.equal(model(batch(2)), dense(batch(2)))
        assert torch.equal(model.eval()(batch(2)), dense(batch(2)))
    assert "forward" not in vars(model[2])
    predictive.remove()
    run(model, batch())
    assert model[2].weight.grad is not None
    assert not model[2].weight.grad.is_sparse


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(6, 6, bias=False), torch.nn.Linear(6, 6, bias=False)
        self.b.weight = self.a.weight
        self.table, self.head = torch.nn.Embedding(9, 6), torch.nn.Linear(6, 9, bias=False)
        self.head.weight = self.table.weight

    def forward(self, i: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.b(self.a(self.table(i)).tanh()))
        return out


def test_linear_layers_may_share_a_weight_and_embeddings_stay_dense() -> None:
    model = Tied()
    dense = copy.deepcopy(model)
    predictive = PredictiveBackward(model, rows=0.5, every=9)
    tokens = torch.arange(9)
    run(model, tokens)
    predictive.update()
    assert torch.equal(run(model, tokens), run(dense, tokens))
    assert model.a.weight.grad is not None
    assert dense.a.weight.grad is not None
    found = model.a.weight.grad.coalesce()
    assert torch.allclose(found.values(), dense.a.weight.grad[found.indices()[0]], atol=1e-6)
    assert found.indices().numel() == 3
    assert torch.equal(model.table.weight.grad, dense.table.weight.grad)  # type: ignore[arg-type]


def test_training_with_a_tenth_of_the_rows_learns() -> None:
    torch.set_num_threads(1)
    model, x = network(width=40), batch(0, (64,))
    y = torch.sin(x @ torch.linspace(-1, 1, 8))[:, None].expand(-1, 5)
    optimizer = RowAdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    with PredictiveBackward(model, rows=0.1, every=10) as predictive:
        for _ in range(80):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step()
            predictive.update()
            losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_all_rows_are_adamw() -> None:
    ours, theirs = network(), network()
    mine, torchs = RowAdamW(ours.parameters(), lr=1e-2), torch.optim.AdamW(theirs.parameters(), lr=1e-2)
    for seed in range(20):
        run(ours, batch(seed))
        run(theirs, batch(seed))
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = q.grad.to_sparse(1) if seed % 2 and q.grad is not None else copy.deepcopy(q.grad)
        mine.step()
        torchs.step()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)
    loaded = RowAdamW(theirs.parameters())
    loaded.load_state_dict(copy.deepcopy(mine.state_dict()))
    assert loaded.state_bytes() == mine.state_bytes() > 0


def test_rows_that_leave_lose_their_moments() -> None:
    p = torch.nn.Parameter(torch.zeros(4, 2))
    optimizer = RowAdamW([p], lr=1.0)
    for rows in ([0, 2], [2, 3]):
        p.grad = torch.sparse_coo_tensor([rows], torch.ones(2, 2), (4, 2), check_invariants=True)
        optimizer.step()
    assert optimizer.state[p]["rows"].tolist() == [2, 3]
    assert optimizer.state[p]["age"].tolist() == [2, 1]
    before = p.detach().clone()
    p.grad = torch.sparse_coo_tensor([[1]], torch.full((1, 2), float("nan")), (4, 2))
    with pytest.raises(RefuseError):
        optimizer.step()
    assert torch.equal(p, before)
    p.grad = torch.ones(4, 2).to_sparse(2)
    with pytest.raises(MisuseError, match="whole rows"):
        optimizer.step()


@pytest.mark.parametrize("bad", [{"rows": 0.0}, {"rows": 1.5}, {"every": 0}, {"explore": -0.1}, {"unit": "cell"}])
def test_misuse_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(MisuseError):
        PredictiveBackward(network(), **bad)


def test_layers_that_cannot_be_are_refused() -> None:
    model = network()
    with PredictiveBackward(model), pytest.raises(MisuseError, match="already"):
        PredictiveBackward(model)
    with pytest.raises(MisuseError, match="no linear layer"):
        PredictiveBackward(torch.nn.Conv1d(1, 1, 1))
    with pytest.raises(MisuseError):
        RowAdamW(model.parameters(), lr=-1.0)
