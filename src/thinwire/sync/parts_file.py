"""A checkpoint file that is kept at versions in parts: it holds whole tensors, as any tool reads them, and is cut into
the parts' chunks only to be proved and patched.

The digest of a state in parts depends on how it is cut, so that of a file's tensors cannot be compared with it. What a
file claims to be is proved through the map of chunks and the parts of the version that it names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from os import PathLike

import numpy as np
import numpy.typing as npt

from thinwire.chain.parts import delta_key
from thinwire.chain.plan import Path
from thinwire.errors import MalformedError, NoPathError, ObjectNotFoundError, RebaseError, RefetchError
from thinwire.sync.apply import apply_patch, tree_of
from thinwire.sync.checkpoint import Checkpoint, tensors_of
from thinwire.sync.files import Stages, stage_of
from thinwire.sync.host import HostState
from thinwire.sync.layout import Layout, MemorySource
from thinwire.sync.remote import Remote
from thinwire.sync.rewrite import change_file
from thinwire.sync.sharded_state import fetch_share, known_since, map_of, regions, way_to
from thinwire.sync.sharded_target import ShareTarget
from thinwire.sync.shards import assemble, held_by
from thinwire.sync.share import Meter, Proof, Share, fetch_patch
from thinwire.wire.chunks import ChunkMap
from thinwire.wire.digests import TensorInfo, Tree
from thinwire.wire.manifest import Manifest
from thinwire.wire.patch import Patch
from thinwire.wire.spec import dtype_of

__all__ = ["PartsFile"]

Cells = npt.NDArray[np.unsignedinteger]
_Hop = tuple[Manifest, Patch, Proof]


class PartsFile:
    """Proves a file, patches it, or fetches a version whole.

    Args:
        remote: a chain that may hold versions in parts.
        avoid: keys of what is of no use, as :mod:`thinwire.chain.parts` makes them; added to here, cleared by the
            caller.
        warn: told what goes wrong on the way.
    """

    def __init__(
        self, remote: Remote, *, avoid: set[str], threads: int, stages: Stages | None, warn: Callable[[str], None]
    ) -> None:
        self.remote, self.avoid, self.threads, self.stages, self.warn = remote, avoid, threads, stages, warn
        self._maps: dict[str, ChunkMap] = {}
        self._known: tuple[str, Tree] | None = None  # the state that the file was last proved to hold, and its chunks
        self._damage = ""

    def holds(self, checkpoint: Checkpoint, manifest: Manifest) -> bool:
        """Whether the file's tensors are those of a version, bit by bit. Reads all of them, one at a time.

        Raises:
            NoPathError: the version's map of chunks cannot be had.
            RetryError: the store does not answer.
        """
        share = self._share(manifest)
        source, whole = checkpoint.map(), _layouts(share.chunks)
        if source.layouts != whole or source.aliases != dict(share.chunks.aliases):
            return False
        infos: dict[str, TensorInfo] = {}
        total, done = share.size, 0
        report = stage_of(self.stages, "hash")
        for name, tensor in share.chunks.tensors.items():
            layouts = {chunk.full_name: share.layouts[chunk.full_name] for chunk in tensor.chunks}
            pieces = [(tensor.box, source.cells[name])]
            cells = {c.full_name: assemble(c.box, whole[name].dtype, pieces) for c in tensor.chunks}
            infos.update(tree_of(layouts, cells, {}, hash_name=manifest.hash, threads=self.threads).tensors)
            done += whole[name].size
            if report is not None:
                report(done, total)
        tree = Tree(manifest.hash, infos, {})
        if not Proof(self.remote, manifest, share, Meter())(tree):
            return False
        self._known = manifest.state, tree
        return True

    def _share(self, manifest: Manifest) -> Share:
        try:
            return Share.of(map_of(self.remote, manifest, self._maps), None)
        except (RefetchError, MalformedError) as error:
            raise NoPathError(f"the map of chunks of version {manifest.version} cannot be had: {error}") from error

    # --- from nothing ----------------------------------------------------------------------------------------------

    def fetch(self, target: Manifest) -> HostState:
        """The state of a version as whole tensors, proved.

        Raises:
            NoPathError: no intact objects lead there.
            RetryError: the store does not answer.
        """
        share, meter = self._share(target), Meter()
        try:
            state = fetch_share(
                self.remote, target, share,
                meter=meter, avoid=self.avoid, threads=self.threads, progress=stage_of(self.stages, "apply"),
            )  # fmt: skip
        except NoPathError as error:
            seen = f" (damage seen before: {self._damage})" if self._damage else ""
            raise NoPathError(f"{error}{seen}", **error.facts) from error
        self._known = target.state, state.tree
        pieces, layouts = regions(share, state.cells), _layouts(share.chunks)
        state.cells.clear()
        cells = {n: assemble(t.box, layouts[n].dtype, pieces.pop(n)) for n, t in share.chunks.tensors.items()}
        return HostState(
            layouts, cells, dict(share.chunks.aliases), target.version, target.state, meter.bytes, state.hops,
            state.seconds,
        )  # fmt: skip

    # --- from a version that the file holds ------------------------------------------------------------------------

    def patch(
        self,
        checkpoint: Checkpoint,
        version: int,
        state: str,
        target: Manifest,
        out: str | PathLike[str],
        *,
        metadata: Mapping[str, str],
    ) -> tuple[int, int] | None:
        """Bring the file, which says that it is ``version`` with ``state``, to ``target`` under the name ``out``, where
        patches do that with fewer bytes than an anchor: the number of patches, and the bytes fetched. None: they do
        not, are of no use, or start from something else; ``out`` is as it was.

        The file is proved before it is patched, and what comes of it before it gets its name. Memory: the patches, and
        chunks that do not lie in one piece in their tensor (all that are cut by columns).

        Raises:
            RetryError: the store does not answer.
        """
        try:
            base = self.remote.manifest(version)
        except ObjectNotFoundError:
            return None
        if not base.parts or base.state != state:
            return None
        known_since(self.remote, target, version)
        if self._way(target, version) is None:
            return None
        if not (self._known is not None and self._known[0] == state) and not self.holds(checkpoint, base):
            self.warn(f"{checkpoint.path} says it is version {version} and is not; it is fetched anew")
            return None
        share, meter, self._damage = self._share(target), Meter(), ""
        hops = self._hops(target, version, share, meter)
        if not hops:
            return None
        try:
            tree = change_file(
                checkpoint, lambda source: self._apply(source, share, hops), out, metadata=metadata, stages=self.stages
            )
        except (RefetchError, RebaseError, MalformedError) as error:
            if not isinstance(error, RebaseError):  # else it is the file that is at fault
                self.avoid.update(delta_key(manifest.version) for manifest, _, _ in hops)
            self._known = None
            self.warn(f"the patches to version {target.version} cannot be used, trying another way: {error}")
            return None
        self._known = target.state, tree
        return len(hops), meter.bytes

    def _way(self, target: Manifest, version: int) -> Path | None:
        """The patches from ``version`` to ``target``; None if an anchor is cheaper, or none lead there."""
        try:
            path = way_to(self.remote, target, have=version, avoid=self.avoid, across=False)
        except NoPathError:
            return None
        return path if path.anchor_version is None else None

    def _hops(self, target: Manifest, version: int, share: Share, meter: Meter) -> list[_Hop]:
        """The patches from ``version`` to ``target``, fetched; none if an anchor must do."""
        while (path := self._way(target, version)) is not None:
            found: list[_Hop] = []
            for hop in path.hops:
                manifest = self.remote.chain.manifests[hop.version]
                try:
                    patch = fetch_patch(self.remote, manifest, share, meter, parent="")
                    found.append((manifest, patch, Proof(self.remote, manifest, share, meter)))
                except (RefetchError, MalformedError) as error:
                    self._damage = str(error)
                    self.avoid.add(delta_key(hop.version))
                    break
            else:
                return found
        return []

    def _apply(self, source: MemorySource, share: Share, hops: list[_Hop]) -> Tree:
        """Change the cells of all tensors by the patches; the chunks' tree after them."""
        assert self._known is not None
        tree = self._known[1]
        target = ShareTarget(held_by(tensors_of(source)), share, {}, read=True)
        for _, patch, proof in hops:
            tree = apply_patch(
                replace(patch, parent=tree.digest), dict(target.layouts), target.cells,
                threads=self.threads, progress=stage_of(self.stages, "apply"), agrees=proof,
            ).tree  # fmt: skip
        target.commit()
        return tree


def _layouts(chunks: ChunkMap) -> dict[str, Layout]:
    return {name: Layout(dtype_of(tensor.dtype), tensor.shape) for name, tensor in chunks.tensors.items()}
