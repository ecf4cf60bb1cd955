"""Parties of a run that are processes: started once for many scenarios."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from thinwire.stores.local import LocalStore
from thinwire.testing.peers import Party

WAIT_S = 270.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Meeting:
    """A barrier of processes in a folder."""

    def __init__(self, folder: Path, rank: int, size: int) -> None:
        self.folder, self.rank, self.size, self.round = folder, rank, size, 0

    def __call__(self) -> None:
        self.round += 1
        (self.folder / f"{self.round}-{self.rank}").touch()
        deadline = time.monotonic() + WAIT_S
        while sum(1 for _ in self.folder.glob(f"{self.round}-*")) < self.size:
            if time.monotonic() > deadline:
                raise TimeoutError(f"not everybody came to meeting {self.round}")
            time.sleep(0.01)


def play(
    make: Callable[[int, int], Any], folder: str, rank: int, size: int, scenario: Any, args: tuple[Any, ...]
) -> Any:
    """One party's part: its carrier is made, joined, and left in the end, when all are done."""
    root = Path(folder)
    (root / "meet").mkdir(parents=True, exist_ok=True)
    store, meet = LocalStore(root / "store", fsync=False), Meeting(root / "meet", rank, size)
    carrier = make(rank, size)
    carrier.join(store, publishing=rank == 0)
    try:
        return scenario(Party(carrier, rank, size, store, meet), *args)
    finally:
        meet()
        carrier.leave()


def _work(pipe: multiprocessing.connection.Connection, rank: int, size: int, environment: dict[str, str]) -> None:
    os.environ.update(environment, RANK=str(rank), WORLD_SIZE=str(size), OMP_NUM_THREADS="1")
    while True:
        task = pipe.recv()
        if task is None:
            break
        function, args = task
        try:
            pipe.send((True, function(rank, size, *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    os._exit(0)  # whatever threads libraries have left


class Workers:
    """``size`` processes that run functions ``f(rank, size, *args)`` side by side, until :meth:`close`."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
        self.size, self.pipes, self.processes = size, [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, rank, size, environment), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = WAIT_S) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, args))
        results, failed = [], []
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(timeout_s), f"process {rank} does not answer"
            fine, result = pipe.recv()
            results.append(result)
            if not fine:
                failed.append(f"process {rank}:\n{result}")
        assert not failed, "\n".join(failed)
        return results

    def play(self, make: Callable[[int, int], Any], scenario: Any, *args: Any) -> list[Any]:
        with tempfile.TemporaryDirectory() as folder:
            return self.run(_play, make, folder, scenario, args)

    def close(self) -> None:
        for pipe in self.pipes:
            try:
                pipe.send(None)
            except OSError:
                pass
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()


def _play(rank: int, size: int, make: Any, folder: str, scenario: Any, args: tuple[Any, ...]) -> Any:
    return play(make, folder, rank, size, scenario, args)
