"""A state held in host memory, and how it is fetched from a chain, whole or hop by hop."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from thinwire.chain.plan import Hop, Path, plan, sketch
from thinwire.errors import (
    DamagedObjectError,
    MalformedError,
    NoPathError,
    ObjectNotFoundError,
    RebaseError,
    RefetchError,
    RefuseError,
)
from thinwire.sync.anchor import read_shards
from thinwire.sync.apply import ApplyReport, apply_patch, tree_of
from thinwire.sync.encode import Progress, Snapshot, thread_count
from thinwire.sync.layout import Layout
from thinwire.sync.remote import Remote
from thinwire.tensors.digest import block_cells, hash_block
from thinwire.wire.digests import TensorInfo, Tree, tensor_digest
from thinwire.wire.manifest import Manifest, ObjectRef
from thinwire.wire.patch import Patch
from thinwire.wire.skip import SKIPS_PREFIX

__all__ = ["Fetched", "HostState", "Route", "fetch_path", "fetch_state", "snapshot_of"]

Cells = npt.NDArray[np.unsignedinteger]

_log = logging.getLogger(__name__)
_MANY = 256  # with more versions than this between, only those from the newest anchor on are looked at


@dataclass(slots=True)
class HostState:
    """Cells in memory that were proved to be those of a version."""

    layouts: dict[str, Layout]
    cells: dict[str, Cells]
    aliases: dict[str, str]
    version: int
    digest: str
    bytes_fetched: int = 0
    hops: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Fetched:
    """A path with its objects' bytes, each checked against size and digest."""

    path: Path
    anchor: list[bytes]
    patches: list[bytes]
    size: int
    seconds: float


class Route:
    """Finds the cheapest ways to ``target``, from ``have`` or from nothing, fetching the manifests it needs for that.

    Where a listing shows skip deltas on the way, only the manifests of the versions that a sketch leads over are
    fetched, else all between. ``by_skips`` False leaves skip deltas out.
    """

    def __init__(
        self, remote: Remote, target: Manifest, *, have: int | None, have_state: str | None, by_skips: bool = True
    ) -> None:
        self.remote, self.target, self.have, self.have_state = remote, target, have, have_state
        first = target.anchor_version
        if have is not None and have < target.version:
            first = max(first, have) if target.version - have == 1 else min(first, have)
        self._first = first
        far = by_skips and target.version - first > 1
        self._hints = remote.skip_hints(first, target.version) if far else {}

    def find(self, avoid: set[str]) -> Path:
        """The cheapest way that leads over nothing in ``avoid``.

        Raises:
            NoPathError: there is none.
            RetryError: the store does not answer.
        """
        hints = {pair: size for pair, (key, size) in self._hints.items() if not self._avoided(pair, key, avoid)}
        if not all(key.startswith(SKIPS_PREFIX) for key in avoid):  # a delta is gone, too: look at all that there is
            self._look_back()
        while hints:
            bad = self._follow(hints)
            if not bad:
                with suppress(NoPathError):
                    return self._plan(avoid)
                break
            for pair in bad:
                del hints[pair]
        self._look_back()
        while True:
            try:
                return self._plan(avoid)
            except NoPathError:
                if not _further_back(self.remote):
                    raise

    def _avoided(self, pair: tuple[int, int], key: str, avoid: set[str]) -> bool:
        skip = self.remote.skips.get(pair)
        return key in avoid or (skip is not None and skip.object.key in avoid)

    def _plan(self, avoid: set[str]) -> Path:
        skips = [self.remote.skips[pair] for pair in self._hints if pair in self.remote.skips]
        return plan(
            self.remote.chain.manifests, self.target.version,
            have=self.have, have_state=self.have_state, avoid=avoid, skips=skips,
        )  # fmt: skip

    def _follow(self, hints: Mapping[tuple[int, int], int]) -> list[tuple[int, int]]:
        """Fetch what the sketched way leads over; the skip deltas on it that are no good."""
        target, have = self.target, self.have
        self.remote.manifests([target.anchor_version])
        anchor = self.remote.chain.manifests.get(target.anchor_version)
        starts = {} if anchor is None else {anchor.version: anchor.anchor_bytes}
        if have is not None and have <= target.version:
            starts[have] = 0
        single = min((delta.object.size for delta in target.deltas), default=0)
        way = sketch(hints, target.version, starts=starts, single_bytes=single)
        self.remote.manifests(way)
        known = self.remote.chain.manifests
        pairs = [pair for pair in pairwise(way) if pair in hints]
        return [pair for pair in pairs if not set(pair) <= set(known) or self.remote.skip(*pair) is None]

    def _look_back(self) -> None:
        """Fetch all manifests that paths without skip deltas may lead over."""
        first, have = self.target.anchor_version, self.have
        if have is not None and have < self.target.version and self.target.version - have <= _MANY:
            first = min(first, have)
        self.remote.manifests(range(first, self.target.version))


def _further_back(remote: Remote) -> bool:
    """Fetch the manifests up to the anchor before the oldest known; False if there is none."""
    oldest = min(remote.chain.manifests)
    if oldest <= 1:
        return False
    try:
        before = remote.manifest(oldest - 1)
    except ObjectNotFoundError:
        return False
    remote.manifests(range(before.anchor_version, before.version))
    return True


def fetch_path(
    remote: Remote,
    target: Manifest,
    *,
    have: int | None = None,
    have_state: str | None = None,
    avoid: set[str],
    by_skips: bool = True,
    route: Route | None = None,
) -> Fetched:
    """The objects of the cheapest path to ``target`` that is intact; keys of bad objects are added to ``avoid``.

    ``route`` is one that was made for this target before.

    Raises:
        NoPathError: there is none.
        RetryError: the store does not answer.
    """
    began = time.perf_counter()
    route = route or Route(remote, target, have=have, have_state=have_state, by_skips=by_skips)
    bad: Exception | None = None
    while True:
        try:
            path = route.find(avoid)
        except NoPathError as error:
            raise (NoPathError(f"{error} (last damage seen: {bad})", **error.facts) if bad else error) from bad
        refs = [*path.anchor, *(hop.delta.object for hop in path.hops)]

        def get(ref: ObjectRef) -> bytes | RefetchError:
            try:
                return remote.fetch(ref, target.hash)
            except RefetchError as error:
                avoid.add(ref.key)
                if ref.key.startswith(SKIPS_PREFIX):
                    _log.warning("a skip delta is not used: %s", error)
                return error

        with ThreadPoolExecutor(min(remote.connections, max(len(refs), 1))) as pool:
            got = list(pool.map(get, refs))
        errors = [item for item in got if isinstance(item, RefetchError)]
        if errors:
            bad = errors[0]
            continue
        data = [item for item in got if isinstance(item, bytes)]
        cut = len(path.anchor)
        return Fetched(path, data[:cut], data[cut:], sum(map(len, data)), time.perf_counter() - began)


def fetch_state(
    remote: Remote,
    target: Manifest,
    *,
    avoid: set[str] | None = None,
    fetched: Fetched | None = None,
    threads: int = 0,
    progress: Progress | None = None,
) -> HostState:
    """The state of ``target``, built from nothing and proved by its digest.

    ``fetched`` is a path from an anchor whose objects are at hand; it is tried first, and used up.

    Raises:
        NoPathError: no intact path.
        RetryError: the store does not answer.
    """
    avoid = set() if avoid is None else avoid
    while True:
        if fetched is None:
            fetched = fetch_path(remote, target, avoid=avoid)
        try:
            return _build(fetched, target, threads, progress)
        except _BadSkipError as error:
            avoid.add(error.key)
            fetched = None
        except (RefetchError, RebaseError, MalformedError):  # as published, and yet of no use: this way is out
            avoid.update(ref.key for ref in fetched.path.anchor)
            avoid.update(hop.delta.object.key for hop in fetched.path.hops)
            fetched = None


class _BadSkipError(Exception):
    """A skip delta does not do what its record says."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _patched(
    hop: Hop,
    data: bytes,
    layouts: dict[str, Layout],
    cells: dict[str, Cells],
    aliases: Mapping[str, str],
    threads: int,
    progress: Progress | None,
) -> ApplyReport:
    """Apply one patch of a path. Raises _BadSkipError for a skip delta, whatever is wrong with it."""
    try:
        patch = Patch.parse(data)
        if hop.skip and (patch.parent, patch.result) != (hop.delta.base_state, hop.state):
            raise MalformedError("the patch leads elsewhere than its record says")
        return apply_patch(patch, layouts, cells, aliases=aliases, threads=threads, progress=progress)
    except (RefetchError, RebaseError, RefuseError) as error:
        if not hop.skip:
            raise
        _log.warning("the skip delta to version %d is not used: %s", hop.version, error)
        raise _BadSkipError(hop.delta.object.key) from error


def _build(fetched: Fetched, target: Manifest, threads: int, progress: Progress | None) -> HostState:
    began = time.perf_counter()
    layouts, views, aliases = read_shards(fetched.anchor)
    fetched.anchor.clear()
    cells = {}
    for name in list(views):  # a shard's memory is free again when its last tensor has been copied
        cells[name] = views.pop(name).copy()
    seconds = {"fetch": fetched.seconds, "decode": 0.0, "apply": 0.0, "verify": 0.0}
    if not fetched.patches:
        start = time.perf_counter()
        digest = tree_of(layouts, cells, aliases, hash_name=target.hash, threads=threads, progress=progress).digest
        seconds["verify"] = time.perf_counter() - start
        if digest != target.state:
            raise DamagedObjectError(
                f"the anchor of version {target.version} holds state {digest}, its manifest says {target.state}",
                expected=target.state,
                actual=digest,
            )
    for hop, data in zip(fetched.path.hops, fetched.patches, strict=True):
        report = _patched(hop, data, layouts, cells, aliases, threads, progress)
        aliases = dict(report.tree.aliases)
        digest = report.tree.digest
        for stage in ("decode", "apply", "verify"):
            seconds[stage] += report.seconds[stage]
    if digest != target.state:
        raise DamagedObjectError(f"the path to version {target.version} ends at state {digest}, not {target.state}")
    seconds["total"] = fetched.seconds + time.perf_counter() - began
    return HostState(layouts, cells, aliases, target.version, digest, fetched.size, len(fetched.patches), seconds)


def snapshot_of(state: HostState, *, hash_name: str, threads: int = 0) -> Snapshot:
    """A publisher's snapshot over the same memory."""

    def leaves_of(name: str) -> list[bytes]:
        step = block_cells(state.layouts[name].dtype.cell_bytes)
        cells = state.cells[name]
        return [hash_block(hash_name, cells[i : i + step]) for i in range(0, cells.size, step)]

    with ThreadPoolExecutor(thread_count(threads)) as pool:
        leaves = dict(zip(state.layouts, pool.map(leaves_of, state.layouts), strict=True))
    infos: Mapping[str, TensorInfo] = {
        n: TensorInfo(x.dtype.name, x.shape, tensor_digest(hash_name, x.dtype.name, x.shape, leaves[n]))
        for n, x in state.layouts.items()
    }
    return Snapshot(state.layouts, state.cells, leaves, Tree(hash_name, infos, state.aliases))
