"""ASPG: torch's optimisers at density 1, a set that follows importance, torch's conventions, and bad input."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thinwire.errors import MalformedError, MisuseError, RefuseError
from thinwire.optim import ASPG
from thinwire.optim.selection import Active, choose


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.nn.Parameter]:
    random = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter((torch.rand(s, generator=random) + 0.5).to(dtype)) for s in shapes]


def gradients(params: list[torch.nn.Parameter], seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=random).to(p.dtype)


def ulps(a: torch.Tensor, b: torch.Tensor) -> int:
    return int((a.detach().view(torch.int32).long() - b.detach().view(torch.int32).long()).abs().max())


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("decay", ["active", "all"])
def test_density_one_is_adamw(foreach: bool, decay: str) -> None:
    ours, theirs = parameters((65, 33), (7,)), parameters((65, 33), (7,))
    mine = ASPG(ours, lr=1e-3, density=1.0, weight_decay=0.1, decay=decay)
    torchs = torch.optim.AdamW(theirs, lr=1e-3, weight_decay=0.1, foreach=foreach)
    for seed in range(100):
        gradients(ours, seed)
        gradients(theirs, seed)
        mine.step()
        torchs.step()
    assert max(ulps(a, b) for a, b in zip(ours, theirs, strict=True)) <= 1


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
def test_density_one_is_sgd(foreach: bool, nesterov: bool) -> None:
    ours, theirs = parameters((64, 32)), parameters((64, 32))
    numbers: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.01}
    mine = ASPG(ours, density=1.0, style="sgd", **numbers)
    torchs = torch.optim.SGD(theirs, foreach=foreach, **numbers)
    for seed in range(100):
        gradients(ours, seed)
        gradients(theirs, seed)
        mine.step()
        torchs.step()
    assert ulps(ours[0], theirs[0]) <= 1


@given(st.data())
def test_the_set_is_the_oracles(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=4))
    numbers = st.sampled_from([0.0, 0.5, -0.5, 1.0, -2.0, 3.0])
    grads = [torch.tensor(data.draw(st.lists(numbers, min_size=n, max_size=n))) for n in sizes]
    active, scores = [], []
    for grad in grads:
        n = grad.numel()
        mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)), dtype=torch.bool)
        importance = torch.tensor(data.draw(st.lists(numbers, min_size=n, max_size=n))).abs()
        active.append(Active(mask.nonzero().flatten().int(), importance[mask]))
        scores.append([(float(importance[i] if mask[i] else grad[i].abs()), bool(mask[i]), i) for i in range(n)])
    k = data.draw(st.integers(1, max(1, sum(sizes))))
    flat = [(-s, not held, t, i) for t, part in enumerate(scores) for s, held, i in part if held or s > 0]
    want = {(t, i) for _, _, t, i in sorted(flat)[:k]}
    hint = data.draw(numbers.map(abs))
    found, chosen = set(), choose(grads, active, k, hint)
    assert chosen is not None
    for t, (stay, new) in enumerate(chosen.parts):
        found |= {(t, int(i)) for i in active[t].positions[stay]} | {(t, int(i)) for i in new}
    assert found == want


def test_only_active_cells_move_and_the_largest_are_active() -> None:
    params = parameters((100,), (50,))
    before = [p.detach().clone() for p in params]
    optimizer = ASPG(params, lr=0.1, density=0.1, weight_decay=0.0)
    gradients(params, 1)
    optimizer.step()
    joined = torch.cat([p.grad for p in params]).abs()  # type: ignore[misc]
    moved = torch.cat([p.detach() != b for p, b in zip(params, before, strict=True)])
    assert moved.sum() == 15
    assert joined[moved].min() > joined[~moved].max()


def test_survivors_keep_their_moments_and_newcomers_count_their_own_steps() -> None:
    (p,) = params = parameters((4,))
    optimizer = ASPG(params, lr=0.1, density=0.5, refresh_every=2, stickiness=1.0)
    for grad in ([4.0, 3.0, 0.1, 0.1], [4.0, 0.001, 0.1, 0.1]):
        p.grad = torch.tensor(grad)
        optimizer.step()
    kept = optimizer.state[p]["exp_avg"][0].clone()
    p.grad = torch.tensor([4.0, 0.001, 0.1, 9.0])
    optimizer.step()
    state = optimizer.state[p]
    assert state["positions"].tolist() == [0, 3]
    assert state["entered"].tolist() == [1, 3]
    assert state["exp_avg"][0] == torch.lerp(kept, torch.tensor(4.0), 1 - 0.9)
    assert state["exp_avg"][1] == torch.lerp(torch.tensor(0.0), torch.tensor(9.0), 1 - 0.9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_state_is_twice_the_density_of_adams(dtype: torch.dtype) -> None:
    params = parameters((1000, 100), dtype=dtype)
    optimizer = ASPG(params, density=0.01)
    gradients(params, 0)
    optimizer.step()
    dense = 8 * 100_000
    assert 0 < optimizer.state_bytes() <= 2 * 0.01 * dense


def test_masters_add_up_what_bfloat16_would_lose() -> None:
    ends = []
    for masters in (False, True):
        (p,) = params = [torch.nn.Parameter(torch.full((64,), 4.0, dtype=torch.bfloat16))]
        optimizer = ASPG(params, lr=1e-3, density=0.5, weight_decay=0.0, masters=masters)
        for _ in range(50):
            p.grad = torch.ones_like(p)
            optimizer.step()
        ends.append(float(p.detach().min()))
    assert ends == [4.0, 3.953125]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_changes_nothing(bad: float) -> None:
    params = parameters((20,), (10,))
    for nonfinite in ("raise", "skip"):
        optimizer = ASPG([{"params": [params[0]]}, {"params": [params[1]]}], density=0.2, nonfinite=nonfinite)
        gradients(params, 0)
        optimizer.step()
        before, state = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict())
        assert params[1].grad is not None
        params[1].grad.fill_(bad)
        if nonfinite == "raise":
            with pytest.raises(RefuseError, match="nothing was changed"):
                optimizer.step()
        else:
            optimizer.step()
            assert optimizer.skipped == 1
        assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
        assert str(optimizer.state_dict()) == str(state)


def test_zero_gradients_leave_the_set_empty() -> None:
    params = parameters((20,), (0,), ())
    optimizer = ASPG(params, density=0.2)
    for p in params:
        p.grad = torch.zeros_like(p)
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert optimizer.active_cells() == 0
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_parameters_without_gradients_and_groups_added_later() -> None:
    params = parameters((20,), (30,), (40,))
    optimizer = ASPG(params[:2], density=0.1)
    gradients(params[:1], 0)
    optimizer.step()
    assert params[1] not in optimizer.state
    optimizer.add_param_group({"params": [params[2]], "density": 0.5})
    gradients(params, 1)
    optimizer.step()
    assert optimizer.state[params[2]]["positions"].numel() == 20
    with pytest.raises(MisuseError):
        optimizer.add_param_group({"params": parameters((3,)), "density": 2.0})
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_state_goes_on_as_if_never_saved(dtype: torch.dtype) -> None:
    params = parameters((40, 5), dtype=dtype)
    optimizer = ASPG(params, lr=0.1, density=0.1, refresh_every=3, masters=True)
    for seed in range(4):
        gradients(params, seed)
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    loaded = ASPG(others, lr=7.0, density=0.3)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert loaded.param_groups[0]["density"] == 0.1
    for seed in range(4, 9):
        gradients(params, seed)
        gradients(others, seed)
        optimizer.step()
        loaded.step()
    assert torch.equal(params[0], others[0])
    loaded.param_groups[0]["density"] = 0.3
    gradients(others, 9)
    loaded.step()
    assert loaded.active_cells() == 60


def test_a_state_of_another_model_is_refused() -> None:
    params, small = parameters((100,)), parameters((10,))
    optimizer, other = ASPG(params, density=0.5), ASPG(small, density=0.5)
    gradients(params, 0)
    optimizer.step()
    with pytest.raises(MalformedError):
        other.load_state_dict(optimizer.state_dict())
    for name, value in (("entered", 9), ("exp_avg", None)):
        damaged = copy.deepcopy(optimizer.state_dict())
        damaged["state"][0][name] = (
            damaged["state"][0][name].double() if value is None else torch.full((50,), value).int()
        )
        with pytest.raises(MalformedError, match="damaged"):
            optimizer.load_state_dict(damaged)
    dense = torch.optim.AdamW(params)
    dense.step()
    with pytest.raises(MalformedError):
        ASPG(params).load_state_dict(dense.state_dict())


def test_the_conventions_of_torch() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(10, 3)
    optimizer = ASPG(model.parameters(), lr=0.001, density=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    scaler = torch.amp.GradScaler("cpu")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 10)).square().sum()
        loss.backward()
        return loss.detach()

    first = float(optimizer.step(closure))
    assert float(optimizer.step(closure)) < first
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.0005
    optimizer.zero_grad()
    scaler.scale(model(torch.ones(2, 10)).square().sum()).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    before = model.weight.detach().clone()
    scaler.step(optimizer)
    assert not torch.equal(model.weight, before)


def test_memory_formats_do_not_matter() -> None:
    (flat,), (turned,) = parameters((4, 3, 2, 2)), parameters((4, 3, 2, 2))
    turned.data = turned.data.to(memory_format=torch.channels_last)
    for p in (flat, turned):
        gradients([p], 0)
        ASPG([p], lr=0.1, density=0.25).step()
    assert torch.equal(flat, turned)
    gaps = torch.nn.Parameter(torch.ones(4, 4)[:, :2])
    gaps.grad = torch.ones(4, 2)
    with pytest.raises(MisuseError, match="gaps"):
        ASPG([gaps]).step()


@pytest.mark.parametrize(
    "bad",
    [
        {"density": 0.0}, {"density": 1.5}, {"density": float("nan")}, {"lr": -1.0}, {"betas": (1.0, 0.9)},
        {"refresh_every": 0}, {"stickiness": 0.5}, {"style": "lion"}, {"scope": "layer"}, {"decay": "none"},
        {"capturable": True}, {"foreach": True}, {"nonfinite": "ignore"}, {"momentum": 1.0},
    ],
)  # fmt: skip
def test_misuse_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(MisuseError):
        ASPG(parameters((3,)), **bad)


def test_sparse_gradients_and_other_types_are_refused() -> None:
    (p,) = params = parameters((3,))
    p.grad = torch.ones(3).to_sparse()
    with pytest.raises(MisuseError, match="SparseAdam"):
        ASPG(params).step()
    with pytest.raises(MisuseError, match="float64"):
        ASPG([torch.nn.Parameter(torch.ones(3, dtype=torch.float64))])
