"""The command ``thinwire bench sync``, its tables, and ``thinwire bench sync report``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from thinwire.bench.sync_methods import NAMES

__all__ = ["app", "sync_markdown", "sync_table"]

Row = dict[str, Any]
BEGIN, END = "<!-- sync: begin -->", "<!-- sync: end -->"
"""The marks between which ``report --into`` puts the tables."""

_LINKS = {"100mbit": "100 Mbit/s", "1gbit": "1 Gbit/s", "none": "no limit", "loopback": "loopback"}

app = typer.Typer(
    help="Weight sync side by side over limited lines.", no_args_is_help=False, add_completion=False,
    invoke_without_command=True,
)  # fmt: skip


# --- tables --------------------------------------------------------------------------------------------------------


def _groups(rows: Sequence[Row]) -> list[tuple[tuple[int, float, bool], list[Row]]]:
    """Rows by size, density and whether they were measured; full checkpoints in every density."""
    measured = [row for row in rows if row["method"] != "full"] or list(rows)
    keys = sorted({(row["size"], row["density"], row["projected"]) for row in measured}, key=lambda k: (k[2], k[:2]))
    return [
        (
            key,
            [
                row
                for row in rows
                if (row["size"], row["projected"]) == (key[0], key[2])
                and (row["density"] == key[1] or (row["method"] == "full" and not row["projected"]))
            ],
        )
        for key in keys
    ]


def _links(rows: Sequence[Row]) -> list[str]:
    order = [*_LINKS, *sorted({row["link"] for row in rows} - set(_LINKS))]
    return [link for link in order if any(row["link"] == link for row in rows)]


def _size(size: int) -> str:
    """
    >>> _size(1 << 30), _size(64 << 20), _size(14_000_000_000)
    ('1 GiB', '64 MiB', '14 GB')
    """
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB")):
        if size % unit == 0:
            return f"{size // unit} {name}"
    return f"{size / 1e9:.3g} GB"


def _title(key: tuple[int, float, bool]) -> str:
    size, density, projected = key
    text = f"{_size(size)} of bf16, {100 * density:g} % changed"
    return f"{text}: a projection" if projected else text


def _cell(row: Row, first: Row) -> str:
    text = f"{row['seconds']:.2f}" if row["seconds"] < 100 else f"{row['seconds']:.0f}"
    text = f"**{text}**" if row is first else text
    return f"{text} ({1000 * row['pause_s']:.0f})"


def _by_link(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row["link"], {})[row["method"]] = row
    return found


def _lines(rows: Sequence[Row]) -> list[list[str]]:
    from thinwire.bench.sync import winner

    by_link, links = _by_link(rows), _links(rows)
    first = {link: winner(list(by_link[link].values())) for link in links}
    lines = []
    for method, name in NAMES.items():
        mine = {link: by_link[link][method] for link in links if method in by_link[link]}
        if mine:
            cells = [_cell(mine[link], first[link]) if link in mine else "" for link in links]
            size = next(iter(mine.values()))["bytes"]
            lines.append([name, *cells, f"{size / 1e6:,.1f}"])
    return lines


def _beaten(rows: Sequence[Row]) -> list[str]:
    """Cells in which thinwire is not first, and where the time goes."""
    from thinwire.bench.sync import winner

    said = []
    for key, group in _groups(rows):
        for link, methods in _by_link(group).items():
            ours = [row for row in methods.values() if row["ours"]]
            first = winner(list(methods.values()))
            if not ours or first["ours"]:
                continue
            best = winner(ours)
            more = {k: best["stages_s"][k] - first["stages_s"][k] for k in best["stages_s"]}
            where = max(more, key=more.__getitem__)
            said.append(
                f"{_title(key)}, {_LINKS.get(link, link)}: {NAMES[first['method']]} is first by "
                f"{1000 * (best['seconds'] - first['seconds']):.0f} ms before {NAMES[best['method']]}; most of it is "
                f"{where} ({1000 * best['stages_s'][where]:.0f} against {1000 * first['stages_s'][where]:.0f} ms)"
            )
    return said


def sync_markdown(rows: Sequence[Row]) -> str:
    """The tables of ``docs/fleet.md``: a table a size and density, then what thinwire does not win."""
    parts = []
    for key, group in _groups(rows):
        links = _links(group)
        heading = ["seconds (ms of pause)", *(_LINKS.get(link, link) for link in links), "MB a worker"]
        table = [heading, ["---", *["---:"] * (len(heading) - 1)], *_lines(group)]
        parts += [f"**{_title(key)}**", "\n".join("| " + " | ".join(line) + " |" for line in table)]
    beaten = _beaten(rows)
    if beaten:
        parts.append("Where thinwire is not first:\n\n" + "\n".join(f"* {line}." for line in beaten))
    else:
        parts.append("thinwire is first in every cell.")
    return "\n\n".join(parts)


def sync_table(key: tuple[int, float, bool], rows: Sequence[Row]) -> Table:
    """One line for each method."""
    links = _links(rows)
    table = Table(title=f"{_title(key)}: seconds to the last worker's proof (ms of pause)", title_justify="left")
    table.add_column("method")
    for link in links:
        table.add_column(_LINKS.get(link, link), justify="right")
    table.add_column("MB a worker", justify="right")
    for line in _lines(rows):
        table.add_row(*(cell.replace("**", "") for cell in line))
    return table


# --- commands ------------------------------------------------------------------------------------------------------


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _numbers(text: str) -> tuple[float, ...]:
    from thinwire.errors import MisuseError

    try:
        return tuple(float(word) for word in _words(text))
    except ValueError:
        raise MisuseError(f"not numbers: {text!r}; write them as 0.002,0.01,0.05") from None


_EXAMPLES = """\b
thinwire bench sync -o sync.jsonl                              # 1 GiB: three densities, three lines, eight methods
thinwire bench sync --size 16MiB --densities 0.01 --links loopback         # small, without root, to try it
thinwire bench sync report sync.jsonl --into docs/fleet.md
"""


@app.callback(epilog=_EXAMPLES)
def sync(
    ctx: typer.Context,
    sizes: Annotated[str, typer.Option("--sizes", "--size", help="Bytes of the state, with commas between.")] = "1GiB",
    densities: Annotated[str, typer.Option(help="Shares of weights that change.")] = "0.002,0.01,0.05",
    links: Annotated[str, typer.Option(help="Rates of lines: 100mbit, 1gbit, none; or loopback.")] = (
        "100mbit,1gbit,none"
    ),
    methods: Annotated[str, typer.Option(help="Names with commas between; all.")] = "",
    states: Annotated[str, typer.Option(help="Where the two states come from: ulp, adam.")] = "ulp",
    rounds: Annotated[int, typer.Option(min=2, help="Rounds of each method, an even number; the median counts.")] = 2,
    workers: Annotated[int, typer.Option(min=1, help="Workers, a process and a host each.")] = 2,
    delay_ms: Annotated[float, typer.Option(min=0, help="Of the line to the store, each way, by a proxy.")] = 0.0,
    loss: Annotated[float, typer.Option(min=0, max=0.5, help="Share of packets that are lost, by a proxy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows of JSON.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Append rows to this file; what it holds is not run again.")
    ] = None,
) -> None:
    """Full checkpoints, others' deltas and thinwire's levels: seconds from publish() to every worker's proof.

    Needs root for lines with a rate (network namespaces); without it says so and skips.
    """
    if ctx.invoked_subcommand is not None:
        return
    from thinwire.bench.measure import parse_size
    from thinwire.bench.net.namespaces import SlowNetwork
    from thinwire.bench.sync import LOOPBACK, SyncOptions, run_sync

    console = Console(stderr=as_json)
    lines = _words(links)
    if set(lines) != {LOOPBACK} and (reason := SlowNetwork.why_not()) is not None:
        console.print(f"skipped: {reason} (--links loopback needs none of it, but has no limit and counts no bytes)")
        return
    chosen = tuple(NAMES) if methods == "all" else _words(methods) or SyncOptions().methods
    rows: list[Row] = []
    for size in _words(sizes):
        options = SyncOptions(
            parse_size(size), _numbers(densities), lines, chosen, states, rounds, workers, seed, delay_ms / 1000, loss
        )
        with console.status("starting the processes") as status:
            rows = run_sync(options, out, report=lambda text: status.update(f"sync: {text}"))
        if out is None:
            _show(console, rows)
    if out is not None:
        _show(console, rows)
    if as_json:
        for row in rows:
            typer.echo(json.dumps(row, sort_keys=True))


def _show(console: Console, rows: Sequence[Row]) -> None:
    for key, group in _groups(rows):
        console.print(sync_table(key, group))
    for line in _beaten(rows):
        console.print(f"not first: {line}", highlight=False)


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="File of rows (.jsonl).")],
    into: Annotated[Path | None, typer.Option(help="Put the tables between the marks of this page.")] = None,
    project: Annotated[str, typer.Option(help="Size of a state to project to; none: no projection.")] = "14e9",
    density: Annotated[float, typer.Option(help="Density of the projection.")] = 0.01,
) -> None:
    """Tables of measurements that there are, and a projection to a larger state, marked as one."""
    from thinwire.bench import sync as bench
    from thinwire.errors import MisuseError

    rows = bench.read_rows(results)
    if not rows:
        raise MisuseError(f"{results} holds no rows; make some with: thinwire bench sync -o {results}")
    if project != "none":
        rows = rows + bench.project(rows, int(float(project)), density)
    _show(Console(), rows)
    if into is not None:
        insert(f"{sync_markdown(rows)}\n\nRows: `{results.name}`.", into)


def insert(text: str, path: Path) -> None:
    """Put ``text`` between the two marks of a page, in place of what is there.

    Raises:
        MisuseError: the page has not both marks, in their order.
    """
    from thinwire.errors import MisuseError

    head, begin, rest = path.read_text().partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise MisuseError(f"{path} has no {BEGIN} with {END} after it; put both where the tables belong")
    path.write_text(f"{head}{begin}\n\n{text}\n\n{end}{tail}")
