"""The command ``thinwire bench sparserl``."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from thinwire.errors import MisuseError

if TYPE_CHECKING:
    from thinwire.bench.sparserl import Suite

__all__ = ["app"]

_EXAMPLES = """\b
thinwire bench sparserl --suite small --models llama-0.6m      # one model: some tens of minutes on two cores
thinwire bench sparserl --methods aspg,random-mask,dense --seeds 0,1 --tasks gcd
thinwire bench sparserl --methods mine/half.py,random-mask     # a method of yours: one file
thinwire bench sparserl report sparserl
"""

app = typer.Typer(invoke_without_command=True, add_completion=False)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _seeds(text: str) -> list[int]:
    words = _words(text)
    if not all(word.isdecimal() for word in words):
        raise MisuseError(f"not seeds: {text!r}; write them as 0,1,2")
    return [int(word) for word in words]


@app.callback(epilog=_EXAMPLES)
def sparserl(
    ctx: typer.Context,
    suite: Annotated[str, typer.Option(help="small, middle, hub, or a YAML file.")] = "small",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the results; what is in it is kept.")] = Path(
        "sparserl"
    ),
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", min=0, help="Runs at a time, of one thread each; 0: in this process.")
    ] = 2,
    models: Annotated[str, typer.Option(help="Some of the suite's, with commas between.")] = "",
    tasks: Annotated[str, typer.Option(help="Names, or files that define TASK.")] = "",
    methods: Annotated[str, typer.Option(help="Names, or files that define METHOD.")] = "",
    seeds: Annotated[str, typer.Option(help="Numbers with commas between.")] = "",
    list_only: Annotated[bool, typer.Option("--list", help="Say which runs there are; make none.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the leaderboard as JSON.")] = False,
) -> None:
    """Sparse and adapter methods under reinforcement learning: what each gains, and costs to train and to send.

    A suite that was interrupted goes on where it was. Afterwards OUT has report.md, leaderboard.json
    and .html, and figures.
    """
    if ctx.invoked_subcommand is not None:
        return
    from thinwire.bench.sparserl import choose_lrs, read_suite, run_suite

    console = _console()
    chosen = read_suite(suite).chosen(
        models=_words(models), tasks=_words(tasks), methods=_words(methods), seeds=_seeds(seeds)
    )
    if list_only:
        cells = chosen.cells(choose_lrs(chosen, out))
        console.print(f"{len(chosen.tuning())} runs to tune, {len(cells)} runs")
        for cell in cells:
            typer.echo(f"{cell.model_name} {cell.task} {cell.method} {cell.seed}")
        return
    began = time.perf_counter()
    with _Bar(console, chosen) as bar:
        failed = run_suite(chosen, out, jobs=jobs, on_done=bar)
    console.print(f"done in {(time.perf_counter() - began) / 60:.1f} min")
    if failed:
        console.print(f"{len(failed)} failed, the reasons are in {out}/failed; the same command tries again")
    _report(console, out, out, as_json)
    if failed:
        raise typer.Exit(1)


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="Folder of a suite, or a file of kept rows (.jsonl).")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write into.", show_default="that of the results")
    ] = None,
    rows: Annotated[Path | None, typer.Option(help="Write a line of JSON a run to this file, to be kept.")] = None,
    into: Annotated[Path | None, typer.Option(help="Put the report between the marks of this page, too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the leaderboard as JSON.")] = False,
) -> None:
    """Tables, Pareto plots and a static leaderboard page of results that there are."""
    from thinwire.bench.sparserl_summary import read_summaries, write_summaries

    console = _console()
    if rows is not None:
        write_summaries(rows, read_summaries(results))
    if into is not None:
        from thinwire.bench.sparserl_report import insert, markdown

        insert(markdown(read_summaries(results)), into)
    _report(console, results, out or (results if results.is_dir() else results.parent), as_json)


def _console() -> Console:
    console = Console(stderr=True)
    return console if console.is_terminal else Console(stderr=True, width=132)


def _report(console: Console, results: Path, out: Path, as_json: bool) -> None:
    from thinwire.bench.sparserl_report import leaderboard, write_report
    from thinwire.bench.sparserl_summary import read_summaries

    summaries = read_summaries(results)
    files = write_report(summaries, out)
    board = leaderboard(summaries)
    console.print(board["finding"], highlight=False)
    if as_json:
        typer.echo(json.dumps(board, allow_nan=False))
    else:
        _show(board)
    console.print("wrote " + ", ".join(str(file) for file in files), highlight=False)


def _show(board: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table("model", "method", "score, %", "to random 1 %", "sent a step", "changed, %", "optimiser", "diverged")
    for entry in board["entries"]:
        interval, against = entry["score_interval"], entry["against"].get("random-mask")
        table.add_row(
            entry["model"], entry["method"],
            f"{100 * interval['mean']:.1f} ({100 * interval['low']:.1f} to {100 * interval['high']:.1f})",
            "" if against is None else f"{100 * against['mean']:+.1f}",
            "" if entry["sync_bytes"] is None else f"{entry['sync_bytes'] / 1024:,.1f} KiB",
            "" if entry["changed"] is None else f"{100 * entry['changed']:.2f}",
            f"{entry['optimizer_bytes'] / 1024:,.0f} KiB", str(entry["diverged"]),
        )  # fmt: skip
    console = Console()
    (console if console.is_terminal else Console(width=132)).print(table)


class _Bar:
    """A bar over the runs of all stages; without a terminal, a line every tenth."""

    def __init__(self, console: Console, suite: Suite) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._console, self._failed, self._done = console, 0, 0
        self._total = len(suite.cells({(m, n): 1.0 for m in suite.models for n in suite.methods})) + len(suite.tuning())
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("starts", total=self._total)

    def __enter__(self) -> _Bar:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def __call__(self, stage: str, name: str, sound: bool) -> None:
        self._failed += not sound
        text = f"{stage} {name.partition('--seed')[0]}" + (f" ({self._failed} failed)" if self._failed else "")
        if stage == "start":
            self._bar.update(self._task, description=text)
            return
        self._done += 1
        self._bar.update(self._task, description=text, advance=1)
        if not self._console.is_terminal and self._done % max(1, self._total // 20) == 0:
            self._console.print(
                f"{self._done} of {self._total} runs" + (f", {self._failed} failed" * bool(self._failed))
            )
