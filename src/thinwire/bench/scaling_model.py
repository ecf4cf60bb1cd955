"""What an exchange takes with any number of workers: an alpha-beta model, fitted to measured points and held to others.

Seconds of one exchange (Hockney 1994, with the work on the processor added)::

    beta * bytes + share * (alpha * messages + element * n + entry * entries)

``messages`` are those that a rank sends, ``bytes`` what it receives, ``n`` the elements and ``entries`` the
index-value pairs it handles. All are arithmetic; the coefficients are fitted, each at least zero: ``beta`` is the
line's, ``alpha`` a message's, ``element`` one each of fp32, fp16 and sparse methods, ``entry`` one each of all-gather
(which adds up while it receives) and of ours. ``share`` is by how much ranks are short of cores: 1 on hosts of their
own; where all are measured on one machine, as soon as there are fewer than :data:`CORES_A_RANK` for each. It stands
before alpha, too: between namespaces, a message's latency is the work of handling it.

The model is crude on purpose. ``CORES_A_RANK`` is the one number in it that was not fitted: it was set to 2 on seeing
that 16 ranks on 16 virtual cores take 1.5 times the processor time that 8 take, so what it says of that machine at 16
ranks is not a blind prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from thinwire.bench.gradients_exchange import selected
from thinwire.bench.gradients_methods import METHODS
from thinwire.bench.gradients_workload import Bucket
from thinwire.errors import MisuseError

__all__ = ["CORES_A_RANK", "SIMULATED", "Model", "Point", "Setting", "fit"]

CORES_A_RANK = 2
"""What a rank can keep busy: its own thread, and gloo's with the kernel's network behind it."""

SIMULATED = ("fp32", "fp16", "allgather", "split", "shared")
"""The methods that the model knows."""

_COEFFICIENTS = (
    "message_s", "byte_s", "element_fp32_s", "element_fp16_s", "element_sparse_s", "entry_allgather_s", "entry_s",
)  # fmt: skip
_SPARSE = ("allgather", "split", "shared")
_ROUNDS = {"allgather": 2, "split": 4, "shared": 5}  # collectives in which everybody sends to everybody


@dataclass(frozen=True)
class Setting:
    """What is exchanged, and on how many cores the measured ranks ran."""

    buckets: Sequence[Bucket]
    density: float
    cores: int

    def share(self, workers: int) -> float:
        """By how much the measured ranks were short of cores.

        >>> Setting((), 0.01, cores=16).share(4), Setting((), 0.01, cores=2).share(4)
        (1.0, 4.0)
        """
        return max(1.0, CORES_A_RANK * workers / self.cores)


@dataclass(frozen=True, slots=True)
class Point:
    """One measured exchange."""

    method: str
    workers: int
    seconds: float


def _features(method: str, workers: int, setting: Setting, share: float) -> list[float]:
    """What the coefficients are multiplied with: alpha, beta, element (fp32, fp16, sparse), entry (theirs, ours)."""
    if method not in SIMULATED:
        raise MisuseError(f"no model of {method!r}; there is one of {', '.join(SIMULATED)}")
    if workers == 1:
        return [0.0] * len(_COEFFICIENTS)
    numel = sum(bucket.buffer().numel() for bucket in setting.buckets)
    k = selected(setting.buckets, setting.density)
    messages = _ROUNDS.get(method, 2) * (workers - 1) * len(setting.buckets)
    received = METHODS[method].theory(workers, setting.buckets, setting.density)
    entries = {"allgather": workers * k, "split": 3 * k, "shared": 2 * k}.get(method, 0)
    elements = [share * numel if mine else 0.0 for mine in (method == "fp32", method == "fp16", method in _SPARSE)]
    of_entries = [share * entries if (method == "allgather") == theirs else 0.0 for theirs in (True, False)]
    return [share * messages, received, *elements, *of_entries]


@dataclass(frozen=True, slots=True)
class Model:
    """Fitted coefficients in seconds, in the order of :meth:`row`."""

    setting: Setting
    coefficients: tuple[float, ...]

    def seconds(self, method: str, workers: int, *, own_cores: bool) -> float:
        """Of one exchange; every rank on cores of its own, or all on the cores of the measurement."""
        share = 1.0 if own_cores else self.setting.share(workers)
        features = _features(method, workers, self.setting, share)
        return sum(c * x for c, x in zip(self.coefficients, features, strict=True))

    def error(self, point: Point) -> float:
        """Relative: 0.1 is a prediction 10 % too slow."""
        return self.seconds(point.method, point.workers, own_cores=False) / point.seconds - 1

    def row(self) -> dict[str, float]:
        """The coefficients by name."""
        return dict(zip(_COEFFICIENTS, self.coefficients, strict=True))


def fit(points: Sequence[Point], setting: Setting) -> Model:
    """The non-negative coefficients with the least sum of squared relative errors.

    Raises:
        MisuseError: Fewer than two points of more than one worker.
    """
    used = [point for point in points if point.workers > 1]
    if len(used) < 2:
        raise MisuseError(f"{len(used)} measured points of more than one worker; a model needs several")
    rows = [_features(point.method, point.workers, setting, setting.share(point.workers)) for point in used]
    relative = np.array(rows) / np.array([[point.seconds] for point in used])
    return Model(setting, tuple(_non_negative_least_squares(relative, np.ones(len(used))).tolist()))


def _non_negative_least_squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """argmin |a x - b| over x >= 0: the best of the solutions that are positive where they are not zero, of which a
    handful of columns has few."""
    best, least = np.zeros(a.shape[1]), float(b @ b)
    scale = np.maximum(np.abs(a).max(0), 1e-300)  # seconds a byte and seconds a message differ by many powers of ten
    for size in range(1, a.shape[1] + 1):
        for columns in map(list, combinations(range(a.shape[1]), size)):
            x, *_ = np.linalg.lstsq(a[:, columns] / scale[columns], b, rcond=None)
            x = x / scale[columns]
            error = float(((a[:, columns] @ x - b) ** 2).sum())
            if x.min() >= 0 and error < least:
                best, least = np.zeros(a.shape[1]), error
                best[columns] = x
    return best
