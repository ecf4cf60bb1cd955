"""One host of the swarm's benchmark: ``python -m thinwire.bench.swarm_worker FOLDER WAY MODEL_BYTES DENSITIES``.

Rank 0 is the store, rank 1 the trainer, all others serve. They meet before and after each version, in files; bytes are
those that the kernel has counted on each host's line in between.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from thinwire.bench.follow_worker import memory_digest, random_model
from thinwire.bench.net.http_store import HttpServer, HttpStore
from thinwire.bench.net.launch import deliver
from thinwire.stores.local import LocalStore
from thinwire.sync.warm import compile_kernels

__all__ = ["WAYS", "main"]

WAYS = ("store", "swarm", "orphans")
"""All from the store; by swarm; by swarm, from a publisher that seeds nothing."""

_PORT, _MEETING_PORT, _MEET_S = 8000, 6969, 300.0
_POLL_S = 0.2


def _meet(folder: Path, name: str, rank: int, ranks: int) -> None:
    (folder / f"{name}.{rank}").touch()
    deadline = time.monotonic() + _MEET_S
    while len(list(folder.glob(f"{name}.*"))) < ranks:
        if time.monotonic() > deadline:
            raise TimeoutError(f"not everybody came to {name}")
        time.sleep(0.02)


def _line() -> dict[str, int]:
    """Bytes that this host's line has carried."""
    counters = Path("/sys/class/net") / os.environ["GLOO_SOCKET_IFNAME"] / "statistics"
    return {way: int((counters / f"{way}_bytes").read_text()) for way in ("rx", "tx")}


def _minus(after: Mapping[str, int], before: Mapping[str, int]) -> dict[str, int]:
    return {way: after[way] - before[way] for way in after}


class _Host:
    """What every rank does: meet, and count what its line carries meanwhile."""

    def __init__(self, folder: Path, way: str, size: int, densities: list[float]) -> None:
        self.folder, self.way, self.size, self.densities = folder, way, size, densities
        self.rank, self.ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.origin = os.environ["MASTER_ADDR"]

    def store(self) -> HttpStore:
        return HttpStore(f"http://{self.origin}:{_PORT}")

    def peers(self) -> Any:
        if self.way == "store":
            return None
        from thinwire.peers.torrent import Swarm

        meeting = f"{self.origin}:{_MEETING_PORT}" if self.way == "orphans" else None
        return Swarm(rendezvous=meeting, folder=f"/dev/shm/thinwire-bench-{os.getpid()}")

    def versions(self) -> int:
        return len(self.densities) + 1

    def version(self, number: int, work: Any) -> dict[str, Any]:
        """Let ``work`` do this rank's part of a version; the bytes of the line are added to what it returns."""
        _meet(self.folder, f"before-{number}", self.rank, self.ranks)
        before = _line()
        row: dict[str, Any] = work(number)
        _meet(self.folder, f"after-{number}", self.rank, self.ranks)
        return {**row, "line": _minus(_line(), before)}


def _serve(host: _Host) -> list[dict[str, Any]]:
    from thinwire.peers.rendezvous import Rendezvous

    store = LocalStore(host.folder / "store", fsync=False)
    with HttpServer(store, host=host.origin, port=_PORT), Rendezvous(host.origin, _MEETING_PORT):
        (host.folder / "serving").touch()
        return [host.version(number, lambda _: {}) for number in range(1, host.versions() + 1)]


def _train(host: _Host) -> list[dict[str, Any]]:
    from thinwire.sync.peering import leave
    from thinwire.sync.publisher import Publisher

    model = random_model(host.size, 0)
    generator = torch.Generator().manual_seed(1)
    publisher = Publisher(host.store(), peers=host.peers(), anchor_ratio=1e9)

    def publish(number: int) -> dict[str, Any]:
        if number > 1:
            for tensor in model.values():
                where = torch.rand(tensor.shape, generator=generator) < host.densities[number - 2]
                tensor[where] *= 1.01
        began = time.monotonic()
        report = publisher.publish(model)
        if host.way == "orphans":  # what it has described stays; it gives nothing itself
            held = publisher._peered.carrier  # type: ignore[attr-defined]
            for key in list(held._torrents):
                held._drop(key)
        return {
            "began": began,
            "published": time.monotonic(),
            "digest": report.digest,
            "payload_bytes": report.anchor_bytes or report.patch_bytes,
            "uploaded_bytes": report.total_bytes,
        }

    rows = [host.version(number, publish) for number in range(1, host.versions() + 1)]
    leave(publisher._peered)
    return rows


def _follow(host: _Host) -> list[dict[str, Any]]:
    from thinwire.sync.consumer import Consumer
    from thinwire.sync.peering import PeerStore, leave

    model = random_model(host.size, host.rank)
    consumer = Consumer(host.store(), peers=host.peers(), poll_s=_POLL_S, threads=1)

    def bring(number: int) -> dict[str, Any]:
        if number == 1:
            consumer.load(model, timeout_s=_MEET_S)
        else:
            for version in consumer.follow(timeout_s=_MEET_S):
                version.apply(model)
                break
        verified = time.monotonic()
        row: dict[str, Any] = {"verified": verified, "digest": memory_digest(model)}
        if isinstance(consumer._peered, PeerStore):
            row |= {"peer_bytes": consumer._peered.peer_bytes, "store_bytes": consumer._peered.store_bytes}
        return row

    rows = [host.version(number, bring) for number in range(1, host.versions() + 1)]
    leave(consumer._peered)
    return rows


def main() -> None:
    """One rank's part."""
    torch.set_num_threads(1)
    folder, way, size, densities = sys.argv[1:5]
    host = _Host(Path(folder), way, int(size), json.loads(densities))
    if host.rank:
        compile_kernels(levels=("small",))
    if host.rank == 0:
        rows = _serve(host)
    else:
        while not (host.folder / "serving").exists():
            time.sleep(0.05)
        rows = _train(host) if host.rank == 1 else _follow(host)
    deliver(rows)


if __name__ == "__main__":
    main()
