"""How many directions a matrix really has: effective ranks of gradients, updates and kernels.

With singular values s_i, their squares l_i and the sum of squares E:

=================  =============================================================  ==================================
kind               definition                                                     source
=================  =============================================================  ==================================
``entropy``        exp of the entropy of s_i / sum(s)                             Roy and Vetterli 2007, EUSIPCO
``participation``  (sum l)^2 / sum(l^2)                                           Bell and Dean 1970 (localisation)
``stable``         E / l_1                                                        Rudelson and Vershynin 2007,
                                                                                  arXiv:math/0503442
``threshold``      the fewest directions that hold 1 - ``delta`` of E             Jolliffe 2002, section 6.1.1
``numerical``      singular values above ``tolerance`` times the largest          Golub and Van Loan, section 5.5
=================  =============================================================  ==================================

For r equal singular values and zeros otherwise, all are r (``threshold`` with a small ``delta``); all are between 1
and the number of singular values, and none changes when the matrix is scaled, transposed or rotated.

>>> three = torch.diag(torch.tensor([2.0, 2.0, 2.0, 0.0, 0.0]))
>>> [round(effective_rank(three, kind=kind), 3) for kind in KINDS]
[3.0, 3.0, 3.0, 3.0, 3.0]
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from thinwire.errors import MisuseError
from thinwire.probe.spectrum import Krylov, Method, Spectrum, as_matrix, gram_of, spectrum_of, spectrum_of_gram

__all__ = ["KINDS", "Kind", "effective_rank", "layer_ranks", "rank_of"]

Kind = Literal["entropy", "participation", "stable", "threshold", "numerical"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_SMALL = 512
"""Up to this smaller side everything is computed at once: there is little to save, and much noise in estimates."""

_STEPS_FIRST = 6
"""Blocks of the Krylov space: as few as make sense."""

_SETTLED = {"threshold": 0.005, "entropy": 0.005, "participation": 0.01, "stable": 0.01}
"""The estimate is taken when the last two blocks moved it by less than this share of it."""

_DOUBT = 0.008
"""Most standard error, as a share of the rank, of what random vectors estimate."""

_WIDTH = 16


def rank_of(spectrum: Spectrum, kind: Kind = "entropy", *, delta: float = 0.01, tolerance: float = 1e-6) -> float:
    """The effective rank by a spectrum; 0 if all singular values are 0 or there is none.

    Values that stand for several singular values count as many times.

    Raises:
        MisuseError: an unknown kind, ``delta`` or ``tolerance`` out of [0, 1), or ``numerical`` by a spectrum whose
            small singular values are not known.
    """
    if kind not in KINDS:
        raise MisuseError(f"there is no rank {kind!r}; use one of {', '.join(KINDS)}", kind=kind)
    if not (0 <= delta < 1 and 0 <= tolerance < 1):
        raise MisuseError(f"delta {delta} and tolerance {tolerance} are shares in [0, 1)")
    values, counts = spectrum.values, spectrum.counts
    if values.numel() == 0 or not float(values[0]) > 0:
        return 0.0
    share = values / values.max()
    squares = share.square()
    if kind == "entropy":
        total = float((counts * share).sum())
        part = share / total
        return float(torch.exp(-(counts * torch.special.xlogy(part, part)).sum()))
    if kind == "participation":
        return float((counts * squares).sum().square() / (counts * squares.square()).sum())
    if kind == "stable":
        return float((counts * squares).sum() / squares[0])
    if kind == "threshold":
        return _threshold(squares, counts, delta)
    if not spectrum.exact:
        raise MisuseError("a numerical rank needs every singular value; use the method 'gram' or 'full'")
    return float(counts[share > tolerance].sum())


def _threshold(squares: Tensor, counts: Tensor, delta: float) -> float:
    """Whole directions until ``1 - delta`` of the sum is reached; inside a node, as many as its share asks for."""
    order = squares.argsort(descending=True, stable=True)
    squares, counts = squares[order], counts[order]
    sums = (counts * squares).cumsum(0)
    wanted = (1 - delta) * float(sums[-1]) * (1 - 1e-12)
    at = min(int(torch.searchsorted(sums, wanted)), squares.numel() - 1)
    before = float(sums[at - 1]) if at else 0.0
    within = (wanted - before) / float(squares[at]) if float(squares[at]) > 0 else 0.0
    return float(torch.ceil((counts[:at].sum() + min(within, float(counts[at]))) - 1e-9))


def effective_rank(
    matrix: Tensor,
    kind: Kind = "entropy",
    *,
    delta: float = 0.01,
    tolerance: float | None = None,
    method: Method | Literal["auto"] = "auto",
    seed: int = 0,
) -> float:
    """The effective rank of ``matrix`` [m, n], or [m, ...] flattened to it; 0 if it is all zeros, or empty.

    ``auto`` is within 2 % of the full SVD's for spectra that gradients have, and the cheapest that is: a Krylov space
    where the last two of its blocks agree about the answer within 1 %, and what random vectors leave uncertain of it is
    less than that. Elsewhere (the entropy of a long and low tail; a ``threshold`` amid many like values; ``numerical``,
    which counts the smallest of all) it is a Gram matrix, or the full SVD where that costs less. ``tolerance`` is the
    numerical rank's, as a share of the largest singular value; if None, the larger side times the precision of the
    data type, and 1e-7 at least. ``seed`` draws the Krylov space; equal seeds give equal ranks.

    Raises:
        MisuseError: fewer than two dimensions, no real floats, NaN or infinity; unknown kind or method; ``delta`` or
            ``tolerance`` out of [0, 1); ``numerical`` with ``method="krylov"``.
    """
    if tolerance is None:
        precision = torch.finfo(matrix.dtype).eps if matrix.is_floating_point() else 0.0
        precision = precision if matrix.dtype == torch.float64 else min(precision, torch.finfo(torch.float32).eps)
        tolerance = min(max(max(matrix.shape, default=0) * precision, 1e-7), 0.5)
    if method != "auto":
        return rank_of(spectrum_of(matrix, method=method, seed=seed), kind, delta=delta, tolerance=tolerance)
    rank_of(Spectrum(torch.zeros(0), torch.zeros(0), 0.0, 0), kind, delta=delta, tolerance=tolerance)  # refuses early
    flat, _, energy = as_matrix(matrix)
    if energy == 0:
        return 0.0
    if kind != "numerical" and min(flat.shape) > _SMALL:
        found = _settled(flat, energy, kind, delta, seed)
        if found is not None:
            return found
    precise = kind in ("entropy", "numerical")
    if precise and (min(flat.shape) <= _SMALL or max(flat.shape) >= 2 * min(flat.shape)):
        return rank_of(spectrum_of(flat, method="full"), kind, delta=delta, tolerance=tolerance)
    return rank_of(spectrum_of_gram(gram_of(flat, wide=precise)), kind, delta=delta, tolerance=tolerance)


def _settled(flat: Tensor, energy: float, kind: Kind, delta: float, seed: int) -> float | None:
    """The rank by a Krylov space that grows until it moves no more; None if it does not settle."""
    last = 10 if min(flat.shape) < 2048 else 16  # what is saved grows with the smaller side, what a pass costs does not
    space = Krylov(flat, energy, width=_WIDTH, seed=seed)
    for steps in range(_STEPS_FIRST, last + 1, 2):
        found = space.grow(steps).spectrum()
        now = rank_of(found, kind, delta=delta)
        before = rank_of(space.spectrum(steps - 2), kind, delta=delta)
        quiet = _doubt(found, kind, now, torch.finfo(flat.dtype).eps) <= _DOUBT
        if space.complete or (quiet and abs(now - before) <= _SETTLED[kind] * now):
            return now
    return None


def _doubt(found: Spectrum, kind: Kind, rank: float, precision: float) -> float:
    """The rank's standard error as a share of it.

    The count of a node is a mean over random vectors of squared normal numbers, with variance 2 counts / vectors; what
    that does to the rank follows from its derivatives by counts and by the scale of the nodes, both of which are set
    so that number and energy are right. The nodes' energy is what rounding has left of a difference, which matters to
    the entropy where the tail is long and low.
    """
    counts, values = found.counts[found.known :], found.values[found.known :]
    if kind == "stable" or not len(counts):
        return 0.0
    if kind == "threshold":
        return math.sqrt(2 * max(rank - found.known, 0.0) / _WIDTH) / rank
    squares = values.square()
    if kind == "participation":
        slopes = squares.square() / (found.counts * found.values.pow(4)).sum()
        scale = 4 * float((counts * slopes).sum())
    else:
        part = (values / (found.counts * found.values).sum()).clamp(min=1e-300)
        slopes = part * (1 - part.log() - math.log(rank))
        scale = float((counts * (slopes - part)).sum())
    number, energy = float(counts.sum()), float((counts * squares).sum())
    if energy <= 0:
        return 0.0
    by_number = slopes - (counts * slopes).sum() / number
    effect = by_number - scale / 2 * (squares / energy - 1 / number)
    rounded = min(1.0, 8 * precision * found.energy / energy) if kind == "entropy" else 0.0
    return math.sqrt(2 / _WIDTH * float((counts * effect.square()).sum())) + rounded * float(
        (counts * slopes.abs()).sum()
    )


def layer_ranks(
    updates: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    kind: Kind = "entropy",
    *,
    delta: float = 0.01,
    seed: int = 0,
) -> dict[str, float]:
    """The effective rank of each matrix among named gradients or updates; vectors and scalars are left out.

    A tensor that comes under several names (tied weights) is counted under the first.

    Raises:
        MisuseError: as :func:`effective_rank`, with the name.

    >>> layer_ranks({"weight": torch.eye(4), "bias": torch.ones(4)})
    {'weight': 4.0...}
    """
    found: dict[str, float] = {}
    seen: set[int] = set()
    for name, tensor in updates.items() if isinstance(updates, Mapping) else updates:
        if tensor.dim() < 2 or (tensor.numel() and id(tensor) in seen):
            continue
        seen.add(id(tensor))
        try:
            found[name] = effective_rank(tensor, kind, delta=delta, seed=seed)
        except MisuseError as error:
            raise MisuseError(f"{name}: {error}", name=name, **error.facts) from error
    return found
