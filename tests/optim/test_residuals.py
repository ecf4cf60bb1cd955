"""Error feedback of ASPG: nothing is lost, density 1 is SGD, and a refused step leaves the residual as it was."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.errors import MalformedError, MisuseError, RefuseError
from thinwire.optim import ASPG


def zeros(*sizes: int, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.zeros(n, dtype=dtype)) for n in sizes]


def sums(params: list[torch.nn.Parameter], **options: object) -> ASPG:
    """SGD of rate 1 from zero weights: the weights are what was applied, with the sign turned."""
    plain = {"lr": 1.0, "style": "sgd", "weight_decay": 0.0, "error_feedback": True}
    return ASPG(params, **(plain | options))  # type: ignore[arg-type]


def left(optimizer: ASPG, p: torch.nn.Parameter) -> torch.Tensor:
    found: torch.Tensor = optimizer.state[p].get("residual", torch.zeros_like(p))
    return found


@settings(max_examples=40)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=3),
    st.sampled_from([0.05, 0.3, 1.0]),
    st.integers(1, 4),
    st.sampled_from([1.0, 2.0]),
    st.sampled_from(["global", "tensor"]),
    st.integers(0, 2**32),
)
def test_nothing_is_lost(
    sizes: list[int], density: float, every: int, stickiness: float, scope: str, seed: int
) -> None:
    params, random = zeros(*sizes), torch.Generator().manual_seed(seed)
    optimizer = sums(params, density=density, refresh_every=every, stickiness=stickiness, scope=scope)
    totals = [torch.zeros(n) for n in sizes]
    for _ in range(7):
        for p, total in zip(params, totals, strict=True):
            p.grad = torch.randint(-9, 10, p.shape, generator=random).float()  # whole numbers: sums are exact
            total += p.grad
        optimizer.step()
        for p, total in zip(params, totals, strict=True):
            assert torch.equal(left(optimizer, p) - p.detach(), total)


@settings(max_examples=20)
@given(st.sampled_from(["float32", "bfloat16"]), st.integers(0, 2**32))
def test_nothing_is_lost_but_rounding(dtype: str, seed: int) -> None:
    (p,) = params = zeros(64)
    random, total = torch.Generator().manual_seed(seed), torch.zeros(64, dtype=torch.float64)
    optimizer = sums(params, density=0.1, refresh_every=2, residual_dtype=dtype)
    for _ in range(10):
        p.grad = torch.randn(64, generator=random)
        total += p.grad.double()
        optimizer.step()
    found = left(optimizer, p).double() - p.detach().double()
    assert left(optimizer, p).dtype == getattr(torch, dtype)
    assert torch.allclose(found, total, atol=10 * 16 * torch.finfo(getattr(torch, dtype)).eps)


def test_without_it_small_gradients_are_lost_for_ever() -> None:
    ends = []
    for feedback in (False, True):
        (p,) = params = zeros(2)
        optimizer = sums(params, density=0.5, refresh_every=1, error_feedback=feedback, stickiness=1.0)
        for step in range(20):
            p.grad = torch.tensor([1.0, 10.0 * (-1) ** step])  # the second is larger, and says nothing
            optimizer.step()
        ends.append(p.detach().clone())
    assert ends[0][0] == 0.0
    assert ends[1][0] < -9.0


@pytest.mark.parametrize("style", ["sgd", "adam"])
def test_density_one_is_no_feedback(style: str) -> None:
    ends = []
    for feedback in (False, True):
        (p,) = params = [torch.nn.Parameter(torch.linspace(-1, 1, 50))]
        optimizer = ASPG(params, lr=0.1, density=1.0, style=style, error_feedback=feedback)
        for seed in range(5):
            p.grad = torch.randn(50, generator=torch.Generator().manual_seed(seed))
            optimizer.step()
        ends.append(p.detach())
        assert "residual" not in optimizer.state[p]
    assert torch.equal(*ends)


def test_its_memory_is_counted() -> None:
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        params = zeros(10_000)
        optimizer = sums(params, density=0.01, residual_dtype=dtype)
        params[0].grad = torch.randn(10_000)
        optimizer.step()
        assert optimizer.state_bytes() == 16 * 100 + size * 10_000


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3.4e38])
def test_a_refused_step_leaves_all_residuals(bad: float) -> None:
    params = zeros(20, 10, 10)
    groups = [{"params": [params[0]]}, {"params": [params[1]]}, {"params": [params[2]], "error_feedback": False}]
    optimizer = sums(groups, density=0.1, refresh_every=1)  # type: ignore[arg-type]
    for where in range(3):
        for p in params:
            p.grad = torch.arange(1.0, p.numel() + 1)
        optimizer.step()
        before = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict())
        for p in params:
            p.grad = torch.ones_like(p)
        grad = params[where].grad
        assert grad is not None
        grad[0] = bad
        if bad == 3.4e38 and where == 2:
            continue  # finite, and nothing is added to it
        with pytest.raises(RefuseError, match="nothing was changed"):
            optimizer.step()
        assert all(torch.equal(p, old) for p, old in zip(params, before[0], strict=True))
        assert str(optimizer.state_dict()) == str(before[1])


def test_a_saved_residual_goes_on() -> None:
    params, others = zeros(40), zeros(40)
    optimizer, loaded = sums(params, density=0.1), sums(others, density=0.1)
    random = torch.Generator().manual_seed(0)
    for step in range(6):
        if step == 3:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
            loaded.load_state_dict(saved)
            others[0].data.copy_(params[0].data)
            saved["state"][0]["residual"] = torch.zeros(3)
            with pytest.raises(MalformedError, match="residual"):
                loaded.load_state_dict(saved)
        params[0].grad = torch.randn(40, generator=random)
        others[0].grad = params[0].grad.clone()
        optimizer.step()
        if step >= 3:
            loaded.step()
    assert torch.equal(params[0], others[0])
    with pytest.raises(MisuseError, match="residual_dtype"):
        sums(zeros(3), residual_dtype="float16")
