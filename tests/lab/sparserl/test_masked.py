"""A masked optimiser is AdamW on its cells and nothing elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thinwire.errors import MisuseError
from thinwire.lab.sparserl.masked import MaskedAdamW, Subnetwork, random_cells, top_cells
from thinwire.lab.sparserl.methods.base import Setting, adamw
from thinwire.lab.sparserl.registry import find

SHAPES = [(7, 5), (11,), (), (0, 3), (4, 2, 3)]


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=source).to(dtype)) for shape in SHAPES]


@given(st.integers(0, 1000), st.floats(0.01, 1.0), st.integers(1, 6))
def test_it_is_dense_adamw_on_its_cells_and_nothing_elsewhere(seed: int, density: float, steps: int) -> None:
    ours, dense = tensors(seed), tensors(seed)
    before = [p.detach().clone() for p in ours]
    cells = random_cells(ours, density, seed)
    optimiser, oracle = MaskedAdamW(ours, cells, lr=0.01), adamw(dense, 0.01)
    source = torch.Generator().manual_seed(seed + 1)
    for _ in range(steps):
        for p, q in zip(ours, dense, strict=True):
            p.grad = torch.randn(p.shape, generator=source)
            q.grad = p.grad.clone()
        optimiser.step()
        oracle.step()
    for p, q, old, chosen in zip(ours, dense, before, cells, strict=True):
        expected = old.flatten().clone()
        expected[chosen] = q.detach().flatten()[chosen]
        assert torch.equal(p.detach().flatten(), expected)


@given(st.integers(0, 1000), st.floats(1e-4, 1.0))
def test_cells_are_distinct_sorted_inside_and_as_many_as_asked(seed: int, density: float) -> None:
    params = tensors(seed)
    total = sum(p.numel() for p in params)
    for cells in (random_cells(params, density, seed), top_cells(params, density)):
        assert sum(c.numel() for c in cells) == max(1, round(density * total))
        for p, chosen in zip(params, cells, strict=True):
            assert chosen.tolist() == sorted(set(chosen.tolist()))
            assert all(0 <= cell < p.numel() for cell in chosen.tolist())


def test_top_cells_have_the_largest_scores() -> None:
    scores = [torch.tensor([1.0, 5.0, 3.0]), torch.tensor([4.0, 2.0])]
    assert [c.tolist() for c in top_cells(scores, 0.4)] == [[1], [0]]


def test_a_subnetwork_moves_nothing_until_it_is_found_and_then_only_itself() -> None:
    params = tensors(4)
    before = [p.detach().clone() for p in params]
    optimiser = Subnetwork(params, random_cells(params, 0.2, 4), lr=0.1, pilot=2)
    large = [torch.randint(2, p.shape).float() * 100 for p in params]

    def step() -> None:
        for p, much in zip(params, large, strict=True):
            p.grad = torch.ones_like(p) + much
        optimiser.step()

    for _ in range(2):
        assert not optimiser.chosen
        step()
        assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
    assert optimiser.chosen
    step()
    for p, old, cells, much in zip(params, before, optimiser.cells, large, strict=True):
        assert (p != old).flatten().nonzero().flatten().tolist() == cells.tolist()
        assert bool((much.flatten()[cells] > 0).all())


@pytest.mark.parametrize("name", ["top_of_each_tensor", "random_where_gradients"])
def test_the_examples_pick_as_many_cells_as_they_say(name: str) -> None:
    method = find("method", str(Path(__file__).parents[3] / "examples" / "sparserl" / f"{name}.py"))
    source = torch.Generator().manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Linear(40, 50), torch.nn.Linear(50, 20))
    scale = torch.tensor([1.0, 1.0, 30.0, 1.0])  # most of the large gradients lie in one tensor
    ready = method.prepare(model, Setting(0.01, 8, 3))
    optimiser = ready.optimiser
    assert isinstance(optimiser, Subnetwork)
    params = list(ready.trained.values())
    scores = [torch.zeros_like(p) for p in params]
    for _ in range(4):
        assert not optimiser.chosen
        for p, score, times in zip(params, scores, scale, strict=True):
            p.grad = times * torch.randn(p.shape, generator=source)
            score += p.grad.square()
        optimiser.step()
    assert optimiser.chosen
    counts = [cells.numel() for cells in optimiser.cells]
    largest = top_cells(scores, 0.01)
    if name == "top_of_each_tensor":
        assert counts == [20, 1, 10, 1]
        for cells, score in zip(optimiser.cells, scores, strict=True):
            assert torch.equal(cells, top_cells([score], cells.numel() / score.numel())[0])
    else:
        assert counts == [cells.numel() for cells in largest]
        assert counts[2] > 25
        assert not torch.equal(optimiser.cells[2], largest[2])


def test_bf16_parameters_have_masters() -> None:
    params = [torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))]
    optimiser = MaskedAdamW(params, [torch.tensor([1])], lr=1e-4)
    for _ in range(40):  # each step is less than half a unit in the last place
        params[0].grad = torch.ones_like(params[0])
        optimiser.step()
    assert params[0][1] < 1
    assert params[0][0] == params[0][2] == params[0][3] == 1


def test_nonsense_is_refused() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 6))
    with pytest.raises(MisuseError, match="density"):
        random_cells([weight], 0.0, 0)
    with pytest.raises(MisuseError, match="one for each"):
        MaskedAdamW([weight], [], lr=1e-3)
    with pytest.raises(MisuseError, match="gaps"):
        MaskedAdamW([torch.nn.Parameter(torch.ones(4, 6).t())], [torch.tensor([0])], lr=1e-3)
    with pytest.raises(MisuseError, match="pilot"):
        Subnetwork([weight], [torch.tensor([0])], lr=1e-3, pilot=0)
