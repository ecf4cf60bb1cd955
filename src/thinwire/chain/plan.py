"""The cheapest way to a version, as a pure function of the manifests and skip deltas at hand."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass

from thinwire.errors import NoPathError
from thinwire.wire.manifest import DeltaRef, Manifest, ObjectRef
from thinwire.wire.skip import Skip

__all__ = ["HOP_BYTES", "Hop", "Path", "plan", "sketch"]

HOP_BYTES = 64 << 10
"""What one more object to fetch, apply and verify counts for, in bytes, so that of two ways alike the shorter wins."""


@dataclass(frozen=True, slots=True)
class Hop:
    """A delta to apply, and the version and state digest that it leads to.

    ``skip``: no manifest names it, a skip delta's record does.
    """

    version: int
    state: str
    delta: DeltaRef
    skip: bool = False


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
    skips: Iterable[Skip] = (),
) -> Path:
    """The path to version ``target`` with the fewest bytes, over anchors, deltas of any length and ``skips``.

    ``have`` is the version already held, with state digest ``have_state``; ``avoid`` holds keys of objects found to be
    missing or damaged.

    Raises:
        NoPathError: no path over the known manifests and intact objects.
    """
    edges: dict[int, list[tuple[int, DeltaRef, bool]]] = {}
    best: dict[int, int] = {}
    came: dict[int, tuple[int, DeltaRef, bool] | None] = {}
    queue: list[tuple[int, int]] = []
    for version, manifest in manifests.items():
        if version > target:
            continue
        for delta in manifest.deltas:
            if delta.object.key not in avoid:
                edges.setdefault(delta.base, []).append((version, delta, False))
        if manifest.anchor and not any(ref.key in avoid for ref in manifest.anchor):
            best[version] = manifest.anchor_bytes + HOP_BYTES * len(manifest.anchor)
            came[version] = None
    for skip in skips:
        leads = skip.version in manifests and manifests[skip.version].state == skip.state
        if leads and skip.version <= target and skip.object.key not in avoid:
            edges.setdefault(skip.base, []).append((skip.version, skip.delta, True))
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
        for following, delta, is_skip in edges.get(version, ()):
            if state is not None and delta.base_state != state:
                continue
            reached = cost + delta.object.size + HOP_BYTES
            if reached < best.get(following, reached + 1):
                best[following], came[following] = reached, (version, delta, is_skip)
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
        hops.append(Hop(at, manifests[at].state, step[1], step[2]))
        at = step[0]
    hops.reverse()
    from_held = have is not None and at == have and best[at] == 0
    return Path(None if from_held else at, () if from_held else manifests[at].anchor, tuple(hops))


def sketch(
    hints: Mapping[tuple[int, int], int], target: int, *, starts: Mapping[int, int], single_bytes: int
) -> tuple[int, ...]:
    """The versions on what looks like the cheapest way to ``target``, from hints alone: which manifests to fetch.

    ``hints`` holds the sizes of skip deltas by (base, version), ``starts`` what it costs to be at a version,
    ``single_bytes`` the assumed size of every delta to the next version. Nothing is proved by this; :func:`plan`
    decides over what the manifests say. Empty if no start is at or before ``target``.

    >>> sketch({(2, 4): 10, (4, 8): 12}, 9, starts={1: 0}, single_bytes=9)
    (1, 2, 4, 8, 9)
    """
    by_version: dict[int, list[tuple[int, int]]] = {}
    for (base, version), size in hints.items():
        by_version.setdefault(version, []).append((base, size))
    first = min((v for v in starts if v <= target), default=None)
    if first is None:
        return ()
    best: dict[int, int] = {}
    came: dict[int, int] = {}
    for version in range(first, target + 1):
        ways = [(best[b] + size + HOP_BYTES, b) for b, size in by_version.get(version, ()) if b in best]
        if version - 1 in best:
            ways.append((best[version - 1] + single_bytes + HOP_BYTES, version - 1))
        if version in starts:
            ways.append((starts[version], 0))
        best[version], came[version] = min(ways)
    found = [target]
    while came[found[-1]]:
        found.append(came[found[-1]])
    return tuple(reversed(found))
