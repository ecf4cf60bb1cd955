"""The consumer of a sharded trainer's versions: brings a model, or slices of one, to the newest and keeps it there."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch.distributed as dist

from thinwire.errors import (
    MisuseError,
    NoPathError,
    RebaseError,
    RefetchError,
    RefuseError,
)
from thinwire.peers import Carrier
from thinwire.sync import events
from thinwire.sync.apply import apply_patch
from thinwire.sync.consumer import ApplyResult
from thinwire.sync.encode import Progress
from thinwire.sync.following import Following, Offered
from thinwire.sync.ranks import Alone, Ranks, agree, ranks_of
from thinwire.sync.remote import ReadableStore
from thinwire.sync.sharded_state import ShareState, fetch_share, known_since, map_of, way_to
from thinwire.sync.sharded_target import ShareTarget, check_fits, wanted_by
from thinwire.sync.shards import Entries, Held, held_by
from thinwire.sync.share import Meter, Proof, Share, fetch_patch
from thinwire.sync.trust import Pinned
from thinwire.wire.chunks import ChunkMap
from thinwire.wire.digests import Tree
from thinwire.wire.manifest import Manifest
from thinwire.wire.patch import Patch

__all__ = ["ShardedConsumer", "ShardedVersion"]

Cells = npt.NDArray[np.unsignedinteger]
_log = logging.getLogger(__name__)
_Hop = tuple[Manifest, Patch, Proof]


class ShardedVersion(Offered):
    """A version that is newer than the one held. What a share needs of it has been fetched; nothing is applied."""

    def __init__(self, consumer: ShardedConsumer, manifest: Manifest, hops: list[_Hop] | None, meter: Meter) -> None:
        super().__init__(manifest)
        self._consumer, self._hops, self._meter = consumer, hops, meter

    def apply(self, model: Entries, *, progress: Progress | None = None) -> ApplyResult:
        """Bring ``model`` to this version, in place; it must be the one that the consumer loaded or applied last.

        All chunks change together, proved by their digests, or none does; then what was read by ranges is fetched
        whole, and at last an anchor is taken (whose bytes are fetched only now).

        Raises:
            NoPathError: no intact objects lead here. The model is as it was, or at a version on the way
                (``consumer.version``).
            MisuseError: the model has other tensors or shards than the one that was loaded.
            RetryError: the store does not answer.
        """
        hops, self._hops = self._hops, None
        result = self._consumer._apply(self.manifest, hops, self._meter, model, progress)
        events.tell(self._consumer.observer, events.applied(result, self.manifest))
        return result


class ShardedConsumer(Following[ShardedVersion]):
    """Follows versions that a :class:`~thinwire.ShardedPublisher` writes, for any sharding of its own, or none.

    A model may hold DTensors (FSDP2, tensor parallelism), plain tensors, or, as a dict, slices of tensors
    (:class:`~thinwire.sync.shards.Slice`). Only the groups of chunks that hold some of it are fetched, from patches and
    anchors by ranges, and kept: a chunk that reaches over a slice's end lies in host memory beside the model.

    Args:
        store: as for :class:`~thinwire.Consumer`; one that can get ranges, too, or everything is fetched whole.
        partial: take the tensors that the model has, and no others (a pipeline stage, a few layers).
        group: ranks that go from version to version together (the replicas of one engine): a process group; their calls
            are then collective, each version is the newest that all of them see, and all must apply what they are
            given. None: this process alone.
        poll_s, retry_s, floor, threads, trust, memory, observer, cache, peers: as for :class:`~thinwire.Consumer`; a
            cache and peers are asked for whole objects, and ranges of others come from the store.

    >>> import torch, thinwire
    >>> from thinwire.sync.shards import Slice
    >>> trained = torch.nn.Linear(16, 16)
    >>> _ = thinwire.ShardedPublisher("memory://doc-sharded-consumer").publish(trained, step=0)
    >>> half = torch.zeros(8, 16)
    >>> consumer = ShardedConsumer("memory://doc-sharded-consumer", partial=True)
    >>> consumer.load({"weight": Slice(half, offsets=(8, 0), shape=(16, 16))}).version
    1
    >>> torch.equal(half, trained.weight[8:])
    True
    """

    def __init__(
        self,
        store: str | ReadableStore,
        *,
        partial: bool = False,
        group: dist.ProcessGroup | Ranks | None = None,
        poll_s: float = 0.5,
        retry_s: float = 30.0,
        floor: int = 0,
        threads: int = 0,
        trust: Pinned | None = None,
        memory: str | os.PathLike[str] | None = None,
        observer: events.Observer | None = None,
        cache: str | os.PathLike[str] | None = None,
        peers: str | Carrier | None = None,
    ) -> None:
        super().__init__(
            store, poll_s=poll_s, retry_s=retry_s, floor=floor, threads=threads, trust=trust, memory=memory,
            observer=observer, cache=cache, peers=peers, in_parts=True,
        )  # fmt: skip
        self.partial = partial
        self.ranks: Ranks = Alone() if group is None else ranks_of(group)
        self._maps: dict[str, ChunkMap] = {}
        self._share: Share | None = None
        self._tree: Tree | None = None
        self._beside: dict[str, Cells] = {}

    @property
    def share_bytes(self) -> int:
        """Bytes of the chunks that are fetched and proved for this model."""
        return 0 if self._share is None else self._share.size

    @property
    def beside_bytes(self) -> int:
        """Bytes of chunks that reach over the model's slices, and are kept beside it."""
        return sum(cells.nbytes for cells in self._beside.values())

    # --- loading ---------------------------------------------------------------------------------------------------

    @events.telling
    def load(
        self, model: Entries, *, version: int | None = None, timeout_s: float = 60.0, progress: Progress | None = None
    ) -> ApplyResult:
        """Bring ``model`` to the newest version, or to ``version``, from whatever is cheapest.

        Its share is built and proved aside; the model is written at the very end. Waits up to ``timeout_s`` for a first
        version to appear.

        Raises:
            StoreUnavailableError: no version appeared in time.
            NoPathError: there is no such version, or no intact objects lead to it.
            MisuseError: the model has other tensors, data types or shapes; or the versions are not in parts.
        """
        began, meter = time.perf_counter(), Meter()

        def look() -> int:
            return (self._wait_for_first(timeout_s) if version is None else self._manifest(version)).version

        agreed = min(agree(self.ranks, look))

        def fetch() -> tuple[dict[str, Held], ShareState]:
            manifest, held = self._manifest(agreed), held_by(model)
            events.tell(self.observer, events.Seen(max(agreed, self.version or 0), self.version or 0))
            return held, self._fetch_state(manifest, held, meter, progress)

        mine: list[tuple[dict[str, Held], ShareState]] = []
        agree(self.ranks, lambda: mine.append(fetch()))
        result = self._write(*mine[0], meter, began)
        events.tell(self.observer, events.applied(result, self._require_held()))
        return result

    def _fetch_state(
        self, manifest: Manifest, held: Mapping[str, Held], meter: Meter, progress: Progress | None
    ) -> ShareState:
        if not manifest.parts:
            raise MisuseError(
                "this store holds versions of a model that is not sharded; read it with thinwire.Consumer"
            )
        chunks = map_of(self._remote, manifest, self._maps)
        check_fits(held, chunks, partial=self.partial)
        share = Share.of(chunks, wanted_by(held) if held else {})
        state = fetch_share(
            self._remote, manifest, share, meter=meter, avoid=self._avoid, threads=self.threads, progress=progress
        )
        told = events.Fetched(manifest.version, meter.bytes, state.hops, state.seconds["fetch"])
        events.tell(self.observer, told)
        return state

    def _write(self, held: Mapping[str, Held], state: ShareState, meter: Meter, began: float) -> ApplyResult:
        beside: dict[str, Cells] = {}
        ShareTarget(held, state.share, beside, read=False).write(state.cells)
        self._beside = beside
        self._hold(state.manifest, state.share, state.tree)
        seconds = {**state.seconds, "total": time.perf_counter() - began}
        changed = sum(layout.cells for layout in state.share.layouts.values())
        manifest, path = state.manifest, "anchor+delta" if state.hops else "anchor"
        return ApplyResult(
            manifest.version, manifest.step, manifest.state, path, state.hops, meter.bytes, changed, seconds
        )

    def _hold(self, manifest: Manifest, share: Share, tree: Tree) -> None:
        self._held, self._share, self._tree = manifest, share, tree

    # --- following -------------------------------------------------------------------------------------------------

    @events.telling
    def poll(self, *, every: bool = False) -> ShardedVersion | None:
        """The newest version behind the one held, or None; with ``every``, the very next one. Does not wait.

        Raises:
            MisuseError: nothing has been loaded yet.
            RetryError: the store does not answer.
        """
        held, meter = self._require_held(), Meter()

        def look() -> int:
            found = self._remote.after(held.version)
            events.tell(self.observer, events.Seen((found or held).version, held.version))
            return (found or held).version

        newest = min(agree(self.ranks, look))
        if newest <= held.version:
            return None
        number = held.version + 1 if every else newest
        hops: list[_Hop] = []

        def fetch() -> Manifest:
            target = self._manifest(number)
            try:
                hops.extend(self._fetch_hops(target, held, meter))
            except NoPathError:
                hops.clear()  # apply() will say so, with the reason
                self._avoid.clear()  # what was damaged on its way may be whole by then, or at the next look
            return target

        targets: list[Manifest] = []
        agree(self.ranks, lambda: targets.append(fetch()))
        return ShardedVersion(self, targets[0], hops or None, meter)

    def _idle_s(self, mine: float) -> float:
        shortest: float = min(self.ranks.gather(mine))
        return shortest

    def _fetch_hops(self, target: Manifest, held: Manifest, meter: Meter) -> list[_Hop]:
        """The patches that lead from the version held to ``target``; none if an anchor is cheaper.

        Raises:
            NoPathError: neither leads there.
        """
        known_since(self._remote, target, held.version)
        while True:
            path = way_to(self._remote, target, have=held.version, avoid=self._avoid, across=False)
            if path.anchor_version is not None:
                return []
            found: list[_Hop] = []
            assert self._share is not None
            assert self._tree is not None
            for hop in path.hops:
                manifest = self._remote.chain.manifests[hop.version]
                try:
                    patch = fetch_patch(self._remote, manifest, self._share, meter, parent=self._tree.digest)
                    found.append((manifest, patch, Proof(self._remote, manifest, self._share, meter)))
                except (RefetchError, RefuseError) as error:
                    _log.warning("the patches of version %d are not used: %s", hop.version, error)
                    self._avoid.add(hop.delta.object.key)
                    break
            else:
                told = events.Fetched(target.version, meter.bytes, len(found), 0.0)
                events.tell(self.observer, told)
                return found

    # --- applying --------------------------------------------------------------------------------------------------

    @events.telling
    def _apply(
        self, manifest: Manifest, hops: list[_Hop] | None, meter: Meter, model: Entries, progress: Progress | None
    ) -> ApplyResult:
        began = time.perf_counter()
        seconds = {"fetch": 0.0, "decode": 0.0, "apply": 0.0, "verify": 0.0}
        held, changed, applied = held_by(model), 0, 0
        assert self._share is not None
        check_fits(held, self._share.chunks, partial=self.partial)
        if Share.of(self._share.chunks, wanted_by(held)).groups != self._share.groups:
            raise MisuseError("the model holds other slices than the one that was loaded; load it first")
        target = ShareTarget(held, self._share, self._beside, read=True) if hops else None
        for hop, patch, proof in hops or ():
            if self._require_held().version >= hop.version:
                continue
            assert target is not None
            done = self._hop(hop, patch, proof, target, meter, progress, seconds)
            if done is None:
                break
            changed, applied = changed + done, applied + 1
        if self._require_held().version >= manifest.version:
            seconds["total"] = time.perf_counter() - began
            return ApplyResult(
                manifest.version, manifest.step, manifest.state, "delta", applied, meter.bytes, changed, seconds
            )
        state = self._fetch_state(manifest, held, meter, progress)
        return self._write(held, state, meter, began)

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
        """Apply one version's patches; the number of changed elements, or None if they are of no use."""
        assert self._share is not None
        assert self._tree is not None
        for whole in (False, True):
            try:
                if whole:
                    patch = fetch_patch(
                        self._remote, manifest, self._share, meter, parent=self._tree.digest, whole=True
                    )
                patch = replace(patch, parent=self._tree.digest)
                report = apply_patch(
                    patch, dict(target.layouts), target.cells,
                    threads=self.threads, progress=progress, watch=target.staged, agrees=proof,
                )  # fmt: skip
            except (RefetchError, RefuseError, RebaseError) as error:
                _log.warning("the patches to version %d are not used: %s", manifest.version, error)
                if isinstance(error, RebaseError):
                    return None
                continue
            target.commit(report.touched)
            for stage in ("decode", "apply", "verify"):
                seconds[stage] += report.seconds[stage]
            self._hold(manifest, self._share, report.tree)
            return report.changed
        return None
