"""An inference engine's own tensors, kept at a store's versions; paused only while changed elements are written.

A copy of the checkpoint is kept on the host. What is new is fetched, decoded, applied there and proved by digest while
the engine serves; then the engine is paused for the time that it takes to write the changed elements into its fused
tensors, which :mod:`thinwire.integrations.runtime_map` found out where they are.

>>> import thinwire
>>> trained = {"q": torch.ones(30, 32), "k": torch.zeros(10, 32)}
>>> publisher = thinwire.Publisher("memory://doc-runtime-sync")
>>> _ = publisher.publish(trained, step=0)
>>> fused = torch.empty(40, 32)
>>> def load(weights):  # an engine's load_weights
...     for name, tensor in weights:
...         fused[slice(0, 30) if name == "q" else slice(30, 40)].copy_(tensor)
>>> sync = RuntimeSync("memory://doc-runtime-sync", {"qk": fused}, load)
>>> sync.open().version
1
>>> trained["k"][0, 1] = 7
>>> _ = publisher.publish(trained, step=1)
>>> sync.prepare()  # the engine serves meanwhile
2
>>> report = sync.swap()  # now it is paused
>>> report.version, report.elements, fused[30, :2].tolist()
(2, 1, [0.0, 7.0])
>>> sync.verify()
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from thinwire.errors import DamagedObjectError, MisuseError
from thinwire.integrations.runtime_map import IndexMap, Load, Write, probe
from thinwire.integrations.runtime_mirror import Mirror, WholeMirror, chosen
from thinwire.tensors.bits import tensor_of

__all__ = ["RuntimeSync", "SwapReport"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SwapReport:
    """The engine is at ``version``, whose state has ``digest``.

    ``elements`` were written one by one, ``whole`` tensors whole, ``loaded`` tensors through the engine's loader.
    ``pause_s`` is how long that took, which is how long the engine must stand still; ``prepare_s`` is what went before
    it, with ``bytes_fetched``.
    """

    version: int
    step: int | None
    digest: str
    elements: int
    whole: int
    loaded: int
    bytes_fetched: int
    prepare_s: float
    pause_s: float


@dataclass(slots=True)
class _Ready:
    """What the next swap writes."""

    version: int
    step: int | None
    digest: str
    writes: list[Write]
    whole: list[str]
    load: bool
    bytes_fetched: int
    seconds: float


class RuntimeSync:
    """Keeps ``tensors`` of an engine at the versions of a store.

    Args:
        store: as :class:`~thinwire.sync.consumer.Consumer` takes it. Its versions may be whole, or in parts (of a
            :class:`~thinwire.ShardedPublisher`): which of them is seen when it is opened.
        tensors: the engine's parameters by its own names, ``dict(model.named_parameters())``. They stay where they are:
            nothing is replaced, so that compiled graphs remain good.
        load: the engine's loader, ``model.load_weights``.
        settings: the consumer's other arguments: ``trust``, ``memory``, ``observer``, ``threads``, ...

    Costs a copy of the checkpoint in host memory. What the loader computes rather than copies goes through it again
    whenever it changes, whole (``map.unmapped``). The engine's weights are written by :meth:`open` and :meth:`swap`
    alone; only during these must it stand still. :meth:`prepare` may run in another thread, one at a time; a swap that
    meets one waits for it.

    After a swap caches of what old weights computed (prefix caches) are the engine's to drop.
    """

    def __init__(self, store: Any, tensors: Mapping[str, torch.Tensor], load: Load, **settings: Any) -> None:
        self._whole, self._settings = WholeMirror(store, **settings), settings
        self._mirror: Mirror | None = None
        self._tensors, self._load = dict(tensors), load
        self._map: IndexMap | None = None
        self._ready: _Ready | None = None
        self._at: SwapReport | None = None
        self._lock = threading.Lock()

    @property
    def map(self) -> IndexMap:
        """Where the checkpoint's tensors lie."""
        if self._map is None:
            raise MisuseError("open the store first: sync.open()")
        return self._map

    @property
    def at(self) -> SwapReport | None:
        """The version that the engine is at."""
        return self._at

    @property
    def ready(self) -> int | None:
        """The version that :meth:`swap` would go to, or None."""
        return None if self._ready is None else self._ready.version

    def newest(self) -> int:
        """Number of the store's newest version."""
        return self._chosen(60.0).newest().version

    def _chosen(self, timeout_s: float) -> Mirror:
        """The copy on the host, for the kind of versions that the store holds."""
        if self._mirror is None:
            self._mirror = chosen(self._whole, self._settings, timeout_s=timeout_s)
        return self._mirror

    @property
    def _copy(self) -> Mirror:
        assert self._mirror is not None, "asked for only once a map has been made"
        return self._mirror

    def open(self, *, version: int | None = None, timeout_s: float = 60.0) -> SwapReport:
        """Load the newest version, or ``version``, whole; find out where everything lies. The engine stands still.

        Raises:
            StoreUnavailableError, NoPathError: as ``Consumer.load``.
            MisuseError: the engine's loader takes nothing of this checkpoint.
        """
        with self._lock:
            began = time.perf_counter()
            copy = self._chosen(timeout_s)
            fetched = copy.open(version, timeout_s)
            found = probe(self._tensors, self._load, copy.layouts, copy.aliases)
            prepared = time.perf_counter()
            self._load(self._pairs(copy.layouts))  # padding, and what else a loader does
            _settle(self._tensors)
            self._map = found.without(name for name in found.pieces if not found.agrees(name, self._copy.cells(name)))
            if self._map.unmapped:
                some = ", ".join(sorted(self._map.unmapped)[:3])
                _log.warning(
                    "%d of %d tensors do not lie in the engine as they are published, and are loaded whole when they "
                    "change: %s", len(self._map.unmapped), len(copy.layouts), some,
                )  # fmt: skip
            held, pause = copy.held, time.perf_counter() - prepared
            self._at = SwapReport(
                held.version, held.step, held.state, 0, len(self._map.pieces), len(self._map.unmapped),
                fetched, prepared - began, pause,
            )  # fmt: skip
            return self._at

    def prepare(self, version: int | None = None) -> int | None:
        """Bring the copy on the host to the newest version, or to ``version``, and get ready to write it; the version
        that a swap would go to, or None if there is nothing new. The engine may serve meanwhile.

        Raises:
            NoPathError, RetryError, UntrustedError, ...: as ``Consumer.poll`` and ``Version.apply``. What was ready
                stays so.
        """
        self.map  # noqa: B018 - opened?
        began = time.perf_counter()
        with self._lock:
            result = self._copy.bring_to(version)
            if result is not None or self._copy.changed():
                self._ready = self._gather(0 if result is None else result.bytes_fetched, began)
        return self.ready

    def _gather(self, bytes_fetched: int, began: float) -> _Ready:
        held = self._copy.held
        writes: list[Write] = []
        whole: list[str] = []
        load = False
        for name in self._copy.changed():
            found = self._copy.changes(name)
            if name in self.map.unmapped:
                load = load or found is None or bool(found[0].size)
            elif found is None:
                whole.append(name)
            else:
                writes += self.map.plan(name, *found)
        before = self._ready
        seconds = time.perf_counter() - began + (before.seconds if before else 0.0)
        size = bytes_fetched + (before.bytes_fetched if before else 0)
        return _Ready(held.version, held.step, held.state, writes, whole, load, size, seconds)

    def swap(self) -> SwapReport | None:
        """Write what is ready into the engine's tensors; None if nothing is. The engine stands still."""
        with self._lock:
            return self._written()

    def _written(self) -> SwapReport | None:
        ready = self._ready
        if ready is None:
            return None
        began = time.perf_counter()
        with torch.no_grad():
            for write in ready.writes:
                write.run()
            for name in ready.whole:
                self.map.write(name, self._copy.cells(name))
            if ready.load:
                self._load(self._pairs(self.map.unmapped))
        _settle(self._tensors)
        pause = time.perf_counter() - began
        self._ready = None
        self._copy.forget()
        self._at = SwapReport(
            ready.version, ready.step, ready.digest, sum(write.size for write in ready.writes), len(ready.whole),
            len(self.map.unmapped) if ready.load else 0, ready.bytes_fetched, ready.seconds, pause,
        )  # fmt: skip
        return self._at

    def _pairs(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors of the copy, under all their names."""
        aliases, layouts = self._copy.aliases, self._copy.layouts
        for name in sorted(names):
            layout = layouts[name]
            tensor = tensor_of(self._copy.cells(name), layout.dtype.name, layout.shape)
            for known in (name, *(alias for alias, other in aliases.items() if other == name)):
                yield known, tensor

    def verify(self) -> None:
        """Compare the engine's memory with the copy on the host, bit by bit. The engine stands still or only reads.

        The copy was proved by the version's digest, so where all agree the checkpoint, as the engine holds it, has that
        digest too. Of a shard only what is there is compared; ``map.unmapped`` tensors are not.

        Raises:
            DamagedObjectError: tensors differ; the error names them. :meth:`rewrite` writes all of them again.
            MisuseError: a version is ready that has not been written yet.
        """
        with self._lock:
            if self._ready is not None:
                raise MisuseError(f"version {self._ready.version} is ready, but not in the engine yet; swap first")
            self._check()

    def _check(self) -> None:
        bad = [name for name in sorted(self.map.pieces) if not self.map.agrees(name, self._copy.cells(name))]
        if bad:
            raise DamagedObjectError(
                f"{len(bad)} tensors of the engine are not those of version {self._copy.held.version}: "
                f"{', '.join(bad[:3])}. Write them again (rewrite) and find out who else writes to them",
                tensors=bad,
            )

    def rewrite(self) -> SwapReport | None:
        """Write every tensor of the version that the copy on the host holds. The engine stands still."""
        with self._lock:
            held = self._copy.held
            names, load = sorted(self.map.pieces), bool(self.map.unmapped)
            self._ready = _Ready(held.version, held.step, held.state, [], names, load, 0, 0.0)
            return self._written()


def _settle(tensors: Mapping[str, torch.Tensor]) -> None:
    """Wait until devices have done what they were told."""
    for kind in {tensor.device.type for tensor in tensors.values()} - {"cpu", "meta"}:
        getattr(torch, kind).synchronize()
