"""Sketched dot products are unbiased and stay within their bound; whole ones are exact."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thinwire.errors import MisuseError
from thinwire.probe.covariance import GradientCovariance, gradients_of
from thinwire.probe.rank import rank_of
from thinwire.probe.spectrum import spectrum_of


def stack(count: int, seed: int, rank: int = 3) -> list[dict[str, Tensor]]:
    """``count`` gradients in ``rank`` directions, and a little noise."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"b.weight": (40, 30), "a.bias": (7,), "scale": (), "empty": (0, 3)}
    directions = [{n: torch.randn(s, generator=generator) for n, s in shapes.items()} for _ in range(rank)]
    found = []
    for _ in range(count):
        mix = torch.randn(rank, generator=generator)
        found.append(
            {
                name: sum(w * d[name] for w, d in zip(mix, directions, strict=True))
                + 0.01 * torch.randn(shape, generator=generator)
                for name, shape in shapes.items()
            }
        )
    return found  # type: ignore[return-value]


def rows(gradients: list[dict[str, Tensor]]) -> Tensor:
    return torch.stack([torch.cat([g[n].flatten() for n in sorted(g)]) for g in gradients]).double()


@given(count=st.integers(0, 6), seed=st.integers(0, 99))
def test_whole_gradients_have_their_gram_matrix(count: int, seed: int) -> None:
    gradients = stack(count, seed)
    covariance = GradientCovariance(sketch=None)
    for gradient in gradients:
        covariance.update(dict(reversed(gradient.items())))
    assert len(covariance) == count
    matrix = rows(gradients) if count else torch.zeros(0, 1, dtype=torch.float64)
    torch.testing.assert_close(covariance.gram(), matrix @ matrix.T, rtol=1e-6, atol=1e-6)
    centred = matrix - matrix.mean(dim=0) if count else matrix
    torch.testing.assert_close(covariance.gram(centred=True), centred @ centred.T, rtol=1e-5, atol=1e-4)
    assert covariance.error() == 0.0
    assert covariance.spectrum().values.numel() == count


def test_the_spectrum_is_that_of_the_stack() -> None:
    gradients = stack(12, 1)
    covariance = GradientCovariance(sketch=None)
    for gradient in gradients:
        covariance.update(gradient)
    expected = spectrum_of(rows(gradients)).values
    torch.testing.assert_close(covariance.spectrum().values, expected, rtol=1e-4, atol=1e-5)
    assert rank_of(covariance.spectrum(), "threshold") == 3.0


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), size=st.sampled_from([250, 600, 1024]))
def test_sketched_dot_products_stay_within_the_bound(seed: int, size: int) -> None:
    gradients = stack(5, seed)
    covariance = GradientCovariance(sketch=size, seed=seed)
    for gradient in gradients:
        covariance.update(gradient)
    matrix = rows(gradients)
    exact, norms = matrix @ matrix.T, matrix.norm(dim=1)
    share = (covariance.gram() - exact).abs() / torch.outer(norms, norms)
    assert bool((share.diagonal() < 1e-5).all())
    assert float(share.max()) <= covariance.error(delta=0.02) < 0.65


def test_sketched_dot_products_are_unbiased_and_vary_as_little_as_promised() -> None:
    first, second = stack(2, 7)
    matrix = rows([first, second])
    exact, size = float(matrix[0] @ matrix[1]), 256
    errors = []
    for seed in range(300):
        covariance = GradientCovariance(sketch=size, seed=seed)
        covariance.update(first)
        covariance.update(second)
        errors.append(float(covariance.gram()[0, 1]) - exact)
    found = torch.tensor(errors, dtype=torch.float64)
    variance = float((matrix[0].square().sum() * matrix[1].square().sum() + exact**2) / size)
    assert abs(float(found.mean())) < 4 * math.sqrt(variance / 300)
    assert float(found.square().mean()) < 1.4 * variance


def test_nothing_meets_where_there_is_room_for_all() -> None:
    gradients = [{"only": g["b.weight"]} for g in stack(3, 2)]
    whole, sketched = GradientCovariance(sketch=None), GradientCovariance(sketch=2048)
    for gradient in gradients:
        whole.update(gradient)
        sketched.update(gradient)
    torch.testing.assert_close(sketched.gram(), whole.gram(), rtol=1e-5, atol=1e-4)


def test_a_models_gradients_count_tied_weights_once_and_frozen_ones_not() -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3), "b": torch.nn.Linear(3, 3), "c": torch.nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    model["c"].requires_grad_(False)
    model["a"](torch.ones(3)).sum().backward()
    named = gradients_of(model)
    assert sorted(named) == ["a.bias", "a.weight", "b.bias"]
    assert not named["b.bias"].any()
    covariance = GradientCovariance(sketch=None)
    covariance.update(model.bfloat16())
    assert float(covariance.gram()) == pytest.approx(3 + 9)


def test_what_cannot_be_compared_is_refused_and_leaves_no_trace() -> None:
    covariance = GradientCovariance()
    covariance.update({"w": torch.ones(4)})
    for other in ({"w": torch.ones(5)}, {"v": torch.ones(4)}, {}, {"w": torch.ones(4), "v": torch.ones(1)}):
        with pytest.raises(MisuseError, match="names and shapes"):
            covariance.update(other)
    for value in (math.nan, math.inf):
        with pytest.raises(MisuseError, match="'w'") as error:
            covariance.update({"w": torch.tensor([1.0, value, 0.0, 0.0])})
        assert error.value.facts["name"] == "w"
    with pytest.raises(MisuseError, match="int64"):
        covariance.update({"w": torch.arange(4)})
    assert len(covariance) == 1
    with pytest.raises(MisuseError, match="sketch"):
        GradientCovariance(sketch=0)
    for delta in (0.0, 1.5):
        with pytest.raises(MisuseError, match="delta"):
            covariance.error(delta)


def test_no_gradient_and_zeros_have_no_rank() -> None:
    covariance = GradientCovariance()
    assert rank_of(covariance.spectrum()) == 0.0
    covariance.update({"w": torch.zeros(3)})
    assert rank_of(covariance.spectrum(centred=True)) == 0.0
