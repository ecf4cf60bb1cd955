"""What each stage costs on one thread, by itself: seconds for one GiB of state, at best."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from thinwire.bench.measure import GIB, seconds
from thinwire.bench.weights import Cells, Pair
from thinwire.tensors.digest import block_cells, hash_block
from thinwire.tensors.kernels import find_changed, swap_steps
from thinwire.wire import rans
from thinwire.wire.context import ContextWriter, Histogram, choose_bounds
from thinwire.wire.positions import gaps_of, positions_of
from thinwire.wire.spec import DTYPES

__all__ = ["stage_costs"]

_CELLS = 1 << 25  # one stripe
_BF16 = DTYPES["BF16"]


def _diff(old: Cells, new: Cells, positions: np.ndarray, codes: Cells) -> int:
    found, step = 0, block_cells(2)
    for at in range(0, old.size, step):
        found = find_changed(
            old[at : at + step], new[at : at + step], at, positions, codes, found, is_float=True, values="ulp"
        )
    return found


def stage_costs(pair: Pair, repeats: int) -> dict[str, float]:
    """Seconds per GiB of state for each stage of encoding and decoding, on the first stripe of ``pair``."""
    old, new = pair.old[:_CELLS], pair.new[:_CELLS]
    step = block_cells(2)
    positions, codes = np.zeros(old.size, np.uint32), np.zeros(old.size, np.uint16)
    found = _diff(old, new, positions, codes)
    positions, codes = positions[:found].copy(), codes[:found].copy()
    room = np.zeros(old.size, np.uint32), np.zeros(old.size, np.uint16)
    gaps = gaps_of(positions, 0)
    packed = [rans.encode(x, rans.EFFORT_SMALL) for x in (gaps, codes)]
    target = old.copy()

    def swap() -> None:
        kept, first = codes.copy(), 0
        for at in range(0, target.size, step):
            first = swap_steps(target[at : at + step], at, positions, kept, first, is_float=True)

    stages: dict[str, Callable[[], object]] = {
        "copy": lambda: np.copyto(target, new),
        "hash": lambda: [hash_block("blake3", new[at : at + step]) for at in range(0, new.size, step)],
        "diff": lambda: _diff(old, new, *room),
        "encode gaps": lambda: rans.encode(gaps_of(positions, 0), rans.EFFORT_SMALL),
        "encode steps": lambda: rans.encode(codes, rans.EFFORT_SMALL),
        "decode gaps": lambda: positions_of(rans.decode(packed[0], found, np.uint32), 0, old.size),
        "decode steps": lambda: rans.decode(packed[1], found, np.uint16),
        "swap": swap,
    }
    histogram = Histogram(_BF16)
    histogram.add(old, new, stride=1)
    bounds = choose_bounds(histogram)
    if bounds:
        classes, hot_gaps = np.empty(found, np.uint8), np.empty(found, np.uint32)
        stages["classify"] = lambda: ContextWriter(_BF16, bounds).add(old, 0, positions, 0, found, classes, hot_gaps)
    scale = GIB / old.nbytes
    return {name: round(scale * min(seconds(run) for _ in range(repeats + 1)), 4) for name, run in stages.items()}
