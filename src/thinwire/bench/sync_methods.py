"""Ways to bring a new version to workers over a store, each as its users would: what is uploaded, fetched and applied.

Those of others have no digest of the result; here each is proved by the same one as thinwire's, and the time that this
takes is told apart.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch

from thinwire.bench.net.http_store import HttpStore
from thinwire.bench.peers import PEERS, Peer, apply_all, units_of
from thinwire.bench.weights import Cells, Pair, layouts_of, parts_of
from thinwire.errors import MisuseError, ObjectNotFoundError
from thinwire.stores.local import LocalStore
from thinwire.stores.protocol import Store
from thinwire.sync.apply import tree_of
from thinwire.sync.consumer import Consumer
from thinwire.sync.encode import LEVELS, thread_count
from thinwire.sync.publisher import Publisher
from thinwire.sync.retrying import jittered
from thinwire.tensors.bits import tensor_of

__all__ = ["NAMES", "POLL_S", "Receiver", "Sender", "digest_of", "is_ours", "receiver", "sender", "state_of_cells"]

POLL_S = 0.02
_OBJECT_BYTES, _CONNECTIONS = 1 << 26, 4
_MARKER_BYTES_MAX = 1 << 26
_NO_ANCHOR = 1e9

_PEERS = {
    "full": "copy",
    "coo": "COO",
    "coo-zstd": "COO, zstd-1",
    "gaps-zstd": "gaps + values, zstd-1",
    "u16-zstd": "u16 gaps + XOR, zstd-1",
    "xor-zstd": "XOR, zstd-1",
}
NAMES: Mapping[str, str] = {
    "full": "full checkpoint",
    "coo": "COO, int32 + bf16 (verl, vLLM)",
    "coo-zstd": "COO, zstd-1",
    "gaps-zstd": "gaps + values, zstd-1 (GRAIL)",
    "u16-zstd": "u16 gaps + XOR, zstd-1 (NeMo-RL)",
    "xor-zstd": "XOR of whole tensors, zstd-1 (slime, SkyRL)",
    **{level: f"thinwire {level}" for level in LEVELS},
}
"""Methods, and what tables call them."""

Stages = dict[str, float]


def is_ours(method: str) -> bool:
    """Whether a method is one of thinwire's levels."""
    return method not in _PEERS


def state_of_cells(flat: Cells, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Tensors over the same memory."""
    return {name: tensor_of(part, "BF16", shapes[name]) for name, part in parts_of(flat, shapes).items()}


def digest_of(flat: Cells, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Digest of a state as it lies in memory now, by all cores."""
    return tree_of(layouts_of(shapes), cast("dict[str, Any]", parts_of(flat, shapes)), {}).digest


class Sender(Protocol):
    """The publisher's side of a method."""

    def publish(self, old: Cells, new: Cells) -> tuple[int, Stages]:
        """Bring out ``new``; bytes that one worker needs, and seconds by stage."""
        ...

    def close(self) -> None: ...


class Receiver(Protocol):
    """A worker's side: ``cells`` are its model's memory."""

    def follow(self, cells: Cells) -> tuple[str, Stages]:
        """Wait for the next version and apply it; its digest, and seconds by stage, ``pause`` among them."""
        ...


# --- thinwire ------------------------------------------------------------------------------------------------------


class _Switched:
    """A store that is first the folder itself, to set the scene, and then what leads to it over the line."""

    def __init__(self, first: Store, then: Store) -> None:
        self._now, self._then = first, then

    def switch(self) -> None:
        self._now = self._then

    def __getattr__(self, name: str) -> Any:
        if name == "wait_for":  # all methods look for what is new in the same way
            raise AttributeError(name)
        return getattr(self._now, name)


class _OurSender:
    def __init__(self, level: str, near: Store, line: Store, pair: Pair) -> None:
        self._shapes = pair.shapes
        store = _Switched(near, line)
        self._publisher = Publisher(cast("Store", store), level=level, anchor_ratio=_NO_ANCHOR, retry_s=600.0)
        self._publisher.publish(state_of_cells(pair.old, self._shapes))
        store.switch()

    def publish(self, old: Cells, new: Cells) -> tuple[int, Stages]:  # noqa: ARG002 (it holds the old one)
        report = self._publisher.publish(state_of_cells(new, self._shapes))
        return report.patch_bytes, {
            "encode": report.seconds["encode"], "upload": report.seconds["upload"] + report.seconds["commit"],
        }  # fmt: skip

    def close(self) -> None:
        self._publisher.close()


class _OurReceiver:
    def __init__(self, near: Store, line: Store, cells: Cells, shapes: Mapping[str, tuple[int, ...]]) -> None:
        store = _Switched(near, line)
        self._model = state_of_cells(cells, shapes)
        self._consumer = Consumer(cast("Store", store), poll_s=POLL_S, retry_s=600.0)
        self._consumer.load(self._model, version=1)
        store.switch()

    def follow(self, cells: Cells) -> tuple[str, Stages]:
        began = time.perf_counter()
        version = next(islice(self._consumer.follow(), 1))
        fetched = time.perf_counter()
        result = version.apply(self._model)
        paused = time.perf_counter() - fetched
        assert cells.size
        return result.digest, {
            "wait+fetch": fetched - began, "fetch": result.seconds["fetch"], "pause": paused,
            "apply": result.seconds["decode"] + result.seconds["apply"], "verify": result.seconds["verify"],
        }  # fmt: skip


# --- others --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Place:
    """Where versions of a method lie."""

    store: Store
    prefix: str

    def marker(self, number: int) -> str:
        return f"{self.prefix}/{number:06d}.json"

    def part(self, number: int, k: int) -> str:
        return f"{self.prefix}/{number:06d}/{k:06d}"


def _grouped(data: Sequence[bytes | memoryview]) -> list[list[bytes | memoryview]]:
    """Units of one tensor each, put together into objects that are worth a request."""
    groups: list[list[bytes | memoryview]] = [[]]
    size = 0
    for item in data:
        if size + len(item) > _OBJECT_BYTES and groups[-1]:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += len(item)
    return groups


class _TheirSender:
    def __init__(self, peer: Peer, line: Store, pair: Pair) -> None:
        self._peer, self._shapes, self._place, self._number = peer, pair.shapes, _Place(line, "versions"), 0

    def publish(self, old: Cells, new: Cells) -> tuple[int, Stages]:
        began = time.perf_counter()
        self._number += 1
        before, after = units_of(self._peer, old, self._shapes), units_of(self._peer, new, self._shapes)
        data: list[bytes | memoryview]
        with ThreadPoolExecutor(thread_count(0)) as pool:
            if self._peer.name == "copy":  # nothing to encode
                data = [unit.data.cast("B") for unit in after]
            else:
                data = list(pool.map(self._peer.encode, before, after))
        encoded = time.perf_counter()
        groups = _grouped(data)
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            keys = [self._place.part(self._number, k) for k in range(len(groups))]
            list(pool.map(self._place.store.put, keys, groups))
        sizes = [[len(item) for item in group] for group in groups]
        self._place.store.create(self._place.marker(self._number), [json.dumps(sizes).encode()])
        return sum(map(sum, sizes)), {"encode": encoded - began, "upload": time.perf_counter() - encoded}

    def close(self) -> None:
        """Nothing is held."""


class _TheirReceiver:
    def __init__(self, peer: Peer, line: Store, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._peer, self._shapes, self._place, self._number = peer, shapes, _Place(line, "versions"), 0

    def _wait(self) -> list[list[int]]:
        while True:
            try:
                data = self._place.store.get(self._place.marker(self._number), size_max=_MARKER_BYTES_MAX)
            except ObjectNotFoundError:
                time.sleep(jittered(POLL_S))
                continue
            found: list[list[int]] = json.loads(data)
            return found

    def follow(self, cells: Cells) -> tuple[str, Stages]:
        self._number += 1
        began = time.perf_counter()
        sizes = self._wait()
        seen = time.perf_counter()

        def get(k: int) -> bytes:
            return self._place.store.get(self._place.part(self._number, k), size_max=sum(sizes[k]))

        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            got = list(pool.map(get, range(len(sizes))))
        fetched = time.perf_counter()
        data: list[bytes] = []
        for whole, each in zip(got, sizes, strict=True):
            ends = np.cumsum(each)
            data += [whole[end - size : end] if len(each) > 1 else whole for end, size in zip(ends, each, strict=True)]
        with ThreadPoolExecutor(thread_count(0)) as pool:
            apply_all(self._peer, data, units_of(self._peer, cells, self._shapes), pool)
        applied = time.perf_counter()
        digest = digest_of(cells, self._shapes)
        verified = time.perf_counter()
        return digest, {
            "wait+fetch": fetched - began, "fetch": fetched - seen, "apply": applied - fetched,
            "verify": verified - applied, "pause": verified - fetched,
        }  # fmt: skip


# --- either --------------------------------------------------------------------------------------------------------


def _peer(method: str) -> Peer:
    return next(peer for peer in PEERS if peer.name == _PEERS[method])


def _stores(method: str, folder: Path, endpoint: str) -> tuple[LocalStore, HttpStore]:
    """A method's place in the folder, and the same place over the line."""
    if method not in NAMES:
        raise MisuseError(f"methods are {', '.join(NAMES)}; not {method!r}")
    return LocalStore(folder / method, fsync=False), HttpStore(f"{endpoint}/{method}")


def sender(method: str, folder: Path, endpoint: str, pair: Pair) -> Sender:
    """The publisher's side; the first version is brought out beforehand, and not over the line."""
    near, line = _stores(method, folder, endpoint)
    return _OurSender(method, near, line, pair) if is_ours(method) else _TheirSender(_peer(method), line, pair)


def receiver(
    method: str, folder: Path, endpoint: str, cells: Cells, shapes: Mapping[str, tuple[int, ...]]
) -> Receiver:  # fmt: skip
    """A worker's side, which holds the first version in ``cells`` already."""
    near, line = _stores(method, folder, endpoint)
    if is_ours(method):
        return _OurReceiver(near, line, cells, shapes)
    return _TheirReceiver(_peer(method), line, shapes)
