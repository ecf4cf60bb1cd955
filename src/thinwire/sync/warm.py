"""Compile the kernels ahead of time: ``python -m thinwire.sync.warm``.

Numba compiles a kernel when it is first called, for each data type anew, and keeps the result on disk. A first publish
in a new environment therefore takes some ten seconds longer than the next. Run this while something else is loading,
or when an image is built, and no trainer or worker waits for it.
"""

from __future__ import annotations

import sys
import time

import torch

from thinwire.stores.memory import MemoryStore
from thinwire.sync.consumer import Consumer
from thinwire.sync.publisher import Publisher

__all__ = ["compile_kernels"]


def compile_kernels(*dtypes: torch.dtype, levels: tuple[str, ...] = ("small", "smallest")) -> float:
    """Publish and follow a toy model of each dtype (bfloat16 by default) in memory; the seconds it took.

    >>> compile_kernels(levels=("small",)) >= 0
    True
    """
    began = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    for dtype in dtypes or (torch.bfloat16,):
        for level in levels:
            masters = torch.randn(1 << 16, generator=generator) * 0.02
            held = {"w": torch.zeros(1 << 16, dtype=dtype)}
            store = MemoryStore()
            publisher, consumer = Publisher(store, level=level, threads=1), Consumer(store, threads=1)
            publisher.publish({"w": masters.to(dtype)})
            consumer.load(held)
            publisher.publish({"w": (masters + 1e-6 * torch.sign(masters)).to(dtype)})
            version = consumer.poll()
            if version is not None:
                version.apply(held)
    return time.perf_counter() - began


if __name__ == "__main__":
    print(f"kernels compiled and kept in {compile_kernels():.1f} s", file=sys.stderr)
