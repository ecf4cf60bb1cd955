"""The copy of a checkpoint that an engine's worker keeps on the host, and what changed in it; of either kind of chain.

A chain holds whole versions (:class:`~thinwire.Publisher`) or versions in parts (:class:`~thinwire.ShardedPublisher`).
To the engine both are tensors by name, so both mirrors look alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from thinwire.chain.plan import Hop
from thinwire.errors import MisuseError, NoPathError, RefetchError
from thinwire.integrations.newest import Newest
from thinwire.sync.consumer import ApplyResult, Consumer, Version
from thinwire.sync.encode import Progress
from thinwire.sync.host import HostState
from thinwire.sync.layout import Layout
from thinwire.sync.places import places_in
from thinwire.sync.sharded_consumer import ShardedConsumer, ShardedVersion
from thinwire.sync.sharded_state import ShareState, map_of
from thinwire.sync.sharded_target import ShareTarget
from thinwire.sync.shards import Held
from thinwire.sync.share import Meter, Proof
from thinwire.sync.target import Target
from thinwire.tensors.bits import tensor_of
from thinwire.wire.chunks import Chunk, ChunkMap
from thinwire.wire.manifest import Manifest
from thinwire.wire.patch import Patch
from thinwire.wire.spec import dtype_of

__all__ = ["Mirror", "PartsMirror", "Touched", "WholeMirror", "chosen"]

Touched = dict[str, list[npt.NDArray[np.int64] | None]]
"""Flat positions that changed, by tensor; None stands for all of it."""

_Where = npt.NDArray[np.int64] | None


class Mirror(Protocol):
    """A state in host memory that goes from version to version, and notes in ``touched`` what changes in it.

    ``model`` holds each tensor once, ``aliases`` further names of tied ones.
    """

    model: dict[str, torch.Tensor]
    touched: Touched

    @property
    def held(self) -> Manifest:
        """The version that the copy is at."""
        ...

    @property
    def layouts(self) -> Mapping[str, Layout]: ...

    @property
    def aliases(self) -> Mapping[str, str]: ...

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

    def __init__(self, inner: Target, touched: Touched) -> None:
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
        self.model: dict[str, torch.Tensor] = {}
        self.touched: Touched = {}

    @property
    def held(self) -> Manifest:
        return self._require_held()

    @property
    def layouts(self) -> Mapping[str, Layout]:
        return self._layouts

    @property
    def aliases(self) -> Mapping[str, str]:
        return self._aliases

    def newest(self, timeout_s: float = 60.0) -> Manifest:
        return self._wait_for_first(timeout_s)

    def open(self, version: int | None, timeout_s: float) -> int:
        state = self.fetch(version=version, timeout_s=timeout_s)
        self.adopt(state)
        self.model = {n: tensor_of(state.cells[n], x.dtype.name, x.shape) for n, x in state.layouts.items()}
        self.touched.clear()
        return state.bytes_fetched

    def bring_to(self, version: int | None) -> ApplyResult | None:
        try:
            found = self.poll() if version is None else self._named(version)
            return None if found is None else found.apply(self._entries())
        except NoPathError:
            self._avoid.clear()  # what is damaged or missing now may be mended when it is asked for again
            raise

    def _named(self, version: int) -> Version | None:
        if version <= (self.version or 0):
            return None
        manifest = self._manifest(version)
        return Version(self, manifest, self._fetch_to(manifest, self._require_held()))

    def _entries(self) -> dict[str, torch.Tensor]:
        return self.model | {alias: self.model[name] for alias, name in self._aliases.items()}

    def _hop(self, hop: Hop, data: bytes, target: Target, seconds: dict[str, float], progress: Progress | None) -> int:
        watched = _Watched(target, self.touched)
        return super()._hop(hop, data, watched, seconds, progress)

    def _write(self, state: HostState, model: Any, began: float) -> ApplyResult:
        _same_tensors(self.model, state.layouts, state.version)
        for name in state.layouts:
            self.touched.setdefault(name, []).append(None)
        return super()._write(state, model, began)


# --- versions in parts ---------------------------------------------------------------------------------------------


class _WatchedShare(ShareTarget):
    """A share's target that tells which positions of which tensors were written."""

    def __init__(self, inner: ShareTarget, touched: Touched) -> None:
        self.inner, self.touched = inner, touched
        self.share, self.layouts, self.cells = inner.share, inner.layouts, inner.cells

    @property
    def staged(self) -> Any:
        """All names, so that all positions are told."""
        return self.layouts.keys()

    def commit(self, touched: Mapping[str, _Where] | None = None) -> None:
        """Note the positions, as those of whole tensors."""
        self.inner.commit(touched)
        for chunk in self.share.members:
            where = (touched or {}).get(chunk.full_name)
            if where is None or where.size:
                self.touched.setdefault(chunk.tensor, []).append(self._placed(chunk, where))

    def _placed(self, chunk: Chunk, where: _Where) -> _Where:
        tensor = self.share.chunks.tensors[chunk.tensor]
        if where is not None:
            return places_in(chunk.box, tensor.shape, dtype_of(tensor.dtype), where)
        if chunk.box == tensor.box:
            return None
        every = np.arange(self.layouts[chunk.full_name].cells)
        return places_in(chunk.box, tensor.shape, dtype_of(tensor.dtype), every)


class PartsMirror(ShardedConsumer):
    """A :class:`Mirror` of a chain in parts: a sharded trainer's versions as plain tensors by name."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.model: dict[str, torch.Tensor] = {}
        self.touched: Touched = {}

    @property
    def held(self) -> Manifest:
        return self._require_held()

    @property
    def layouts(self) -> Mapping[str, Layout]:
        return _layouts(self._chunks(self.held))

    @property
    def aliases(self) -> Mapping[str, str]:
        return self._chunks(self.held).aliases

    def _chunks(self, manifest: Manifest) -> ChunkMap:
        return map_of(self._remote, manifest, self._maps)

    def newest(self, timeout_s: float = 60.0) -> Manifest:
        return self._wait_for_first(timeout_s)

    def open(self, version: int | None, timeout_s: float) -> int:
        manifest = self.newest(timeout_s) if version is None else self._manifest(version)
        if not manifest.parts:
            raise MisuseError(f"version {manifest.version} is whole; read it with thinwire.Consumer")
        with self._no_path(manifest.version):
            chunks = self._chunks(manifest)
            model = {
                name: tensor_of(np.empty(layout.cells, layout.dtype.cells), layout.dtype.name, layout.shape)
                for name, layout in _layouts(chunks).items()
            }
            result = self.load(_entries(model, chunks), version=manifest.version)
        self.model = model
        self.touched.clear()
        return result.bytes_fetched

    def bring_to(self, version: int | None) -> ApplyResult | None:
        with self._no_path(version):
            found = self.poll() if version is None else self._named(version)
            if found is None:
                return None
            chunks = self._chunks(found.manifest)
            _same_tensors(self.model, chunks.tensors, found.number)
            return found.apply(_entries(self.model, chunks))

    @contextmanager
    def _no_path(self, version: int | None) -> Iterator[None]:
        """What is damaged or missing now may be mended when it is asked for again."""
        try:
            yield
        except NoPathError:
            self._avoid.clear()
            raise
        except RefetchError as error:  # the map of chunks: without it there is no way at all
            self._avoid.clear()
            wanted = "the newest version" if version is None else f"version {version}"
            raise NoPathError(f"no intact objects lead to {wanted}: {error}") from error

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

    def _hop(
        self,
        manifest: Manifest,
        patch: Patch,
        proof: Proof,
        target: ShareTarget,
        meter: Meter,
        progress: Progress | None,
        seconds: dict[str, float],
    ) -> int | None:
        watched = _WatchedShare(target, self.touched)
        return super()._hop(manifest, patch, proof, watched, meter, progress, seconds)

    def _write(self, held: Mapping[str, Held], state: ShareState, meter: Meter, began: float) -> ApplyResult:
        for name in state.share.chunks.tensors:
            self.touched.setdefault(name, []).append(None)
        return super()._write(held, state, meter, began)


def _layouts(chunks: ChunkMap) -> dict[str, Layout]:
    return {name: Layout(dtype_of(tensor.dtype), tensor.shape) for name, tensor in chunks.tensors.items()}


def _entries(model: Mapping[str, torch.Tensor], chunks: ChunkMap) -> dict[str, torch.Tensor]:
    return {**model, **{alias: model[name] for alias, name in chunks.aliases.items()}}
