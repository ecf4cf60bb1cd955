"""The same steps through a store: a publisher writes each version to a folder, a consumer brings a model to it."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import torch

from thinwire.bench.measure import Stopwatch, extra_memory
from thinwire.bench.weights import Cells, Pair, parts_of
from thinwire.sync.consumer import Consumer
from thinwire.sync.publisher import Publisher
from thinwire.tensors.bits import tensor_of

__all__ = ["end_to_end"]


def _state(pair: Pair, flat: Cells) -> dict[str, torch.Tensor]:
    return {name: tensor_of(part, "BF16", pair.shapes[name]) for name, part in parts_of(flat, pair.shapes).items()}


def end_to_end(pair: Pair, *, level: str, repeats: int, threads: int = 0) -> dict[str, Any]:
    """Publish and follow ``pair`` to and fro through a folder: seconds of whole calls, and their peak extra memory.

    Publishing ends when the version is committed; applying begins when it is fetched. The publisher's snapshot and the
    consumer's model are there before. Everything is compared bit for bit.
    """
    states = [_state(pair, pair.old), _state(pair, pair.new)]
    model = {name: torch.zeros_like(tensor) for name, tensor in states[0].items()}
    memory: dict[str, int | None] = {}
    publishing, applying = Stopwatch(), Stopwatch()
    with tempfile.TemporaryDirectory() as folder, Publisher(folder, level=level, threads=threads) as publisher:
        consumer = Consumer(folder, threads=threads)
        publisher.publish(states[0])
        consumer.load(model)
        for k in range(1, repeats + 3):  # the first round compiles, the second tells the memory
            state, measured = states[k % 2], k > 2
            if k == 2:
                memory["publish"] = extra_memory(lambda state=state: publisher.publish(state))  # type: ignore[misc]
            else:
                with publishing() if measured else Stopwatch()():
                    publisher.publish(state)
            version = consumer.poll()
            assert version is not None
            if k == 2:
                memory["apply"] = extra_memory(lambda version=version: version.apply(model))  # type: ignore[misc]
            else:
                with applying() if measured else Stopwatch()():
                    version.apply(model)
            if not all(np.array_equal(model[n].view(torch.int16), state[n].view(torch.int16)) for n in state):
                raise AssertionError(f"version {version.number} is not exact")
    row: dict[str, Any] = {"bench": "end to end", "codec": f"thinwire {level}", "verified": True}
    for name, watch in (("publish", publishing), ("apply", applying)):
        extra = memory[name]
        percent = None if extra is None else round(100 * extra / pair.size, 2)
        row[name] = {**watch.timing().row(pair.size), "extra_memory_percent": percent}
    return {**row, "state_bytes": pair.size}
