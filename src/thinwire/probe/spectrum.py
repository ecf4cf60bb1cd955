"""The singular values of a matrix: all of them, or their distribution from a few passes over it.

A :class:`Spectrum` holds singular values with multiplicities, so that one definition of a rank serves both. Three
ways lead to one:

=========  ==========================================  ====================================================
method     what it does                                what it knows
=========  ==========================================  ====================================================
``full``   LAPACK's SVD without vectors                every singular value to the matrix's precision
``gram``   the Gram matrix of the smaller side         every singular value above 1e-8 of the largest, if
                                                       sums are in float64; above 1e-3 of it in float32
``krylov`` a block Krylov space (Musco and Musco       the largest singular values, and of all others how
           2015, arXiv:1504.05477) of 16 random        many lie about where: a Gauss quadrature of their
           vectors, over which the matrix is passed    distribution, by moments that the random vectors
           twice a step (randomised range finder:      estimate (Ubaru, Chen and Saad 2017,
           Halko, Martinsson and Tropp 2009,           doi:10.1137/16M1104974), scaled to the known sum of
           arXiv:0909.4061)                            squares
=========  ==========================================  ====================================================

>>> two = spectrum_of(torch.diag(torch.tensor([3.0, 4.0, 0.0])))
>>> two.values.tolist(), two.energy
([4.0, 3.0, 0.0], 25.0)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from thinwire.errors import MisuseError

__all__ = ["Krylov", "Method", "Spectrum", "as_matrix", "gram_of", "krylov", "spectrum_of", "spectrum_of_gram"]

Method = Literal["full", "gram", "krylov"]

_CONVERGED = 0.02
"""A Ritz value counts as a singular value of its own when its residual is below this share of it."""

_SAFE = (2.0**-40, 2.0**40)
"""Largest entries in between are squared and summed in float32 without under- or overflow."""

_BLOCK_ELEMENTS = 1 << 22


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Singular values with multiplicities.

    Attributes:
        values: float64 [k], descending, 0 or more.
        counts: float64 [k], how many singular values each stands for: 1 where it is known, any positive number where
            it is a node of a quadrature. They add up to the smaller side of the matrix.
        energy: the sum of squares of all singular values, which is that of all entries.
        known: leading values that are singular values of the matrix rather than nodes.
    """

    values: Tensor
    counts: Tensor
    energy: float
    known: int

    @property
    def exact(self) -> bool:
        """Whether every singular value is known."""
        return self.known == self.values.numel()


def spectrum_of(matrix: Tensor, *, method: Method = "full", seed: int = 0) -> Spectrum:
    """The spectrum of ``matrix`` [m, n], or [m, ...] flattened to it.

    float16 and bfloat16 are widened to float32, in which ``full`` and ``krylov`` compute; float64 stays.
    ``seed`` draws the random vectors of ``krylov``.

    Raises:
        MisuseError: fewer than two dimensions, no real floats, NaN or infinity, or an unknown method.
    """
    if method not in get_args(Method):
        raise MisuseError(f"there is no method {method!r}; use one of {', '.join(get_args(Method))}", method=method)
    flat, scale, energy = as_matrix(matrix)
    if energy == 0:
        return _nothing(min(flat.shape))
    if method == "krylov":
        return scaled(Krylov(flat, energy, seed=seed).grow(10).spectrum(), scale)
    if method == "gram":
        return scaled(spectrum_of_gram(gram_of(flat)), scale)
    values = torch.linalg.svdvals(flat).double()
    return scaled(Spectrum(values, torch.ones_like(values), energy, values.numel()), scale)


def krylov(matrix: Tensor, *, steps: int = 10, width: int = 16, seed: int = 0) -> Spectrum:
    """The spectrum from a block Krylov space of ``steps`` times ``width`` dimensions; ``2 * steps`` passes.

    Raises:
        MisuseError: as :func:`spectrum_of`, or no step, or no width.

    >>> matrix = torch.arange(12.0).reshape(3, 4)
    >>> torch.allclose(krylov(matrix).values, spectrum_of(matrix).values, atol=1e-2)  # small: nothing is left to guess
    True
    """
    flat, scale, energy = as_matrix(matrix)
    if energy == 0:
        return _nothing(min(flat.shape))
    return scaled(Krylov(flat, energy, width=width, seed=seed).grow(steps).spectrum(), scale)


def spectrum_of_gram(gram: Tensor) -> Spectrum:
    """The spectrum of a matrix A from its Gram matrix ``A A^T`` or ``A^T A`` [n, n]: roots of the eigenvalues.

    Eigenvalues that rounding has made negative are 0. For a tangent kernel K = J J^T it is the spectrum of the
    Jacobian J; the kernel's eigenvalues are the squares.

    Raises:
        MisuseError: not square, not real, NaN or infinity.
    """
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1]:
        raise MisuseError(f"a Gram matrix is square, not {tuple(gram.shape)}", shape=tuple(gram.shape))
    if gram.is_complex() or not gram.is_floating_point() or not bool(torch.isfinite(gram).all()):
        raise MisuseError("a Gram matrix holds finite real floats; look for NaN or infinity in what it was made from")
    wide = gram.detach().double()
    values = torch.linalg.eigvalsh((wide + wide.T) / 2).clamp(min=0).flip(0)
    return Spectrum(values.sqrt(), torch.ones_like(values), float(values.sum()), values.numel())


def gram_of(matrix: Tensor, *, wide: bool = True) -> Tensor:
    """``A A^T`` or ``A^T A`` of the smaller side, float64, a block of the larger side at a time.

    ``wide`` False multiplies in the matrix's own precision and adds the blocks' products in float64: twice as fast in
    float32, with errors of 1e-6 of the largest eigenvalue.
    """
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    columns = tall.shape[1]
    total = torch.zeros(columns, columns, dtype=torch.float64, device=matrix.device)
    for part in torch.split(tall, max(columns, _BLOCK_ELEMENTS // max(columns, 1), 1)):
        block = part.double() if wide else part
        total += block.T @ block
    return total


class Krylov:
    """A block Krylov space of ``A^T A`` that grows by passes over A [m, n], with an orthonormal basis.

    ``energy`` is A's sum of squares. The space never grows beyond the smaller side; it then holds the whole spectrum.
    """

    def __init__(self, matrix: Tensor, energy: float, *, width: int = 16, seed: int = 0) -> None:
        if width < 1:
            raise MisuseError(f"a Krylov space needs a width of 1 or more, not {width}", width=width)
        self._tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
        self._energy = energy
        size = self._tall.shape[1]
        self._width = min(width, size)
        generator = torch.Generator().manual_seed(seed)
        probes = torch.randn(size, self._width, generator=generator, dtype=torch.float64)
        self._basis: Tensor = torch.linalg.qr(probes)[0].to(matrix)
        self._image: Tensor = self._tall @ self._basis
        self._next: Tensor | None = None

    @property
    def steps(self) -> int:
        """Blocks of the basis; passes over the matrix are twice as many."""
        return -(-int(self._basis.shape[1]) // self._width)

    @property
    def complete(self) -> bool:
        """Whether the space is everything, so that all singular values are known."""
        return bool(self._basis.shape[1] == self._tall.shape[1])

    def grow(self, steps: int) -> Krylov:
        """Itself, with at least ``steps`` blocks in the basis, or everything.

        Raises:
            MisuseError: ``steps`` is less than 1.
        """
        if steps < 1:
            raise MisuseError(f"a Krylov space needs 1 step or more, not {steps}", steps=steps)
        while self.steps < steps and not self.complete:
            fresh = self._residual()
            room = self._tall.shape[1] - self._basis.shape[1]
            block = torch.linalg.qr(fresh)[0][:, :room]
            # Where nothing was left, QR returns arbitrary directions; they are made orthogonal to the basis, too.
            block = torch.linalg.qr(_without(block, self._basis))[0]
            self._basis = torch.cat([self._basis, block], dim=1)
            self._image = torch.cat([self._image, self._tall @ block], dim=1)
            self._next = None
        return self

    def spectrum(self, steps: int | None = None) -> Spectrum:
        """What the first ``steps`` blocks of the basis tell (all, if None)."""
        held = self._basis.shape[1] if steps is None else min(steps * self._width, self._basis.shape[1])
        size, image = self._tall.shape[1], self._image[:, :held]
        eigenvalues, vectors = torch.linalg.eigh((image.T @ image).double())
        eigenvalues, vectors = eigenvalues.clamp(min=0).flip(0), vectors.flip(1)
        if held == size:
            return Spectrum(eigenvalues.sqrt(), torch.ones_like(eigenvalues), self._energy, size)
        # The residual of a Ritz vector is what A^T A adds outside the space: its last block's image, projected.
        following = self._following(held)
        residual = torch.linalg.vector_norm(following @ vectors[-self._last(held) :], dim=0)
        loose = (residual >= _CONVERGED * eigenvalues).nonzero()
        known = int(loose[0]) if loose.numel() else held
        left = self._energy - float(eigenvalues[:known].sum())
        weights = vectors[: self._width, known:].square().sum(dim=0)  # the probes are the basis's first block
        mass, moment = float(weights.sum()), float((weights * eigenvalues[known:]).sum())
        if known == held or left <= 1e-6 * self._energy or mass <= 0 or moment <= 0:
            return self._without_tail(eigenvalues, known, max(left, 0.0))
        counts = weights * ((size - known) / mass)
        nodes = eigenvalues[known:] * (left / (moment * ((size - known) / mass)))
        keep = counts > 0
        return Spectrum(
            torch.cat([eigenvalues[:known], nodes[keep]]).sqrt(),
            torch.cat([torch.ones_like(eigenvalues[:known]), counts[keep]]),
            self._energy,
            known,
        )

    def _without_tail(self, eigenvalues: Tensor, known: int, left: float) -> Spectrum:
        """The known values, and the little that is left spread evenly over all others."""
        others = self._tall.shape[1] - known
        rest = torch.tensor([left / others], dtype=torch.float64, device=eigenvalues.device)
        counts = torch.ones(known + 1, dtype=torch.float64, device=eigenvalues.device)
        counts[-1] = others
        return Spectrum(torch.cat([eigenvalues[:known], rest]).sqrt(), counts, self._energy, known)

    def _last(self, held: int) -> int:
        """Columns of the last block among the first ``held``."""
        return held - (held - 1) // self._width * self._width

    def _residual(self) -> Tensor:
        """``A^T A`` of the last block, without its part in the space."""
        if self._next is None:
            last = self._last(self._basis.shape[1])
            self._next = _without(self._tall.T @ self._image[:, -last:], self._basis)
        return self._next

    def _following(self, held: int) -> Tensor:
        """What ``A^T A`` adds to the first ``held`` vectors: a matrix [., last] with the same column norms."""
        if held == self._basis.shape[1]:
            return self._residual().double()
        following = self._image[:, held : held + self._width]
        found: Tensor = following.T @ self._image[:, held - self._last(held) : held]
        return found.double()


def as_matrix(matrix: Tensor) -> tuple[Tensor, float, float]:
    """``matrix`` as [m, n] floats of 32 or 64 bits divided by a power of two, that power, and the sum of squares.

    The power is 1 unless squares would leave float32's range.

    Raises:
        MisuseError: fewer than two dimensions, no real floats, NaN or infinity.
    """
    if matrix.dim() < 2:
        raise MisuseError(f"a rank is that of a matrix, not of a tensor {tuple(matrix.shape)}", shape=matrix.shape)
    if not matrix.is_floating_point():
        raise MisuseError(f"a rank is that of real floats, not of {matrix.dtype}; convert it first", dtype=matrix.dtype)
    flat = matrix.detach().reshape(matrix.shape[0], -1) if matrix.numel() else matrix.detach().new_zeros(0, 0)
    if flat.numel() == 0:
        return flat.float(), 1.0, 0.0
    flat = flat if flat.dtype == torch.float64 else flat.float()
    low, high = torch.aminmax(flat)
    largest = max(-float(low), float(high))
    if not largest < float("inf"):
        raise MisuseError("the matrix holds NaN or infinity; find the step that made it, or leave it out")
    scale = 1.0
    if largest > 0 and not _SAFE[0] <= largest <= _SAFE[1]:
        exponent = int(torch.frexp(torch.tensor(largest, dtype=torch.float64))[1])
        scale = 2.0**exponent
        flat = flat * 2.0 ** (-exponent // 2) * 2.0 ** (-exponent - (-exponent // 2))  # 2 ** 149 is no float32
    return flat, scale, float(torch.linalg.vector_norm(flat, dim=1).double().square().sum())


def scaled(spectrum: Spectrum, scale: float) -> Spectrum:
    """The spectrum of a matrix ``scale`` times as large."""
    if scale == 1.0:
        return spectrum
    energy = spectrum.energy * scale * scale
    return Spectrum(spectrum.values * scale, spectrum.counts, energy, spectrum.known)


def _nothing(size: int) -> Spectrum:
    zeros = torch.zeros(size, dtype=torch.float64)
    return Spectrum(zeros, torch.ones_like(zeros), 0.0, size)


def _without(block: Tensor, basis: Tensor) -> Tensor:
    """``block`` without its part in the span of ``basis``, taken away twice, as once leaves rounding's share."""
    block = block - basis @ (basis.T @ block)
    return block - basis @ (basis.T @ block)
