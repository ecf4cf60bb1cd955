"""Every way to a spectrum leads to the full SVD's and keeps what all ways know: the sum of squares, the number."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from thinwire.errors import MisuseError
from thinwire.probe.spectrum import Krylov, Method, as_matrix, gram_of, krylov, spectrum_of, spectrum_of_gram

METHODS: tuple[Method, ...] = ("full", "gram", "krylov")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Decompositions of small matrices wait for each other's threads longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def matrix_of(singular: Tensor, rows: int, columns: int, seed: int = 0) -> Tensor:
    """A matrix with these singular values and random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(side, singular.numel(), generator=generator, dtype=torch.float64))[0]
        for side in (rows, columns)
    )
    return (left * singular) @ right.T


def power_law(count: int, exponent: float) -> Tensor:
    return torch.arange(1, count + 1, dtype=torch.float64).pow(-exponent)


@given(rows=st.integers(1, 40), columns=st.integers(1, 40), rank=st.integers(0, 40), seed=st.integers(0, 99))
def test_small_matrices_have_one_spectrum_by_every_method(rows: int, columns: int, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rank = min(rank, rows, columns)
    matrix = torch.randn(rows, rank, generator=generator, dtype=torch.float64) @ torch.randn(
        rank, columns, generator=generator, dtype=torch.float64
    )
    expected = torch.linalg.svdvals(matrix)
    for method in METHODS:
        found = spectrum_of(matrix, method=method, seed=seed)
        tolerance = 1e-9 if method == "full" else 1e-6  # squares lose half of the digits of small ones
        if found.values.numel() == min(rows, columns):
            torch.testing.assert_close(
                found.values, expected, rtol=1e-6, atol=tolerance * float(expected.max()) + 1e-12
            )
        assert float(found.counts.sum()) == pytest.approx(min(rows, columns))
        assert found.energy == pytest.approx(float(matrix.square().sum()), rel=1e-9, abs=1e-12)


@given(exponent=st.floats(0.3, 2.0), seed=st.integers(0, 20))
def test_a_krylov_spectrum_keeps_the_energy_and_the_number_of_values(exponent: float, seed: int) -> None:
    matrix = matrix_of(power_law(300, exponent), 320, 300).float()
    found = krylov(matrix, steps=5, seed=seed)
    assert float((found.counts * found.values.square()).sum()) == pytest.approx(found.energy, rel=1e-5)
    assert float(found.counts.sum()) == pytest.approx(300)
    assert not found.exact
    assert 0 < found.known < found.values.numel()


def test_leading_values_are_those_of_the_matrix() -> None:
    matrix = matrix_of(power_law(400, 1.0), 500, 400).float()
    found = krylov(matrix, steps=8)
    expected = torch.linalg.svdvals(matrix).double()[: found.known]
    assert found.known >= 20
    torch.testing.assert_close(found.values[: found.known], expected, rtol=2e-3, atol=0.0)


def test_the_tail_lies_where_the_matrixs_does() -> None:
    """Marchenko and Pastur: what share of the singular values of noise is below a bound."""
    matrix = torch.randn(800, 600, generator=torch.Generator().manual_seed(3))
    expected, found = torch.linalg.svdvals(matrix).double(), krylov(matrix, steps=8)
    for quantile in (0.1, 0.25, 0.5, 0.75, 0.9):
        bound = float(expected.quantile(quantile))
        share = float(found.counts[found.values < bound].sum()) / 600
        assert share == pytest.approx(quantile, abs=0.06)  # nodes are discrete


def test_a_space_that_grew_is_the_space_made_at_once_and_looks_back() -> None:
    matrix = matrix_of(power_law(200, 0.7), 210, 200).float()
    energy = float(matrix.double().square().sum())
    grown = Krylov(matrix, energy).grow(3).grow(6)
    at_once = Krylov(matrix, energy).grow(6)
    torch.testing.assert_close(grown.spectrum().values, at_once.spectrum().values)
    before = Krylov(matrix, energy).grow(4).spectrum()
    back = at_once.spectrum(4)
    assert before.known == back.known
    torch.testing.assert_close(before.values, back.values, rtol=1e-4, atol=1e-6)
    assert Krylov(matrix, energy).grow(100).complete
    assert Krylov(matrix, energy).grow(100).spectrum().exact


@pytest.mark.parametrize("rank", [1, 3, 40])
def test_low_ranks_leave_nothing_in_the_tail(rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(500, rank, generator=generator) @ torch.randn(rank, 400, generator=generator)
    found = krylov(matrix, steps=6)
    torch.testing.assert_close(found.values[:rank], torch.linalg.svdvals(matrix).double()[:rank], rtol=1e-3, atol=0.0)
    assert float((found.counts * found.values)[rank:].sum()) < 0.05 * float(found.values[0])


@given(rows=st.integers(1, 30), columns=st.integers(1, 30))
def test_a_gram_matrix_is_that_of_the_smaller_side(rows: int, columns: int) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    tall = matrix.double() if rows >= columns else matrix.double().T
    for wide in (True, False):
        torch.testing.assert_close(gram_of(matrix, wide=wide), tall.T @ tall, rtol=1e-5, atol=1e-5)


def test_a_gram_matrix_in_blocks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from thinwire.probe import spectrum as module

    matrix = torch.randn(100, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = gram_of(matrix)
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 70)
    torch.testing.assert_close(gram_of(matrix), whole)
    torch.testing.assert_close(gram_of(matrix.T), whole)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("exponent", [-149, -100, 0, 100, 124])
def test_scale_goes_through_wherever_float32_reaches(method: Method, exponent: int) -> None:
    matrix = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
    scale = 2.0**exponent
    scaled = (matrix.double() * scale).float() if exponent > -149 else torch.tensor([[0.0, 1e-45]] * 3)
    found = spectrum_of(scaled, method=method)
    expected = 4.0 * scale if exponent > -149 else math.sqrt(3) * 2.0**-149
    assert float(found.values[0]) == pytest.approx(expected, rel=1e-5)
    assert found.energy == pytest.approx(float(scaled.double().square().sum()), rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (3, 4), (300, 400)])
def test_nothing_and_zeros_have_no_energy(method: Method, shape: tuple[int, int]) -> None:
    found = spectrum_of(torch.zeros(shape), method=method)
    assert found.energy == 0.0
    assert not found.values.any()


@pytest.mark.parametrize(
    "matrix",
    [
        torch.tensor([[1.0, math.nan]]),
        torch.tensor([[math.inf, 1.0]]),
        torch.tensor([[-math.inf, 1.0]]),
        torch.ones(3),
        torch.tensor(1.0),
        torch.ones(2, 2, dtype=torch.int64),
        torch.ones(2, 2, dtype=torch.complex64),
    ],
)
def test_what_has_no_spectrum_is_refused(matrix: Tensor) -> None:
    for method in METHODS:
        with pytest.raises(MisuseError):
            spectrum_of(matrix, method=method)
    with pytest.raises(MisuseError):
        krylov(matrix)


def test_arguments_out_of_range_are_refused() -> None:
    matrix = torch.ones(3, 3)
    with pytest.raises(MisuseError, match="randomised"):
        spectrum_of(matrix, method="randomised")  # type: ignore[arg-type]
    with pytest.raises(MisuseError, match="width"):
        krylov(matrix, width=0)
    with pytest.raises(MisuseError, match="step"):
        krylov(matrix, steps=0)
    for gram in (torch.ones(2, 3), torch.ones(2), torch.full((2, 2), math.nan), torch.ones(2, 2, dtype=torch.int32)):
        with pytest.raises(MisuseError, match="Gram"):
            spectrum_of_gram(gram)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_narrow_floats_are_widened(dtype: torch.dtype) -> None:
    matrix = torch.randn(6, 4, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    flat, scale, _ = as_matrix(matrix)
    assert flat.shape == (6, 8)
    assert scale == 1.0
    assert flat.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = torch.linalg.svdvals(matrix.double().reshape(6, 8))
    torch.testing.assert_close(spectrum_of(matrix).values, expected, rtol=1e-4, atol=1e-5)
