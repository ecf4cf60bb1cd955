"""Which skip deltas a collection of garbage keeps: those that are whole, between versions that can be reached."""

from __future__ import annotations

from collections.abc import Iterable, Set

from thinwire.stores.protocol import ObjectInfo
from thinwire.sync.remote import Remote
from thinwire.wire.skip import skip_key, skip_of_key

__all__ = ["sort_skips"]


def sort_skips(
    listing: Iterable[ObjectInfo], remote: Remote, reachable: Set[int]
) -> tuple[list[ObjectInfo], list[ObjectInfo]]:
    """What of a ``listing`` of ``skips/`` stays, and what may go, by the versions that stay ``reachable``.

    What stays is a record that fits the manifests (which ``remote`` must hold) together with the patch that it names.
    So records that lie, records without a patch, and patches without a record may go, and are then made anew. Keys that
    are not those of skip deltas are in neither list.
    """
    by_pair: dict[tuple[int, int], list[ObjectInfo]] = {}
    for info in listing:
        pair = skip_of_key(info.key)
        if pair is not None:
            by_pair.setdefault(pair, []).append(info)
    kept: list[ObjectInfo] = []
    useless: list[ObjectInfo] = []
    for pair, infos in by_pair.items():
        keys = {info.key for info in infos}
        wanted = set(pair) <= reachable and skip_key(*pair) in keys
        skip = remote.skip(*pair) if wanted else None
        whole = skip is not None and skip.object.key in keys
        needed = {skip_key(*pair), skip.object.key} if skip is not None and whole else set()
        for info in infos:
            (kept if info.key in needed else useless).append(info)
    return kept, useless
