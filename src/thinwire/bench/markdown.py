"""Rows as the tables of ``docs/benchmarks.md``; a test holds the two together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from thinwire.bench.real import summary

__all__ = ["codec_markdown", "real_markdown"]

Row = dict[str, Any]


def _table(heading: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [heading, ["---", *["---:"] * (len(heading) - 1)], *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _speed(timing: Row) -> str:
    return f"{timing['best_gib_s']:.2f} ({timing['median_gib_s']:.2f})"


def codec_markdown(rows: Sequence[Row]) -> str:
    """One line a codec, and thinwire through a folder: B a change, GiB of state a second, extra memory in %."""
    lines = []
    for row in (row for row in rows if row["bench"] == "codec"):
        speeds = [f"{row[stage]['best_gib_s_with_digest']:.2f}" for stage in ("encode", "apply")]
        memory = "/".join(f"{row[stage]['extra_memory_percent']:.1f}" for stage in ("encode", "apply"))
        size = f"{row['bytes_per_changed']:.3f}"
        name = f"**{row['codec']}**" if row["computes_digest"] else row["codec"]
        lines.append([name, size, _speed(row["encode"]), speeds[0], _speed(row["apply"]), speeds[1], memory])
    for row in (row for row in rows if row["bench"] == "end to end"):
        memory = "/".join(f"{row[call]['extra_memory_percent']:.1f}" for call in ("publish", "apply"))
        calls = [_speed(row["publish"]), "", _speed(row["apply"]), ""]
        lines.append([f"{row['codec']}, publish and apply through a folder", "", *calls, memory])
    heading = ["codec", "B/changed", "encode", "+ digest", "apply", "+ digest", "extra memory %"]
    return _table(heading, lines)


def real_markdown(rows: Sequence[Row]) -> str:
    """One line a codec: bytes per changed element over the steps, bytes a step, share of a full checkpoint."""
    lines = []
    for name, (least, mean, most) in summary(rows)["bytes_per_changed"].items():
        ours = name.startswith("thinwire ")
        level = name.removeprefix("thinwire ")
        sizes = [row["thinwire"][level]["bytes"] if ours else row["peers"][name]["bytes"] for row in rows]
        share = 100 * sum(sizes) / sum(row["state_bytes"] for row in rows)
        shown = [f"{least:.3f}", f"{mean:.3f}", f"{most:.3f}", f"{sum(sizes) / len(sizes):,.0f}", f"{share:.3f}"]
        lines.append([f"**{name}**" if ours else name, *shown])
    return _table(["codec", "least", "mean", "most", "bytes a step", "% of a full checkpoint"], lines)
