"""Aggregators that are linear in the updates, their coefficients made from dot products alone.

========================  ============================================================  =============================
class                     coefficients                                                  source
========================  ============================================================  =============================
:class:`Mean`             equal                                                         -
:class:`Weighted`         fixed                                                         -
:class:`AdaCons`          by consensus with the mean                                    Choukroun et al. 2024
:class:`AdaSum`           a sum where updates are orthogonal, a mean where parallel     Maleki et al. 2021
:class:`Krum`             all on the one nearest to its neighbours                      Blanchard et al. 2017
:class:`MultiKrum`        equal on several such                                         Blanchard et al. 2017
:class:`CentredClipping`  the last aggregate, moved by clipped differences              Karimireddy et al. 2021
:class:`OutlierSkip`      equal, without workers whose norm is far from its history     Cheng et al. 2024 (EDiT)
========================  ============================================================  =============================

In all formulas ``G[i, j] = <g_i, g_j>``, over the ``Q`` workers whose update is finite.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite, sqrt
from typing import final

import torch
from torch import Tensor

from thinwire.aggregate.base import Linear, State, check_between, check_decay
from thinwire.errors import MisuseError

__all__ = ["AdaCons", "AdaSum", "CentredClipping", "Krum", "Mean", "MultiKrum", "OutlierSkip", "Weighted"]


@final
@dataclass(frozen=True)
class Mean(Linear):
    """The plain mean. One arbitrary worker moves it anywhere."""

    name = "mean"

    def choose(self, gram: Tensor, kept: Tensor, size: int, state: State) -> tuple[Tensor, State]:
        del gram, size
        return _equal(len(kept)), state


@final
@dataclass(frozen=True)
class Weighted(Linear):
    """Fixed weights, such as the clients' numbers of examples. They are scaled to sum to 1 over those who take part.

    >>> gram = torch.eye(2, dtype=torch.float64)
    >>> Weighted((3.0, 1.0)).coefficients(gram, {})[0].tolist()
    [0.75, 0.25]

    Raises:
        MisuseError: A weight is negative or not finite, all are 0, or there are not as many as workers.
    """

    weights: tuple[float, ...]
    name = "weighted"

    def __post_init__(self) -> None:
        if not all(isfinite(w) and w >= 0 for w in self.weights) or not 0 < sum(self.weights) < inf:
            raise MisuseError(f"weights of {self.weights}; give finite ones, none negative, not all 0")

    def init(self, size: int) -> State:
        if size != len(self.weights):
            raise MisuseError(f"{len(self.weights)} weights for {size} workers", size=size)
        return {}

    def choose(self, gram: Tensor, kept: Tensor, size: int, state: State) -> tuple[Tensor, State]:
        del gram
        self.init(size)
        mine = torch.tensor(self.weights, dtype=torch.float64)[kept]
        return (mine / mine.sum() if mine.any() else _equal(len(kept))), state


@final
@dataclass(frozen=True)
class AdaCons(Linear):
    """Adaptive consensus (Choukroun et al. 2024, arXiv:2411.03742): ``a_i = <g_i, mean> / |g_i|``; the sorted ``a`` are
    averaged over steps with ``momentum``, so that it is the k-th best worker's share that is smooth, not a worker's;
    and ``c_i`` is proportional to ``a_i / |g_i|``.

    Two things differ from the authors' sample implementation. There, ``sum a_i = 1``, which makes the result at most a
    unit vector and leaves the scale to the step size; here ``sum c_i = 1``, so equal updates come out as they are. And
    an update that points away from the mean has no part, where there it has a negative one: no sums near 0 to divide
    by. It is not robust: whoever sends a huge update is most of the mean that all are compared with.
    """

    momentum: float = 0.99
    name = "adacons"

    def __post_init__(self) -> None:
        check_decay(self.momentum)

    def choose(self, gram: Tensor, kept: Tensor, size: int, state: State) -> tuple[Tensor, State]:
        norm = gram.diagonal().clamp(min=0).sqrt()
        inverse = torch.where(norm > 0, 1 / norm, 0.0)
        consensus = torch.zeros(size, dtype=torch.float64)
        consensus[kept] = (gram.mean(1) * inverse).clamp(min=0)
        ordered, order = consensus.sort(stable=True)
        if "sorted" in state and len(state["sorted"]) == size:
            ordered = self.momentum * state["sorted"] + (1 - self.momentum) * ordered
        smooth = torch.empty_like(ordered).index_copy_(0, order, ordered)
        coefficients = smooth[kept] * inverse
        total = float(coefficients.sum())
        chosen = coefficients / total if 0 < total < inf else _equal(len(kept))
        return chosen, {**state, "sorted": ordered}


@final
@dataclass(frozen=True)
class AdaSum(Linear):
    """Adaptive summation (Maleki et al. 2021, arXiv:2006.02924): of two,
    ``(1 - <a, b> / 2|a|²) a + (1 - <a, b> / 2|b|²) b``, and of more in a binary tree, in the order of the workers; one
    without a partner goes up as it is. Orthogonal updates are added, equal ones averaged: up to P times as long as the
    mean, so it goes with the learning rate of a single worker."""

    name = "adasum"

    def choose(self, gram: Tensor, kept: Tensor, size: int, state: State) -> tuple[Tensor, State]:
        del size
        level = list(torch.eye(len(kept), dtype=torch.float64))
        while len(level) > 1:
            pairs = [_adasum(a, b, gram) for a, b in zip(level[::2], level[1::2], strict=False)]
            level = pairs + ([level[-1]] if len(level) % 2 else [])
        return level[0], state


def _adasum(a: Tensor, b: Tensor, gram: Tensor) -> Tensor:
    dot, norm2_a, norm2_b = (float(x @ gram @ y) for x, y in ((a, b), (a, a), (b, b)))
    share_a, share_b = (1 - dot / norm2 / 2 if norm2 > 0 else 1.0 for norm2 in (norm2_a, norm2_b))
    return share_a * a + share_b * b


@final
@dataclass(frozen=True)
class Krum(Linear):
    """The update whose ``P - faulty - 2`` nearest others are nearest, in the sum of squared distances (Blanchard et al.
    2017). Survives ``faulty`` arbitrary workers out of ``P >= 2 faulty + 3``, and throws away what the others know.

    Raises:
        MisuseError: ``faulty`` is negative, or there are too few workers.
    """

    faulty: int = 1
    name = "krum"

    def __post_init__(self) -> None:
        check_between("faulty", self.faulty, 0)

    def init(self, size: int) -> State:
        return _enough_for_krum(size, self.faulty)

    def choose(self, gram: Tensor, kept: Tensor, size: int, state: State) -> tuple[Tensor, State]:
        best = _krum_scores(gram, self.faulty - (size - len(kept))).argsort(stable=True)[:1]
        return torch.zeros(len(kept), dtype=torch.float64).index_fill_(0, best, 1.0), state


@final
@dataclass(frozen=True)
class MultiKrum(Linear):
    """The mean of the ``keep`` updates with the best :class:`Krum` scores; without ``keep``, of ``P - faulty - 2``.

    Raises:
        MisuseError: ``faulty`` is negative, there are too few workers, or ``keep`` is more than are surely good.
    """

    faulty: int = 1
    keep: int | None = None
    name = "multi_krum"

    def __post_init__(self) -> None:
        check_between("faulty", self.faulty, 0)
        if self.keep is not None:
            check_between("keep", self.keep, 1)

    def init(self, size: int) -> State:
        if self.keep is not None and self.keep > size - self.faulty:
            raise MisuseError(f"keep={self.keep} of {size} workers of which {self.faulty} are faulty", size=size)
        return _enough_for_krum(size, self.faulty)

    def choose(self, gram: Tensor, kept: Tensor, size: int, state: State) -> tuple[Tensor, State]:
        faulty = max(0, self.faulty - (size - len(kept)))
        keep = max(1, len(kept) - faulty - 2) if self.keep is None else min(self.keep, len(kept))
        best = _krum_scores(gram, faulty).argsort(stable=True)[:keep]
        return torch.zeros(len(kept), dtype=torch.float64).index_fill_(0, best, 1.0 / keep), state


def _enough_for_krum(size: int, faulty: int) -> State:
    if size < 2 * faulty + 3:
        raise MisuseError(f"{faulty} faulty of {size} workers; Krum needs {2 * faulty + 3} for so many", size=size)
    return {}


def _krum_scores(gram: Tensor, faulty: int) -> Tensor:
    """``[Q]``; ``faulty`` counts those who are still among them, so without whoever was left out already."""
    norm2 = gram.diagonal()
    distance2 = (norm2[:, None] + norm2[None, :] - 2 * gram).clamp_(min=0).fill_diagonal_(0)
    neighbours = max(1, len(gram) - max(0, faulty) - 2)
    return distance2.sort(dim=1).values[:, 1 : neighbours + 1].sum(dim=1)


@final
@dataclass(frozen=True)
class CentredClipping(Linear):
    """``v <- v + mean_i (g_i - v) min(1, radius / |g_i - v|)``, ``iterations`` times, from the previous aggregate on
    (Karimireddy et al. 2021, arXiv:2012.10333): an arbitrary worker moves the result by ``radius * iterations / P`` at
    most. It is meant for workers' *momenta*, which change slowly, so that the previous aggregate is a good centre.

    Without a ``radius``, the median of the distances in each iteration is taken: no scale to set, and less than half of
    the workers being arbitrary it is no larger than the farthest good one's distance. (That rule is ours.)

    Raises:
        MisuseError: The radius is not positive, or there are no iterations.
    """

    radius: float | None = None
    iterations: int = 3
    name = "centred_clipping"
    uses_previous = True

    def __post_init__(self) -> None:
        if self.radius is not None and not 0 < self.radius < inf:
            raise MisuseError(f"a radius of {self.radius}; give a positive one, in the units of the updates' norm")
        check_between("iterations", self.iterations, 1)

    def choose(self, gram: Tensor, kept: Tensor, size: int, state: State) -> tuple[Tensor, State]:
        del size
        workers = len(kept)
        if not gram[-1, -1].isfinite():
            raise MisuseError("the previous aggregate is not finite; start from init()")
        one_each = torch.eye(workers + 1, dtype=torch.float64)
        centre = one_each[-1]
        for _ in range(self.iterations):
            apart = one_each[:-1] - centre
            distance = ((apart @ gram) * apart).sum(1).clamp_(min=0).sqrt_()
            radius = distance.median() if self.radius is None else torch.tensor(self.radius, dtype=torch.float64)
            clip = torch.where(distance > radius, radius / distance, 1.0)
            centre = centre + (clip[:, None] * apart).mean(0)
        return centre, state


@final
@dataclass(frozen=True)
class OutlierSkip(Linear):
    """The mean without workers whose update is suddenly long: whose norm is more than ``threshold`` standard deviations
    above its own moving average (anomaly elimination of EDiT, Cheng et al. 2024, arXiv:2412.07210; its weights by norm
    and its final clipping are not part of this). Each worker's first ``warmup`` steps are taken as they come.

    What was skipped counts in the averages as if it were at the threshold, so that a lasting change is got used to. If
    all are outliers at once it is the model that jumped, not a worker, and all are taken; EDiT rolls back instead.

    Raises:
        MisuseError: A number is out of its range.
    """

    decay: float = 0.98
    threshold: float = 3.0
    warmup: int = 100
    name = "outlier_skip"

    def __post_init__(self) -> None:
        check_decay(self.decay)
        check_between("threshold", self.threshold, 0)
        check_between("warmup", self.warmup, 1)

    def init(self, size: int) -> State:
        return {"count": [0] * size, "mean": [0.0] * size, "variance": [0.0] * size}

    def choose(self, gram: Tensor, kept: Tensor, size: int, state: State) -> tuple[Tensor, State]:
        if size != len(state["count"]):
            raise MisuseError(f"{size} workers, and a state of {len(state['count'])}; start from init()", size=size)
        count, mean, variance = list(state["count"]), list(state["mean"]), list(state["variance"])
        norms = gram.diagonal().clamp(min=0).sqrt().tolist()
        usual = []
        for worker, norm in zip(kept.tolist(), norms, strict=True):
            limit = inf
            if count[worker] >= self.warmup:
                limit = mean[worker] + self.threshold * sqrt(variance[worker])
            usual.append(norm <= limit)
            apart = min(norm, limit) - mean[worker]
            rate = max(1 - self.decay, 1 / (count[worker] + 1))
            mean[worker] += rate * apart
            variance[worker] = (1 - rate) * (variance[worker] + rate * apart * apart)
            count[worker] += 1
        taken = torch.tensor(usual if any(usual) else [True] * len(usual), dtype=torch.float64)
        return taken / taken.sum(), {"count": count, "mean": mean, "variance": variance}


def _equal(workers: int) -> Tensor:
    return torch.full((workers,), 1.0 / workers, dtype=torch.float64)
