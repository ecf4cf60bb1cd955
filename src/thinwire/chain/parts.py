"""Versions in parts, for who plans over whole versions: the cheapest way, as a pure function of the manifests."""

from __future__ import annotations

from collections.abc import Mapping, Set
from contextlib import suppress
from dataclasses import replace

from thinwire.chain.plan import Path, plan
from thinwire.errors import NoPathError
from thinwire.wire.manifest import DeltaRef, Manifest, ObjectRef

__all__ = ["anchor_key", "delta_key", "flattened", "plan_parts"]

_NOTHING = "0" * 64


def delta_key(version: int) -> str:
    """What stands for all deltas of a version together."""
    return f"deltas/{version:010d}"


def anchor_key(version: int) -> str:
    """What stands for all anchors of a version together."""
    return f"anchors/{version:010d}"


def flattened(manifests: Mapping[int, Manifest], *, across: bool) -> dict[int, Manifest]:
    """Each version in parts as if it were one: its deltas as one object, its anchors as another.

    ``across`` keeps deltas between versions that are cut into chunks differently. Who holds cells of the one can make
    the chunks of the other from them, if it holds enough; who comes with nothing takes an anchor that is cut alike.
    """
    found = {}
    for version, manifest in manifests.items():
        if not manifest.parts:
            found[version] = manifest
            continue
        deltas = []
        for k, delta in enumerate(manifest.parts[0].deltas):
            base = manifests.get(delta.base)
            if across or (base is not None and base.tree.digest == manifest.tree.digest):
                size = sum(part.deltas[k].object.size for part in manifest.parts)
                state = base.state if base is not None else _NOTHING
                deltas.append(DeltaRef(delta.base, state, ObjectRef(delta_key(version), size, _NOTHING)))
        anchor = (ObjectRef(anchor_key(version), manifest.anchor_bytes, _NOTHING),) if manifest.parts[0].anchor else ()
        found[version] = replace(manifest, parts=(), deltas=tuple(deltas), anchor=anchor)
    return found


def plan_parts(
    manifests: Mapping[int, Manifest],
    target: int,
    *,
    have: int | None = None,
    avoid: Set[str] = frozenset(),
    across: bool = True,
) -> Path:
    """The path to version ``target`` with the fewest bytes, from ``have`` or from an anchor.

    ``avoid`` holds keys as :func:`delta_key` and :func:`anchor_key` make them. ``across`` False stays between versions
    that are cut alike.

    Raises:
        NoPathError: there is none.
    """
    found: list[Path] = []
    if have is not None and have in manifests:
        anchors = {anchor_key(version) for version in manifests}
        flat = flattened(manifests, across=across)
        with suppress(NoPathError):
            found.append(plan(flat, target, have=have, have_state=manifests[have].state, avoid={*avoid, *anchors}))
    try:
        found.append(plan(flattened(manifests, across=False), target, avoid=avoid))
    except NoPathError:
        if not found:
            raise
    return min(found, key=lambda path: path.size)
