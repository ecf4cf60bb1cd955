"""The publisher of a sharded trainer: each rank publishes its own shards, one manifest commits them all."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Literal, overload

import torch
import torch.distributed as dist

from thinwire.errors import (
    ConflictError,
    MisuseError,
    ObjectExistsError,
    ObjectNotFoundError,
    RetryError,
    UnsafeStoreError,
)
from thinwire.stores import Store, open_store
from thinwire.stores.probe import enforces_create
from thinwire.sync.chunking import GROUP_CELLS
from thinwire.sync.encode import Options, Progress
from thinwire.sync.events import Observer, observed, published, tell
from thinwire.sync.pending import PublishReport, head_of, signed
from thinwire.sync.ranks import Ranks, agree, ranks_of
from thinwire.sync.remote import HINT_KEY, Remote, hint_bytes
from thinwire.sync.retrying import retrying
from thinwire.sync.sharded_making import Cut, Making, PartMaker, new_word
from thinwire.sync.shards import Entries
from thinwire.sync.trust import Keys, Pinned, Trust, now_ms, read_trust, signers_of
from thinwire.wire.manifest import Manifest, ObjectRef, manifest_key
from thinwire.wire.spec import HASHES, MANIFEST_BYTES_MAX
from thinwire.wire.trust import TrustDocument

__all__ = ["ShardedPublisher"]

_UPLOADS = 4


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
    ) -> None:
        if hash not in HASHES:
            raise MisuseError(f"hash must be one of {', '.join(HASHES)}, not {hash!r}")
        if anchor_ratio <= 0 or (anchor_every is not None and anchor_every < 1) or shard_bytes_max < 1:
            raise MisuseError("anchor_ratio, anchor_every and shard_bytes_max must be positive")
        if slices < 1 or group_cells < 1:
            raise MisuseError("slices and group_cells must be positive")
        self.observer = observer
        self.store: Store = observed(open_store(store) if isinstance(store, str) else store, observer)
        self.ranks = ranks_of(group)
        self.hash, self.single_publisher, self.retry_s = hash, single_publisher, retry_s
        self.anchor_ratio, self.anchor_every = anchor_ratio, anchor_every
        self._signers = signers_of(key) if self.ranks.rank == 0 else ()
        pinned = None if trust is None else read_trust(trust)
        if pinned is None and self._signers:
            pinned = Trust(TrustDocument.of_keys([signer.public for signer in self._signers]))
        vouched = frozenset() if adopt is None else frozenset({adopt})
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
        self._background: Future[PublishReport] | None = None
        self._pool: ThreadPoolExecutor | None = None
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
            if wait:
                return self._commit()
            if self._pool is None:
                self._pool = ThreadPoolExecutor(1, thread_name_prefix="thinwire-publish")
            self._background = self._pool.submit(self._commit)
            return self._background

    def flush(self) -> PublishReport | None:
        """Wait for the version under way, trying again if it failed; its report, or None. On all ranks.

        Raises:
            RetryError, ConflictError: as :meth:`publish`.
        """
        with self._lock:
            return self._settle()

    def close(self) -> None:
        """Wait for the version under way and stop the background thread. On all ranks."""
        try:
            self.flush()
        finally:
            if self._pool is not None:
                self._pool.shutdown(wait=True)
                self._pool = None

    def __enter__(self) -> ShardedPublisher:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            self.close()
        elif self._pool is not None:  # after an error the other ranks may not be there to close with
            self._pool.shutdown(wait=False)

    # --- the chain's end -------------------------------------------------------------------------------------------

    def _settle(self) -> PublishReport | None:
        report = None
        if self._background is not None:
            background, self._background = self._background, None
            with suppress(RetryError):
                report = background.result()
        if self._pending is not None:
            report = self._commit()
        return report

    def _open(self) -> None:
        if self._opened:
            return

        def look() -> tuple[int, str]:
            if self.ranks.rank != 0:
                return 0, ""
            if not self.single_publisher and not enforces_create(self.store):
                raise UnsafeStoreError(
                    f"{self.store.url} overwrites objects that were to be created only, so two publishers could both "
                    "win a version. Use another store, or pass single_publisher=True if only one ever runs",
                    store=self.store.url,
                )
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
        agree(self.ranks, lambda: self._upload(pending))
        uploaded = time.perf_counter()

        def create() -> bytes:
            if self.ranks.rank != 0:
                return b""
            manifest = signed(pending.manifest, self._remote, self._signers)
            self._create_manifest(manifest)
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

    def _upload(self, pending: Making) -> None:
        """Put the objects, several at once; those that are up are taken off the list even if others fail."""

        def put(item: tuple[ObjectRef, list[bytes | memoryview]]) -> None:
            ref, buffers = item
            retrying(lambda: self.store.put(ref.key, buffers), limit_s=self.retry_s)

        with ThreadPoolExecutor(min(_UPLOADS, max(len(pending.uploads), 1))) as pool:
            futures = [(item, pool.submit(put, item)) for item in pending.uploads]
        pending.uploads = [item for item, future in futures if future.exception() is not None]
        for _, future in futures:
            future.result()

    def _create_manifest(self, manifest: Manifest) -> None:
        key, data = manifest_key(manifest.version), manifest.encode()
        later = retrying(lambda: next(iter(self.store.list("manifests/", start_after=key)), None), limit_s=self.retry_s)

        def attempt() -> bool:
            try:
                self.store.create(key, [data])
            except ObjectExistsError:
                pass
            except RetryError:
                with suppress(ObjectNotFoundError):
                    return self.store.get(key, size_max=MANIFEST_BYTES_MAX) == data
                raise
            else:
                return True
            return self.store.get(key, size_max=MANIFEST_BYTES_MAX) == data

        if later is not None or not retrying(attempt, limit_s=self.retry_s):
            raise ConflictError(
                f"version {manifest.version} in {self.store.url} was written by another publisher. Nothing of this one "
                "was committed; start new publishers on all ranks to go on from the newest version",
                version=manifest.version,
                store=self.store.url,
            )


def _delta_bytes(manifest: Manifest) -> int:
    return sum(min((delta.object.size for delta in part.deltas), default=0) for part in manifest.parts)
