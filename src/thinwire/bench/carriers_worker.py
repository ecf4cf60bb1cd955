"""One of two processes between which a carrier is timed.

``python -m thinwire.bench.carriers_worker NAME FOLDER BYTES RUNS``.
Rank 0 offers objects, rank 1 fetches them one after the other and compares every byte before a time counts.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from thinwire.bench.net.launch import deliver
from thinwire.errors import MisuseError
from thinwire.stores.local import LocalStore

__all__ = ["CARRIERS", "main"]

CARRIERS = ("copy", "folder", "collective", "swarm", "nixl", "mooncake")
_MEET_S, _STALL_S = 120.0, 60.0


def _meet(folder: Path, name: str, rank: int) -> None:
    (folder / f"{name}.{rank}").touch()
    deadline = time.monotonic() + _MEET_S
    while len(list(folder.glob(f"{name}.*"))) < 2:
        if time.monotonic() > deadline:
            raise TimeoutError(f"the other process did not come to {name}")
        time.sleep(0.005)


def _carrier(name: str, folder: Path) -> Any:
    if name == "swarm":
        from thinwire.peers.torrent import Swarm

        return Swarm(listen="127.0.0.1:0", folder=f"/dev/shm/{folder.name}-{time.time_ns()}", rescue_s=_STALL_S)
    if name == "collective":
        import torch.distributed as dist

        from thinwire.peers.collective import Collective

        dist.init_process_group("gloo")
        return Collective()
    from thinwire.peers.rdma import Rdma

    options: dict[str, Any] = {"host": "127.0.0.1"} if name == "mooncake" else {}
    return Rdma(name, relay=False, **options)


def _key(run: int) -> str:
    return f"objects/{run + 1:010d}-bench/object"


def _timed(fetch: Callable[[str], bytes | None], bodies: list[bytes]) -> list[float]:
    took = []
    for run, wanted in enumerate(bodies):
        began = time.perf_counter()
        data = fetch(_key(run))
        took.append(time.perf_counter() - began)
        if data != wanted:
            raise MisuseError(f"run {run} gave other bytes")
    return took


def _alone(name: str, folder: Path, bodies: list[bytes]) -> list[float]:
    """Without a carrier: a copy in memory, or a store that is a folder."""
    if name == "copy":
        return _timed(lambda key: bytes(memoryview(bodies[int(key[8:18]) - 1])), bodies)
    store = LocalStore(folder / "store", fsync=False)
    for run, body in enumerate(bodies):
        store.put(_key(run), [body])
    return _timed(lambda key: store.get(key, size_max=len(bodies[0])), bodies)


def main() -> None:
    """One rank's part."""
    name, folder, size, runs = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    rank = int(os.environ["RANK"])
    bodies = [Random(run).randbytes(size) for run in range(runs)]
    if name in CARRIERS[:2]:
        deliver(_alone(name, folder, bodies) if rank else [])
        return
    carrier = _carrier(name, folder)
    carrier.join(LocalStore(folder / "store", fsync=False), publishing=rank == 0)
    took: list[float] = []
    if rank == 0:
        for run, body in enumerate(bodies):
            carrier.offer(_key(run), [body])
        _meet(folder, "offered", rank)
    else:
        _meet(folder, "offered", rank)
        took = _timed(lambda key: carrier.fetch(key, size_max=size, stall_s=_STALL_S, progress=lambda _: None), bodies)
    _meet(folder, "fetched", rank)
    carrier.leave()
    deliver(took)
    sys.stdout.flush()
    os._exit(0)  # without waiting for what native libraries keep running


if __name__ == "__main__":
    main()
