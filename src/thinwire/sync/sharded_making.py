"""How ranks make a version together: they agree on who publishes what, find what to start from, encode, name objects.

Nothing is uploaded here. Every rank makes the same calls; where one fails, all do, and none believes that its snapshot
is of a version that was never made.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, final

import torch

from thinwire.errors import MisuseError, NoPathError, RebaseError, RefetchError
from thinwire.sync.anchor import write_shards
from thinwire.sync.chunking import Shard, plan_chunks
from thinwire.sync.encode import Options, Progress, Snapshot, make_patch, take_snapshot
from thinwire.sync.host import HostState, snapshot_of
from thinwire.sync.ranks import Ranks, agree
from thinwire.sync.remote import Remote, hash_bytes
from thinwire.sync.sharded_state import fetch_share, regions
from thinwire.sync.shards import ChunkSource, Entries, Held, assemble, held_by, local_state, shards_of
from thinwire.sync.share import Meter, Share, fetch_map
from thinwire.wire.chunks import Box, Chunk, ChunkMap
from thinwire.wire.manifest import DeltaRef, Manifest, ObjectRef, Parent, Part, state_of_parts
from thinwire.wire.patch import Patch

__all__ = ["Cut", "Making", "PartMaker", "Word", "new_word"]


class Cut(NamedTuple):
    """How a publisher cuts and codes; the same on all ranks."""

    dtype: torch.dtype | None
    values: str
    hash: str
    slices: int
    group_cells: int


class Word(NamedTuple):
    """What rank 0 says, and all take."""

    step: int | None
    metadata: dict[str, str]
    token: str


class _Sums(NamedTuple):
    """Of all ranks together: bytes of the patches and of the state, changed elements and all of them."""

    patch_bytes: int
    full_bytes: int
    changed: int
    elements: int


@dataclass(slots=True)
class Making:
    """A version that is made but not committed: its manifest, unsigned, and this rank's objects to upload."""

    manifest: Manifest
    uploads: list[tuple[ObjectRef, list[bytes | memoryview]]]
    total_bytes: int
    began: float
    seconds: dict[str, float] = field(default_factory=dict)


def _group_of(name: str) -> str:
    return name[:6]


@final
class PartMaker:
    """Makes this rank's part of one version after another; holds its snapshot and the map of chunks.

    ``shard_bytes_max`` is the size of an anchor's files.
    """

    def __init__(self, ranks: Ranks, remote: Remote, cut: Cut, options: Options, *, shard_bytes_max: int) -> None:
        self.ranks, self.remote, self.cut, self.options = ranks, remote, cut, options
        self.shard_bytes_max = shard_bytes_max
        self._keys: list[str] = []
        self._map: ChunkMap | None = None
        self._map_digest = ""
        self._snapshot: Snapshot | None = None
        self._snapshot_of = ""

    def forget(self) -> None:
        """The snapshot is of no version any more."""
        self._snapshot = None

    def make(
        self,
        model: Entries,
        head: Manifest | None,
        word: Word,
        *,
        chain_bytes: int,
        anchor_ratio: float,
        anchor_every: int | None,
        progress: Progress | None = None,
    ) -> Making:
        """The version after ``head``. ``chain_bytes`` are those of the patches since its anchor.

        Raises:
            MisuseError: ranks disagree, or together do not hold every tensor exactly.
            RetryError: the store, or a rank, does not answer.
        """
        began = time.perf_counter()
        held, shards = self._held(model)
        word = self._plan(shards, word)
        assert self._map is not None
        mine = [chunk for chunk in self._map.chunks() if chunk.part == self.ranks.rank]
        try:
            source = ChunkSource(held, mine, self.cut.dtype)
            base = self._agreed_base(source, mine, head)
            based = time.perf_counter()
            patch, sums = self._encode(source, base, progress)
            encoded = time.perf_counter()
            recut = head is None or head.tree.digest != self._map_digest
            since = 0 if head is None else head.version + 1 - head.anchor_version
            by_count = anchor_every is not None and since >= anchor_every
            by_bytes = chain_bytes + sums.patch_bytes > anchor_ratio * sums.full_bytes
            anchored = patch is None or recut or by_count or by_bytes
            made = self._assemble(head, patch, word, sums, anchored=anchored, began=began)
        except BaseException:
            self.forget()
            raise
        made.seconds = {"base": based - began, "encode": encoded - based}
        return made

    def _held(self, model: Entries) -> tuple[dict[str, Held], list[Shard]]:
        """This rank's shards, and what it tells of them."""
        held: dict[str, Held] = {}
        shards: list[Shard] = []

        def look() -> None:
            held.update(held_by(model))
            shards.extend(shards_of(held, local_state(held, self.cut.dtype)))

        agree(self.ranks, look)
        return held, shards

    def _plan(self, mine: list[Shard], word: Word) -> Word:
        """Agree on the map of chunks; rank 0's word."""
        key = hashlib.sha256(repr((self.cut, mine)).encode()).hexdigest()
        told = self.ranks.gather((self.cut, key, word))
        if len({cut for cut, _, _ in told}) > 1:
            raise MisuseError("ranks publish with different settings (dtype, values, hash, slices or group_cells)")
        keys = [key for _, key, _ in told]
        if keys != self._keys:
            tables = self.ranks.gather(mine)
            self._map = plan_chunks(tables, slices=self.cut.slices, group_cells=self.cut.group_cells)
            self._map_digest = hash_bytes(self.cut.hash, [self._map.encode()])
            self._keys = keys
        return Word(*told[0][2])

    # --- what to start from ----------------------------------------------------------------------------------------

    def _agreed_base(self, source: ChunkSource, mine: list[Chunk], head: Manifest | None) -> Snapshot | None:
        """The base, if every rank has one."""
        bases: list[Snapshot] = []

        def find() -> bool:
            base = None if head is None else self._base(source, mine, head)
            bases.extend([] if base is None else [base])
            return bool(bases)

        return bases[0] if all(agree(self.ranks, find)) else None

    def _base(self, source: ChunkSource, mine: list[Chunk], head: Manifest) -> Snapshot | None:
        """This rank's part of the head's state in today's chunks: from memory, the model, or the store. None: none."""
        threads = self.options.threads
        if self._snapshot is not None and self._snapshot.intact and self._snapshot_of == self._map_digest:
            return self._snapshot
        self.forget()
        if head.tree.digest == self._map_digest:
            fresh = take_snapshot(source, hash_name=self.cut.hash, threads=threads)
            if fresh.tree.digest == head.parts[self.ranks.rank].state:
                return fresh
            del fresh
        before = fetch_map(self.remote, head)
        wanted: dict[str, list[Box]] = {}
        assert self._map is not None
        for chunk in mine:
            then, now = before.tensors.get(chunk.tensor), self._map.tensors[chunk.tensor]
            if then is None or (then.dtype, then.shape) != (now.dtype, now.shape):
                return None  # other tensors than before: an anchor tells them best
            wanted.setdefault(chunk.tensor, []).append(chunk.box)
        try:
            state = fetch_share(self.remote, head, Share.of(before, wanted), threads=threads, meter=Meter())
        except (NoPathError, RefetchError, RebaseError):
            return None
        pieces = regions(state.share, state.cells)
        cells = {
            chunk.name: assemble(chunk.box, source.layouts[chunk.name].dtype, pieces.get(chunk.tensor, ()))
            for chunk in sorted(mine, key=lambda chunk: chunk.name)
        }
        host = HostState(dict(source.layouts), cells, {}, head.version, head.state)
        return snapshot_of(host, hash_name=self.cut.hash, threads=threads)

    # --- what to publish -------------------------------------------------------------------------------------------

    def _encode(
        self, source: ChunkSource, base: Snapshot | None, progress: Progress | None
    ) -> tuple[Patch | None, _Sums]:
        """Take the snapshot to the new state; the patch that leads there, if there is a base."""
        self._snapshot, self._snapshot_of = None, self._map_digest
        patches: list[Patch] = []

        def encode() -> _Sums:
            if base is None:
                taken = take_snapshot(source, hash_name=self.cut.hash, threads=self.options.threads)
                elements = sum(layout.cells for layout in taken.layouts.values())
                self._snapshot = taken
                return _Sums(0, taken.size, elements, elements)
            patch = make_patch(base, source, self.options, progress=progress, group_of=_group_of)
            patches.append(patch)
            self._snapshot = base
            return _Sums(sum(map(len, patch.encode())), base.size, patch.changed, patch.cells)

        rows = agree(self.ranks, encode)
        return (patches[0] if patches else None), _Sums(*(sum(column) for column in zip(*rows, strict=True)))

    def _assemble(
        self, head: Manifest | None, patch: Patch | None, word: Word, sums: _Sums, *, anchored: bool, began: float
    ) -> Making:
        snapshot, chunks, rank = self._snapshot, self._map, self.ranks.rank
        assert snapshot is not None
        assert chunks is not None
        version = head.version + 1 if head is not None else 1
        uploads: list[tuple[ObjectRef, list[bytes | memoryview]]] = []

        def add(name: str, buffers: list[bytes | memoryview]) -> ObjectRef:
            size, key = sum(map(len, buffers)), f"objects/{version:010d}-{word.token}/{name}"
            ref = ObjectRef(key, size, hash_bytes(self.cut.hash, buffers))
            uploads.append((ref, buffers))
            return ref

        tree = add(f"{rank:05d}-tree.json", [snapshot.tree.encode()])
        deltas: tuple[DeltaRef, ...] = ()
        if patch is not None and head is not None:
            deltas = (DeltaRef(head.version, patch.parent, add(f"{rank:05d}-delta.safetensors", patch.encode())),)
        anchor: tuple[ObjectRef, ...] = ()
        if anchored:
            meta = {"thinwire.version": str(version), "thinwire.part": f"{rank} of {self.ranks.size}"}
            shards = write_shards(
                snapshot.layouts, snapshot.cells, {}, metadata=meta, shard_bytes_max=self.shard_bytes_max
            )
            anchor = tuple(add(f"{rank:05d}-{shard.name}", shard.buffers) for shard in shards)
        table = head.tree if head is not None and head.tree.digest == self._map_digest else None
        if table is None and rank == 0:
            table = add("chunks.json", [chunks.encode()])
        mine = Part(snapshot.tree.digest, tree, deltas, anchor)
        answers = self.ranks.gather((mine, table, sum(ref.size for ref, _ in uploads)))
        parts, table = tuple(part for part, _, _ in answers), answers[0][1]
        assert table is not None
        manifest = Manifest(
            version=version,
            state=state_of_parts(self.cut.hash, table.digest, (part.state for part in parts)),
            hash=self.cut.hash,
            parent=None if head is None else Parent(head.version, head.digest),
            tree=table,
            deltas=(),
            anchor=(),
            anchor_version=version if anchored or head is None else head.anchor_version,
            step=word.step,
            facts={
                "changed": sums.changed,
                "created_ms": time.time_ns() // 10**6,
                "elements": sums.elements,
                "state_bytes": sums.full_bytes,
            },
            metadata=word.metadata,
            parts=parts,
        )
        return Making(manifest, uploads, sum(size for _, _, size in answers), began)


def new_word(step: int | None, metadata: Mapping[str, str] | None) -> Word:
    """What a rank would say if it were rank 0."""
    return Word(step, dict(metadata or {}), secrets.token_hex(6))
