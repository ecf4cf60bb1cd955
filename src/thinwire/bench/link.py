"""From which link on which level pays: measured codec rates, computed transfers.

A version is at a reader after ``making + bytes / link + taking in``: what thinwire does one after the other. Making and
taking in are measured by :mod:`thinwire.bench.codec`, with the digests of the state on both sides, also for those that
compute none; a full checkpoint is charged its digests and one copy, and nothing else. The link is arithmetic: what real
sockets add is measured by ``thinwire bench sync``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from thinwire.bench.measure import GIB
from thinwire.errors import MisuseError

__all__ = ["FULL", "LINKS", "Way", "link_markdown", "link_rows", "link_table", "link_text", "pays"]

Row = dict[str, Any]
FULL = "full checkpoint"
LINKS = (1e7, 1e8, 1e9, 1e10, 2.5e10, 1e11)
"""Bits a second that tables show."""
_LEAST, _MOST = 1e6, 1e12


@dataclass(frozen=True, slots=True)
class Way:
    """One way to bring a version over: ``work_s`` on both sides together, and bytes on the link."""

    name: str
    work_s: float
    bytes: int

    def seconds(self, bits_s: float) -> float:
        """From the trainer's call to proved weights over a link of ``bits_s`` bits a second.

        >>> Way("any", 0.5, 10**6).seconds(8e6)
        1.5
        """
        return self.work_s + 8 * self.bytes / bits_s


def pays(ways: Sequence[Way]) -> list[tuple[float, Way]]:
    """From which link (bits a second) on which way is the quickest, from 1 Mbit/s to 1 Tbit/s; slowest link first.

    >>> [(rate, way.name) for rate, way in pays([Way("few bytes", 1.0, 10**6), Way("quick", 0.0, 2 * 10**6)])]
    [(1000000.0, 'few bytes'), (8000000.0, 'quick')]
    """
    crossings = {_LEAST}
    for a, b in itertools.combinations(ways, 2):
        work, size = a.work_s - b.work_s, b.bytes - a.bytes
        if work and size and _LEAST < 8 * size / work < _MOST:
            crossings.add(8 * size / work)
    found: list[tuple[float, Way]] = []
    edges = [*sorted(crossings), _MOST]
    for low, high in itertools.pairwise(edges):
        best = min(ways, key=lambda way: way.seconds((low * high) ** 0.5))
        if not found or found[-1][1] is not best:
            found.append((low, best))
    return found


def _work(row: Row) -> float:
    """Seconds of making and taking in, digests included, from a row of the codec's benchmark."""
    sides = (row["encode"]["best_gib_s_with_digest"], row["apply"]["best_gib_s_with_digest"])
    return sum(float(row["state_bytes"] / GIB / rate) for rate in sides)


def link_rows(codec: Sequence[Row]) -> list[Row]:
    """A row for each workload and codec among the rows of ``thinwire bench codec``, and one for a full checkpoint.

    Raises:
        MisuseError: there are none.
    """
    measured = [row for row in codec if row.get("bench") == "codec" and row["codec"] not in ("copy", "zstd-1")]
    largest = max((row["state_bytes"] for row in measured), default=0)
    measured = [row for row in measured if row["state_bytes"] == largest]  # slow codecs are measured on a sample
    if not measured:
        raise MisuseError("no rows of codecs here; make them with thinwire bench codec --out FILE")
    rows = []
    for workload, group in itertools.groupby(measured, key=lambda row: (row["workload"]["name"], row["density"])):
        found = list(group)
        state, base = found[0]["state_bytes"], found[0]
        ways = [Way(row["codec"], _work(row), row["patch_bytes"]) for row in found]
        ways.append(Way(FULL, 2 * base["digest_s"] + base["copy_s"], state))
        for way in ways:
            rows.append(
                {
                    "bench": "link", "workload": workload[0], "density": round(workload[1], 5), "codec": way.name,
                    "state_bytes": state, "bytes": way.bytes, "work_s": round(way.work_s, 6),
                    "seconds": {f"{rate:g}": round(way.seconds(rate), 6) for rate in LINKS}, "link": "computed",
                    "machine": base["machine"], "versions": base["versions"], "threads": base["threads"],
                }
            )  # fmt: skip
    return rows


def _ways(rows: Sequence[Row]) -> list[Way]:
    return [Way(row["codec"], row["work_s"], row["bytes"]) for row in rows]


def _rate(bits_s: float) -> str:
    for unit, name in ((1e9, "Gbit/s"), (1e6, "Mbit/s")):
        if bits_s >= unit:
            return f"{bits_s / unit:.3g} {name}"
    return f"{bits_s:.3g} bit/s"


def link_text(rows: Sequence[Row], *, ours: bool = True) -> str:
    """Which way is the quickest from which link on, in words: of thinwire's levels and full checkpoints, or of all."""
    chosen = [row for row in rows if not ours or row["codec"].startswith("thinwire") or row["codec"] == FULL]
    parts = []
    for k, (rate, way) in enumerate(pays(_ways(chosen))):
        parts.append(f"{way.name}" if k == 0 else f"from {_rate(rate)} on {way.name}")
    return ", ".join(parts)


def link_table(rows: Sequence[Row]) -> Table:
    """One line a codec: bytes, work, and seconds over each link; the quickest of each in bold."""
    first = rows[0]
    changed = f"{first['workload']}, {first['density']:.2%} of {first['state_bytes'] / GIB:.3g} GiB changed"
    table = Table(title=f"{changed}: seconds, links computed", title_justify="left")
    for heading in ("codec", "MB", "work", *(_rate(rate) for rate in LINKS)):
        table.add_column(heading, justify="left" if heading == "codec" else "right")
    keys = [f"{rate:g}" for rate in LINKS]
    best = {key: min(row["seconds"][key] for row in rows) for key in keys}
    for row in rows:
        cells = [f"{row['seconds'][key]:.3g}" for key in keys]
        bold = [f"[bold]{c}[/bold]" if row["seconds"][k] == best[k] else c for k, c in zip(keys, cells, strict=True)]
        table.add_row(row["codec"], f"{row['bytes'] / 1e6:.3g}", f"{row['work_s']:.3f}", *bold)
    return table


def link_markdown(rows: Sequence[Row]) -> str:
    """The table of one workload for the documentation, and which way pays from where.

    ``rows`` are those of one workload. Of each link the quickest is bold.
    """
    keys = [f"{rate:g}" for rate in LINKS]
    best = {key: min(row["seconds"][key] for row in rows) for key in keys}
    lines = [
        "| | MB | work, s | " + " | ".join(_rate(rate) for rate in LINKS) + " |",
        "|---|---:|---:|" + "---:|" * len(keys),
    ]
    for row in rows:
        cells = [f"{row['seconds'][k]:.3g}" for k in keys]
        bold = [f"**{c}**" if row["seconds"][k] == best[k] else c for k, c in zip(keys, cells, strict=True)]
        lines.append(f"| {row['codec']} | {row['bytes'] / 1e6:.3g} | {row['work_s']:.3f} | " + " | ".join(bold) + " |")
    return "\n".join(lines) + f"\n\nOf thinwire's levels and full checkpoints: {link_text(rows)}.\n"
