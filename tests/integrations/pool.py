"""A few processes that stay up and run functions as ranks of a fresh process group each time."""

from __future__ import annotations

import multiprocessing as mp
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any


class RankPool:
    """``run(size, work, *args)`` calls ``work(*args)`` on ``size`` ranks and returns what each returned."""

    def __init__(self, most: int) -> None:
        self._context = mp.get_context("spawn")
        self._most = most
        self._folder = tempfile.TemporaryDirectory()
        self._runs = 0
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def __enter__(self) -> RankPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        self._folder.cleanup()

    def _start(self) -> None:
        for _ in range(self._most):
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def run(
        self, size: int, work: Callable[..., Any], *args: Any, timeout_s: float = 180.0, lost: int = 0
    ) -> list[Any]:
        """``lost`` ranks, the last ones, are expected to die; their result is None, and the pool is made anew."""
        if not self._processes:
            self._start()
        self._runs += 1
        store = Path(self._folder.name) / f"store-{self._runs}"
        for rank in range(size):
            self._pipes[rank].send((str(store), rank, size, timeout_s, work, args))
        results: list[Any] = [None] * size
        waiting = set(range(size - lost))
        while waiting:
            ready = wait([self._pipes[r] for r in waiting], timeout=timeout_s + 60)
            if not ready:
                self._stop()
                raise TimeoutError(f"ranks {sorted(waiting)} did not answer")
            for rank in [r for r in waiting if self._pipes[r] in ready]:
                try:
                    good, results[rank] = self._pipes[rank].recv()
                except EOFError:
                    good, results[rank] = False, f"rank {rank} died"
                waiting.remove(rank)
                if not good:
                    self._stop()  # the others may be waiting for this one
                    raise AssertionError(f"on rank {rank}:\n{results[rank]}")
        if lost:
            self._stop()
        return results


def _serve(pipe: Connection) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        try:
            store, rank, size, timeout_s, work, args = pipe.recv()
        except EOFError:
            sys.exit()
        try:
            dist.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s)
            )
            answer = True, work(*args)
        except BaseException:
            answer = False, traceback.format_exc()
        if dist.is_initialized():
            dist.destroy_process_group()
        pipe.send(answer)
