"""A state held in host memory, and how it is fetched from a chain, whole or hop by hop."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from thinwire.chain.plan import Path, plan
from thinwire.errors import (
    DamagedObjectError,
    MalformedError,
    NoPathError,
    ObjectNotFoundError,
    RebaseError,
    RefetchError,
)
from thinwire.sync.anchor import read_shards
from thinwire.sync.apply import apply_patch, tree_of
from thinwire.sync.encode import Progress, Snapshot, thread_count
from thinwire.sync.layout import Layout
from thinwire.sync.remote import Remote
from thinwire.tensors.digest import block_cells, hash_block
from thinwire.wire.digests import TensorInfo, Tree, tensor_digest
from thinwire.wire.manifest import Manifest, ObjectRef
from thinwire.wire.patch import Patch

__all__ = ["Fetched", "HostState", "fetch_path", "fetch_state", "snapshot_of"]

Cells = npt.NDArray[np.unsignedinteger]

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


def _look_back(remote: Remote, target: Manifest, have: int | None) -> None:
    """Fetch the manifests that paths to ``target`` may lead over."""
    first = target.anchor_version
    if have is not None and have < target.version and target.version - have <= _MANY:
        first = min(first, have)
    remote.manifests(range(first, target.version))


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
    remote: Remote, target: Manifest, *, have: int | None = None, have_state: str | None = None, avoid: set[str]
) -> Fetched:
    """The objects of the cheapest path to ``target`` that is intact; keys of bad objects are added to ``avoid``.

    Raises:
        NoPathError: there is none.
        RetryError: the store does not answer.
    """
    began = time.perf_counter()
    _look_back(remote, target, have)
    bad: Exception | None = None
    while True:
        try:
            path = plan(remote.chain.manifests, target.version, have=have, have_state=have_state, avoid=avoid)
        except NoPathError as error:
            if _further_back(remote):
                continue
            raise (NoPathError(f"{error} (last damage seen: {bad})", **error.facts) if bad else error) from bad
        refs = [*path.anchor, *(hop.delta.object for hop in path.hops)]

        def get(ref: ObjectRef) -> bytes | RefetchError:
            try:
                return remote.fetch(ref, target.hash)
            except RefetchError as error:
                avoid.add(ref.key)
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
        except (RefetchError, RebaseError, MalformedError):  # as published, and yet of no use: this way is out
            avoid.update(ref.key for ref in fetched.path.anchor)
            avoid.update(hop.delta.object.key for hop in fetched.path.hops)
            fetched = None


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
    for data in fetched.patches:
        report = apply_patch(Patch.parse(data), layouts, cells, aliases=aliases, threads=threads, progress=progress)
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
