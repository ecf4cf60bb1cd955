"""The publisher of a sharded trainer: each rank publishes its own shards, one manifest commits them all."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from typing import Literal, overload

import torch
import torch.distributed as dist

from thinwire.errors import (
    ConflictError,
    MisuseError,
    RetryError,
)
from thinwire.peers import Carrier
from thinwire.stores import Store, open_store
from thinwire.sync.chunking import GROUP_CELLS
from thinwire.sync.committing import Background, check_create, create_manifest, upload
from thinwire.sync.encode import Options, Progress
from thinwire.sync.events import Observer, observed, published, tell
from thinwire.sync.peering import leave, peered_ranks
from thinwire.sync.pending import PublishReport, head_of, signed
from thinwire.sync.ranks import Ranks, agree, ranks_of
from thinwire.sync.remote import HINT_KEY, Remote, hint_bytes
from thinwire.sync.sharded_making import Cut, Making, PartMaker, new_word
from thinwire.sync.shards import Entries
from thinwire.sync.trust import Keys, Pinned, now_ms, pinned_by, signers_of
from thinwire.wire.manifest import Manifest
from thinwire.wire.spec import HASHES

__all__ = ["ShardedPublisher"]


class ShardedPublisher:
    """Publishes versions of a model whose tensors are sharded over ranks. Every rank makes the same calls.

    Args:
        store: as for :class:`~thinwire.Publisher`: the same one on all ranks.
        group: the ranks that together hold the state: a process group, or None for all of them (or for one process).
            The group's ranks talk over a Gloo group of their own.
        slices: cut matrices so that a reader with tensor parallelism of this degree, or a divisor of it, needs whole
            chunks only. Readers of any other sharding work, too, and fetch somewhat more. See ``docs/sharding.md``.
        group_cells: cells after which a group of chunks ends; readers fetch and keep whole groups. Smaller ones serve
            readers of few layers, and cost a segment each.
        peers: give objects to the workers directly, too: ``"swarm"``, ``"nixl"``, ... Each rank gives its own. With
            peers, all ranks make their publishers at the same time. A carrier that is passed is this rank's alone.
        dtype, level, values, hash, anchor_ratio, anchor_every, single_publisher, shard_bytes_max, threads, retry_s,
            key, trust, adopt, observer: as for :class:`~thinwire.Publisher`; the same on all ranks. Rank 0 signs.

    DTensors (FSDP2's ``fully_shard``, tensor parallelism, both) are published shard by shard; a tensor that several
    ranks hold alike, by one of them. Tensors may be on some ranks only (pipeline stages). For shards that are no
    DTensors pass a dict of :class:`~thinwire.sync.shards.Slice`. Each rank keeps a snapshot of what it publishes, no
    more. Nothing is seen of a version until rank 0 has created its manifest: a rank that dies before leaves the store
    at the version before, from which a new start goes on, with any number of ranks.

    Raises:
        ConflictError: (any call) somebody else has written the next version. Start new publishers on all ranks.
        MisuseError: (publish) ranks disagree, or together do not hold every tensor exactly.
        RetryError: the store fails for longer than ``retry_s`` on one rank, or a rank does not answer. The version
            stays pending on all ranks and goes out with the next call of :meth:`publish` or :meth:`flush`.
        UnsafeStoreError, UntrustedError: as for :class:`~thinwire.Publisher`.

    >>> import torch, thinwire
    >>> model = torch.nn.Linear(16, 16)
    >>> publisher = ShardedPublisher("memory://doc-sharded-publisher")
    >>> publisher.publish(model, step=0).kind
    'anchor'
    >>> with torch.no_grad():
    ...     _ = model.weight[0].add_(1.0)
    >>> report = publisher.publish(model, step=1)
    >>> report.kind, report.version, report.changed
    ('delta', 2, 16)
    """

    def __init__(
        self,
        store: str | Store,
        *,
        group: dist.ProcessGroup | Ranks | None = None,
        slices: int = 4,
        group_cells: int = GROUP_CELLS,
        dtype: torch.dtype | None = None,
        level: str = "small",
        values: str = "ulp",
        hash: str = "blake3",
        anchor_ratio: float = 1.0,
        anchor_every: int | None = None,
        single_publisher: bool = False,
        shard_bytes_max: int = 1 << 28,
        threads: int = 0,
        retry_s: float = 60.0,
        key: Keys | None = None,
        trust: Pinned | None = None,
        adopt: str | None = None,
        observer: Observer | None = None,
        peers: str | Carrier | None = None,
    ) -> None:
        if hash not in HASHES:
            raise MisuseError(f"hash must be one of {', '.join(HASHES)}, not {hash!r}")
        if anchor_ratio <= 0 or (anchor_every is not None and anchor_every < 1) or shard_bytes_max < 1:
            raise MisuseError("anchor_ratio, anchor_every and shard_bytes_max must be positive")
        if slices < 1 or group_cells < 1:
            raise MisuseError("slices and group_cells must be positive")
        self.observer = observer
        self.ranks = ranks_of(group)
        self._peered = peered_ranks(open_store(store) if isinstance(store, str) else store, peers, self.ranks)
        self.store: Store = observed(self._peered, observer)
        self.hash, self.single_publisher, self.retry_s = hash, single_publisher, retry_s
        self.anchor_ratio, self.anchor_every = anchor_ratio, anchor_every
        self._signers = signers_of(key) if self.ranks.rank == 0 else ()
        vouched = frozenset() if adopt is None else frozenset({adopt})
        pinned = pinned_by(trust, self._signers)
        self._remote = Remote(self.store, retry_s=retry_s, trust=pinned, vouched=vouched, in_parts=True)
        self._opened = False
        self._head: Manifest | None = None
        self._chain_bytes = 0
        self._maker = PartMaker(
            self.ranks,
            self._remote,
            Cut(dtype, values, hash, slices, group_cells),
            Options(level, values, threads),
            shard_bytes_max=shard_bytes_max,
        )
        self._pending: Making | None = None
        self._background = Background()
        self._lock = threading.Lock()

    @overload
    def publish(
        self, model: Entries, *, step: int | None = ..., metadata: Mapping[str, str] | None = ...,
        wait: Literal[True] = ..., progress: Progress | None = ...,
    ) -> PublishReport: ...  # fmt: skip

    @overload
    def publish(
        self, model: Entries, *, step: int | None = ..., metadata: Mapping[str, str] | None = ...,
        wait: Literal[False], progress: Progress | None = ...,
    ) -> Future[PublishReport]: ...  # fmt: skip

    def publish(
        self,
        model: Entries,
        *,
        step: int | None = None,
        metadata: Mapping[str, str] | None = None,
        wait: bool = True,
        progress: Progress | None = None,
    ) -> PublishReport | Future[PublishReport]:
        """Publish the state as the next version; the report is the same on all ranks, but for its ``seconds``.

        ``step`` and ``metadata`` are those of rank 0. With ``wait=False`` only the pass over memory happens now; upload
        and commit go on in the background, on all ranks, and the next call waits for them.
        """
        with self._lock:
            self._settle()
            self._open()
            self._pending = self._maker.make(
                model,
                self._head,
                new_word(step, metadata),
                chain_bytes=self._chain_bytes,
                anchor_ratio=self.anchor_ratio,
                anchor_every=self.anchor_every,
                progress=progress,
            )
            return self._commit() if wait else self._background.run(self._commit)

    def flush(self) -> PublishReport | None:
        """Wait for the version under way, trying again if it failed; its report, or None. On all ranks.

        Raises:
            RetryError, ConflictError: as :meth:`publish`.
        """
        with self._lock:
            return self._settle()

    def close(self) -> None:
        """Wait for the version under way, stop the background thread and leave the peers. On all ranks."""
        try:
            self.flush()
        finally:
            leave(self._peered)
            self._background.close()

    def __enter__(self) -> ShardedPublisher:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            self.close()
        else:  # after an error the other ranks may not be there to close with
            leave(self._peered)
            self._background.close(wait=False)

    # --- the chain's end -------------------------------------------------------------------------------------------

    def _settle(self) -> PublishReport | None:
        report = self._background.settle()
        return report if self._pending is None else self._commit()

    def _open(self) -> None:
        if self._opened:
            return

        def look() -> tuple[int, str]:
            if self.ranks.rank != 0:
                return 0, ""
            if not self.single_publisher:
                check_create(self.store)
            head = head_of(self._remote)
            if head is not None and not head.parts:
                raise MisuseError(
                    f"{self.store.url} holds versions of a model that is not sharded; use another store, or Publisher",
                    store=self.store.url,
                )
            return (0, "") if head is None else (head.version, head.digest)

        version, digest = agree(self.ranks, look)[0]

        def follow() -> Manifest | None:
            if not version:
                return None
            head = self._remote.manifest(version)
            if head.digest != digest:
                raise ConflictError(f"version {version} is another one on rank 0; do all ranks use one store?")
            if head.hash != self.hash:
                raise MisuseError(f"the chain in {self.store.url} uses hash={head.hash!r}, not {self.hash!r}")
            self._remote.manifests(range(head.anchor_version, version))
            return head

        self._head = agree(self.ranks, follow)[self.ranks.rank]
        if self._head is not None:
            known = self._remote.chain.manifests
            since = range(self._head.anchor_version + 1, self._head.version + 1)
            self._chain_bytes = sum(_delta_bytes(known[v]) for v in since if v in known)
        self._opened = True

    # --- upload and commit -----------------------------------------------------------------------------------------

    def _commit(self) -> PublishReport:
        """Upload this rank's objects; when all ranks have, rank 0 creates the manifest."""
        pending, start = self._pending, time.perf_counter()
        assert pending is not None
        agree(self.ranks, lambda: upload(self.store, pending, limit_s=self.retry_s))
        uploaded = time.perf_counter()

        def create() -> bytes:
            if self.ranks.rank != 0:
                return b""
            manifest = signed(pending.manifest, self._remote, self._signers)
            if not create_manifest(self.store, manifest, limit_s=self.retry_s):
                raise ConflictError(
                    f"version {manifest.version} in {self.store.url} was written by another publisher. Nothing of this "
                    "one was committed; start new publishers on all ranks to go on from the newest version",
                    version=manifest.version,
                    store=self.store.url,
                )
            return manifest.encode()

        try:
            data = agree(self.ranks, create)[0]
        except ConflictError:
            self._pending = None
            self._maker.forget()
            raise
        head = self._remote.chain.accept_newest(data, version=pending.manifest.version, now_ms=now_ms())
        committed = time.perf_counter()
        self._chain_bytes = 0 if head.anchor_bytes else self._chain_bytes + _delta_bytes(head)
        self._head, self._pending = head, None
        if self.ranks.rank == 0:
            with suppress(RetryError):  # only a hint: readers manage without
                self.store.put(HINT_KEY, [hint_bytes(head.version)])
        elements, changed = head.facts["elements"], head.facts["changed"]
        report = PublishReport(
            version=head.version,
            step=head.step,
            digest=head.state,
            kind=head.kind,
            patch_bytes=_delta_bytes(head),
            anchor_bytes=head.anchor_bytes,
            total_bytes=pending.total_bytes + len(data),
            full_bytes=head.facts["state_bytes"],
            changed=changed,
            elements=elements,
            density=changed / max(elements, 1),
            seconds={
                **pending.seconds,
                "upload": uploaded - start,
                "commit": committed - uploaded,
                "total": time.perf_counter() - pending.began,
            },
        )
        tell(self.observer, published(report, began=pending.began, uploading=start))
        return report


def _delta_bytes(manifest: Manifest) -> int:
    return sum(min((delta.object.size for delta in part.deltas), default=0) for part in manifest.parts)
