"""One machine of a fleet: many consumers, each in a thread, following one chain; every version proved and noted.

Run as ``python -m thinwire.bench.fleet_worker SPEC`` it is a process of its own, where SPEC is a file of JSON with the
fields of :class:`Machine`. It ends when the file ``stop`` appears in its folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from thinwire.errors import ThinwireError
from thinwire.peers.protocol import Carrier
from thinwire.stores.cached import CachedStore
from thinwire.stores.protocol import Store
from thinwire.sync.consumer import Consumer
from thinwire.tensors.bits import cells_of

__all__ = ["Machine", "memory_hash", "open_origin", "run_machine", "small_state", "swarm"]

_TENSORS, _ROWS = 8, 64
_READY, _STOP = "ready", "stop"
_LOAD_S, _STACK_BYTES, _SWARM_BYTES_MIN = 300.0, 1 << 20, 512


@dataclass(frozen=True, slots=True)
class Machine:
    """What a machine of the fleet is told. ``cache`` is empty for consumers that ask the origin themselves."""

    index: int
    folder: str
    consumers: int
    state_bytes: int
    poll_s: float
    origin: Mapping[str, str]
    trust: str
    cache: str
    peers: str
    seed: int

    def write(self) -> Path:
        """The file that the process reads."""
        path = Path(self.folder) / f"machine-{self.index}.json"
        path.write_text(json.dumps(asdict(self)))
        return path


def open_origin(origin: Mapping[str, str]) -> Store:
    """The store that ``origin`` describes: an ``endpoint`` of ours, or a bucket's ``url`` with its options."""
    if "url" not in origin:
        from thinwire.bench.net.http_store import HttpStore

        return HttpStore(origin["endpoint"])
    from thinwire.stores.cloud import CloudStore

    options: dict[str, Any] = {key: value for key, value in origin.items() if key != "url"}
    return CloudStore(origin["url"], connect_timeout_s=120.0, stall_timeout_s=120.0, **options)


def swarm() -> Carrier:
    """A swarm that also carries the small patches of this benchmark, which would otherwise come from the store."""
    from thinwire.peers.torrent import Swarm

    return Swarm(bytes_min=_SWARM_BYTES_MIN)


def small_state(size_bytes: int, seed: int) -> dict[str, torch.Tensor]:
    """A bf16 state of eight tensors."""
    generator = torch.Generator().manual_seed(seed)
    columns = max(size_bytes // 2 // _TENSORS // _ROWS, 1)
    return {
        f"layers.{k}.weight": (torch.randn(_ROWS, columns, generator=generator) * 0.02).to(torch.bfloat16)
        for k in range(_TENSORS)
    }


def memory_hash(state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of the weights as they lie in memory, by nothing that thinwire has computed."""
    found = hashlib.sha256()
    for name in sorted(state):
        found.update(np.ascontiguousarray(cells_of(state[name])).data)
    return found.hexdigest()[:32]


class _Notes:
    """Lines of a file, each written at once: consumer, version, when it was proved, since which look, hash, digest."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, *words: object) -> None:
        os.write(self._file, (" ".join(map(str, words)) + "\n").encode())


class _Worker(threading.Thread):
    """One consumer, from its first version to the end."""

    def __init__(self, machine: Machine, index: int, store: Store, notes: _Notes, errors: Counter[str]) -> None:
        super().__init__(daemon=True)
        self._machine, self._index, self._notes, self._errors = machine, index, notes, errors
        self._model = small_state(machine.state_bytes, machine.seed + 1 + index)
        self._consumer = Consumer(
            store, poll_s=machine.poll_s, threads=1, retry_s=120.0, trust=machine.trust or None
        )  # fmt: skip
        self.stopping = threading.Event()

    def run(self) -> None:
        while not self.stopping.is_set():
            began = time.monotonic()
            try:
                if self._consumer.version is None:
                    result = self._consumer.load(self._model, timeout_s=_LOAD_S)
                    self._note(result.version, began, result.digest)
                    continue
                found = self._consumer.poll(every=True)
                if found is not None:
                    result = found.apply(self._model)
                    self._note(result.version, began, result.digest)
                    continue
            except ThinwireError as error:  # nothing was changed; as a follower does, try again at the next look
                self._errors[type(error).__name__] += 1
            self._wait()

    def _note(self, version: int, began: float, digest: str) -> None:
        now = time.monotonic()
        self._notes.write(self._index, version, f"{now:.6f}", f"{began:.6f}", memory_hash(self._model), digest)

    def _wait(self) -> None:
        if self._consumer.version is None:
            time.sleep(0.1)
        else:
            self._consumer._wait()


def run_machine(machine: Machine) -> dict[str, int]:
    """Follow until told to stop; what went wrong on the way, by kind of error."""
    folder = Path(machine.folder)
    store = open_origin(machine.origin)
    if machine.peers:
        from thinwire.sync.peering import peered

        store = peered(store, swarm())
    if machine.cache:
        store = CachedStore(store, machine.cache, fresh_s=machine.poll_s / 4)
    notes, errors = _Notes(folder / f"notes-{machine.index}.txt"), Counter[str]()
    before = threading.stack_size(_STACK_BYTES)
    workers = [
        _Worker(machine, machine.index * machine.consumers + k, store, notes, errors) for k in range(machine.consumers)
    ]
    try:
        for worker in workers:
            worker.start()
    finally:
        threading.stack_size(before)
    (folder / f"{_READY}-{machine.index}").touch()
    while not (folder / _STOP).exists():
        time.sleep(0.05)
    for worker in workers:
        worker.stopping.set()
    deadline = time.monotonic() + 2 * machine.poll_s + 30.0
    for worker in workers:
        worker.join(timeout=max(deadline - time.monotonic(), 0.1))
    if machine.peers:
        from thinwire.sync.peering import leave

        leave(store)
    (folder / f"errors-{machine.index}.json").write_text(json.dumps(errors))
    return dict(errors)


def _raise_limits() -> None:
    with suppress(ImportError, ValueError, OSError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    torch.set_num_threads(1)
    random.seed(os.getpid())  # the waits between looks must differ between machines
    _raise_limits()
    run_machine(Machine(**cast("dict[str, Any]", json.loads(Path(sys.argv[1]).read_text()))))
