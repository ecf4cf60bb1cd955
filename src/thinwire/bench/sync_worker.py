"""One process of ``thinwire bench sync``: the store's server, the publisher, or a worker, by its rank.

All processes make the same two states from a seed, so that nothing but what is measured passes the line; they meet
through a folder on the machine's disk, which is no part of what is measured either. Times are of the system's monotonic
clock, which they share.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinwire.bench.net.http_store import HttpServer
from thinwire.bench.net.launch import deliver
from thinwire.bench.net.proxy import TcpProxy
from thinwire.bench.sync_methods import digest_of, receiver, sender
from thinwire.bench.weights import Pair
from thinwire.bench.workloads import WORKLOADS
from thinwire.errors import StoreUnavailableError
from thinwire.stores.local import LocalStore

__all__ = ["PORT", "SyncTask", "run_publisher", "run_server", "run_worker"]

PORT = 7070
_MEET_S = 3600.0
_WARM_BYTES = 1 << 20

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class SyncTask:
    """What one launch measures. ``place`` is the store's folder, ``folder`` where processes meet."""

    folder: str
    place: str
    workload: str
    size: int
    density: float
    methods: tuple[str, ...]
    rounds: int
    workers: int
    seed: int
    delay_s: float = 0.0
    loss: float = 0.0
    host: str = "127.0.0.1"

    def read_endpoint(self) -> str:
        """Where the store is, once the server has said so."""
        path = Path(self.folder) / "endpoint"
        _until(path.exists, f"the server has not started in {self.folder}")
        return path.read_text()

    def meet(self, name: str, rank: int) -> None:
        """Wait for the publisher and all workers to come here."""
        folder = Path(self.folder) / f"meet-{name}"
        folder.mkdir(exist_ok=True)
        (folder / str(rank)).touch()
        _until(lambda: len(os.listdir(folder)) >= self.workers + 1, f"not all came to {name}")


def _until(ready: Any, what: str) -> None:
    deadline = time.monotonic() + _MEET_S
    while not ready():
        if time.monotonic() > deadline:
            raise StoreUnavailableError(what)
        time.sleep(0.005)


def _line_bytes(which: str) -> int | None:
    try:
        return int(Path(f"/sys/class/net/eth0/statistics/{which}_bytes").read_text())
    except (OSError, ValueError):
        return None


def _passed(before: int | None, after: int | None) -> int | None:
    return None if before is None or after is None else after - before


def _warm(methods: Sequence[str]) -> None:
    """Compile or load every kernel of both sides."""
    pair = WORKLOADS["ulp"](_WARM_BYTES, 0.01, 0)
    with tempfile.TemporaryDirectory() as name, HttpServer(LocalStore(name, fsync=False)) as server:
        for method in methods:
            cells = pair.old.copy()
            out = sender(method, Path(name), server.endpoint, pair)
            into = receiver(method, Path(name), server.endpoint, cells, pair.shapes)
            out.publish(pair.old, pair.new)
            into.follow(cells)
            out.close()


def run_server(task: SyncTask) -> None:
    """Serve until the others have ended."""
    far = bool(task.delay_s or task.loss)
    with ExitStack() as stack:
        server = HttpServer(
            LocalStore(task.place, fsync=False), host="127.0.0.1" if far else task.host, port=0 if far else _port(task)
        )
        endpoint = stack.enter_context(server).endpoint
        if far:
            port = int(endpoint.rpartition(":")[2])
            proxy = TcpProxy(
                ("127.0.0.1", port), delay_s=task.delay_s, loss=task.loss, host=task.host, port=_port(task)
            )  # fmt: skip
            endpoint = stack.enter_context(proxy).endpoint
        unfinished = Path(task.folder) / "endpoint.unfinished"
        unfinished.write_text(endpoint)
        unfinished.rename(unfinished.with_suffix(""))
        _until((Path(task.folder) / "end").exists, "nobody has ended the server")


def _port(task: SyncTask) -> int:
    return 0 if task.host == "127.0.0.1" else PORT


def run_publisher(task: SyncTask, pair: Pair, rank: int = 1) -> list[Row]:
    """Bring out each round's version by each method; when it began and what it took."""
    endpoint, rows = task.read_endpoint(), []
    states = (pair.old, pair.new)
    for method in task.methods:
        out = sender(method, Path(task.place), endpoint, pair)
        task.meet(f"{method}-first", rank)
        for k in range(task.rounds):
            task.meet(f"{method}-{k}", rank)
            sent = _line_bytes("tx")
            began = time.monotonic()
            size, stages = out.publish(states[k % 2], states[(k + 1) % 2])
            row = {"method": method, "round": k, "began": began, "published": time.monotonic(), "bytes": size, **stages}
            task.meet(f"{method}-{k}-done", rank)
            rows.append({**row, "line_bytes": _passed(sent, _line_bytes("tx"))})
        out.close()
        task.meet(f"{method}-end", rank)
        shutil.rmtree(Path(task.place) / method, ignore_errors=True)  # of the first version there is a whole copy
    return rows


def run_worker(task: SyncTask, pair: Pair, digests: tuple[str, str], rank: int) -> list[Row]:
    """Follow; when each version was proved. What it is is compared with what it should be, from memory, after that.

    Raises:
        AssertionError: a state is not what was published.
    """
    endpoint, rows, cells = task.read_endpoint(), [], pair.old
    for method in task.methods:
        task.meet(f"{method}-first", rank)
        into = receiver(method, Path(task.place), endpoint, cells, pair.shapes)
        for k in range(task.rounds):
            task.meet(f"{method}-{k}", rank)
            got = _line_bytes("rx")
            digest, stages = into.follow(cells)
            row = {"method": method, "round": k, "proved": time.monotonic(), **stages}
            row["line_bytes"] = _passed(got, _line_bytes("rx"))
            task.meet(f"{method}-{k}-done", rank)
            if digest != digests[(k + 1) % 2] or digest_of(cells, pair.shapes) != digest:
                raise AssertionError(f"{method}, round {k}: the worker holds {digest}, not {digests[(k + 1) % 2]}")
            rows.append(row)
        task.meet(f"{method}-end", rank)
    return rows


def run_rank(task: SyncTask, rank: int) -> list[Row]:
    """One rank's part: 0 serves, 1 publishes, the others follow."""
    if rank == 0:
        run_server(task)
        return []
    _warm(task.methods)
    pair = WORKLOADS[task.workload](task.size, task.density, task.seed)
    if rank == 1:
        return run_publisher(task, pair)
    digests = digest_of(pair.old, pair.shapes), digest_of(pair.new, pair.shapes)
    pair = Pair(pair.workload, pair.shapes, pair.old, pair.old[:0])  # the new one is what is to come
    return run_worker(task, pair, digests, rank)


def main() -> None:
    """The rank that the environment names."""
    rank, given = int(os.environ["RANK"]), json.loads(Path(sys.argv[1]).read_text())
    host = os.environ["MASTER_ADDR"]
    task = SyncTask(**{**given, "methods": tuple(given["methods"]), "host": host})
    try:
        deliver(run_rank(task, rank))
    finally:
        if rank == 1:
            (Path(task.folder) / "end").touch()


if __name__ == "__main__":
    threading.stack_size(1 << 20)
    main()
