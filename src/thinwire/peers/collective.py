"""A broadcast inside a process group: one rank reads each object from the store, and all get it.

Ranks need not be in step. A rank that wants an object says so through the group's key-value store; the source has it
from its own publisher, or reads it, announces it, and then all ranks take part in the broadcast, in threads of their
own and in a process group of their own. So an object leaves the store once for a whole group, whatever its ranks' polls
do, and no collective of the caller's can come in between.

A process group is as strong as its weakest rank: when one leaves or dies, the broadcast ends for all of them, and
everybody goes on with the store.
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
import time
import weakref
from collections import OrderedDict
from contextlib import suppress
from datetime import timedelta
from typing import Any, final

import torch
import torch.distributed as dist

from thinwire.errors import MisuseError, RefetchError, RetryError, ThinwireError
from thinwire.peers.protocol import Blob, Origin, Progress

__all__ = ["Collective"]

_log = logging.getLogger(__name__)
_CHUNK_BYTES = 32 << 20
_WAIT_S, _LOOK_S, _IDLE_S, _END_S = 1.0, 0.005, 0.03, 3.0
_SAID_MAX = 1000
_KEY_LENGTH_MAX = 512


class _Arrival:
    """An object that somebody here waits for."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.moved = progress, time.monotonic()
        self.absent = False


@final
class Collective:
    """A carrier inside a process group. Making one is collective: every rank of ``group`` makes one.

    Args:
        group: a process group; by default all ranks.
        source: the rank, counted in the group, that reads the store for all, or publishes.
        timeout_s: a broadcast in which a rank does not take part for so long is given up, and the carrier with it.
        keep_bytes: what the source keeps of what was offered, and others of what nobody has asked for yet.
        bytes_max: the largest object.

    With NCCL bytes travel between GPUs, 32 MiB at a time, and are copied to the host; with gloo they never leave it.

    Raises:
        MisuseError: torch.distributed has not been initialised, or has no key-value store.
    """

    name = "collective"

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        source: int = 0,
        timeout_s: float = 60.0,
        keep_bytes: int = 4 << 30,
        bytes_max: int = 64 << 30,
    ) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise MisuseError("call torch.distributed.init_process_group() first; torchrun sets up what it needs")
        ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        if not 0 <= source < len(ranks):
            raise MisuseError(f"source {source} of a group of {len(ranks)} ranks; they count from 0")
        if timeout_s <= 0 or keep_bytes < 1 or bytes_max < 1:
            raise MisuseError("timeout_s, keep_bytes and bytes_max are above 0")
        self.rank, self.size = dist.get_rank(group), len(ranks)
        self._keep_bytes, self._bytes_max = keep_bytes, bytes_max
        self._is_source, self._root = self.rank == source, ranks[source]
        backend = dist.get_backend(group)
        on_gpu = "nccl" in backend
        self._device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        self._group: Any = dist.new_group(
            ranks, timeout=timedelta(seconds=timeout_s), backend=backend, use_local_synchronization=group is not None
        )
        self._board = self._meet()
        self._origin: Origin | None = None
        self._lock = threading.Condition()
        self._held: OrderedDict[str, bytes] = OrderedDict()
        self._awaited: dict[str, list[_Arrival]] = {}
        self._loading: set[str] = set()
        self._over: str | None = None
        self._seen = 0  # announcements that have been followed
        self._said: OrderedDict[str, int] = OrderedDict()  # at the source: the last announcement of a key
        self._thread: threading.Thread | None = None
        self.received_bytes = self.sent_bytes = 0

    def _meet(self) -> Any:
        """A part of the group's key-value store that only this carrier uses, on a connection of its own."""
        token = torch.tensor([secrets.randbits(62)], dtype=torch.int64, device=self._device)
        dist.broadcast(token, self._root, group=self._group)
        try:
            distributed: Any = dist
            store = distributed.distributed_c10d._get_default_store().clone()  # the caller's waits block its own
            return distributed.PrefixStore(f"thinwire/{int(token):x}", store)
        except (RuntimeError, AttributeError) as error:
            raise MisuseError(f"this process group has no key-value store that can be shared: {error}") from error

    def join(self, origin: Origin, *, publishing: bool) -> None:
        if self._origin is not None:
            raise MisuseError("this carrier was joined to a run before; make a new one for another")
        if publishing and not self._is_source:
            raise MisuseError(f"rank {self.rank} publishes, so it must be the source: Collective(source={self.rank})")
        self._origin = origin
        run = self._serve if self._is_source else self._listen
        self._thread = threading.Thread(target=run, name="thinwire-collective", daemon=True)
        weakref.finalize(self, _end, self._thread, self._lock)
        self._thread.start()

    def carries(self, key: str, size: int) -> bool:
        return size <= self._bytes_max and len(key) <= _KEY_LENGTH_MAX

    # --- holding -----------------------------------------------------------------------------------------------------

    def offer(self, key: str, data: Blob) -> None:
        if self._is_source and self._over is None:
            self._keep(key, b"".join(data))

    def _keep(self, key: str, data: bytes) -> None:
        with self._lock:
            self._held[key] = data
            self._held.move_to_end(key)
            held = sum(map(len, self._held.values()))
            while held > self._keep_bytes and len(self._held) > 1:
                _, oldest = self._held.popitem(last=False)
                held -= len(oldest)
            self._lock.notify_all()

    def _load(self, key: str, size_max: int) -> bytes | None:
        """At the source: the object, read from the store unless it is held; once, whoever asks meanwhile."""
        assert self._origin is not None
        with self._lock:
            while key in self._loading:
                self._lock.wait(_WAIT_S)
            if key in self._held:
                return self._held[key]
            self._loading.add(key)
        try:
            data = self._origin.get(key, size_max=size_max)
            self._keep(key, data)
            return data
        except RefetchError:
            return None
        finally:
            with self._lock:
                self._loading.discard(key)
                self._lock.notify_all()

    # --- asking ------------------------------------------------------------------------------------------------------

    def fetch(self, key: str, *, size_max: int, stall_s: float, progress: Progress) -> bytes | None:
        if self._over is not None or self._origin is None:
            return None
        if self._is_source:
            data = self._load(key, size_max)
        else:
            data = self._await(key, size_max, stall_s, progress)
        if data is None or len(data) > size_max:
            return None
        progress(len(data))
        return data

    def _await(self, key: str, size_max: int, stall_s: float, progress: Progress) -> bytes | None:
        arrival = _Arrival(progress)
        with self._lock:
            first = key not in self._held and not self._awaited.get(key)
            self._awaited.setdefault(key, []).append(arrival)
        try:
            if first:
                self._say_to_source({"key": key, "size_max": size_max, "seen": self._seen})
            with self._lock:
                while key not in self._held:
                    if self._over is not None:
                        raise RetryError(f"the broadcast is over: {self._over}")
                    if arrival.absent:
                        return None
                    left = arrival.moved + stall_s - time.monotonic()
                    if left <= 0:
                        raise RetryError(f"nothing of {key} has been broadcast for {stall_s:g} s")
                    self._lock.wait(min(left, _WAIT_S))
                return self._held[key]
        finally:
            with self._lock:
                waiting = self._awaited.get(key, [])
                if arrival in waiting:
                    waiting.remove(arrival)
                if not waiting:
                    self._awaited.pop(key, None)
                    self._held.pop(key, None)  # nobody else asks here

    def _say_to_source(self, message: dict[str, Any]) -> None:
        try:
            number = self._board.add("wants", 1)
            self._board.set(f"want/{number}", json.dumps(message))
        except (RuntimeError, ValueError) as error:  # the store's own errors; its host is gone
            self._finish(f"the group's key-value store does not answer ({error})")
            raise RetryError(f"the broadcast is over: {self._over}") from error

    def distrust(self, key: str) -> None:
        with self._lock:
            self._held.pop(key, None)
        if not self._is_source and self._over is None and self._origin is not None:
            with suppress(RetryError):
                self._say_to_source({"key": key, "wrong": True})

    # --- the source's thread -----------------------------------------------------------------------------------------

    def _serve(self) -> None:
        taken = said = 0
        try:
            while self._over is None:
                if self._board.add("wants", 0) <= taken:
                    time.sleep(2 * _LOOK_S)
                    continue
                taken += 1
                message = json.loads(self._board.get(f"want/{taken}"))
                self._board.delete_key(f"want/{taken}")
                if message.get("left"):
                    self._finish(f"rank {message['left']} has left")
                elif message.get("wrong"):
                    with self._lock:
                        self._held.pop(message["key"], None)
                else:
                    if self._said.get(message["key"], 0) > message["seen"]:
                        continue  # it is on its way there already
                    said += 1
                    self._answer(said, message["key"], message["size_max"])
        except (RuntimeError, ValueError, KeyError, ThinwireError) as error:
            self._finish(f"{type(error).__name__}: {error}")
        with suppress(RuntimeError):
            self._board.set(f"say/{said + 1}", json.dumps({"end": self._over or "left"}))

    def _answer(self, number: int, key: str, size_max: int) -> None:
        try:
            data = self._load(key, size_max)
        except ThinwireError as error:
            _log.warning("%s cannot be broadcast: %s", key, error)
            data = None
        size = None if data is None or len(data) > min(size_max, self._bytes_max) else len(data)
        self._board.set(f"say/{number}", json.dumps({"key": key, "size": size}))
        self._said[key] = number
        if number > _SAID_MAX:
            self._said.pop(next(iter(self._said)))
            self._board.delete_key(f"say/{number - _SAID_MAX}")
        if size is not None and data is not None:
            self._broadcast(memoryview(data), key)
            self.sent_bytes += size

    def _broadcast(self, view: memoryview, key: str) -> None:
        """All ranks: the bytes of ``view`` from the source, into it elsewhere."""
        for start in range(0, len(view), _CHUNK_BYTES):
            chunk = view[start : start + _CHUNK_BYTES]  # torch wants memory that may be written
            part = torch.frombuffer(bytearray(chunk) if self._is_source else chunk, dtype=torch.uint8)
            travelling = part.to(self._device)
            dist.broadcast(travelling, self._root, group=self._group)
            if not self._is_source and travelling is not part:
                part.copy_(travelling)
            with self._lock:
                for arrival in self._awaited.get(key, []):
                    arrival.moved = time.monotonic()
                    arrival.progress(start + part.numel())

    # --- everybody else's --------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        try:
            while self._over is None:
                name = f"say/{self._seen + 1}"
                if not self._board.check([name]):  # waiting for it would warn at every time-out
                    time.sleep(_LOOK_S if self._awaited else _IDLE_S)
                    continue
                message = json.loads(self._board.get(name))
                if "end" in message:
                    self._finish(str(message["end"]))
                    return
                self._take(message["key"], message["size"])
        except (RuntimeError, ValueError, KeyError, MemoryError, RetryError) as error:
            self._finish(f"{type(error).__name__}: {error}")

    def _take(self, key: str, size: int | None) -> None:
        if size is None:
            with self._lock:
                self._seen += 1
                for arrival in self._awaited.get(key, []):
                    arrival.absent = True
                self._lock.notify_all()
            return
        if not 0 <= size <= self._bytes_max:
            raise RetryError(f"the source announced {size} bytes of {key}; at most {self._bytes_max} are taken")
        buffer = bytearray(size)
        if size:
            self._broadcast(memoryview(buffer), key)
        self.received_bytes += size
        with self._lock:
            self._seen += 1  # before it can be taken away: who asks then asks for another broadcast
            self._keep(key, bytes(buffer))

    # --- the end -----------------------------------------------------------------------------------------------------

    def _finish(self, why: str) -> None:
        with self._lock:
            if self._over is None:
                self._over = why
                if why != "left":
                    _log.warning("nothing is broadcast any more, the store is asked: %s", why)
            self._held.clear()
            self._lock.notify_all()

    def leave(self) -> None:
        """Ends the broadcast for all ranks: they go on with the store."""
        if self._over is None and self._origin is not None and not self._is_source:
            with suppress(RetryError):
                self._say_to_source({"left": self.rank + 1})
        self._finish("left")
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(_END_S)


def _end(thread: threading.Thread, lock: threading.Condition) -> None:
    """At the end of the process: no thread may be inside torch when it goes."""
    with lock:
        lock.notify_all()
    thread.join(0.1)
