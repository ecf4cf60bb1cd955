"""A folder whose ``model.safetensors`` is some published version, always: what ``pull`` and ``follow`` keep up to date.

The file says which version it is, in its metadata; whether it is that is proved by digests. An update changes a copy of
the file and gives it the name, so that whoever reads the file sees one version or the other, and a process that is
killed at any moment leaves a version behind from which the next one goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from thinwire.errors import (
    MalformedError,
    MisuseError,
    NoPathError,
    RebaseError,
    RefetchError,
    RefuseError,
    UntrustedError,
)
from thinwire.sync.anchor import write_shards
from thinwire.sync.checkpoint import Checkpoint, open_checkpoint, tree_of_checkpoint
from thinwire.sync.files import Stages, stage_of, write_file
from thinwire.sync.host import Route, fetch_path, fetch_state
from thinwire.sync.parts_file import PartsFile
from thinwire.sync.remote import Remote
from thinwire.sync.rewrite import padded, patch_checkpoint
from thinwire.wire.container import PREFIX_BYTES
from thinwire.wire.manifest import Manifest
from thinwire.wire.patch import Patch

__all__ = ["FILE_NAME", "MEMORY_NAME", "Mirror", "Update"]

FILE_NAME = "model.safetensors"
MEMORY_NAME = ".thinwire.seen.json"
"""What a follower that pins keys has seen of the store (:class:`thinwire.sync.trust.Memory`)."""
VERSION_KEY, STATE_KEY = "thinwire.version", "thinwire.state"
_LOCK_NAME = ".thinwire.lock"
_SPARE_BYTES = 64  # of the header, so that it can name later versions without moving the tensors


@dataclass(frozen=True, slots=True)
class Update:
    """How the folder came to a version: ``held`` (it was there), ``delta``, ``anchor`` or ``anchor+delta``."""

    version: int
    step: int | None
    state: str
    file: str
    path: str
    hops: int
    bytes_fetched: int
    seconds: float


@dataclass(frozen=True, slots=True)
class _Held:
    """What the file in the folder says of itself."""

    checkpoint: Checkpoint
    version: int
    state: str


class Mirror:
    """Args: the folder, which is made; the chain, of whole versions or in parts; a callback for progress and one for
    warnings.

    Raises:
        MisuseError: the folder cannot be made, or :meth:`locked` by somebody else.
    """

    def __init__(
        self, folder: Path, remote: Remote, *, threads: int, stages: Stages | None, warn: Callable[[str], None]
    ) -> None:
        self.folder, self.file, self.remote = folder, folder / FILE_NAME, remote
        self.threads, self.stages, self.warn = threads, stages, warn
        self.avoid: set[str] = set()
        self._proved: str | None = None
        self._parts: PartsFile | None = None
        folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep others out, and clear away what a killed one left. The lock ends with the process, however it ends."""
        try:
            import fcntl
        except ImportError:  # pragma: no cover - not on Windows
            yield
            return
        with open(self.folder / _LOCK_NAME, "ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise MisuseError(
                    f"another pull or follow is at work in {self.folder}; use another folder", path=str(self.folder)
                ) from error
            for leftover in self.folder.glob(f".{FILE_NAME}.*.tmp"):
                with suppress(FileNotFoundError):
                    leftover.unlink()
            yield

    def version(self) -> int:
        """The version that the file claims to be; 0 without a file."""
        held = self._held()
        return held.version if held else 0

    def _held(self) -> _Held | None:
        if not self.file.exists():
            return None
        try:
            checkpoint = open_checkpoint(self.file)
            metadata = checkpoint.files[0].header.metadata
            return _Held(checkpoint, int(metadata[VERSION_KEY]), metadata[STATE_KEY])
        except (RefuseError, KeyError, ValueError) as error:
            why = str(error) if isinstance(error, RefuseError) else "it names no version"
            raise MisuseError(
                f"{self.file} is not one that thinwire pulled ({why}), so it is not replaced; "
                "use another folder, or remove it",
                path=str(self.file),
            ) from error

    def newest(self) -> Manifest | None:
        """The store's newest version, or None if it has none.

        Raises:
            UntrustedError: the folder has seen a newer one.
        """
        found = self.remote.newest()
        if found is None and self.remote.chain.floor:
            older = Remote(self.remote.store, retry_s=self.remote.retry_s, in_parts=True).newest()
            if older is not None:
                raise UntrustedError(
                    f"the store's newest version is {older.version}, but {self.folder} holds version "
                    f"{self.remote.chain.floor}: a rollback. If that is meant, name the version, or use another folder",
                    offered=older.version,
                    seen=self.remote.chain.floor,
                )
        return found

    def bring_to(self, target: Manifest) -> Update:
        """Make the file that of ``target``.

        Raises:
            NoPathError: no intact objects lead there. The file is as it was.
            MisuseError: the file is not one that was written here.
            RetryError: the store does not answer.
        """
        began = time.perf_counter()
        held = self._held()
        path, hops, size = "held", 0, 0
        if (
            held is None
            or (held.version, held.state) != (target.version, target.state)
            or not self._is_intact(held, target)
        ):
            patched = self._by_deltas(held, target) if held is not None and held.version < target.version else None
            path, hops, size = self._whole(target) if patched is None else ("delta", *patched)
        self._proved = target.state
        return Update(
            target.version, target.step, target.state, str(self.file), path, hops, size, time.perf_counter() - began
        )

    def _is_intact(self, held: _Held, target: Manifest) -> bool:
        if self._proved == target.state:
            return True
        if target.parts:
            intact = self._in_parts().holds(held.checkpoint, target)
        else:
            tree = tree_of_checkpoint(held.checkpoint, hash_name=target.hash, threads=self.threads, stages=self.stages)
            intact = tree.digest == target.state
        if intact:
            return True
        self.warn(f"{self.file} says it is version {held.version} and is not; it is fetched anew")
        return False

    def _in_parts(self) -> PartsFile:
        if self._parts is None or self._parts.remote is not self.remote:
            self._parts = PartsFile(
                self.remote, avoid=self.avoid, threads=self.threads, stages=self.stages, warn=self.warn
            )
        return self._parts

    def _by_deltas(self, held: _Held, target: Manifest) -> tuple[int, int] | None:
        """Patch the file, if that is the cheapest way: how many patches, and bytes; None if it is not, or does not work
        out."""
        if target.parts:
            return self._in_parts().patch(
                held.checkpoint, held.version, held.state, target, self.file, metadata=_metadata(target)
            )
        route = Route(self.remote, target, have=held.version, have_state=held.state)
        try:
            if route.find(self.avoid).anchor_version is not None:
                return None
            fetched = fetch_path(self.remote, target, route=route, avoid=self.avoid)
        except NoPathError:
            return None
        if fetched.path.anchor_version is not None:
            return None
        try:
            patches = [Patch.parse(data) for data in fetched.patches]
            for patch, hop in zip(patches, fetched.path.hops, strict=True):
                if (patch.parent, patch.result) != (hop.delta.base_state, hop.state):
                    raise MalformedError(f"the patch to version {hop.version} leads elsewhere than its manifest says")
            patch_checkpoint(
                held.checkpoint, patches, self.file,
                metadata=_metadata(target), threads=self.threads, stages=self.stages,
            )  # fmt: skip
        except (RefetchError, RebaseError, MalformedError) as error:
            if not isinstance(error, RebaseError):  # else it is the file that is at fault
                hops = fetched.path.hops
                skips = [hop for hop in hops if hop.skip]  # what manifests do not name is doubted first
                self.avoid.update(hop.delta.object.key for hop in skips or hops)
            self.warn(f"the patches to version {target.version} cannot be used, trying another way: {error}")
            return None
        return len(fetched.patches), fetched.size

    def _whole(self, target: Manifest) -> tuple[str, int, int]:
        if target.parts:
            state = self._in_parts().fetch(target)
        else:
            state = fetch_state(
                self.remote, target, avoid=self.avoid, threads=self.threads, progress=stage_of(self.stages, "apply")
            )
        shard = write_shards(
            state.layouts, state.cells, state.aliases, metadata=_metadata(target), shard_bytes_max=1 << 62
        )[0]
        header = bytes(shard.buffers[0])
        start = padded(header, len(header) - PREFIX_BYTES + _SPARE_BYTES)
        write_file(self.file, [start, *shard.buffers[1:]], stages=self.stages)
        return "anchor+delta" if state.hops else "anchor", state.hops, state.bytes_fetched


def _metadata(target: Manifest) -> dict[str, str]:
    return {VERSION_KEY: str(target.version), STATE_KEY: target.state}
