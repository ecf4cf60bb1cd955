"""Bytes that the real exchange moves between more workers than a machine can hold as processes.

Every worker is a thread, and they are joined by :class:`~thinwire.compress.group.MemoryGroup`, which counts what would
have travelled. The algorithm, its messages and the gradients are those of the processes; only the wire is not there.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from statistics import fmean

import torch

from thinwire.bench.gradients_ours import Mode
from thinwire.bench.gradients_workload import Workload, resnet50_shapes
from thinwire.compress.feedback import ErrorFeedback
from thinwire.compress.group import MemoryGroup
from thinwire.compress.sparsify import TopK
from thinwire.integrations.exchange import Exchange

__all__ = ["bytes_in_memory"]

_STEPS, _SETTLED = 4, 2


def bytes_in_memory(
    mode: Mode, workers: int, *, density: float = 0.01, values: str = "float32", width: int = 32, seed: int = 0
) -> float:
    """Bytes that a worker receives in a step, as a share of its float32 gradient; the mean over all workers.

    ``width`` is that of ResNet-50's first layer, 64 in the real one: shares hardly depend on the size, memory does.

    >>> 0 < bytes_in_memory("split", 2, density=0.1, width=2) < 0.2
    True
    """
    first = Workload(resnet50_shapes(width), 0, 0, seed)
    workloads = [first, *(first.beside(rank) for rank in range(1, workers))]
    shapes = [tuple(gradient.shape) for gradient in first.buckets[0].gradients()]
    keys = [f"#{i}" for i in range(len(shapes))]

    def work(rank: int, group: MemoryGroup) -> float:
        torch.set_num_threads(1)
        exchange = Exchange(ErrorFeedback(TopK(density, values=values)), group, mode=mode)
        before = 0
        for step in range(_STEPS):
            if step == _SETTLED:  # the first steps place the borders of the regions
                before = group.received_bytes
            workloads[rank].fill(step)
            exchange.reduce_(workloads[rank].flat, keys, shapes)
        return (group.received_bytes - before) / (_STEPS - _SETTLED)

    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers) as pool:
            received = list(pool.map(work, range(workers), MemoryGroup.of(workers, timeout_s=600.0)))
    finally:
        torch.set_num_threads(threads)
    return fmean(received) / (4 * first.numel)
