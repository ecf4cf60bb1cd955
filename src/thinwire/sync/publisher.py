"""The publisher: turns each state of a model into a committed version in a store."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from typing import Literal, overload

import torch

from thinwire.errors import (
    ConflictError,
    MisuseError,
    NoPathError,
    RefetchError,
    RetryError,
)
from thinwire.peers import Carrier
from thinwire.stores import Store, open_store
from thinwire.sync.anchor import write_shards
from thinwire.sync.committing import Background, check_create, create_manifest, upload
from thinwire.sync.compactor import BackgroundCompactor, CompactReport, compact
from thinwire.sync.encode import Options, Progress, Snapshot, make_patch, take_snapshot
from thinwire.sync.events import Observer, observed, published, tell
from thinwire.sync.guard import put_heartbeat
from thinwire.sync.host import fetch_state, snapshot_of
from thinwire.sync.layout import StateSource
from thinwire.sync.levels import AUTO, LevelChooser
from thinwire.sync.peering import leave, peered
from thinwire.sync.pending import Pending, PublishReport, head_of, signed
from thinwire.sync.remote import HINT_KEY, Remote, hash_bytes, hint_bytes
from thinwire.sync.trust import Keys, Pinned, now_ms, pinned_by, signers_of
from thinwire.tensors.tree import state_of
from thinwire.wire.manifest import DeltaRef, Manifest, ObjectRef, Parent
from thinwire.wire.patch import Patch
from thinwire.wire.spec import HASHES
from thinwire.wire.trust import Heartbeat

__all__ = ["PublishReport", "Publisher"]

Model = torch.nn.Module | Mapping[str, torch.Tensor]


class Publisher:
    """Publishes versions of one model to a store, each as a patch against the one before.

    Args:
        store: a folder, ``s3://``, ``gs://``, ``az://``, ``memory://`` or any fsspec URL; or a
            :class:`~thinwire.stores.Store`.
        dtype: publish floating-point tensors of 16 bits or more as this dtype (``torch.bfloat16`` for fp32 masters
            that are served in bf16), rounded as ``tensor.to(dtype)`` does.
        level: ``fast``, ``small`` or ``smallest``; or ``auto``, which tries the last two and goes on with the one that
            brings versions over sooner, by the rates it measures. See ``docs/levels.md``.
        link_mbit_s: rate of the link that ``auto`` is to choose for, in Mbit/s, where the publisher's own is not the
            one that counts.
        values: ``ulp`` (steps; smaller) or ``absolute`` (new values; applying twice does no harm).
        hash: ``blake3`` or ``sha256``.
        anchor_ratio: write a full anchor when the patches since the last one have so many times its size.
        anchor_every: and at the latest after so many versions.
        single_publisher: publish to a store that does not enforce create-only writes. Two publishers could then both
            believe that they wrote a version: only one may ever run.
        shard_bytes_max: size of an anchor's files, which go up and come down several at once.
        threads: threads for diff, encoding and hashing; 0 means one a core.
        retry_s: how long one request is retried while the store fails.
        skips: ``"ladder"`` writes skip deltas in the background, after a version is committed, so that who is far
            behind catches up with few bytes; they cost more upload than the patches themselves. ``thinwire compact``
            can write them anywhere else. See ``docs/skips.md``.
        key: sign with this private key: an Ed25519 one (:class:`thinwire.crypto.SigningKey`), its file, anything that
            signs, or several of them. See ``docs/trust.md``.
        trust: go on only from versions that these keys have signed: a trust document's file, public keys' files, or a
            :class:`~thinwire.sync.trust.Trust`. By default, with ``key``, the public keys of ``key``.
        adopt: digest of the manifest of the store's newest version, to go on from it though the keys that are trusted
            have not signed it: one that was published without keys, or before keys were revoked.
        observer: called with what happens (:mod:`thinwire.sync.events`), for metrics and traces.
        peers: give versions to the workers directly, too: ``"swarm"``, or a carrier of :mod:`thinwire.peers`. See
            ``docs/peers.md``; call :meth:`close` at the end.

    One snapshot of the last published state is kept in host memory. A publisher that starts on a store with versions
    in it goes on from the newest one; its base is proved by digest, and no anchor is needed for that.

    Raises:
        ConflictError: (any call) another publisher has written the next version. Start a new publisher.
        UnsafeStoreError: (first publish) the store does not enforce create-only writes.
        UntrustedError: (first publish) keys that are trusted have not signed the store's newest version, or would not
            count what this publisher signs.
        RetryError: the store fails for longer than ``retry_s``. Nothing is lost: the version stays pending and goes out
            with the next call of :meth:`publish` or :meth:`flush`.

    >>> import torch, thinwire
    >>> model = torch.nn.Linear(16, 16)
    >>> publisher = thinwire.Publisher("memory://doc-publisher")
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
        dtype: torch.dtype | None = None,
        level: str = "small",
        link_mbit_s: float | None = None,
        values: str = "ulp",
        hash: str = "blake3",
        anchor_ratio: float = 1.0,
        anchor_every: int | None = None,
        single_publisher: bool = False,
        shard_bytes_max: int = 1 << 28,
        threads: int = 0,
        retry_s: float = 60.0,
        skips: Literal["ladder"] | None = None,
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
        if skips not in (None, "ladder"):
            raise MisuseError(f"skips must be 'ladder' or None, not {skips!r}")
        self.observer = observer
        self._peered = peered(open_store(store) if isinstance(store, str) else store, peers, publishing=True)
        self.store: Store = observed(self._peered, observer)
        self._levels = LevelChooser(None if link_mbit_s is None else 1e6 * link_mbit_s) if level == AUTO else None
        if link_mbit_s is not None and self._levels is None:
            raise MisuseError("link_mbit_s is what level='auto' chooses by; give both or neither")
        self.dtype, self.options, self.hash = dtype, Options("small" if self._levels else level, values, threads), hash
        self.anchor_ratio, self.anchor_every = anchor_ratio, anchor_every
        self.single_publisher, self.shard_bytes_max, self.retry_s = single_publisher, shard_bytes_max, retry_s
        self._signers = signers_of(key)
        vouched = frozenset() if adopt is None else frozenset({adopt})
        pinned = pinned_by(trust, self._signers)
        self._remote = Remote(self.store, retry_s=retry_s, trust=pinned, vouched=vouched)
        self._opened = False
        self._head: Manifest | None = None
        self._chain_bytes = 0
        self._snapshot: Snapshot | None = None
        self._pending: Pending | None = None
        self._background = Background()
        self._lock = threading.Lock()
        self._skips = (
            BackgroundCompactor(self.store, retry_s=retry_s, threads=threads, signers=self._signers) if skips else None
        )

    @overload
    def publish(
        self,
        model: Model,
        *,
        step: int | None = ...,
        metadata: Mapping[str, str] | None = ...,
        wait: Literal[True] = ...,
        progress: Progress | None = ...,
    ) -> PublishReport: ...

    @overload
    def publish(
        self,
        model: Model,
        *,
        step: int | None = ...,
        metadata: Mapping[str, str] | None = ...,
        wait: Literal[False],
        progress: Progress | None = ...,
    ) -> Future[PublishReport]: ...

    def publish(
        self,
        model: Model,
        *,
        step: int | None = None,
        metadata: Mapping[str, str] | None = None,
        wait: bool = True,
        progress: Progress | None = None,
    ) -> PublishReport | Future[PublishReport]:
        """Publish the model's state as the next version.

        With ``wait=False`` only the pass over memory happens now (the model may be changed as soon as this returns);
        upload and commit go on in the background, and the future gives the report. The next call waits for them, so
        that at most one version is ever under way.

        ``metadata`` (strings) is stored in the manifest. ``progress`` is called with bytes done and bytes in all.
        """
        with self._lock:
            self._settle()
            began = time.perf_counter()
            self._open()
            self._pending = self._prepare(model, step, dict(metadata or {}), began, progress)
            return self._commit() if wait else self._background.run(self._commit)

    def flush(self) -> PublishReport | None:
        """Wait for the version under way, trying again if it failed; its report, or None if there is none.

        Raises:
            RetryError, ConflictError: as :meth:`publish`.
        """
        with self._lock:
            return self._settle()

    def compact(self) -> CompactReport:
        """Write all skip deltas that the store lacks, now; see :func:`thinwire.sync.compactor.compact`.

        Raises:
            MisuseError: no version has been published.
            RetryError: the store does not answer. What has been written stays; call it again.
        """
        with self._lock:
            self._settle()
            if self._skips is not None:
                self._skips.wait()
            return compact(self.store, retry_s=self.retry_s, threads=self.options.threads, key=self._signers)

    def heartbeat(self) -> Heartbeat:
        """Sign that the newest version is still the newest, for consumers that insist on hearing so (``max_age_s``).

        Raises:
            MisuseError: there is no key, or no version yet.
            RetryError: the store does not answer.
        """
        with self._lock:
            self._settle()
            self._open()
            if not self._signers or self._head is None:
                raise MisuseError("a heartbeat needs a key to sign with (key=...) and a version that was published")
            return put_heartbeat(self.store, self._head, self._signers, retry_s=self.retry_s)

    def close(self) -> None:
        """Wait for the version under way and stop the background threads; skip deltas not begun are left out. Leave
        the peers."""
        try:
            self.flush()
        finally:
            leave(self._peered)
            if self._skips is not None:
                self._skips.close()
            self._background.close()

    def __enter__(self) -> Publisher:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- the chain's end -------------------------------------------------------------------------------------------

    def _settle(self) -> PublishReport | None:
        """Bring the version under way to its end."""
        report = self._background.settle()
        return report if self._pending is None else self._commit()

    def _open(self) -> None:
        if self._opened:
            return
        if not self.single_publisher:
            check_create(self.store)
        self._head = head_of(self._remote)
        if self._head is not None:
            if self._head.hash != self.hash:
                raise MisuseError(f"the chain in {self.store.url} uses hash={self._head.hash!r}, not {self.hash!r}")
            self._remote.manifests(range(self._head.anchor_version, self._head.version))
            self._chain_bytes = self._bytes_since_anchor(self._head)
        self._opened = True

    def _bytes_since_anchor(self, head: Manifest) -> int:
        total = 0
        for version in range(head.anchor_version + 1, head.version + 1):
            manifest = self._remote.chain.manifests.get(version)
            total += min((d.object.size for d in manifest.deltas), default=0) if manifest else 0
        return total

    # --- making a version ------------------------------------------------------------------------------------------

    def _base(self, source: StateSource) -> Snapshot | None:
        """The head's state, proved: from memory, from the model itself, or rebuilt from the store. None: no base."""
        if self._snapshot is not None and self._snapshot.intact:
            return self._snapshot
        if self._head is None:
            return None
        fresh = take_snapshot(source, hash_name=self.hash, threads=self.options.threads)
        if fresh.tree.digest == self._head.state:
            return fresh
        del fresh
        try:
            held = fetch_state(self._remote, self._head, threads=self.options.threads)
        except (NoPathError, RefetchError):
            return None
        return snapshot_of(held, hash_name=self.hash, threads=self.options.threads)

    def _prepare(
        self, model: Model, step: int | None, metadata: dict[str, str], began: float, progress: Progress | None
    ) -> Pending:
        source = StateSource(state_of(model, cast=self.dtype))
        base = self._base(source)
        based = time.perf_counter()
        patch: Patch | None = None
        if base is None:
            self._snapshot = take_snapshot(source, hash_name=self.hash, threads=self.options.threads)
        else:
            self._snapshot = base
            if self._levels is not None:
                self.options = replace(self.options, level=self._levels.choose())
            patch = make_patch(base, source, self.options, progress=progress)
        encoded = time.perf_counter()
        return self._assemble(patch, step, metadata, began, {"base": based - began, "encode": encoded - based})

    def _wants_anchor(self, patch_bytes: int, full_bytes: int) -> bool:
        head = self._head
        if head is None:
            return True
        by_count = self.anchor_every is not None and head.version + 1 - head.anchor_version >= self.anchor_every
        return by_count or self._chain_bytes + patch_bytes > self.anchor_ratio * full_bytes

    def _assemble(
        self, patch: Patch | None, step: int | None, metadata: dict[str, str], began: float, seconds: dict[str, float]
    ) -> Pending:
        snapshot, head = self._snapshot, self._head
        assert snapshot is not None
        version = head.version + 1 if head is not None else 1
        prefix = f"objects/{version:010d}-{secrets.token_hex(6)}/"
        uploads: list[tuple[ObjectRef, list[bytes | memoryview]]] = []

        def add(name: str, buffers: list[bytes | memoryview]) -> ObjectRef:
            size = sum(len(b) for b in buffers)
            ref = ObjectRef(prefix + name, size, hash_bytes(self.hash, buffers))
            uploads.append((ref, buffers))
            return ref

        tree = add("tree.json", [snapshot.tree.encode()])
        deltas: tuple[DeltaRef, ...] = ()
        if patch is not None and head is not None:
            ref = add("delta.safetensors", patch.encode())
            deltas = (DeltaRef(head.version, patch.parent, ref),)
        patch_bytes = sum(d.object.size for d in deltas)
        if self._levels is not None and patch is not None:
            self._levels.encoded(
                patch.level, state_bytes=snapshot.size, changed=patch.changed, patch_bytes=patch_bytes,
                seconds=seconds["encode"],
            )  # fmt: skip
        anchor: tuple[ObjectRef, ...] = ()
        if patch is None or self._wants_anchor(patch_bytes, snapshot.size):
            meta = {"thinwire.version": str(version), "thinwire.state": snapshot.tree.digest}
            shards = write_shards(
                snapshot.layouts, snapshot.cells, snapshot.aliases,
                metadata=meta, shard_bytes_max=self.shard_bytes_max,
            )  # fmt: skip
            anchor = tuple(add(shard.name, shard.buffers) for shard in shards)
        elements = sum(layout.cells for layout in snapshot.layouts.values())
        changed = patch.changed if patch is not None else elements
        manifest = Manifest(
            version=version,
            state=snapshot.tree.digest,
            hash=self.hash,
            parent=None if head is None else Parent(head.version, head.digest),
            tree=tree,
            deltas=deltas,
            anchor=anchor,
            anchor_version=version if anchor or head is None else head.anchor_version,
            step=step,
            facts={
                "changed": changed,
                "created_ms": time.time_ns() // 10**6,
                "elements": elements,
                "state_bytes": snapshot.size,
            },
            metadata=metadata,
        )
        manifest = signed(manifest, self._remote, self._signers)
        report = PublishReport(
            version=version,
            step=step,
            digest=snapshot.tree.digest,
            kind="+".join(k for k, there in (("delta", deltas), ("anchor", anchor)) if there),
            patch_bytes=patch_bytes,
            anchor_bytes=sum(ref.size for ref in anchor),
            total_bytes=sum(ref.size for ref, _ in uploads) + len(manifest.encode()),
            full_bytes=snapshot.size,
            changed=changed,
            elements=elements,
            density=changed / max(elements, 1),
            seconds=seconds,
            level="" if patch is None else patch.level,
        )
        return Pending(manifest, uploads, report, began)

    # --- upload and commit -----------------------------------------------------------------------------------------

    def _commit(self) -> PublishReport:
        """Upload what is pending, then write its manifest; objects that are up already are not sent twice."""
        pending = self._pending
        assert pending is not None
        start = time.perf_counter()
        delta = [] if self._skips is None else pending.delta()
        waiting = sum(ref.size for ref, _ in pending.uploads)
        upload(self.store, pending, limit_s=self.retry_s)
        uploaded = time.perf_counter()
        if self._levels is not None:
            self._levels.sent(waiting, uploaded - start)
        if not create_manifest(self.store, pending.manifest, limit_s=self.retry_s):
            self._lose(pending.manifest.version)
        committed = time.perf_counter()
        manifest = pending.manifest
        self._chain_bytes = 0 if manifest.anchor else self._chain_bytes + pending.report.patch_bytes
        self._remote.chain.accept_newest(manifest.encode(), version=manifest.version, now_ms=now_ms())
        self._head, self._pending = manifest, None
        with suppress(RetryError):  # only a hint: readers manage without
            self.store.put(HINT_KEY, [hint_bytes(manifest.version)])
        if self._skips is not None:
            self._skips.published(manifest, delta)
        seconds = {
            **pending.report.seconds,
            "upload": uploaded - start,
            "commit": committed - uploaded,
            "total": time.perf_counter() - pending.began,
        }
        report = replace(pending.report, seconds=seconds)
        tell(self.observer, published(report, began=pending.began, uploading=start))
        return report

    def _lose(self, version: int) -> None:
        self._pending, self._snapshot = None, None
        raise ConflictError(
            f"version {version} in {self.store.url} was written by another publisher. Nothing of this one was "
            "committed; start a new Publisher to go on from the newest version",
            version=version,
            store=self.store.url,
        )
