"""Collecting garbage: objects that no kept version needs are deleted; manifests never are.

A manifest is about 1 KB and is the history. Were one deleted, its number could be won a second time by a publisher that
has slept since, and two parties would hold different versions under one number.

What is never deleted either: objects of a version number without a manifest. They may belong to an upload under way, or
to one whose publisher waits for the store to come back; they are dealt with once the chain has gone past that number.

Skip deltas stay between versions that can still be reached. No kept version rests on one: paths are kept without them.

``collected.json`` remembers which versions were given up, so that :func:`expected_objects` can tell their objects from
lost ones. It is written before anything is deleted. Run one collection at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from thinwire.chain.retention import retain
from thinwire.errors import MalformedError, MisuseError, ObjectNotFoundError, RefetchError
from thinwire.peers.metainfo import DESCRIPTION_SUFFIX
from thinwire.stores.protocol import Delete, Get, List, ObjectInfo, Put
from thinwire.sync.remote import Remote
from thinwire.sync.retrying import retrying
from thinwire.sync.skips import sort_skips
from thinwire.sync.trust import Pinned, read_trust
from thinwire.wire import canonical
from thinwire.wire.manifest import Manifest, ObjectRef, version_of_key
from thinwire.wire.skip import SKIPS_PREFIX

__all__ = [
    "COLLECTED_KEY",
    "CollectReport",
    "Collected",
    "all_manifests",
    "collect",
    "expected_objects",
    "read_collected",
]

COLLECTED_KEY = "collected.json"
_FORMAT = "thinwire.collected.v1"
_BYTES_MAX = 64 << 20
_OBJECT_KEY = re.compile(r"objects/([0-9]{10})-[0-9a-f]+/.+", re.ASCII)


class CollectableStore(Get, List, Put, Delete, Protocol):
    """What collecting needs."""


@dataclass(frozen=True, slots=True)
class Collected:
    """What collections have given up: every version up to ``newest`` that is not in ``kept``."""

    newest: int
    kept: frozenset[int]

    def gave_up(self, version: int) -> bool:
        """Whether this version's objects were given up."""
        return version <= self.newest and version not in self.kept


@dataclass(frozen=True, slots=True)
class CollectReport:
    """What a collection did, or would do.

    ``kept`` are the versions that can be reached as before, ``gone`` those asked for that an earlier collection has
    given up. ``deleted`` are the objects deleted (with ``dry_run``: that would be). ``kept_objects`` and ``kept_bytes``
    count what kept versions need, ``young_objects`` and ``young_bytes`` what nobody needs but is younger than the grace
    period or of a version that has no manifest.
    """

    newest: int
    kept: tuple[int, ...]
    gone: tuple[int, ...]
    deleted: tuple[ObjectInfo, ...]
    kept_objects: int
    kept_bytes: int
    young_objects: int
    young_bytes: int
    dry_run: bool

    @property
    def deleted_bytes(self) -> int:
        """Bytes of the deleted objects."""
        return sum(info.size for info in self.deleted)


def all_manifests(remote: Remote) -> dict[int, Manifest]:
    """Every manifest in a store, by version, none contradicting another; only new ones are fetched when asked again.

    Raises:
        MisuseError: there is none.
        ObjectNotFoundError: one that is listed cannot be read.
        RefuseError: one is damaged, of an unknown format, or contradicts another.
        RetryError: the store does not answer.
    """
    if remote.newest() is None:
        raise MisuseError("the store holds no versions")
    listing = retrying(lambda: list(remote.store.list("manifests/")), limit_s=remote.retry_s)
    versions = [v for info in listing if (v := version_of_key(info.key))]
    remote.manifests(versions)
    missing = sorted(set(versions) - set(remote.chain.manifests))
    if missing:
        raise ObjectNotFoundError(
            f"the manifest of version {missing[0]} is listed and cannot be read; try again", versions=missing
        )
    return dict(remote.chain.manifests)


def collect(
    store: CollectableStore,
    *,
    keep_last: int,
    keep: Set[int] = frozenset(),
    grace_s: float,
    dry_run: bool = False,
    now_s: float,
    retry_s: float = 60.0,
    progress: Callable[[int, int], None] | None = None,
    trust: Pinned | None = None,
) -> CollectReport:
    """Delete the objects that neither the last ``keep_last`` versions nor those in ``keep`` need.

    Only objects that are older than ``grace_s`` seconds at ``now_s`` (seconds since the epoch) are deleted: a consumer
    may be on its way over them. Manifests are read again right before, so that versions committed meanwhile are
    honoured. With ``trust`` nothing is deleted unless its keys have signed the chain. ``progress`` is called with
    objects deleted and objects to delete, from any thread.

    Raises:
        MisuseError: no versions, a version in ``keep`` that never was, ``keep_last`` below 1 or ``grace_s`` below 0.
        RefuseError: a manifest cannot be understood. Nothing was deleted: what it needs is not known.
        ObjectNotFoundError: a manifest is listed and cannot be read. Nothing was deleted.
        RetryError: the store does not answer; some objects may have been deleted. Run it again.

    >>> import torch, thinwire
    >>> from thinwire.stores.memory import MemoryStore
    >>> store, model = MemoryStore(), torch.nn.Linear(4, 4)
    >>> publisher = thinwire.Publisher(store, anchor_every=2)
    >>> for step in range(5):
    ...     _ = publisher.publish(model, step=step)
    >>> report = collect(store, keep_last=1, grace_s=0, now_s=4e9)
    >>> report.kept, len(report.deleted) > 0
    ((5,), True)
    >>> thinwire.Consumer(store).load(torch.nn.Linear(4, 4)).version
    5
    """
    if grace_s < 0:
        raise MisuseError(f"the grace period must not be negative, and is {grace_s:g} s")
    remote = Remote(store, retry_s=retry_s, trust=None if trust is None else read_trust(trust), in_parts=True)
    all_manifests(remote)
    listing = retrying(lambda: list(store.list("objects/")), limit_s=retry_s)
    manifests = all_manifests(remote)  # once more, for versions committed meanwhile
    retained = retain(manifests, keep_last=keep_last, keep=keep)
    never = sorted(set(keep) - set(manifests))
    if never:
        raise MisuseError(f"there is no version {never[0]} to keep", versions=never)
    before = read_collected(store, retry_s=retry_s)
    gone = {v for v in retained.versions if before is not None and before.gave_up(v)}
    useless = [i for i in listing if i.key.removesuffix(DESCRIPTION_SUFFIX) not in retained.objects]
    doomed = [i for i in useless if i.modified_s <= now_s - grace_s and _version_of(i.key) in manifests]
    kept = [info for info in listing if info.key in retained.objects]
    shortcuts = retrying(lambda: list(store.list(SKIPS_PREFIX)), limit_s=retry_s)
    kept_skips, useless_skips = sort_skips(shortcuts, remote, (retained.versions | retained.manifests) - gone)
    doomed += [info for info in useless_skips if info.modified_s <= now_s - grace_s]
    useless, kept = useless + useless_skips, kept + kept_skips
    marker = Collected(max(manifests), retained.versions - gone)
    if doomed and not dry_run:
        data = canonical.dump({"format": _FORMAT, "kept": sorted(marker.kept), "newest": marker.newest})
        retrying(lambda: store.put(COLLECTED_KEY, [data]), limit_s=retry_s)
        _delete(store, doomed, retry_s, progress)
    young = set(useless) - set(doomed)
    return CollectReport(
        newest=marker.newest,
        kept=tuple(sorted(marker.kept)),
        gone=tuple(sorted(gone)),
        deleted=tuple(doomed),
        kept_objects=len(kept),
        kept_bytes=sum(info.size for info in kept),
        young_objects=len(young),
        young_bytes=sum(info.size for info in young),
        dry_run=dry_run,
    )


def _version_of(key: str) -> int | None:
    found = _OBJECT_KEY.fullmatch(key)
    return int(found[1]) if found else None


def _delete(
    store: CollectableStore, doomed: list[ObjectInfo], retry_s: float, progress: Callable[[int, int], None] | None
) -> None:
    done = 0

    def delete(info: ObjectInfo) -> None:
        nonlocal done
        retrying(lambda: store.delete(info.key), limit_s=retry_s)
        done += 1
        if progress is not None:
            progress(done, len(doomed))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(delete, doomed))


def read_collected(store: Get, *, retry_s: float) -> Collected | None:
    """What earlier collections have given up; None if there were none (or if their note is unreadable)."""
    try:
        data = retrying(lambda: store.get(COLLECTED_KEY, size_max=_BYTES_MAX), limit_s=retry_s)
        value = canonical.parse(data, bytes_max=_BYTES_MAX)
    except (RefetchError, MalformedError):
        return None
    if not isinstance(value, dict) or value.get("format") != _FORMAT:
        return None
    newest, kept = value.get("newest"), value.get("kept")
    if type(newest) is not int or not isinstance(kept, list) or not all(type(v) is int for v in kept):
        return None
    return Collected(newest, frozenset(kept))


def expected_objects(
    manifests: Mapping[int, Manifest], collected: Collected | None
) -> tuple[frozenset[int], dict[str, ObjectRef]]:
    """The versions that must be reachable and every object that must therefore be there, by key."""
    refs = {ref.key: ref for manifest in manifests.values() for ref in manifest.objects()}
    if collected is None:
        return frozenset(manifests), refs
    old = {v: m for v, m in manifests.items() if v <= collected.newest}
    kept = frozenset(v for v in manifests if not collected.gave_up(v))
    needed = {ref.key for v in set(manifests) - set(old) for ref in manifests[v].objects()}
    if old:
        needed |= retain(old, keep_last=1, keep=collected.kept).objects
    return kept, {key: refs[key] for key in sorted(needed)}
