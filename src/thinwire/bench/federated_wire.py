"""What an update of a federation takes on the wire, beside the entropy of its positions and the width of its values."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch

from thinwire.bench.measure import load, machine, versions
from thinwire.federated import frame as frames
from thinwire.federated.model import ModelLayout
from thinwire.tensors.select import top_k

__all__ = ["floor_bytes", "wire_rows"]

_WIDTH = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "float8": 1}


def floor_bytes(density: float, width: int) -> float:
    """Bytes an element of the whole vector: the entropy of random positions at ``density``, and values as they are.

    >>> round(floor_bytes(0.01, 2), 4)
    0.0301
    """
    entropy = -density * math.log2(density) - (1 - density) * math.log2(1 - density) if density < 1 else 0.0
    return entropy / 8 + density * width


def wire_rows(numels: Sequence[int], densities: Sequence[float], values: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each size, density and codec: top-k of Gaussian noise (positions without structure), the whole frame.

    What is decoded is compared before anything is noted.
    """
    rows = []
    for numel in numels:
        update = torch.randn(numel, generator=torch.Generator().manual_seed(0)) * 1e-3
        layout = ModelLayout((("w", "F32", (numel,)),))
        for density in densities:
            positions = top_k(update, round(density * numel)).indices
            kept = update[positions.long()]
            for name in values:
                began = time.perf_counter()
                data = frames.encode_sparse(positions, kept, numel, name=name)
                encoded = time.perf_counter()
                sparse = frames.decode_sparse(frames.parse_frame(data), layout)
                decoded = time.perf_counter()
                assert torch.equal(sparse.positions, positions)
                assert torch.equal(sparse.values, frames.rounded(kept, name))
                floor = floor_bytes(density, _WIDTH[name])
                rows.append(
                    {
                        "bench": "federated-wire",
                        "numel": numel,
                        "density": density,
                        "values": name,
                        "nbytes": len(data),
                        "bytes_per_element": len(data) / numel,
                        "floor": floor,
                        "of_floor": len(data) / numel / floor,
                        "times_less_than_float32": 4 * numel / len(data),
                        "encode_s": round(encoded - began, 5),
                        "decode_s": round(decoded - encoded, 5),
                        "load": load(),
                        "machine": machine(),
                        "versions": versions(),
                    }
                )
    return rows
