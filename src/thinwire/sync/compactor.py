"""Skip deltas: written beside a chain by its publisher, or by anybody who may read the store and create objects in it.

The *ladder*: version ``v`` gets a skip delta from ``v - s`` for every power of two ``s`` from 2 on that divides ``v``.
Between any two versions then lies a way of at most ``2 log2(n)`` hops. *Dense*: every version gets skip deltas from
2, 4, ... 64 versions before; one hop where the ladder needs several, for several times the bytes. Every rung is
composed of the two rungs of half its span, so that no weights are needed where patches are coded without context
(:mod:`thinwire.sync.compose`).

Skip deltas are never needed: all of ``skips/`` may be deleted at any time. So nothing here is ever waited for, a
rung that cannot be made is left out, and two compactors at once do no more harm than uploading some rungs twice.
"""

from __future__ import annotations

import logging
import secrets
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Protocol

from thinwire.chain.plan import HOP_BYTES
from thinwire.errors import (
    MisuseError,
    ObjectExistsError,
    RebaseError,
    RefetchError,
    RefuseError,
)
from thinwire.stores.protocol import Create, Get, List
from thinwire.sync.apply import apply_patch
from thinwire.sync.collector import all_manifests
from thinwire.sync.compose import compose, in_context, without_context
from thinwire.sync.encode import Options
from thinwire.sync.host import HostState, fetch_state
from thinwire.sync.remote import Remote, hash_bytes
from thinwire.sync.retrying import retrying
from thinwire.sync.trust import Keys, Pinned, Trust, read_trust, signers_of
from thinwire.wire.manifest import DeltaRef, Manifest, ObjectRef
from thinwire.wire.patch import Patch
from thinwire.wire.signing import Signer, sign
from thinwire.wire.skip import Skip, skip_folder, skip_key

__all__ = ["LADDERS", "BackgroundCompactor", "CompactReport", "Compactor", "Rung", "compact", "ladder"]

_log = logging.getLogger(__name__)
LADDERS = ("ladder", "dense")
_DENSE_SPAN_MAX = 64
_BEHIND_MAX = 8  # versions whose rungs wait


class CompactableStore(Get, List, Create, Protocol):
    """What compacting needs."""


def ladder(version: int, kind: str = "ladder") -> Iterator[int]:
    """The versions from which ``version`` gets a skip delta, the nearest first.

    >>> list(ladder(12)), list(ladder(16)), list(ladder(7)), list(ladder(7, "dense"))
    ([10, 8], [14, 12, 8], [], [5, 3])
    """
    span = 2
    while version > span and (span <= _DENSE_SPAN_MAX if kind == "dense" else version % span == 0):
        yield version - span
        span *= 2


@dataclass(frozen=True, slots=True)
class Rung:
    """A skip delta from ``base`` to ``version``: bytes of its patch (0: not made yet) and cells that it changes."""

    base: int
    version: int
    size: int = 0
    changed: int = 0


@dataclass(frozen=True, slots=True)
class CompactReport:
    """What a compaction did, or would do.

    ``written`` were made now (with ``dry_run``: would be, of unknown size), ``kept`` counts those that were there. Of
    ``useless`` ones the parts are as cheap; ``impossible`` ones lack a patch on the way, or cannot be composed.
    """

    newest: int
    written: tuple[Rung, ...]
    kept: int
    useless: tuple[Rung, ...]
    impossible: tuple[Rung, ...]
    dry_run: bool = False

    @property
    def written_bytes(self) -> int:
        """Bytes of the patches written."""
        return sum(rung.size for rung in self.written)


class _ImpossibleError(Exception):
    """A rung cannot be made of what there is."""


class Compactor:
    """Makes rungs, each from two of half its span; keeps the last patches at hand, so that few are fetched again.

    One thread at a time. Memory: the patches of the rungs under way, and one state if patches are coded in context.
    """

    def __init__(
        self,
        store: CompactableStore,
        *,
        retry_s: float = 60.0,
        threads: int = 0,
        level: str = "small",
        signers: Sequence[Signer] = (),
        trust: Trust | None = None,
    ) -> None:
        self.store, self.retry_s, self.options = store, retry_s, Options(level, threads=threads)
        self.remote = Remote(store, retry_s=retry_s, trust=trust)
        self.signers = signers
        self._recent: OrderedDict[tuple[int, int], Patch] = OrderedDict()
        self._state: HostState | None = None

    def offer(self, manifest: Manifest, patch: bytes) -> None:
        """Take a patch to the version of ``manifest`` from the one before, which need not be fetched then."""
        self.remote.chain.accept(manifest.encode(), version=manifest.version)
        self._keep(manifest.version - 1, manifest.version, Patch.parse(patch))

    def extend(self, version: int) -> CompactReport:
        """Make the rungs that lead to ``version``.

        Raises:
            RetryError: the store does not answer.
        """
        return self.make([Rung(base, version) for base in ladder(version)], newest=version)

    def make(
        self, rungs: list[Rung], *, newest: int, kept: int = 0, progress: Callable[[int, int], None] | None = None
    ) -> CompactReport:
        """Make ``rungs`` one after another; ``progress`` is called with rungs done and rungs in all.

        Raises:
            RetryError: the store does not answer. What has been written stays; go on with the same call.
        """
        written: list[Rung] = []
        useless: list[Rung] = []
        impossible: list[Rung] = []
        for done, rung in enumerate(rungs):
            try:
                found = self._make(rung)
                if found is None:
                    kept += 1
                else:
                    (written if found[1] else useless).append(found[0])
            except (_ImpossibleError, MisuseError, RebaseError, RefetchError, RefuseError) as error:
                _log.info("no skip delta from version %d to %d: %s", rung.base, rung.version, error)
                impossible.append(rung)
            if progress is not None:
                progress(done + 1, len(rungs))
        return CompactReport(newest, tuple(written), kept, tuple(useless), tuple(impossible))

    def _make(self, rung: Rung) -> tuple[Rung, bool] | None:
        """Write one rung; None if it is there by now, else the rung and whether it was worth writing."""
        base, version = rung.base, rung.version
        before, after = self.remote.manifest(base), self.remote.manifest(version)
        if self._listed(base, version) and self.remote.skip(base, version) is not None:
            return None
        patch = self._patch(base, version)
        if (patch.parent, patch.result) != (before.state, after.state):
            raise _ImpossibleError("the patches between lead elsewhere than the manifests say")
        buffers = patch.encode()
        made = Rung(base, version, sum(map(len, buffers)), patch.changed)
        if made.size + HOP_BYTES >= self._cost(base, version):
            return made, False
        key = f"{skip_folder(base, version)}{secrets.token_hex(6)}.safetensors"
        reference = ObjectRef(key, made.size, hash_bytes(after.hash, buffers))
        self._create(key, buffers)
        skip = Skip(base, before.state, version, after.state, after.hash, reference, made.changed)
        if self.signers:
            skip = replace(skip, signatures=sign(skip.signed(), self.signers))
        if not self._create(skip_key(base, version), [skip.encode()]):
            found = self.remote.skip(base, version)
            if found is None:
                raise _ImpossibleError("its record is there and no good; a collection of garbage removes it")
            return (made, True) if found == skip else None  # after a lost reply; else another compactor was faster
        self.remote.skips[base, version] = skip
        return made, True

    def _create(self, key: str, buffers: list[bytes | memoryview]) -> bool:
        """Whether it was created here; if not, or if a reply was lost, something lies there already."""

        def attempt() -> bool:
            try:
                self.store.create(key, buffers)
            except ObjectExistsError:
                return False
            return True

        return retrying(attempt, limit_s=self.retry_s)

    def _listed(self, base: int, version: int) -> bool:
        key = skip_key(base, version)
        first = retrying(lambda: next(iter(self.store.list(key)), None), limit_s=self.retry_s)
        return first is not None

    def _cost(self, base: int, version: int) -> int:
        """What the way over smaller rungs, or the anchor there, costs so far, as the planner counts."""
        manifest = self.remote.manifest(version)
        anchor = manifest.anchor_bytes + HOP_BYTES * len(manifest.anchor) if manifest.anchor else 1 << 62
        skip = self.remote.skips.get((base, version))
        if skip is not None:
            way = skip.object.size + HOP_BYTES
        elif version - base == 1:
            way = self._delta(manifest).object.size + HOP_BYTES
        else:
            middle = (base + version) // 2
            way = self._cost(base, middle) + self._cost(middle, version)
        return min(way, anchor)

    # --- patches between versions ----------------------------------------------------------------------------------

    def _keep(self, base: int, version: int, patch: Patch) -> None:
        """Of each span the last two patches are enough for the next rungs."""
        self._recent[base, version] = patch
        same = [pair for pair in self._recent if pair[1] - pair[0] == version - base]
        for pair in same[:-2]:
            del self._recent[pair]

    def _patch(self, base: int, version: int) -> Patch:
        """The patch from ``base`` to ``version``, readable without weights: at hand, from the store, or composed."""
        known = self._recent.get((base, version))
        if known is None and version - base > 1:
            known = self._stored(base, version)
        if known is None:
            known = self._single(version) if version - base == 1 else self._composed(base, version)
        if in_context(known):
            known = self._plain(version, known)
        self._keep(base, version, known)
        return known

    def _composed(self, base: int, version: int) -> Patch:
        middle = (base + version) // 2
        return compose(self._patch(base, middle), self._patch(middle, version), options=self.options)

    def _stored(self, base: int, version: int) -> Patch | None:
        """A skip delta that is there; one that is no good is as good as none."""
        self.remote.manifests([base, version])
        if not {base, version} <= set(self.remote.chain.manifests) or not self._listed(base, version):
            return None
        skip = self.remote.skip(base, version)
        if skip is None:
            return None
        try:
            patch = Patch.parse(self.remote.fetch(skip.object, skip.hash))
        except (RefetchError, RefuseError) as error:
            _log.warning("the skip delta from version %d to %d is not used: %s", base, version, error)
            return None
        elements = self.remote.manifest(version).facts.get("elements", patch.cells)
        fits = (patch.parent, patch.result, patch.cells) == (skip.base_state, skip.state, elements)
        return patch if fits else None  # one of other sizes could ask for any amount of memory

    def _single(self, version: int) -> Patch:
        manifest = self.remote.manifest(version)
        return Patch.parse(self.remote.fetch(self._delta(manifest).object, manifest.hash))

    @staticmethod
    def _delta(manifest: Manifest) -> DeltaRef:
        for delta in manifest.deltas:
            if delta.base == manifest.version - 1:
                return delta
        raise _ImpossibleError(f"version {manifest.version} has no patch from the one before")

    def _plain(self, version: int, patch: Patch) -> Patch:
        """A patch in context, told from the weights of the version before, which are walked along."""
        before = self.remote.manifest(version - 1)
        held = self._state
        if held is None or held.version > before.version or before.version - held.version > 2:
            held = fetch_state(self.remote, before, threads=self.options.threads)
        while held.version < before.version:
            step = self._recent.get((held.version, held.version + 1)) or self._single(held.version + 1)
            self._advance(held, step)
        self._state = held
        return without_context(patch, held.cells, options=self.options)

    def _advance(self, held: HostState, patch: Patch) -> None:
        report = apply_patch(patch, held.layouts, held.cells, aliases=held.aliases, threads=self.options.threads)
        held.aliases, held.digest = dict(report.tree.aliases), report.tree.digest
        held.version += 1


class BackgroundCompactor:
    """Makes each new version's rungs behind a publisher's back; what fails, or does not keep up, is left out.

    Rungs that were left out are made when a later one needs them, or by :func:`compact`.
    """

    def __init__(
        self, store: CompactableStore, *, retry_s: float, threads: int, signers: Sequence[Signer] = ()
    ) -> None:
        self._compactor = Compactor(store, retry_s=retry_s, threads=threads, signers=signers)
        self._pool: ThreadPoolExecutor | None = None
        self._waiting: deque[Future[None]] = deque()

    def published(self, manifest: Manifest, patch: Sequence[bytes | memoryview]) -> None:
        """A version has been committed by ``patch`` (buffers; none if it is to be fetched). Returns at once."""
        while self._waiting and self._waiting[0].done():
            self._waiting.popleft()
        if len(self._waiting) >= _BEHIND_MAX:
            _log.warning("no skip deltas to version %d: those before it are still under way", manifest.version)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="thinwire-compact")
        self._waiting.append(self._pool.submit(self._extend, manifest, b"".join(patch)))

    def _extend(self, manifest: Manifest, patch: bytes) -> None:
        try:
            if patch:
                self._compactor.offer(manifest, patch)
            self._compactor.extend(manifest.version)
        except Exception as error:  # nobody waits for this thread, and versions must go on
            _log.warning("no skip deltas to version %d: %s", manifest.version, error)

    def wait(self) -> None:
        """Until everything asked for is done."""
        wait(self._waiting)

    def close(self) -> None:
        """Finish the version under way; leave out those that wait."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


def compact(
    store: CompactableStore,
    *,
    kind: str = "ladder",
    dry_run: bool = False,
    retry_s: float = 60.0,
    threads: int = 0,
    level: str = "small",
    progress: Callable[[int, int], None] | None = None,
    key: Keys | None = None,
    trust: Pinned | None = None,
) -> CompactReport:
    """Write the rungs that a store lacks, in order of the versions that they lead to; ``kind`` is one of LADDERS.

    A rung is left out if the ways there are cost no more, or if a patch on the way is gone (a collection has given it
    up). Being stopped loses nothing: the next call goes on. Records are signed with ``key``, if there is one; with
    ``trust`` only versions are read that its keys have signed.

    Raises:
        MisuseError: no versions, or another kind.
        RefuseError, ObjectNotFoundError: a manifest is damaged or cannot be read.
        RetryError: the store does not answer; run it again.

    >>> import torch, thinwire
    >>> from thinwire.stores.memory import MemoryStore
    >>> store, model = MemoryStore(), torch.nn.Linear(16, 16)
    >>> publisher = thinwire.Publisher(store)
    >>> for step in range(5):
    ...     with torch.no_grad():
    ...         _ = model.weight[step].add_(1.0)
    ...     _ = publisher.publish(model, step=step)
    >>> [(rung.base, rung.version) for rung in compact(store).written]
    [(2, 4)]
    >>> compact(store).kept
    1
    """
    if kind not in LADDERS:
        raise MisuseError(f"skip deltas come as {' or '.join(LADDERS)}, not as {kind!r}")
    compactor = Compactor(
        store,
        retry_s=retry_s,
        threads=threads,
        level=level,
        signers=signers_of(key),
        trust=None if trust is None else read_trust(trust),
    )
    manifests = all_manifests(compactor.remote)
    newest = max(manifests)
    there = compactor.remote.skip_hints(1, newest)
    objects = {info.key for info in retrying(lambda: list(store.list("objects/")), limit_s=retry_s)}
    steps = {v for v, m in manifests.items() if any(d.base == v - 1 and d.object.key in objects for d in m.deltas)}
    missing = [Rung(b, v) for v in sorted(manifests) for b in ladder(v, kind) if b in manifests and (b, v) not in there]
    possible = [rung for rung in missing if _can_be_made(rung.base, rung.version, steps, set(there))]
    if dry_run:
        out = tuple(rung for rung in missing if rung not in set(possible))
        return CompactReport(newest, tuple(possible), len(there), (), out, dry_run=True)
    for pair in there:
        compactor.remote.skip(*pair)
    report = compactor.make(possible, newest=newest, kept=len(there), progress=progress)
    out = tuple(rung for rung in missing if rung not in set(possible))
    return CompactReport(newest, report.written, report.kept, report.useless, (*report.impossible, *out))


def _can_be_made(base: int, version: int, steps: set[int], there: set[tuple[int, int]]) -> bool:
    """Whether patches lead from ``base`` to ``version`` over rungs of the ladder."""
    if (base, version) in there:
        return True
    if version - base == 1:
        return version in steps
    middle = (base + version) // 2
    return _can_be_made(base, middle, steps, there) and _can_be_made(middle, version, steps, there)
