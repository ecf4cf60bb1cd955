"""PowerSGD: projections on a subspace that repeated steps find, alike in one packet and in rounds of an all-reduce."""

from __future__ import annotations

import struct
from itertools import pairwise
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.compress.base import Layout, Packet, State
from thinwire.compress.lowrank import LowRank
from thinwire.errors import MalformedError, MisuseError
from thinwire.testing.compressors import same, updates

SHAPES = ((30, 20), (20,), (8, 3, 5), (), (4, 1), (12, 2, 2), (2, 2))
LAYOUT = Layout(SHAPES)


def matrix_of_rank(rows: int, columns: int, rank: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)


def once(compressor: LowRank, update: torch.Tensor, layout: Layout) -> torch.Tensor:
    return compressor.decode(compressor.encode(update, compressor.init(layout))[0])


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_what_has_the_rank_is_exact_to_rounding_at_once(rank: int) -> None:
    matrix = matrix_of_rank(40, 30, rank)
    decoded = once(LowRank(rank), matrix.flatten(), Layout(((40, 30),)))
    torch.testing.assert_close(decoded.view(40, 30), matrix, rtol=0, atol=1e-5 * float(matrix.abs().max()))


@given(updates(LAYOUT.numel))
def test_a_rank_that_saves_nothing_is_exact(update: torch.Tensor) -> None:
    assert torch.equal(once(LowRank(20), update, LAYOUT), update)


@given(updates(LAYOUT.numel), st.integers(1, 4))
def test_one_step_is_the_projection_on_what_q_spans(update: torch.Tensor, rank: int) -> None:
    """The readable version, by parameter and in float64: the basis of ``M Q`` from its singular vectors."""
    compressor = LowRank(rank, seed=3)
    state = compressor.init(LAYOUT)
    decoded = compressor.decode(compressor.encode(update, state)[0])
    at_q = 0
    for shape, offset, numel in zip(SHAPES, LAYOUT.offsets, LAYOUT.numels, strict=True):
        rows, columns = (shape[0], prod(shape[1:])) if shape else (1, 1)
        part, sent = update[offset : offset + numel], decoded[offset : offset + numel]
        if rank * (rows + columns) >= rows * columns:
            assert same(part.contiguous(), sent.contiguous())
            continue
        q = state["q"][at_q : at_q + columns * rank].view(columns, rank).double()
        at_q += columns * rank
        matrix = part.view(rows, columns).double()
        left, sigma, _ = torch.linalg.svd(matrix @ q, full_matrices=False)
        expected = left @ (left.T @ matrix)
        error = float((sent.view(rows, columns).double() - expected).norm())
        # Rounding M Q to float32 turns its span by that error over its smallest singular value: where its rank is
        # short, what completes the basis is free.
        turned = 1e-6 * float(matrix.norm() * q.norm()) / max(1e-300, float(sigma[-1]))
        assert error <= float(matrix.norm()) * (1e-5 + turned) + 1e-42
    assert at_q == state["q"].numel()


def test_repeated_steps_approach_the_best_approximation() -> None:
    generator = torch.Generator().manual_seed(1)
    left, _ = torch.linalg.qr(torch.randn(60, 40, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(40, 40, generator=generator))
    sigma = 0.8 ** torch.arange(40.0)
    matrix = (left * sigma) @ right.T
    compressor = LowRank(4)
    state = compressor.init(Layout(((60, 40),)))
    errors = []
    for _ in range(40):
        packet, state = compressor.encode(matrix.flatten(), state)
        errors.append(float((compressor.decode(packet) - matrix.flatten()).norm()))
    best = float(sigma[4:].norm())
    assert errors[0] > 1.1 * best, "one step from a random start is not the best already"
    assert best * (1 - 1e-4) <= errors[-1] <= best * 1.001
    assert all(later <= earlier * (1 + 1e-4) for earlier, later in pairwise(errors))


@settings(max_examples=25)
@given(st.lists(updates(LAYOUT.numel), min_size=2, max_size=4), st.integers(1, 3))
def test_the_rounds_of_an_all_reduce_give_what_one_packet_of_the_mean_gives(
    sequence: list[torch.Tensor], rank: int
) -> None:
    sequence = [update / update.abs().max().clamp_(min=1e-30) for update in sequence]  # a mean of like scales
    generator = torch.Generator().manual_seed(0)
    sequence = [update + torch.randn(update.shape, generator=generator) for update in sequence]
    compressor = LowRank(rank)
    state = compressor.init(LAYOUT)
    mean = torch.stack(sequence).mean(0)
    packet, after = compressor.encode(mean, state)
    stack = torch.stack([compressor.project(update, state) for update in sequence]).mean(0)
    stack = compressor.orthogonalise(stack, state)
    q = torch.stack([compressor.back_project(update, stack, state) for update in sequence]).mean(0)
    torch.testing.assert_close(compressor.reconstruct(stack, q, state), compressor.decode(packet), rtol=0, atol=2e-3)
    torch.testing.assert_close(compressor.advance(q, state)["q"], after["q"], rtol=0, atol=2e-3)


@given(
    st.sampled_from([(1, 1, 1), (2, 1, 1), (5, 5, 5), (5, 5, 2), (50, 4, 4), (50, 4, 1), (50, 4, 0), (9, 3, 2)]),
    st.integers(-35, 30),
    st.integers(0, 100),
)
def test_columns_become_orthonormal_whatever_their_rank(case: tuple[int, int, int], exponent: int, seed: int) -> None:
    rows, columns, rank = case
    compressor = LowRank(columns)
    layout = Layout(((rows, 10_000),)) if columns < rows else Layout(((rows + 1, 10_000),))
    rows = layout.shapes[0][0]
    state = compressor.init(layout)
    stack = matrix_of_rank(rows, columns, rank, seed) * 10.0**exponent
    basis = compressor.orthogonalise(stack.flatten(), state).view(rows, columns)
    torch.testing.assert_close(basis.T @ basis, torch.eye(columns), rtol=0, atol=1e-5)
    torch.testing.assert_close(basis @ (basis.T @ stack), stack, rtol=1e-4, atol=1e-5 * float(stack.abs().max()))
    assert same(compressor.orthogonalise(stack.flatten(), state).view(rows, columns), basis)


def test_the_sign_of_a_basis_follows_its_projection() -> None:
    """LAPACK leaves signs open; without the convention a warm start could flip between libraries."""
    compressor = LowRank(2)
    state = compressor.init(Layout(((30, 20),)))
    stack = compressor.project(torch.randn(600, generator=torch.Generator().manual_seed(0)), state)
    basis = compressor.orthogonalise(stack, state).view(30, 2)
    assert float(basis[:, 0] @ stack.view(30, 2)[:, 0]) > 0
    assert float(basis[:, 1] @ stack.view(30, 2)[:, 1]) > 0
    assert same(compressor.orthogonalise(-stack, state), -compressor.orthogonalise(stack, state))


def test_a_step_without_gradient_or_with_overflow_does_not_end_the_subspace() -> None:
    layout = Layout(((30, 20),))
    matrix = matrix_of_rank(30, 20, 2).flatten()
    compressor = LowRank(2)
    state = compressor.init(layout)
    for bad in (torch.zeros(600), torch.full((600,), torch.nan), torch.full((600,), torch.inf)):
        _, state = compressor.encode(bad, state)
        packet, state = compressor.encode(matrix, state)
        torch.testing.assert_close(compressor.decode(packet), matrix, rtol=0, atol=1e-4)


def test_the_size_of_a_packet() -> None:
    compressor = LowRank(2)
    packet, _ = compressor.encode(torch.ones(LAYOUT.numel), compressor.init(LAYOUT))
    factors = 2 * (30 + 20) + 2 * (8 + 15) + 2 * (12 + 4)
    dense = 20 + 1 + 4 + 4
    assert packet.nbytes == 4 + 8 * len(SHAPES) + 4 * (factors + dense)


def header(*shapes: tuple[int, int], count: int | None = None) -> torch.Tensor:
    sides = [side for shape in shapes for side in shape]
    data = struct.pack(f"<i{len(sides)}i", len(shapes) if count is None else count, *sides)
    return torch.tensor(list(data), dtype=torch.uint8)


@pytest.mark.parametrize(
    "data",
    [
        header((-1, -600)),
        torch.cat([header((-1, -100), (500, 1)), torch.zeros(4 * (500 - 2 * 101), dtype=torch.uint8)]),
        header((600, 0), (600, 1)),
        header((2**31 - 1, 2**31 - 1)),
        header((2**16, 2**16), (600, 1)),
        header((30, 21)),
        header(count=2**31 - 1),
        header((600, 1), count=-1),
        header(),
        header((30, 20)),  # its factors are missing
        header((600, 1)),
    ],
)
def test_headers_that_lie_are_refused_before_anything_is_allocated(data: torch.Tensor) -> None:
    with pytest.raises(MalformedError):
        LowRank(2).decode(Packet(600, data))


def test_another_cut_of_the_same_update_is_a_packet_too() -> None:
    compressor = LowRank(1)
    for shape in ((30, 20), (20, 30), (600, 1), (1, 600)):
        matrix = matrix_of_rank(*shape, 1)
        layout = Layout((shape,))
        packet, _ = compressor.encode(matrix.flatten(), compressor.init(layout))
        torch.testing.assert_close(compressor.decode(packet), matrix.flatten(), rtol=0, atol=1e-4)


def test_the_first_factor_follows_from_the_seed_alone() -> None:
    def q(compressor: LowRank) -> State:
        return compressor.init(LAYOUT)

    assert same(q(LowRank(2)), q(LowRank(2)))
    assert not same(q(LowRank(2)), q(LowRank(2, seed=1)))


def test_misuse() -> None:
    with pytest.raises(MisuseError):
        LowRank(0)
    with pytest.raises(MisuseError, match="9 elements"):
        LowRank(1).encode(torch.ones(9), LowRank(1).init(LAYOUT))
