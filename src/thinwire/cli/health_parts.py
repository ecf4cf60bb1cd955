"""Is a store of versions in parts whole? Maps and trees that fit, versions whose every chunk is what its tree says."""

from __future__ import annotations

from collections.abc import Set
from typing import TYPE_CHECKING, Any

from thinwire.cli.health import RETRY_S, Chain, Problem
from thinwire.errors import MalformedError, RefetchError, RefuseError, ThinwireError, UntrustedError
from thinwire.sync.collector import expected_objects
from thinwire.sync.retrying import retrying
from thinwire.wire.chunks import ChunkMap
from thinwire.wire.digests import Tree
from thinwire.wire.manifest import Manifest, manifest_key

if TYPE_CHECKING:
    from thinwire.stores.protocol import Store
    from thinwire.sync.files import Stages
    from thinwire.sync.sharded_state import ShareWalker
    from thinwire.sync.share import Share

__all__ = ["check_parts", "replay_parts"]


def check_parts(store: Store, manifest: Manifest, bad: Set[str]) -> list[Problem]:
    """The map must have as many parts as the manifest, each part's tree its chunks, and the digest that is named.

    Objects in ``bad`` have been told of.
    """
    try:
        ref = manifest.tree
        chunks = ChunkMap.parse(retrying(lambda: store.get(ref.key, size_max=ref.size), limit_s=RETRY_S))
        if chunks.parts != len(manifest.parts):
            raise MalformedError(f"it is of {chunks.parts} parts, version {manifest.version} has {len(manifest.parts)}")
    except (RefuseError, RefetchError) as error:
        return [Problem.of(manifest.tree.key, error)]
    names: list[set[str]] = [set() for _ in manifest.parts]
    for chunk in chunks.chunks():
        names[chunk.part].add(chunk.name)
    found = []
    for part, expected in zip(manifest.parts, names, strict=True):
        key, size = part.tree.key, part.tree.size
        if key in bad:
            continue
        try:
            tree = Tree.parse(retrying(lambda k=key, n=size: store.get(k, size_max=n), limit_s=RETRY_S))  # type: ignore[misc]
            if tree.digest != part.state:
                raise UntrustedError(f"it is the tree of state {tree.digest}, the manifest says {part.state}")
            if set(tree.tensors) != expected:
                raise MalformedError("it has other chunks than the map gives this part")
        except (RefuseError, RefetchError) as error:
            found.append(Problem.of(key, error))
    return found


def replay_parts(store: Store, chain: Chain, *, threads: int = 0, stages: Stages | None = None) -> list[Problem]:
    """Build every version that must be reachable, and every anchor, part by part, and prove each against the manifests.

    Memory holds one part of two versions.
    """
    from thinwire.sync.files import stage_of
    from thinwire.sync.remote import Remote
    from thinwire.sync.sharded_state import ShareWalker as Walker
    from thinwire.sync.share import Meter

    remote = Remote(store, retry_s=RETRY_S, in_parts=True)
    remote.manifests(sorted(chain.manifests))
    kept, _ = expected_objects(chain.manifests, chain.collected)
    found: list[Problem] = []
    for part in range(max(len(chain.manifests[version].parts) for version in kept)):
        walk = _PartWalk(Walker(remote, Meter(), threads=threads, progress=stage_of(stages, "replay")), part)
        for version in sorted(kept):
            try:
                walk.to(remote.manifest(version))
            except ThinwireError as error:
                found.append(Problem.of(manifest_key(version), error))
                walk.held = None
    return found


class _PartWalk:
    """One part, from version to version."""

    def __init__(self, walker: ShareWalker, part: int) -> None:
        self.walker, self.part = walker, part
        self.held: tuple[Manifest, Share, dict[str, Any], Tree] | None = None
        self._maps: dict[str, ChunkMap] = {}

    def to(self, manifest: Manifest) -> None:
        """Prove this version's anchor, and what its delta makes of the version before, if that is held."""
        from thinwire.sync.sharded_state import fetch_share, map_of
        from thinwire.sync.share import Share

        if self.part >= len(manifest.parts):
            self.held = None
            return
        walker, held = self.walker, self.held
        chunks = map_of(walker.remote, manifest, self._maps)
        share = Share(chunks, frozenset((c.part, c.group) for c in chunks.chunks() if c.part == self.part))
        follows = held is not None and held[0].tree.digest == manifest.tree.digest
        follows = follows and [d.base for d in manifest.parts[0].deltas] == [held[0].version]  # type: ignore[index]
        if manifest.parts[0].anchor:
            cells, tree = walker.anchor(manifest, share)
            if not follows:
                self.held = manifest, share, cells, tree
                return
        if follows and held is not None:
            _, _, cells, tree = held
            tree = walker.advance(manifest, share, cells, tree)
        else:
            state = fetch_share(walker.remote, manifest, share, meter=walker.meter, threads=walker.threads)
            cells, tree = state.cells, state.tree
        self.held = manifest, share, cells, tree
