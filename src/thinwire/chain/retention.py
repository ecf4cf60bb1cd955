"""What may be deleted, as a pure function: never anything that a kept version needs."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

from thinwire.chain.parts import anchor_key, delta_key, flattened
from thinwire.chain.plan import plan
from thinwire.errors import MisuseError, NoPathError
from thinwire.wire.manifest import Manifest

__all__ = ["Retained", "retain"]


@dataclass(frozen=True, slots=True)
class Retained:
    """What stays: versions that can be reached as before, manifests, and objects by key."""

    versions: frozenset[int]
    manifests: frozenset[int]
    objects: frozenset[str]


def retain(manifests: Mapping[int, Manifest], *, keep_last: int, keep: Set[int] = frozenset()) -> Retained:
    """Keep the last ``keep_last`` versions and those in ``keep``, with all that leads to them.

    For each kept version that is its cheapest path from nothing; between kept versions also the deltas that lead from
    one to another, so that nobody who holds one falls off the chain.

    Raises:
        MisuseError: ``keep_last`` is below 1.
    """
    if keep_last < 1:
        raise MisuseError(f"keep_last must be at least 1, not {keep_last}: the newest version always stays")
    flat = flattened(manifests, across=False)
    kept = set(sorted(manifests)[-keep_last:]) | (set(keep) & set(manifests))
    needed_manifests: set[int] = set(kept)
    objects: set[str] = set()
    for version in kept:
        manifest = manifests[version]
        objects.add(manifest.tree.key)
        objects.update(d.object.key for d in manifest.every_delta() if d.base in kept)
        try:
            path = plan(flat, version)
        except NoPathError:  # not reachable as it is: whatever it names is kept, and nothing is made worse
            objects.update(ref.key for ref in manifest.objects())
            continue
        objects.update(ref.key for ref in path.anchor)
        objects.update(hop.delta.object.key for hop in path.hops)
        needed_manifests.update(hop.version for hop in path.hops)
        if path.anchor_version is not None:
            needed_manifests.add(path.anchor_version)
    _take_parts(manifests, needed_manifests, objects)
    return Retained(frozenset(kept), frozenset(needed_manifests), frozenset(objects))


def _take_parts(manifests: Mapping[int, Manifest], needed: Set[int], objects: set[str]) -> None:
    """Of versions in parts: the objects for which those of whole versions stood, and the maps and trees."""
    for version in needed:
        manifest = manifests[version]
        for part in manifest.parts:
            objects |= {manifest.tree.key, part.tree.key}
            if delta_key(version) in objects:
                objects.update(delta.object.key for delta in part.deltas)
            if anchor_key(version) in objects:
                objects.update(ref.key for ref in part.anchor)
    objects -= {make(version) for version in needed for make in (anchor_key, delta_key)}
