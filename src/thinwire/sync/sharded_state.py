"""A share of a version in parts, held in host memory, and how it is fetched: from nothing, or hop by hop."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Set
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from thinwire.chain.parts import anchor_key, delta_key, plan_parts
from thinwire.chain.plan import Path
from thinwire.errors import (
    DamagedObjectError,
    MalformedError,
    NoPathError,
    ObjectNotFoundError,
    RebaseError,
    RefetchError,
    RefuseError,
)
from thinwire.sync.apply import apply_patch, tree_of
from thinwire.sync.encode import Progress
from thinwire.sync.layout import Layout
from thinwire.sync.remote import Remote
from thinwire.sync.share import Meter, Proof, Share, fetch_anchor, fetch_map, fetch_patch
from thinwire.wire.chunks import Box, ChunkMap
from thinwire.wire.digests import Tree
from thinwire.wire.manifest import Manifest

__all__ = ["ShareState", "ShareWalker", "fetch_share", "known_since", "map_of", "regions", "way_to"]

Cells = npt.NDArray[np.unsignedinteger]
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class ShareState:
    """The cells of a share's chunks, by full name, proved to be those of a version; ``tree`` is over them alone."""

    share: Share
    cells: dict[str, Cells]
    tree: Tree
    manifest: Manifest
    hops: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def layouts(self) -> dict[str, Layout]:
        return self.share.layouts


def map_of(remote: Remote, manifest: Manifest, known: dict[str, ChunkMap]) -> ChunkMap:
    """The map of chunks of a version, fetched once for all versions that are cut alike."""
    digest = manifest.tree.digest
    if digest not in known:
        known[digest] = fetch_map(remote, manifest)
    elif known[digest].parts != len(manifest.parts):
        raise MalformedError(f"version {manifest.version} has {len(manifest.parts)} parts, its map another number")
    return known[digest]


def known_since(remote: Remote, target: Manifest, have: int | None) -> None:
    """Fetch the manifests on all ways to ``target``: from its anchor, and from the version held."""
    first = target.anchor_version
    if have is not None and have < target.version:
        first = min(first, have)
    remote.manifests(range(first, target.version))


def way_to(remote: Remote, target: Manifest, *, have: int | None, avoid: Set[str], across: bool = True) -> Path:
    """The cheapest way to ``target``; looks further back for anchors when nothing intact is known.

    Raises:
        NoPathError: there is none.
    """
    while True:
        try:
            return plan_parts(remote.chain.manifests, target.version, have=have, avoid=avoid, across=across)
        except NoPathError:
            oldest = min(remote.chain.manifests)
            if oldest <= 1:
                raise
            try:
                before = remote.manifest(oldest - 1)
            except ObjectNotFoundError:
                raise NoPathError(f"no intact objects lead to version {target.version}") from None
            remote.manifests(range(before.anchor_version, before.version))


def fetch_share(
    remote: Remote,
    target: Manifest,
    share: Share,
    *,
    meter: Meter,
    avoid: Set[str] = frozenset(),
    threads: int = 0,
    progress: Progress | None = None,
) -> ShareState:
    """A share of ``target``, built from nothing and proved. ``share`` must be of the target's map.

    Raises:
        NoPathError: no intact objects lead there.
        RetryError: the store does not answer.
    """
    avoid, reason = set(avoid), ""
    known_since(remote, target, None)
    while True:
        try:
            path = way_to(remote, target, have=None, avoid=avoid)
        except NoPathError as error:
            raise NoPathError(f"{error}{f' (last damage seen: {reason})' if reason else ''}", **error.facts) from None
        try:
            return _build(ShareWalker(remote, meter, threads=threads, progress=progress), path, share)
        except _BadError as error:
            avoid.add(error.key)
            reason = str(error.__cause__)
            _log.warning("%s of version %d is not used: %s", error.key.split("/")[0], target.version, reason)


class _BadError(Exception):
    """What stands under ``key``, as the plan calls it, is of no use."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


class ShareWalker:
    """Brings shares of versions into host memory and proves them, one anchor or one patch at a time.

    ``seconds`` adds up what each stage has taken.
    """

    def __init__(self, remote: Remote, meter: Meter, *, threads: int = 0, progress: Progress | None = None) -> None:
        self.remote, self.meter, self.threads, self.progress = remote, meter, threads, progress
        self.seconds = {"fetch": 0.0, "decode": 0.0, "apply": 0.0, "verify": 0.0}

    def anchor(self, manifest: Manifest, share: Share) -> tuple[dict[str, Cells], Tree]:
        """The cells in a version's anchors; what came by ranges and is no good is asked for whole.

        Raises:
            RefetchError, RefuseError: an object is gone or damaged, or holds something else than the trees say.
            RetryError: the store does not answer.
        """
        flaws: list[str] = []
        for whole in (False, True):
            start = time.perf_counter()
            try:
                cells = fetch_anchor(self.remote, manifest, share, self.meter, whole=whole)
                proof = Proof(self.remote, manifest, share, self.meter)
            except (RefetchError, RefuseError):
                if whole:
                    raise
                continue
            fetched = time.perf_counter()
            tree = tree_of(
                share.layouts, cells, {}, hash_name=manifest.hash, threads=self.threads, progress=self.progress
            )
            flaws = proof.flaws(tree)
            self.seconds["fetch"] += fetched - start
            self.seconds["verify"] += time.perf_counter() - fetched
            if not flaws:
                return cells, tree
        raise DamagedObjectError(
            f"the anchor of version {manifest.version} is not what its trees say: {len(flaws)} chunks, such as "
            f"{flaws[0]}",
            version=manifest.version,
        )

    def advance(self, manifest: Manifest, share: Share, cells: dict[str, Cells], tree: Tree) -> Tree:
        """Change ``cells``, whose tree is ``tree``, by a version's patches; the tree after. All change, or none does.

        Raises:
            RefetchError, RefuseError, RebaseError: the patches are of no use.
            RetryError: the store does not answer.
        """
        for whole in (False, True):
            start = time.perf_counter()
            try:
                patch = fetch_patch(self.remote, manifest, share, self.meter, parent=tree.digest, whole=whole)
                proof = Proof(self.remote, manifest, share, self.meter)
                self.seconds["fetch"] += time.perf_counter() - start
                report = apply_patch(
                    patch, dict(share.layouts), cells, threads=self.threads, progress=self.progress, agrees=proof
                )
            except (RefetchError, RefuseError, RebaseError):
                if whole:
                    raise
                continue
            for stage in ("decode", "apply", "verify"):
                self.seconds[stage] += report.seconds[stage]
            return report.tree
        raise AssertionError("unreachable")


def _build(walker: ShareWalker, path: Path, share: Share) -> ShareState:
    began, manifests = time.perf_counter(), walker.remote.chain.manifests
    assert path.anchor_version is not None
    manifest = manifests[path.anchor_version]
    try:
        cells, tree = walker.anchor(manifest, share)
    except (RefetchError, RefuseError) as error:
        raise _BadError(anchor_key(path.anchor_version)) from error
    for hop in path.hops:
        manifest = manifests[hop.version]
        try:
            tree = walker.advance(manifest, share, cells, tree)
        except (RefetchError, RefuseError, RebaseError) as error:
            raise _BadError(delta_key(hop.version)) from error
    seconds = {**walker.seconds, "total": time.perf_counter() - began}
    return ShareState(share, cells, tree, manifest, len(path.hops), seconds)


def regions(share: Share, cells: Mapping[str, Cells]) -> dict[str, list[tuple[Box, Cells]]]:
    """The cells of a share by tensor, each with its box."""
    found: dict[str, list[tuple[Box, Cells]]] = {}
    for chunk in share.members:
        found.setdefault(chunk.tensor, []).append((chunk.box, cells[chunk.full_name]))
    return found
