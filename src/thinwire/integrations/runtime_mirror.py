"""The copy of a checkpoint that an engine's worker keeps on the host, and what changed in it; of either kind of chain.

A chain holds whole versions (:class:`~thinwire.Publisher`) or versions in parts (:class:`~thinwire.ShardedPublisher`).
To the engine both are tensors by name, so both mirrors look alike.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from thinwire.chain.plan import Hop
from thinwire.errors import MisuseError, NoPathError, RefetchError
from thinwire.integrations.newest import Newest
from thinwire.sync import events
from thinwire.sync.consumer import ApplyResult, Consumer, Version
from thinwire.sync.encode import Progress
from thinwire.sync.host import HostState
from thinwire.sync.layout import Layout
from thinwire.sync.places import places_in
from thinwire.sync.sharded_consumer import ShardedConsumer, ShardedVersion
from thinwire.sync.sharded_state import ShareState, fetch_share, map_of
from thinwire.sync.sharded_target import ShareTarget
from thinwire.sync.shards import assemble
from thinwire.sync.share import Meter, Share
from thinwire.sync.target import Target
from thinwire.tensors.bits import cells_of, tensor_of
from thinwire.wire.chunks import ChunkMap
from thinwire.wire.manifest import Manifest
from thinwire.wire.spec import dtype_of

__all__ = ["Mirror", "PartsMirror", "WholeMirror", "chosen"]

Cells = npt.NDArray[np.unsignedinteger]
_Where = npt.NDArray[np.int64] | None
Changes = tuple[npt.NDArray[np.int64], Cells]
"""Flat positions in a tensor, in any order and more than once if need be, and the cells that are there now."""


class Mirror(Protocol):
    """A state in host memory that goes from version to version, and remembers what changed in it since :meth:`forget`.

    Each tensor is there once, by its name; ``aliases`` are further names of tied ones.
    """

    @property
    def held(self) -> Manifest:
        """The version that the copy is at."""
        ...

    @property
    def layouts(self) -> Mapping[str, Layout]: ...

    @property
    def aliases(self) -> Mapping[str, str]: ...

    def cells(self, name: str) -> Cells:
        """All cells of a tensor, not to be written."""
        ...

    def newest(self, timeout_s: float = 60.0) -> Manifest:
        """The store's newest version; waits for the first one."""
        ...

    def open(self, version: int | None, timeout_s: float) -> int:
        """Hold the newest version, or ``version``; how many bytes were fetched for it."""
        ...

    def bring_to(self, version: int | None) -> ApplyResult | None:
        """Go to the newest version, or to ``version``; None if that is held already, or an older one.

        Raises:
            NoPathError: no intact objects lead there. The copy is as it was, or at a version on the way.
            MisuseError: the version has other tensors than the one that was opened; the copy is as it was.
        """
        ...

    def changed(self) -> list[str]:
        """Names of the tensors that may have changed."""
        ...

    def changes(self, name: str) -> Changes | None:
        """What of a tensor changed; None stands for all of it."""
        ...

    def forget(self) -> None:
        """What has changed is known."""
        ...


def chosen(whole: WholeMirror, settings: Mapping[str, Any], *, timeout_s: float) -> Mirror:
    """The mirror for the kind of versions that the store holds: ``whole``, or one for parts with the same settings.

    Raises:
        StoreUnavailableError: no version has appeared in time.
    """
    if not Newest(whole.store, settings).manifest(timeout_s=timeout_s).parts:
        return whole
    rest = {name: value for name, value in settings.items() if name not in ("cache", "peers")}  # whole.store has these
    return PartsMirror(whole.store, **rest)


def _same_tensors(ours: Mapping[str, object], theirs: Mapping[str, object], version: int) -> None:
    if set(ours) != set(theirs):
        other = sorted(set(ours) ^ set(theirs))
        raise MisuseError(
            f"version {version} has other tensors, or ties them otherwise, than the one that was opened "
            f"({', '.join(other[:3])}); open the store anew",
            tensors=other,
        )


# --- whole versions ------------------------------------------------------------------------------------------------


class _Watched(Target):
    """A target that tells which positions were written."""

    def __init__(self, inner: Target, touched: dict[str, list[_Where]]) -> None:
        self.inner, self.touched = inner, touched
        self.layouts, self.cells = inner.layouts, inner.cells

    @property
    def staged(self) -> Any:
        """All names, so that all positions are told."""
        return self.layouts.keys()

    def commit(self, touched: Mapping[str, _Where] | None = None) -> None:
        """Note the positions."""
        self.inner.commit(touched)
        for name, where in (touched or {}).items():
            self.touched.setdefault(name, []).append(where)


class WholeMirror(Consumer):
    """A :class:`Mirror` of a chain of whole versions: a consumer whose model is a state in host memory."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._model: dict[str, torch.Tensor] = {}
        self._touched: dict[str, list[_Where]] = {}

    @property
    def held(self) -> Manifest:
        return self._require_held()

    @property
    def layouts(self) -> Mapping[str, Layout]:
        return self._layouts

    @property
    def aliases(self) -> Mapping[str, str]:
        return self._aliases

    def cells(self, name: str) -> Cells:
        return cells_of(self._model[name])

    def newest(self, timeout_s: float = 60.0) -> Manifest:
        return self._wait_for_first(timeout_s)

    def open(self, version: int | None, timeout_s: float) -> int:
        state = self.fetch(version=version, timeout_s=timeout_s)
        self.adopt(state)
        self._model = {n: tensor_of(state.cells[n], x.dtype.name, x.shape) for n, x in state.layouts.items()}
        self.forget()
        return state.bytes_fetched

    def bring_to(self, version: int | None) -> ApplyResult | None:
        try:
            found = self.poll() if version is None else self._named(version)
            return None if found is None else found.apply(self._entries())
        except NoPathError:
            self._avoid.clear()  # what is damaged or missing now may be mended when it is asked for again
            raise

    def changed(self) -> list[str]:
        return list(self._touched)

    def changes(self, name: str) -> Changes | None:
        parts = self._touched[name]
        if any(part is None for part in parts):
            return None
        positions = np.concatenate([part for part in parts if part is not None])
        return positions, self.cells(name)[positions]

    def forget(self) -> None:
        self._touched.clear()

    def _named(self, version: int) -> Version | None:
        if version <= (self.version or 0):
            return None
        manifest = self._manifest(version)
        return Version(self, manifest, self._fetch_to(manifest, self._require_held()))

    def _entries(self) -> dict[str, torch.Tensor]:
        return self._model | {alias: self._model[name] for alias, name in self._aliases.items()}

    def _hop(self, hop: Hop, data: bytes, target: Target, seconds: dict[str, float], progress: Progress | None) -> int:
        watched = _Watched(target, self._touched)
        return super()._hop(hop, data, watched, seconds, progress)

    def _write(self, state: HostState, model: Any, began: float) -> ApplyResult:
        _same_tensors(self._model, state.layouts, state.version)
        for name in state.layouts:
            self._touched.setdefault(name, []).append(None)
        return super()._write(state, model, began)


# --- versions in parts ---------------------------------------------------------------------------------------------


class _ChunkCells(ShareTarget):
    """The copy's chunks as the place that patches are written to: in one piece each, so that nothing is copied."""

    def __init__(self, share: Share, cells: dict[str, Cells], touched: dict[str, list[_Where]]) -> None:
        self.share, self.layouts, self.cells, self._touched = share, dict(share.layouts), cells, touched

    @property
    def staged(self) -> Any:
        """All chunks, so that all positions are told."""
        return self.layouts.keys()

    def commit(self, touched: Mapping[str, _Where] | None = None) -> None:
        """Note the positions."""
        for full, where in (touched or {}).items():
            if where is None or where.size:
                self._touched.setdefault(full, []).append(where)


class PartsMirror(ShardedConsumer):
    """A :class:`Mirror` of a chain in parts. The copy is kept as the chunks that are published, which patches change in
    place; tensors are put together of them when they are asked for."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._cells: dict[str, Cells] = {}
        self._touched: dict[str, list[_Where]] = {}  # by chunk
        self._anew = False  # all has changed

    @property
    def held(self) -> Manifest:
        return self._require_held()

    @property
    def _chunks(self) -> ChunkMap:
        if self._share is None:
            raise MisuseError("open the store first")
        return self._share.chunks

    @property
    def layouts(self) -> Mapping[str, Layout]:
        return {name: Layout(dtype_of(tensor.dtype), tensor.shape) for name, tensor in self._chunks.tensors.items()}

    @property
    def aliases(self) -> Mapping[str, str]:
        return self._chunks.aliases

    def cells(self, name: str) -> Cells:
        tensor = self._chunks.tensors[name]
        if len(tensor.chunks) == 1:
            return self._cells[tensor.chunks[0].full_name]
        pieces = [(chunk.box, self._cells[chunk.full_name]) for chunk in tensor.chunks]
        return assemble(tensor.box, dtype_of(tensor.dtype), pieces)

    def newest(self, timeout_s: float = 60.0) -> Manifest:
        return self._wait_for_first(timeout_s)

    def open(self, version: int | None, timeout_s: float) -> int:
        manifest, meter = self.newest(timeout_s) if version is None else self._manifest(version), Meter()
        self._take(self._fetched(manifest, meter))
        self.forget()
        return meter.bytes

    def bring_to(self, version: int | None) -> ApplyResult | None:
        try:
            found = self.poll() if version is None else self._named(version)
            return None if found is None else found.apply({})
        except NoPathError:
            self._avoid.clear()  # what is damaged or missing now may be mended when it is asked for again
            raise

    def changed(self) -> list[str]:
        if self._anew:
            return list(self._chunks.tensors)
        return list(dict.fromkeys(c.tensor for c in self._chunks.chunks() if c.full_name in self._touched))

    def changes(self, name: str) -> Changes | None:
        tensor = self._chunks.tensors[name]
        dtype = dtype_of(tensor.dtype)
        positions: list[npt.NDArray[np.int64]] = []
        values: list[Cells] = []
        for chunk in tensor.chunks:
            cells = self._cells[chunk.full_name]
            parts = self._touched.get(chunk.full_name, [])
            if self._anew or (len(tensor.chunks) == 1 and any(part is None for part in parts)):
                return None
            for part in parts:
                where = np.arange(cells.size) if part is None else part
                positions.append(places_in(chunk.box, tensor.shape, dtype, where))
                values.append(cells[where])
        return np.concatenate(positions), np.concatenate(values)

    def forget(self) -> None:
        self._touched.clear()
        self._anew = False

    def _named(self, version: int) -> ShardedVersion | None:
        held = self._require_held()
        if version <= held.version:
            return None
        manifest, meter = self._manifest(version), Meter()
        try:
            hops = self._fetch_hops(manifest, held, meter)
        except NoPathError:
            hops = []  # apply() will say so, with the reason
            self._avoid.clear()
        return ShardedVersion(self, manifest, hops or None, meter)

    @events.telling
    def _apply(self, manifest: Manifest, hops: Any, meter: Meter, model: Any, progress: Progress | None) -> ApplyResult:
        del model  # the copy is it
        began, changed, applied = time.perf_counter(), 0, 0
        seconds = {"fetch": 0.0, "decode": 0.0, "apply": 0.0, "verify": 0.0}
        assert self._share is not None
        target = _ChunkCells(self._share, self._cells, self._touched)
        for hop, patch, proof in hops or ():
            if self._require_held().version >= hop.version:
                continue
            done = self._hop(hop, patch, proof, target, meter, progress, seconds)
            if done is None:
                break
            changed, applied = changed + done, applied + 1
        path = "delta"
        if self._require_held().version < manifest.version:
            state = self._fetched(manifest, meter)
            _same_tensors(self._chunks.tensors, state.share.chunks.tensors, manifest.version)
            self._take(state)
            path = "anchor+delta" if state.hops else "anchor"
            seconds, changed, applied = state.seconds, sum(x.cells for x in state.layouts.values()), state.hops
        total = {**seconds, "total": time.perf_counter() - began}
        return ApplyResult(manifest.version, manifest.step, manifest.state, path, applied, meter.bytes, changed, total)

    def _fetched(self, manifest: Manifest, meter: Meter) -> ShareState:
        """All chunks of a version, from nothing."""
        if not manifest.parts:
            raise MisuseError(f"version {manifest.version} is whole; read it with thinwire.Consumer")
        try:
            share = Share.of(map_of(self._remote, manifest, self._maps), None)
        except RefetchError as error:
            raise NoPathError(
                f"no intact objects lead to version {manifest.version}: {error}", version=manifest.version
            ) from error
        state = fetch_share(self._remote, manifest, share, meter=meter, avoid=self._avoid, threads=self.threads)
        told = events.Fetched(manifest.version, meter.bytes, state.hops, state.seconds["fetch"])
        events.tell(self.observer, told)
        return state

    def _take(self, state: ShareState) -> None:
        self._hold(state.manifest, state.share, state.tree)
        self._cells, self._anew = state.cells, True
        self._touched.clear()
