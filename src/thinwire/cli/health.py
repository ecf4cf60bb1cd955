"""Is a store whole? Manifests that link, objects that are what the manifests say, versions that replay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from thinwire.errors import (
    DamagedObjectError,
    MalformedError,
    MisuseError,
    ObjectNotFoundError,
    RefetchError,
    RefuseError,
    ThinwireError,
    UntrustedError,
)
from thinwire.sync.collector import Collected, expected_objects, read_collected
from thinwire.sync.remote import hash_bytes
from thinwire.sync.retrying import retrying
from thinwire.wire.digests import Tree, hasher
from thinwire.wire.manifest import Manifest, ObjectRef, manifest_key, version_of_key
from thinwire.wire.spec import MANIFEST_BYTES_MAX

if TYPE_CHECKING:
    from thinwire.stores.protocol import Store
    from thinwire.sync.files import Stages
    from thinwire.sync.host import HostState
    from thinwire.sync.remote import Remote

__all__ = ["Chain", "Problem", "check_chain", "check_object", "check_objects", "read_chain", "replay"]

RETRY_S = 30.0
_PIECE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is not as it should be: where (a key), what, and the exit code of its remedy."""

    where: str
    message: str
    kind: str
    exit_code: int

    @classmethod
    def of(cls, where: str, error: ThinwireError) -> Problem:
        """A problem from the error that it would raise."""
        return cls(where, str(error), type(error).__name__, error.exit_code)

    def to_json(self) -> dict[str, Any]:
        return {"where": self.where, "kind": self.kind, "message": self.message}


@dataclass(slots=True)
class Chain:
    """Every manifest that can be read, what cannot, and which versions collections have given up."""

    manifests: dict[int, Manifest]
    collected: Collected | None
    problems: list[Problem] = field(default_factory=list)


def read_chain(store: Store) -> Chain:
    """Read all manifests, each by itself.

    Raises:
        MisuseError: there are none.
        RetryError: the store does not answer.
    """
    listing = retrying(lambda: list(store.list("manifests/")), limit_s=RETRY_S)
    versions = [v for info in listing if (v := version_of_key(info.key))]
    if not versions:
        raise MisuseError(f"{store.url} holds no versions", store=store.url)

    def read(version: int) -> Manifest | Problem:
        key = manifest_key(version)
        try:
            data = retrying(lambda: store.get(key, size_max=MANIFEST_BYTES_MAX), limit_s=RETRY_S)
            manifest = Manifest.parse(data)
            if manifest.version != version:
                raise UntrustedError(f"this is the manifest of version {manifest.version}")
        except (RefuseError, RefetchError) as error:
            return Problem.of(key, error)
        return manifest

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(read, versions))
    problems = [item for item in found if isinstance(item, Problem)]
    manifests = {item.version: item for item in found if isinstance(item, Manifest)}
    if not manifests:
        raise MalformedError(f"not one manifest in {store.url} can be read: {problems[0].message}", store=store.url)
    return Chain(manifests, read_collected(store, retry_s=RETRY_S), problems)


def check_chain(manifests: Mapping[int, Manifest]) -> list[Problem]:
    """Every parent, base and anchor that a manifest names must be there and be the one that it names."""
    found = []
    for version, manifest in sorted(manifests.items()):
        for error in _contradictions(manifest, manifests):
            found.append(Problem.of(manifest_key(version), error))
    return found


def _contradictions(manifest: Manifest, manifests: Mapping[int, Manifest]) -> Iterator[ThinwireError]:
    version, parent = manifest.version, manifest.parent
    if parent is None and version != 1:
        yield UntrustedError(f"version {version} names no parent; only the first version has none")
    if parent is not None:
        before = manifests.get(parent.version)
        if before is None:
            yield ObjectNotFoundError(f"its parent, version {parent.version}, is not there")
        elif before.digest != parent.manifest:
            yield UntrustedError(
                f"it is built on manifest {parent.manifest} of version {parent.version}, which is {before.digest}"
            )
    for delta in manifest.deltas:
        base = manifests.get(delta.base)
        if base is not None and base.state != delta.base_state:
            yield UntrustedError(
                f"its delta starts from state {delta.base_state}, version {delta.base} is {base.state}"
            )
    anchored = manifests.get(manifest.anchor_version)
    if anchored is not None and "anchor" not in anchored.kind:
        yield UntrustedError(f"it says that version {manifest.anchor_version} has an anchor, which has none")


def check_objects(store: Store, chain: Chain, *, stages: Stages | None = None) -> tuple[list[Problem], int, int]:
    """Read every object that must be there; returns the problems, and the number and bytes of the objects.

    Objects are read in pieces of 64 MiB, so that memory stays bounded.
    """
    kept, needed = expected_objects(chain.manifests, chain.collected)
    hashes = {ref.key: m.hash for m in chain.manifests.values() for ref in m.objects()}
    total, done = sum(ref.size for ref in needed.values()), 0

    def check(ref: ObjectRef) -> Problem | None:
        nonlocal done
        try:
            check_object(store, ref, hashes[ref.key])
        except (RefuseError, RefetchError) as error:
            return Problem.of(ref.key, error)
        finally:
            done += ref.size
            if stages is not None:
                stages("verify", done, total)
        return None

    with ThreadPoolExecutor(4) as pool:
        found = [problem for problem in pool.map(check, needed.values()) if problem is not None]
    bad = {problem.where for problem in found}
    for version in sorted(kept):
        manifest = chain.manifests[version]
        if manifest.tree.key not in bad:
            found += _check_tree(store, manifest, bad)
    return found, len(needed), total


def check_object(store: Store, ref: ObjectRef, hash_name: str, whose: str = "manifest") -> None:
    """Read an object, in pieces if it is large. Raises RefetchError if it is not what its manifest, or record, says."""
    if ref.size <= _PIECE_BYTES:
        data = retrying(lambda: store.get(ref.key, size_max=ref.size), limit_s=RETRY_S)
        size, actual = len(data), hash_bytes(hash_name, [data])
    else:
        size, actual = _digest_in_pieces(store, ref, hash_name)
    if size != ref.size:
        raise DamagedObjectError(f"it has {size} bytes, its {whose} says {ref.size}")
    if actual != ref.digest:
        raise DamagedObjectError(f"it has digest {actual}, its {whose} says {ref.digest}")


def _digest_in_pieces(store: Store, ref: ObjectRef, hash_name: str) -> tuple[int, str]:
    size = retrying(lambda: store.head(ref.key), limit_s=RETRY_S).size
    running = hasher(hash_name)(b"")
    for start in range(0, min(size, ref.size), _PIECE_BYTES):
        length = min(_PIECE_BYTES, min(size, ref.size) - start)
        piece = retrying(lambda at=start, n=length: store.get_range(ref.key, at, n), limit_s=RETRY_S)  # type: ignore[misc]
        running.update(piece)
    return size, running.digest().hex()


def _check_tree(store: Store, manifest: Manifest, bad: Set[str]) -> list[Problem]:
    if manifest.parts:
        from thinwire.cli.health_parts import check_parts

        return check_parts(store, manifest, bad)
    key = manifest.tree.key
    try:
        data = retrying(lambda: store.get(key, size_max=manifest.tree.size), limit_s=RETRY_S)
        actual = Tree.parse(data).digest
        if actual != manifest.state:
            raise UntrustedError(f"it is the tree of state {actual}, version {manifest.version} is {manifest.state}")
    except (RefuseError, RefetchError) as error:
        return [Problem.of(key, error)]
    return []


def replay(
    store: Store,
    chain: Chain,
    *,
    threads: int = 0,
    stages: Stages | None = None,
    beside: Callable[[Remote, HostState], list[Problem]] | None = None,
) -> list[Problem]:
    """Build every version that must be reachable and every anchor, and compare their digests with the manifests.

    ``beside`` is called with each state that was proved, and tells what else is wrong. Memory holds one state and one
    anchor.
    """
    from thinwire.cli.health_parts import replay_parts
    from thinwire.sync.host import fetch_state
    from thinwire.sync.remote import Remote

    if any(manifest.parts for manifest in chain.manifests.values()):
        return replay_parts(store, chain, threads=threads, stages=stages)
    remote = Remote(store, retry_s=RETRY_S)
    found: list[Problem] = []
    kept, _ = expected_objects(chain.manifests, chain.collected)
    held: HostState | None = None
    for version in sorted(kept):
        manifest = chain.manifests[version]
        try:
            remote.manifest(version)
            if manifest.anchor:
                _check_anchor(remote, manifest, threads, stages)
            held = _advance(remote, manifest, held, threads, stages) or fetch_state(remote, manifest, threads=threads)
        except ThinwireError as error:
            found.append(Problem.of(manifest_key(version), error))
            held = None
        if held is not None and beside is not None:
            found += beside(remote, held)
    return found


def _check_anchor(remote: Any, manifest: Manifest, threads: int, stages: Stages | None) -> None:
    from thinwire.sync.anchor import read_shards
    from thinwire.sync.apply import tree_of
    from thinwire.sync.files import stage_of

    layouts, cells, aliases = read_shards([remote.fetch(ref, manifest.hash) for ref in manifest.anchor])
    tree = tree_of(
        layouts, cells, aliases, hash_name=manifest.hash, threads=threads, progress=stage_of(stages, "anchors")
    )
    if tree.digest != manifest.state:
        raise DamagedObjectError(f"its anchor holds state {tree.digest}, its manifest says {manifest.state}")


def _advance(remote: Any, manifest: Manifest, held: Any, threads: int, stages: Stages | None) -> Any:
    """The state held, moved on to this version by its delta; None if no delta starts from it."""
    from thinwire.sync.apply import apply_patch
    from thinwire.sync.files import stage_of
    from thinwire.wire.patch import Patch

    deltas = [d for d in manifest.deltas if held is not None and d.base_state == held.digest]
    if not deltas:
        return None
    patch = Patch.parse(remote.fetch(deltas[0].object, manifest.hash))
    if patch.result != manifest.state:
        raise DamagedObjectError(f"its delta leads to state {patch.result}, its manifest says {manifest.state}")
    report = apply_patch(
        patch, held.layouts, held.cells,
        aliases=held.aliases, threads=threads, progress=stage_of(stages, "replay"),
    )  # fmt: skip
    held.aliases, held.digest, held.version = dict(report.tree.aliases), report.tree.digest, manifest.version
    return held
