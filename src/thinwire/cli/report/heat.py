"""The density by layer and version as a matrix that fits on a page: neighbours are summed, never sampled."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from thinwire.cli.report.facts import VersionFacts

__all__ = ["Heat", "heat_of"]

_PARTS = re.compile(r"(\d+)")


@dataclass(frozen=True, slots=True)
class Heat:
    """``density[row][column]``: changed cells over cells of the row's tensors in the column's patches, None if none.

    ``columns`` are (first, last) versions, ``rows`` names of tensors or, where there are too many, of groups by the
    first parts of their names.
    """

    rows: tuple[str, ...]
    columns: tuple[tuple[int, int], ...]
    density: tuple[tuple[float | None, ...], ...]


def _order(name: str) -> tuple[tuple[int, str], ...]:
    """Layer 2 before layer 10."""
    return tuple((int(part), "") if part.isdigit() and len(part) < 10 else (-1, part) for part in _PARTS.split(name))


def _grouped(names: Sequence[str], most: int) -> dict[str, str]:
    """The group of each name: by as many leading parts as give at most ``most`` groups."""
    depth = max((name.count(".") for name in names), default=0) + 1
    groups = {name: name for name in names}
    while len(set(groups.values())) > most and depth > 0:
        depth -= 1
        groups = {name: ".".join(name.split(".")[:depth]) or "all tensors" for name in names}
    return groups


def heat_of(versions: Sequence[VersionFacts], *, rows_max: int = 64, columns_max: int = 240) -> Heat:
    """The heat map of those versions whose tables could be read.

    >>> patches = [VersionFacts(v, "ok", tensors={"a.w": (1, 4), "a.b": (v, 4)}) for v in (2, 3)]
    >>> heat_of(patches).density
    ((0.5, 0.75), (0.25, 0.25))
    >>> heat_of(patches, rows_max=1, columns_max=1)
    Heat(rows=('a',), columns=((2, 3),), density=((0.4375,),))
    """
    if not any(version.tensors for version in versions):
        return Heat((), (), ())
    names = {name for version in versions for name in version.tensors or {}}
    groups = _grouped(sorted(names), rows_max)
    rows = tuple(sorted(set(groups.values()), key=_order))
    each = -(-len(versions) // columns_max)
    bins = [versions[i : i + each] for i in range(0, len(versions), each)]
    columns = [_sums(part, groups) for part in bins]
    return Heat(
        rows,
        tuple((part[0].version, part[-1].version) for part in bins),
        tuple(tuple(_share(column.get(row)) for column in columns) for row in rows),
    )


def _sums(versions: Sequence[VersionFacts], groups: Mapping[str, str]) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for version in versions:
        for name, (changed, cells) in (version.tensors or {}).items():
            before = found.get(groups[name], (0, 0))
            found[groups[name]] = before[0] + changed, before[1] + cells
    return found


def _share(counts: tuple[int, int] | None) -> float | None:
    return None if counts is None or not counts[1] else counts[0] / counts[1]
