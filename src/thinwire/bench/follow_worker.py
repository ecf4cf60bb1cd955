"""A consumer as a process of its own: ``python -m thinwire.bench.follow_worker STORE REPORTS MODEL_BYTES SEED EVERY``.

It starts from random weights, brings them to the newest version and follows. After each version it hashes its own
memory afresh, all of it, and appends ``version digest`` to the file REPORTS in one write. It ends when it is killed.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Mapping

import torch

from thinwire.bench.weights import layouts_of, model_shapes
from thinwire.sync.apply import tree_of
from thinwire.sync.consumer import Consumer
from thinwire.tensors.bits import cells_of

__all__ = ["follow", "memory_digest", "random_model"]


def random_model(size_bytes: int, seed: int) -> dict[str, torch.Tensor]:
    """A bf16 model of the bench's shapes with weights that no version has."""
    generator = torch.Generator().manual_seed(seed)
    shapes = model_shapes(size_bytes // 2)
    return {name: torch.randn(shape, generator=generator).to(torch.bfloat16) for name, shape in shapes.items()}


def memory_digest(model: Mapping[str, torch.Tensor]) -> str:
    """Digest of the weights as they lie in memory now; nothing that was computed before is used."""
    layouts = layouts_of({name: tuple(tensor.shape) for name, tensor in sorted(model.items())})
    return tree_of(layouts, {name: cells_of(tensor) for name, tensor in model.items()}, {}, threads=1).digest


def follow(store: str, reports: str, size_bytes: int, seed: int, every: bool) -> None:
    """Follow until killed; with ``every``, version by version."""
    model = random_model(size_bytes, seed)
    consumer = Consumer(store, poll_s=0.02, threads=1)
    out = os.open(reports, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def report(version: int) -> None:
        os.write(out, f"{version} {memory_digest(model)}\n".encode())

    report(consumer.load(model, timeout_s=60.0).version)
    for version in consumer.follow(every=every):
        report(version.apply(model).version)


if __name__ == "__main__":
    torch.set_num_threads(1)
    random.seed(os.getpid())  # the waits between polls must differ between consumers
    follow(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == "every")
