"""The cheapest way to a version, as a pure function of the manifests at hand."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Set
from dataclasses import dataclass

from thinwire.errors import NoPathError
from thinwire.wire.manifest import DeltaRef, Manifest, ObjectRef

__all__ = ["HOP_BYTES", "Hop", "Path", "plan"]

HOP_BYTES = 64 << 10
"""What one more object to fetch, apply and verify counts for, in bytes, so that of two ways alike the shorter wins."""


@dataclass(frozen=True, slots=True)
class Hop:
    """A delta to apply, and the version and state digest that it leads to."""

    version: int
    state: str
    delta: DeltaRef


@dataclass(frozen=True, slots=True)
class Path:
    """A way to a version: from the version at hand if ``anchor_version`` is None, else from that version's anchor."""

    anchor_version: int | None
    anchor: tuple[ObjectRef, ...]
    hops: tuple[Hop, ...]

    @property
    def size(self) -> int:
        """Bytes to fetch."""
        return sum(ref.size for ref in self.anchor) + sum(hop.delta.object.size for hop in self.hops)


def plan(
    manifests: Mapping[int, Manifest],
    target: int,
    *,
    have: int | None = None,
    have_state: str | None = None,
    avoid: Set[str] = frozenset(),
) -> Path:
    """The path to version ``target`` with the fewest bytes, over anchors and deltas of any length.

    ``have`` is the version already held, with state digest ``have_state``; ``avoid`` holds keys of objects found to be
    missing or damaged.

    Raises:
        NoPathError: no path over the known manifests and intact objects.
    """
    edges: dict[int, list[tuple[int, Manifest, DeltaRef]]] = {}
    best: dict[int, int] = {}
    came: dict[int, tuple[int, DeltaRef] | None] = {}
    queue: list[tuple[int, int]] = []
    for version, manifest in manifests.items():
        if version > target:
            continue
        for delta in manifest.deltas:
            if delta.object.key not in avoid:
                edges.setdefault(delta.base, []).append((version, manifest, delta))
        if manifest.anchor and not any(ref.key in avoid for ref in manifest.anchor):
            best[version] = manifest.anchor_bytes + HOP_BYTES * len(manifest.anchor)
            came[version] = None
    if have is not None and have_state and have in manifests and manifests[have].state != have_state:
        have = None  # what is held is not what the chain calls by this number
    if have is not None and have <= target:
        best[have], came[have] = 0, None
    for version, cost in best.items():
        heapq.heappush(queue, (cost, version))
    while queue:
        cost, version = heapq.heappop(queue)
        if version == target:
            break
        if cost > best[version]:
            continue
        state = manifests[version].state if version in manifests else have_state
        for following, _, delta in edges.get(version, ()):
            if state is not None and delta.base_state != state:
                continue
            reached = cost + delta.object.size + HOP_BYTES
            if reached < best.get(following, reached + 1):
                best[following], came[following] = reached, (version, delta)
                heapq.heappush(queue, (reached, following))
    if target not in best:
        raise NoPathError(
            f"no intact chain of objects leads to version {target}"
            + (f" from version {have}" if have is not None else "")
            + "; publish an anchor, or follow a newer version",
            target=target,
            have=have,
        )
    hops: list[Hop] = []
    at = target
    while (step := came[at]) is not None:
        hops.append(Hop(at, manifests[at].state, step[1]))
        at = step[0]
    hops.reverse()
    from_held = have is not None and at == have and best[at] == 0
    return Path(None if from_held else at, () if from_held else manifests[at].anchor, tuple(hops))
