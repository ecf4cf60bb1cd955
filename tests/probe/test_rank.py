"""Every rank keeps its laws, and the cheap way to it is within 2 % of the full SVD's."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.probe.test_spectrum import matrix_of, power_law
from thinwire.errors import MisuseError
from thinwire.probe.rank import KINDS, Kind, effective_rank, layer_ranks, rank_of
from thinwire.probe.spectrum import Spectrum, spectrum_of


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Decompositions of small matrices wait for each other's threads longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def oracle(matrix: Tensor, kind: Kind, delta: float = 0.01, tolerance: float = 1e-6) -> float:
    """The definitions, read off the full SVD in float64."""
    singular = torch.linalg.svdvals(matrix.double().reshape(matrix.shape[0], -1))
    squares = singular.square()
    if kind == "entropy":
        part = singular / singular.sum()
        part = part[part > 0]
        return float((-(part * part.log()).sum()).exp())
    if kind == "participation":
        return float(squares.sum() ** 2 / squares.square().sum())
    if kind == "stable":
        return float(squares.sum() / squares[0])
    if kind == "threshold":
        return float(int((squares.cumsum(0) < (1 - delta) * squares.sum() * (1 - 1e-12)).sum()) + 1)
    return float((singular > tolerance * singular[0]).sum())


@given(
    values=st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=12),
    rows=st.integers(12, 20),
    columns=st.integers(12, 20),
    delta=st.floats(0.001, 0.5),
)
def test_every_kind_is_its_definition(values: list[float], rows: int, columns: int, delta: float) -> None:
    matrix = matrix_of(torch.tensor(values, dtype=torch.float64), rows, columns)
    for kind in KINDS:
        expected = oracle(matrix, kind, delta)
        near = 1.0 if kind == "threshold" else 1e-6 * expected  # equal values may fall on either side of a threshold
        assert effective_rank(matrix, kind, delta=delta, tolerance=1e-6) == pytest.approx(expected, abs=near)


@given(rank=st.integers(1, 10), rows=st.integers(10, 16), columns=st.integers(10, 16), kind=st.sampled_from(KINDS))
def test_equal_directions_count_one_each(rank: int, rows: int, columns: int, kind: Kind) -> None:
    matrix = matrix_of(torch.full((rank,), 3.0, dtype=torch.float64), rows, columns)
    assert effective_rank(matrix, kind, delta=1e-3, tolerance=1e-6) == pytest.approx(rank, rel=1e-4)


@given(seed=st.integers(0, 1000), exponent=st.integers(-90, 90), kind=st.sampled_from(KINDS))
def test_scale_transposition_and_rotation_change_no_rank(seed: int, exponent: int, kind: Kind) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(9, 13, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(9, 9, generator=generator, dtype=torch.float64))[0]
    rank = effective_rank(matrix, kind)
    assert 1 <= rank <= 9 + 1e-9
    for twin in (matrix * 2.0**exponent, -matrix, matrix.T, rotation @ matrix):
        assert effective_rank(twin, kind) == pytest.approx(rank, rel=1e-6)


@given(seed=st.integers(0, 1000))
def test_ranks_are_ordered(seed: int) -> None:
    """Renyi entropies fall with their order: stable <= participation; by singular values, entropy is above both."""
    matrix = torch.randn(8, 11, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ranks = {kind: effective_rank(matrix, kind) for kind in KINDS}
    assert ranks["stable"] <= ranks["participation"] + 1e-9
    assert ranks["participation"] <= ranks["entropy"] + 1e-9
    assert ranks["entropy"] <= ranks["numerical"] + 1e-9


SPECTRA = {
    "power 0.5": lambda n: power_law(n, 0.5),
    "power 1": lambda n: power_law(n, 1.0),
    "power 1.5": lambda n: power_law(n, 1.5),
    "power 3": lambda n: power_law(n, 3.0),
    "steep": lambda n: torch.exp(-torch.arange(n, dtype=torch.float64) / 10),
    "slow": lambda n: torch.exp(-torch.arange(n, dtype=torch.float64) / 120),
    "exponential": lambda n: torch.exp(-torch.arange(n, dtype=torch.float64) / 40),
    "low rank and noise": lambda n: torch.cat([torch.full((20,), 30.0), torch.linspace(1.2, 0.3, n - 20)]).double(),
    "flat": lambda n: torch.ones(n, dtype=torch.float64),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SPECTRA)
def test_the_cheap_way_is_within_two_per_cent_of_the_full_svd(name: str, kind: Kind) -> None:
    matrix = matrix_of(SPECTRA[name](540), 560, 540).float()
    tolerance = 1e-5
    expected = rank_of(spectrum_of(matrix), kind, tolerance=tolerance)
    found = effective_rank(matrix, kind, tolerance=tolerance)
    near = 1.0 if kind in ("threshold", "numerical") else 0.0  # whole numbers
    assert found == pytest.approx(expected, rel=0.02, abs=near)


@settings(max_examples=6)
@given(seed=st.integers(0, 10_000))
def test_gradients_of_a_network_are_within_two_per_cent_too(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs, errors = torch.randn(700, 600, generator=generator), torch.randn(700, 530, generator=generator)
    mixing = torch.randn(600, 600, generator=generator) * power_law(600, 0.8).float()
    gradient = errors.T @ torch.relu(inputs @ mixing)
    for kind in ("entropy", "participation", "stable", "threshold"):
        expected = oracle(gradient, kind)
        assert effective_rank(gradient, kind, seed=seed) == pytest.approx(
            expected, rel=0.02, abs=1.0 if kind == "threshold" else 0.0
        )


def test_equal_seeds_give_equal_ranks_and_the_global_generator_stays() -> None:
    matrix = torch.randn(600, 530, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert effective_rank(matrix, seed=3) == effective_rank(matrix, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (4, 5), (600, 530), (2, 0, 3)])
def test_nothing_and_zeros_have_rank_zero(kind: Kind, shape: tuple[int, ...]) -> None:
    assert effective_rank(torch.zeros(shape), kind) == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_what_has_no_rank_is_refused(kind: Kind) -> None:
    for matrix in (torch.ones(3), torch.tensor(1.0), torch.ones(2, 2, dtype=torch.int32)):
        with pytest.raises(MisuseError):
            effective_rank(matrix, kind)
    for size in (2, 530):
        matrix = torch.ones(size, size)
        matrix[1, 1] = math.nan
        with pytest.raises(MisuseError, match="NaN"):
            effective_rank(matrix, kind)


def test_arguments_out_of_range_are_refused() -> None:
    matrix = torch.ones(530, 530)
    with pytest.raises(MisuseError, match="entropy"):
        effective_rank(matrix, "shannon")  # type: ignore[arg-type]
    for delta in (-0.1, 1.0, math.nan):
        with pytest.raises(MisuseError, match="delta"):
            effective_rank(matrix, "threshold", delta=delta)
    with pytest.raises(MisuseError, match="numerical"):
        effective_rank(torch.randn(300, 300), "numerical", method="krylov")
    with pytest.raises(MisuseError, match="method"):
        effective_rank(matrix, method="qr")  # type: ignore[arg-type]


def test_a_node_counts_as_many_times_as_it_stands_for() -> None:
    one_by_one = Spectrum(torch.tensor([2.0] + [1.0] * 10).double(), torch.ones(11).double(), 14.0, 11)
    as_node = Spectrum(torch.tensor([2.0, 1.0]).double(), torch.tensor([1.0, 10.0]).double(), 14.0, 1)
    for kind in KINDS:
        if kind != "numerical":
            for delta in (0.01, 0.3, 0.6, 0.9):
                assert rank_of(as_node, kind, delta=delta) == pytest.approx(rank_of(one_by_one, kind, delta=delta))


def test_layers_have_ranks_by_name() -> None:
    generator = torch.Generator().manual_seed(0)
    tied = torch.randn(6, 4, generator=generator)
    updates = {
        "embed": tied, "head": tied, "norm": torch.ones(4), "scale": torch.tensor(1.0), "empty": torch.zeros(0, 4),
        "conv": torch.randn(3, 2, 2, 2, generator=generator).bfloat16(), "still": torch.zeros(4, 4),
    }  # fmt: skip
    found = layer_ranks(updates, "numerical")
    assert found == {"embed": 4.0, "empty": 0.0, "conv": 3.0, "still": 0.0}
    assert layer_ranks(iter(updates.items()), "numerical") == found
    with pytest.raises(MisuseError, match="bad") as error:
        layer_ranks({"bad": torch.full((2, 2), math.nan)})
    assert error.value.facts["name"] == "bad"
