"""Simulated steps of a trainer, exactly reproducible from a seed, at any size.

Both start from weights drawn from N(0, 0.02²), kept in fp32 and published in bf16 (rounded to nearest, ties to even).

``ulp``
    A given share of the weights, chosen at random whatever their size, moves by one unit in the last place, up or down.
    No real optimiser does this: it hides everything but the coding of positions and signs, and has a known entropy.

``adam``
    Adam (Kingma & Ba, arXiv:1412.6980; betas 0.9 and 0.999) for nine steps with independent normal gradients; the pair
    is the bf16 weights before and after the ninth. The learning rate is bisected until the wanted share changes. The
    gradients carry no signal, so steps resemble each other only through the first moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch

from thinwire.bench.kernels import adam_step, round_to_bf16
from thinwire.bench.weights import Cells, Pair, model_shapes
from thinwire.errors import MisuseError
from thinwire.sync.encode import thread_count
from thinwire.tensors.bits import tensor_of
from thinwire.tensors.kernels import count_changed
from thinwire.wire.values import apply_steps

__all__ = ["WORKLOADS", "adam", "adam_versions", "ulp"]

_CHUNK = 1 << 20
_SIGMA = np.float32(0.02)
_STEPS = 9
_BETA1, _BETA2, _EPS = 0.9, 0.999, 1e-8
_GRADIENT = np.float32(1e-3)  # its scale cancels out in Adam

Floats = npt.NDArray[np.float32]


class _Trajectory:
    """The weights of one chunk under Adam."""

    def __init__(self, size: int, lr: float, seed: list[int]) -> None:
        self.random = np.random.Generator(np.random.SFC64(seed))
        self.weights: Floats = self.random.standard_normal(size, np.float32) * _SIGMA
        self.m, self.v = np.zeros(size, np.float32), np.zeros(size, np.float32)
        self.gradient = np.empty(size, np.float32)
        self.lr, self.step = lr, 0

    def advance(self) -> None:
        self.step += 1
        self.random.standard_normal(dtype=np.float32, out=self.gradient)
        self.gradient *= _GRADIENT
        rate = self.lr / (1 - _BETA1**self.step)
        correction = 1 / (1 - _BETA2**self.step)
        numbers = (np.float32(x) for x in (_BETA1, _BETA2, rate, correction, _EPS))
        adam_step(self.weights, self.m, self.v, self.gradient, *numbers)

    def cells(self) -> Cells:
        found = np.empty(self.weights.size, np.uint16)
        round_to_bf16(self.weights, found)
        return found


def _pair(
    workload: str, size_bytes: int, facts: dict[str, object], chunk: Callable[[int, int], tuple[Cells, Cells]]
) -> Pair:
    cells = size_bytes // 2
    shapes = model_shapes(cells)
    old, new = np.empty(cells, np.uint16), np.empty(cells, np.uint16)

    def fill(k: int) -> None:
        part = slice(k * _CHUNK, min((k + 1) * _CHUNK, cells))
        old[part], new[part] = chunk(k, part.stop - part.start)

    with ThreadPoolExecutor(thread_count(0)) as pool:
        list(pool.map(fill, range(-(-cells // _CHUNK))))
    return Pair(workload, shapes, old, new, facts)


def _check(density: float) -> None:
    if not 0 < density < 1:
        raise MisuseError(f"the density must lie between 0 and 1, not be {density}")


def ulp(size_bytes: int, density: float, seed: int) -> Pair:
    """A share of ``density`` of the weights moves by ±1 unit in the last place."""
    _check(density)

    def chunk(k: int, size: int) -> tuple[Cells, Cells]:
        random = np.random.Generator(np.random.SFC64([seed, k]))
        old = np.empty(size, np.uint16)
        round_to_bf16(random.standard_normal(size, np.float32) * _SIGMA, old)
        where = np.flatnonzero(random.random(size, np.float32) < density)
        new = old.copy()
        new[where] = apply_steps(old[where], random.integers(1, 3, where.size, np.uint16), is_float=True)
        return old, new

    return _pair("ulp", size_bytes, {"simulated": True, "sigma": float(_SIGMA), "seed": seed}, chunk)


def _ninth_step(size: int, lr: float, seed: list[int]) -> tuple[Cells, Cells]:
    trajectory = _Trajectory(size, lr, seed)
    for _ in range(_STEPS - 1):
        trajectory.advance()
    old = trajectory.cells()
    trajectory.advance()
    return old, trajectory.cells()


def _tuned(density: float, seed: int) -> float:
    """The learning rate at which the ninth step changes a share of ``density``, by bisection on a million weights."""
    low, high = 1e-9, 1e-1
    for _ in range(14):
        middle = (low * high) ** 0.5
        old, new = _ninth_step(_CHUNK, middle, [seed, 1 << 32])
        if count_changed(old, new) < density * _CHUNK:
            low = middle
        else:
            high = middle
    return high


def adam(size_bytes: int, density: float, seed: int) -> Pair:
    """Nine steps of Adam, of which the last is measured; it changes a share of about ``density``."""
    _check(density)
    lr = _tuned(density, seed)
    facts: dict[str, object] = {"simulated": True, "sigma": float(_SIGMA), "seed": seed, "lr": lr, "step": _STEPS}
    return _pair("adam", size_bytes, facts, lambda k, size: _ninth_step(size, lr, [seed, k]))


def adam_versions(size_bytes: int, lr: float, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """An endless run of Adam over a small model: its bf16 state before training and after each step.

    Every state is a view of one memory, as a trainer's is: it changes when the next one is asked for.
    """
    shapes = model_shapes(size_bytes // 2)
    trajectory = _Trajectory(size_bytes // 2, lr, [seed])
    flat = trajectory.cells()
    state: dict[str, torch.Tensor] = {}
    at = 0
    for name, shape in shapes.items():
        state[name] = tensor_of(flat[at : at + int(np.prod(shape))], "BF16", shape)
        at += int(np.prod(shape))
    while True:
        yield state
        trajectory.advance()
        round_to_bf16(trajectory.weights, flat)


WORKLOADS: dict[str, Callable[[int, float, int], Pair]] = {"ulp": ulp, "adam": adam}
"""By name: (bytes of one version, share of changed weights, seed) to two versions."""
