"""Which way of reducing is the quickest for an update, from a link and a processor measured at the start.

The alpha-beta model (Hockney 1994): an exchange takes its rounds times a latency, plus its bytes times the seconds a
byte takes, plus the work on elements and entries. Crude, but the ways differ by factors, and all ranks use the same
figures, so they come to the same choice.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal, final

import torch

from thinwire.compress.group import Group
from thinwire.tensors.select import top_k

__all__ = ["CostModel", "Way", "calibrate", "quickest"]

Way = Literal["dense", "split", "gather", "shared"]


@final
@dataclass(frozen=True)
class CostModel:
    """Seconds: ``latency_s`` a round, ``byte_s`` a byte received, ``element_s`` an element looked at for selection,
    ``entry_s`` an element packed, sent, merged and written."""

    latency_s: float
    byte_s: float
    element_s: float
    entry_s: float

    def seconds(self, way: Way, numel: int, count: int, size: int, entry_bytes: float, value_bytes: float) -> float:
        """Predicted time of one exchange of ``count`` of ``numel`` elements between ``size`` ranks.

        ``entry_bytes`` is what an index and a value take, ``value_bytes`` the value alone.

        >>> slow = CostModel(latency_s=1e-4, byte_s=8e-9, element_s=4e-10, entry_s=1e-8)
        >>> slow.seconds("dense", 25_000_000, 0, 8, 5.1, 4) / slow.seconds("split", 25_000_000, 250_000, 8, 5.1, 4) > 30
        True
        """
        others = (size - 1) / size
        if way == "dense":
            return 2 * (size - 1) * self.latency_s + 8 * others * numel * self.byte_s
        look = numel * self.element_s
        if way == "gather":
            entries, received, rounds = size * count, (size - 1) * count * entry_bytes, 2
        elif way == "split":
            entries, received, rounds = 3 * count, 2 * others * count * entry_bytes + 256 * size, 4
        else:
            index_bytes = entry_bytes - value_bytes
            entries, received, rounds = 2 * count, count * index_bytes + 2 * others * count * value_bytes, 5
        return rounds * self.latency_s + received * self.byte_s + look + entries * self.entry_s


def quickest(
    model: CostModel, ways: tuple[Way, ...], numel: int, count: int, size: int, entry_bytes: float, value_bytes: float
) -> Way:
    return min(ways, key=lambda way: model.seconds(way, numel, count, size, entry_bytes, value_bytes))


def calibrate(group: Group, device: torch.device | str, probe_bytes: int = 4 << 20) -> CostModel:
    """Measures the link and this machine, and agrees on the slowest rank's figures. Collective; a few round trips and
    about ``probe_bytes`` received (twice)."""
    tiny = torch.zeros(8, dtype=torch.uint8, device=device)
    chunk = torch.zeros(max(1, probe_bytes // group.size), dtype=torch.uint8, device=device)
    x = torch.randn(1 << 20, device=device)

    def timed(work: object, repeats: int) -> float:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            work()  # type: ignore[operator]
            if x.is_cuda:
                torch.cuda.synchronize(x.device)
            times.append(time.perf_counter() - start)
        return sorted(times)[len(times) // 2]

    def swap(part: torch.Tensor) -> None:
        group.all_to_all([part] * group.size, [part.numel()] * group.size)

    swap(tiny)
    latency = timed(lambda: swap(tiny), 5)
    swap(chunk)  # a token bucket's burst is spent on this one
    transfer = timed(lambda: swap(chunk), 1)
    received = chunk.numel() * (group.size - 1)
    hint = top_k(x, 10_000).threshold
    element = timed(lambda: top_k(x, 10_000, hint=hint), 3) / x.numel()
    positions = top_k(x, 100_000).indices

    def handle() -> None:
        from thinwire.compress.allreduce import merge
        from thinwire.compress.indices import pack, unpack

        again = unpack(pack(positions, x.numel()), positions.numel(), x.numel())
        merge([(again, x[again])], x.numel())

    handle()
    entry = timed(handle, 3) / positions.numel()
    mine = torch.tensor(
        [latency, max(1e-12, (transfer - latency) / max(1, received)), element, entry], dtype=torch.float64
    )
    rows = group.all_gather(mine.view(torch.uint8), [32] * group.size)
    worst = torch.stack([row.cpu().clone().view(torch.float64) for row in rows]).max(0).values.tolist()
    return CostModel(*worst)
