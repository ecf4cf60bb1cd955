"""Low-rank approximation of matrices: PowerSGD.

Vogels, Karimireddy & Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization" (2019),
algorithm 1. Each parameter of two or more dimensions is a matrix ``M [shape[0], rest]``; one step of subspace
iteration, started from the last step's factor, gives ``P^ = orthogonalise(M Q)``, ``Q = M^T P^`` and the approximation
``P^ Q^T``, the projection of M on the span of P^. What has one dimension, or would not shrink, travels as it is.

Both factors are linear in M once the other is fixed, so an all-reduce needs no gathering:

.. code-block:: python

    stack = all_reduce_mean(compressor.project(update, state))          # the P of all matrices, then what stays dense
    stack = compressor.orthogonalise(stack, state)
    q = compressor.back_project(update, stack, state)
    own = compressor.reconstruct(stack, q, state)                       # what a local residual subtracts
    q = all_reduce_mean(q)
    mean, state = compressor.reconstruct(stack, q, state), compressor.advance(q, state)

gives on all ranks what ``encode`` and ``decode`` give for the mean of their updates. Ranks of unlike hardware may
orthogonalise to other last bits; let one do it for all, or replicas drift apart.

Bytes of a packet, little-endian: int32 number of parameters; for each, int32 rows and columns; float32 P^ of all
matrices, float32 dense values, float32 Q of all matrices. Which parameters are matrices follows from their sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import final

import torch
from torch import Tensor

from thinwire.compress.base import Compressor, Layout, Packet, State, check_packet, check_update
from thinwire.errors import MalformedError, MisuseError

__all__ = ["LowRank"]


@final
@dataclass(frozen=True)
class LowRank(Compressor):
    """Matrices at rank ``rank``: ``rank * (rows + columns)`` values in place of ``rows * columns``.

    Biased, and at one step only near the best approximation of its rank: use it within
    :class:`~thinwire.compress.feedback.ErrorFeedback`. The first factor is drawn from ``seed``, alike on all ranks; a
    column of it that turns zero or not finite is replaced by the one before, so that a step without gradient or with
    overflow does not end the learning of a subspace. Finite for magnitudes whose sums of squares over a row are.

    >>> update = torch.outer(torch.arange(1.0, 9.0), torch.linspace(-1, 1, 6)).flatten()
    >>> compressor = LowRank(rank=1)
    >>> packet, state = compressor.encode(update, compressor.init(Layout(((8, 6),))))
    >>> packet.nbytes, torch.allclose(compressor.decode(packet), update, atol=1e-5)
    (68, True)

    Raises:
        MisuseError: The rank is below 1.
    """

    rank: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise MisuseError(f"a rank of {self.rank}; give 1 or more, such as 2", rank=self.rank)

    def init(self, layout: Layout, device: torch.device | str = "cpu") -> State:
        shapes = [(shape[0], prod(shape[1:])) if shape else (1, 1) for shape in layout.shapes]
        plan = _Plan(tuple(shape for shape in shapes if prod(shape)), self.rank)
        generator = torch.Generator().manual_seed(self.seed)
        q = torch.randn(plan.q_numel, generator=generator).to(device)
        return {"shapes": [list(shape) for shape in plan.shapes], "q": q}

    def encode(self, update: Tensor, state: State) -> tuple[Packet, State]:
        stack = self.orthogonalise(self.project(update, state), state)
        q = self.back_project(update, stack, state)
        shapes = self._plan(state).shapes
        header = torch.tensor([len(shapes), *(side for shape in shapes for side in shape)], dtype=torch.int32)
        parts = [part.view(torch.uint8) for part in (header.to(update.device), stack, q)]
        return Packet(update.numel(), torch.cat(parts)), self.advance(q, state)

    def decode(self, packet: Packet) -> Tensor:
        check_packet(packet, packet.nbytes)
        plan = _Plan(_read_shapes(packet), self.rank)
        header_bytes = 4 + 8 * len(plan.shapes)
        check_packet(packet, header_bytes + 4 * (plan.stack_numel + plan.q_numel))
        factors = packet.data[header_bytes:].clone().view(torch.float32)
        return plan.reconstruct(factors[: plan.stack_numel], factors[plan.stack_numel :])

    # --- the rounds of an all-reduce ---------------------------------------------------------------------------------

    def project(self, update: Tensor, state: State) -> Tensor:
        """``M Q`` of all matrices, end to end, and then the values that stay dense: float32, linear in ``update``."""
        check_update(update)
        plan = self._plan(state)
        if update.numel() != plan.numel:
            raise MisuseError(f"an update of {update.numel()} elements for a state of {plan.numel}")
        stack = torch.empty(plan.stack_numel, device=update.device)
        matrices, dense = plan.cut(update)
        ps, rest = plan.cut_stack(stack)
        for matrix, p, q in zip(matrices, ps, plan.cut_q(state["q"]), strict=True):
            torch.mm(matrix, q, out=p)
        if dense:
            torch.cat(dense, out=rest)
        return stack

    def orthogonalise(self, stack: Tensor, state: State) -> Tensor:
        """The projections with their columns made orthonormal, whatever their rank; the dense values as they are."""
        result = stack.clone()
        for p in self._plan(state).cut_stack(result)[0]:
            basis, triangle = torch.linalg.qr(p)
            p.copy_(torch.where(triangle.diagonal() < 0, -basis, basis))  # LAPACK leaves the signs open
        return result

    def back_project(self, update: Tensor, stack: Tensor, state: State) -> Tensor:
        """``M^T P^`` of all matrices, end to end: float32, linear in ``update``."""
        plan = self._plan(state)
        result = torch.empty(plan.q_numel, device=update.device)
        for matrix, p, q in zip(plan.cut(update)[0], plan.cut_stack(stack)[0], plan.cut_q(result), strict=True):
            torch.mm(matrix.T, p, out=q)
        return result

    def with_dense_of(self, own: Tensor, stack: Tensor, state: State) -> Tensor:
        """``stack`` with the dense values of ``own``: what one rank has sent of those, beside the common factors."""
        result = stack.clone()
        plan = self._plan(state)
        plan.cut_stack(result)[1].copy_(plan.cut_stack(own)[1])
        return result

    def reconstruct(self, stack: Tensor, q: Tensor, state: State) -> Tensor:
        """The update that the factors stand for, float32 ``[numel]``."""
        return self._plan(state).reconstruct(stack, q)

    def advance(self, q: Tensor, state: State) -> State:
        """The state that starts the next step from ``q``, columns normalised: only their directions matter, and their
        lengths would multiply from step to step."""
        plan = self._plan(state)
        result = q.clone()
        for new, old in zip(plan.cut_q(result), plan.cut_q(state["q"]), strict=True):
            largest = new.abs().amax(0)
            new.div_(torch.where(largest > 0, largest, 1.0))  # or squares would leave the range of float32
            length = new.norm(dim=0)
            new.copy_(torch.where(length.isfinite() & (length > 0), new / length, old))
        return {**state, "q": result}

    def _plan(self, state: State) -> _Plan:
        return _Plan(tuple((rows, columns) for rows, columns in state["shapes"]), self.rank)


@final
@dataclass(frozen=True)
class _Plan:
    """Where the parameters lie in an update, and their factors in a stack."""

    shapes: tuple[tuple[int, int], ...]
    rank: int

    def is_matrix(self, rows: int, columns: int) -> bool:
        return self.rank * (rows + columns) < rows * columns

    @cached_property
    def matrices(self) -> list[tuple[int, int]]:
        return [shape for shape in self.shapes if self.is_matrix(*shape)]

    @cached_property
    def numel(self) -> int:
        return sum(rows * columns for rows, columns in self.shapes)

    @cached_property
    def stack_numel(self) -> int:
        sent = sum(rows * self.rank for rows, _ in self.matrices)
        return sent + self.numel - sum(rows * columns for rows, columns in self.matrices)

    @cached_property
    def q_numel(self) -> int:
        return sum(columns * self.rank for _, columns in self.matrices)

    def cut(self, update: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Views of the matrices ``[rows, columns]``, and of what stays dense."""
        matrices, dense = [], []
        views = _split(update, [rows * columns for rows, columns in self.shapes])
        for view, (rows, columns) in zip(views, self.shapes, strict=True):
            if self.is_matrix(rows, columns):
                matrices.append(view.view(rows, columns))
            else:
                dense.append(view)
        return matrices, dense

    def cut_stack(self, stack: Tensor) -> tuple[list[Tensor], Tensor]:
        """Views of P ``[rows, rank]`` of the matrices, and of the dense values behind them."""
        sizes = [rows * self.rank for rows, _ in self.matrices]
        *ps, rest = _split(stack, [*sizes, stack.numel() - sum(sizes)])
        return [p.view(-1, self.rank) for p in ps], rest

    def cut_q(self, stack: Tensor) -> list[Tensor]:
        """Views of Q ``[columns, rank]`` of the matrices."""
        return [q.view(-1, self.rank) for q in _split(stack, [columns * self.rank for _, columns in self.matrices])]

    def reconstruct(self, stack: Tensor, q: Tensor) -> Tensor:
        update = torch.empty(self.numel, device=stack.device)
        matrices, dense = self.cut(update)
        ps, rest = self.cut_stack(stack)
        for matrix, p, right in zip(matrices, ps, self.cut_q(q), strict=True):
            torch.mm(p, right.T, out=matrix)
        for view, values in zip(dense, _split(rest, [view.numel() for view in dense]), strict=True):
            view.copy_(values)
        return update


def _split(stack: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    return torch.split_with_sizes(stack, sizes) if sizes else ()


def _read_shapes(packet: Packet) -> tuple[tuple[int, int], ...]:
    """The header of a packet from anywhere.

    Raises:
        MalformedError: It is cut short, or its parameters do not make up the update.
    """
    room = (packet.nbytes - 4) // 8
    count = int(packet.data[:4].clone().view(torch.int32)) if packet.nbytes >= 4 else -1
    if not 0 <= count <= room:
        raise MalformedError(f"a packet of {packet.nbytes} bytes has no room for its {count} parameters", count=count)
    sides = packet.data[4 : 4 + 8 * count].clone().view(torch.int32).tolist()
    shapes = tuple(zip(sides[::2], sides[1::2], strict=True))
    if min(sides, default=1) < 1 or sum(rows * columns for rows, columns in shapes) != packet.numel:
        raise MalformedError(f"the parameters of a packet do not make {packet.numel} elements", numel=packet.numel)
    return shapes
