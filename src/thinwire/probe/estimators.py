"""Traces and extreme eigenvalues of symmetric matrices that can only be multiplied by, with intervals.

The matrix is a function that multiplies vectors [n] by it.

>>> diagonal = torch.tensor([5.0, 1.0, 0.0, -2.0])
>>> trace = hutchinson(lambda v: diagonal * v, 4, probes=8)
>>> trace.value, trace.error  # no more probes than unit vectors are needed
(4.0, 0.0)
>>> ends = lanczos(lambda v: diagonal * v, 4)
>>> round(ends.largest, 4), round(ends.smallest, 4)
(5.0, -2.0)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from thinwire.errors import MisuseError

__all__ = ["Ends", "Estimate", "hutch_plus_plus", "hutchinson", "lanczos"]

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its standard error and the degrees of freedom that this was estimated with."""

    value: float
    error: float
    freedom: int
    products: int

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Student's interval around the value; a point where nothing was estimated, all numbers for one probe.

        Raises:
            MisuseError: ``confidence`` is not in (0, 1).
        """
        if not 0 < confidence < 1:
            raise MisuseError(f"a confidence is a share in (0, 1), not {confidence}", confidence=confidence)
        if self.error == 0.0:
            return self.value, self.value
        if self.freedom < 1:
            return -math.inf, math.inf
        half = _student(0.5 + confidence / 2, self.freedom) * self.error
        return self.value - half, self.value + half


@dataclass(frozen=True, slots=True)
class Ends:
    """The largest and smallest eigenvalue by Lanczos, and how far each may be from one at most (its residual)."""

    largest: float
    smallest: float
    largest_residual: float
    smallest_residual: float
    products: int


def hutchinson(product: Product, size: int, *, probes: int = 16, seed: int = 0) -> Estimate:
    """The trace by ``probes`` random signs (Girard 1989; Hutchinson 1989): the mean of <v, A v>, variance 2 sum A_ij^2.

    Where there are at least as many probes as rows, unit vectors give the trace itself.

    Raises:
        MisuseError: no probes, or the matrix returns NaN or infinity.
    """
    _check(probes)
    if probes >= size:
        return Estimate(sum(_form(product, unit) for unit in _units(size)), 0.0, 0, size)
    generator = torch.Generator().manual_seed(seed)
    forms = [_form(product, _signs(size, generator)) for _ in range(probes)]
    return _mean(forms, 0.0, probes)


def hutch_plus_plus(product: Product, size: int, *, probes: int = 15, seed: int = 0) -> Estimate:
    """The trace by Hutch++ (Meyer, Musco, Musco and Woodruff 2021, arXiv:2010.09649): a third of the products finds the
    largest eigenvectors, whose part is exact, and random signs are for the rest only.

    Much better where few eigenvalues dominate; keeps ``probes / 3`` vectors.

    Raises:
        MisuseError: fewer than 6 probes, or the matrix returns NaN or infinity.
    """
    if probes < 6:
        raise MisuseError(f"Hutch++ needs 6 probes or more, not {probes}", probes=probes)
    if probes >= size:
        return hutchinson(product, size, probes=probes, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    third = probes // 3
    images = torch.stack([_finite(product(_signs(size, generator))) for _ in range(third)], dim=1)
    basis = torch.linalg.qr(images)[0]
    known = sum(_form(product, basis[:, i]) for i in range(third))
    forms = []
    for _ in range(probes - 2 * third):
        signs = _signs(size, generator)
        forms.append(_form(product, signs - basis @ (basis.T @ signs)))
    return _mean(forms, known, probes)


def lanczos(product: Product, size: int, *, steps: int = 20, seed: int = 0) -> Ends:
    """Extreme eigenvalues by ``steps`` products (Lanczos 1950), three vectors in memory whatever the steps.

    Orthogonality is not restored, which repeats eigenvalues that have been found but moves none (Paige 1976). The
    values lie inside the true ends, and an eigenvalue is within the residual of each.

    Raises:
        MisuseError: no step, or the matrix returns NaN or infinity.
    """
    if steps < 1:
        raise MisuseError(f"Lanczos needs 1 step or more, not {steps}", steps=steps)
    if size == 0:
        return Ends(0.0, 0.0, 0.0, 0.0, 0)
    vector = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    vector = vector / vector.norm()
    before, beta = torch.zeros_like(vector), 0.0
    alphas: list[float] = []
    betas: list[float] = []
    for _ in range(min(steps, 2 * size)):
        image = _finite(product(vector)) - beta * before
        alphas.append(float(torch.dot(image.double(), vector.double())))
        image = image - alphas[-1] * vector
        beta = float(torch.linalg.vector_norm(image, dtype=torch.float64))
        betas.append(beta)
        if beta <= 1e-6 * max(map(abs, alphas)) or beta == 0:
            break
        before, vector = vector, image / beta
    inner = torch.tensor(betas[:-1], dtype=torch.float64)
    small = torch.diag(torch.tensor(alphas, dtype=torch.float64)) + torch.diag(inner, 1) + torch.diag(inner, -1)
    values, vectors = torch.linalg.eigh(small)
    residuals = betas[-1] * vectors[-1].abs()
    return Ends(float(values[-1]), float(values[0]), float(residuals[-1]), float(residuals[0]), len(alphas))


def _signs(size: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (size,), generator=generator).float() * 2 - 1


def _units(size: int) -> Tensor:
    return torch.eye(size)


def _form(product: Product, vector: Tensor) -> float:
    return float(torch.dot(vector.double(), _finite(product(vector)).double()))


def _finite(image: Tensor) -> Tensor:
    if not bool(torch.isfinite(image).all()):
        raise MisuseError("a product holds NaN or infinity; look for them in the weights and in the objective")
    return image


def _mean(forms: list[float], known: float, products: int) -> Estimate:
    values = torch.tensor(forms, dtype=torch.float64)
    error = float(values.std()) / math.sqrt(len(forms)) if len(forms) > 1 else math.inf
    return Estimate(known + float(values.mean()), error, len(forms) - 1, products)


def _check(probes: int) -> None:
    if probes < 1:
        raise MisuseError(f"a trace needs 1 probe or more, not {probes}", probes=probes)


def _student(quantile: float, freedom: int) -> float:
    """Student's quantile: exact for 1 and 2 degrees of freedom, else Hill's expansion (within 1 % from 3 on)."""
    if freedom == 1:
        return math.tan(math.pi * (quantile - 0.5))
    if freedom == 2:
        spread = 4 * quantile * (1 - quantile)
        return 2 * (quantile - 0.5) * math.sqrt(2 / spread)
    z = NormalDist().inv_cdf(quantile)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return float(sum(term / freedom**power for power, term in enumerate(terms)))
