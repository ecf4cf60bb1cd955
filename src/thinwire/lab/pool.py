"""Work done in processes of their own, one thread each; what one item does to its process does not touch the others."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from thinwire.errors import MisuseError

__all__ = ["Pool", "workers"]

T = TypeVar("T")
_ALIVE_EVERY_S = 1.0


def _watch_parent(parent: int) -> None:  # a pool whose owner was killed would work on
    while os.getppid() == parent:
        time.sleep(_ALIVE_EVERY_S)
    os._exit(1)


def _start_worker(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the owner decides
    threading.Thread(target=_watch_parent, args=(parent,), daemon=True).start()
    import warnings

    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # PEFT's, once a model
    warnings.filterwarnings("ignore", message=".*[Ss]parse invariant checks.*")
    with suppress(ImportError):
        from transformers.utils import logging

        silence: Any = logging.disable_progress_bar
        silence()  # the owner has a bar for all


class Pool:
    """Processes that do work, or this one; made by :func:`workers`."""

    def __init__(self, executor: ProcessPoolExecutor | None) -> None:
        self._executor = executor

    def do(self, work: Callable[..., Any], items: Sequence[T], *rest: Any) -> Iterator[tuple[T, BaseException | None]]:
        """``work(item, *rest)`` for each item; each is given back as it ends, with its error if it raised one."""
        if self._executor is None:
            yield from _here(work, items, rest)
            return
        waiting: dict[Future[Any], T] = {self._executor.submit(work, item, *rest): item for item in items}
        while waiting:
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                yield waiting.pop(future), future.exception()


def _here(
    work: Callable[..., Any], items: Sequence[T], rest: Sequence[Any]
) -> Iterator[tuple[T, BaseException | None]]:
    for item in items:
        try:
            work(item, *rest)
        except Exception as error:
            yield item, error
        else:
            yield item, None


@contextmanager
def workers(jobs: int) -> Iterator[Pool]:
    """``jobs`` processes, started afresh (spawned); on leaving, what has not begun is not begun. 0: this process, for
    few small items and for debuggers.

    Raises:
        MisuseError: ``jobs`` is negative.
    """
    if jobs < 0:
        raise MisuseError(f"jobs is {jobs}; give 0 or more")
    if not jobs:
        yield Pool(None)
        return
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker, initargs=(os.getpid(),))
    try:
        yield Pool(executor)
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
