"""thinwire's own exchange, as DDP would call it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from thinwire.bench.gradients_exchange import Exchange, Method, count, ring
from thinwire.bench.gradients_workload import Bucket
from thinwire.compress.feedback import ErrorFeedback
from thinwire.compress.sparsify import TopK
from thinwire.integrations.ddp import CompressedAllReduce

__all__ = ["OURS", "Compressed", "Mode"]

Mode = Literal["split", "shared", "gather", "auto"]


class Compressed(Exchange):
    """:class:`~thinwire.integrations.ddp.CompressedAllReduce` with top-k and error feedback."""

    def __init__(self, mode: Mode, values: str, density: float, timeout_s: float = 300.0) -> None:
        compressor = ErrorFeedback(TopK(density, values=values))
        self._exchange = CompressedAllReduce(compressor, mode=mode, timeout_s=timeout_s)

    def hook(self, bucket: Bucket) -> torch.futures.Future[Tensor]:
        return CompressedAllReduce.hook(self._exchange, bucket)  # type: ignore[arg-type]  # a stand-in for DDP's

    def residual(self) -> Tensor | None:
        """Parameters are numbered in the order in which the buckets show them, which is that of the flat update."""
        parameters = self._exchange.state_dict()["parameters"]
        kept = [parameters[f"#{i}"]["residual"].view(-1) for i in range(len(parameters))]
        return torch.cat(kept) if kept else None  # a single rank keeps nothing back

    def received_bytes(self) -> int | None:
        return self._exchange.traffic.received_bytes

    def close(self) -> None:
        self._exchange.close()


def _bytes(mode: Mode, values: str) -> Callable[[int, Sequence[Bucket], float], float]:
    """Leading terms only: positions by Elias-Fano, values by their codec, no counts and no histograms."""

    def theory(ranks: int, buckets: Sequence[Bucket], density: float) -> float:
        compressor, total = TopK(density, values=values), 0.0
        for numel in (bucket.buffer().numel() for bucket in buckets):
            k = count(numel, density)
            where, what = compressor.packed_size(k, numel), compressor.codec.size(k)
            if mode == "gather":
                total += (ranks - 1) * (where + what)
            elif mode == "shared":  # a broadcast of the leader's positions, then a reduction of values
                total += (ranks - 1) / ranks * where + ring(ranks, what)
            else:
                total += ring(ranks, where + what)
        return total

    return theory


def _method(mode: Mode, values: str) -> Method:
    short = "" if values == "float32" else "-bf16"
    return Method(
        f"{mode}{short}", f"thinwire {mode}{', bf16' if short else ''}",
        lambda density: Compressed(mode, values, density), _bytes(mode, values), ours=True,
    )  # fmt: skip


_MODES: tuple[Mode, ...] = ("split", "shared", "gather", "auto")
OURS = tuple(_method(mode, values) for values in ("float32", "bfloat16") for mode in _MODES)
