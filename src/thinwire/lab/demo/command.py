"""``thinwire demo``: run it, judge it, and write its page."""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from thinwire.errors import MisuseError, ThinwireError
from thinwire.lab.demo.director import Director
from thinwire.lab.demo.live import LiveView, byte_text
from thinwire.lab.demo.options import DemoOptions, RunPlan
from thinwire.lab.demo.summary import DemoSummary, summarise

__all__ = ["main", "run_demo"]


def run_demo(options: DemoOptions, console: Console | None = None) -> DemoSummary:
    """Run the demo and write ``report.html`` and ``summary.json`` into the run's folder.

    The summary tells whether every promise was kept (``summary.passed``); a broken promise raises nothing. ``console``
    shows the run while it lasts: a live view on a terminal, otherwise a line every few seconds.

    Raises:
        MisuseError: an extra is not installed, or the model's name is unknown.
        DemoError: one of the processes failed.
        RetryError, RefetchError: SmolLM2 was asked for and could not be downloaded.
    """
    missing = [name for name in ("transformers", "plotly") if importlib.util.find_spec(name) is None]
    if missing:
        raise MisuseError(f"the demo needs {' and '.join(missing)}: pip install 'thinwire[demo]'", missing=missing)
    plan = _plan(options)
    plan.save()
    view = LiveView(console or Console())
    with view:
        picture = Director(plan, restart_delay_s=options.restart_delay_s).run(view.show)
    summary = summarise(picture)
    from thinwire.lab.demo.page import write_page

    summary = replace(summary, page=write_page(picture, summary, plan.folder / "report.html"))
    (plan.folder / "summary.json").write_text(json.dumps(summary.as_json(), indent=2) + "\n", encoding="utf-8")
    return summary


def _plan(options: DemoOptions) -> RunPlan:
    """Options and the recipe's defaults, with a new folder for the run."""
    from thinwire.lab.recipes import RECIPES

    if options.model not in RECIPES:
        raise MisuseError(f"no model {options.model!r}; there are {', '.join(RECIPES)}", model=options.model)
    if options.model == "smollm2":
        from thinwire.lab.smollm2 import fetch_smollm2

        fetch_smollm2()
    recipe = RECIPES[options.model]()
    return RunPlan(
        folder=_new_folder(options.out),
        model=options.model,
        about=recipe.about,
        seed=options.seed,
        lr=options.lr or recipe.lr,
        steps=options.steps or recipe.steps_max,
        seconds=options.minutes * 60 if options.minutes else recipe.seconds,
        workers=options.workers,
        max_staleness=options.max_staleness,
    )


def _new_folder(out: Path) -> Path:
    """A folder that no other run has, named by the time."""
    name = time.strftime("%Y%m%d-%H%M%S")
    for number in range(100):
        folder = out / (name if number == 0 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder.resolve()
    raise MisuseError(f"{out} already has a hundred runs of this second", out=str(out))


def print_summary(summary: DemoSummary, console: Console) -> None:
    """The result in a few lines."""
    console.print()
    for check in summary.checks:
        mark = "[green]ok  [/]" if check.passed else "[bold red]FAIL[/]"
        _say(console, f"{mark} {check.name}: {check.detail}")
    ratio = summary.full_checkpoint_bytes / summary.patch_bytes
    _say(
        console,
        f"     lr {summary.lr:g}: a step changes {100 * summary.density_median:.2f} % of {summary.weights:,} weights",
    )
    _say(
        console,
        f"     a patch is {byte_text(summary.patch_bytes)}, a full checkpoint "
        f"{byte_text(summary.full_checkpoint_bytes)}: {ratio:.0f} times as much",
    )
    for side, verb in (("publish", "to publish"), ("apply", "to follow")):
        times = summary.seconds[side]
        stages = ", ".join(f"{stage} {1000 * seconds:.0f} ms" for stage, seconds in times.items() if stage != "total")
        _say(console, f"     median time {verb}: {1000 * times['total']:.0f} ms ({stages})")
    _say(
        console,
        f"     {summary.steps} steps in {summary.learning_s:.0f} s, {summary.run_s:.0f} s in all; rollouts were "
        f"{summary.staleness_mean:.1f} versions old on average, {summary.dropped} dropped",
    )
    _say(console, f"     page: {summary.page}")


def _say(console: Console, line: str) -> None:
    """One line, whatever the width: a wrapped path cannot be copied."""
    console.print(line, highlight=False, soft_wrap=True)


def main(argv: Sequence[str]) -> int:
    """Parse ``argv``, run, print; returns the exit code: 0 only if every promise was kept."""
    parser = argparse.ArgumentParser(
        prog="thinwire demo", description="An asynchronous RL run in separate processes, its weights sent by thinwire."
    )
    parser.add_argument("--model", default="tiny", help="tiny (default), smollm2, or nano (a check of seconds)")
    parser.add_argument("--steps", type=int, help="optimiser steps at most")
    parser.add_argument("--minutes", type=float, help="minutes of RL at most")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lr", type=float, help="learning rate of AdamW")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="runs get a folder each in here")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON, and progress on stderr")
    given = vars(parser.parse_args(argv))
    as_json = given.pop("json")
    console = Console(stderr=as_json)
    try:
        summary = run_demo(DemoOptions(**given), console)
    except ThinwireError as error:
        console.print(f"[bold red]error:[/] {error}", highlight=False)
        return error.exit_code
    if as_json:
        print(json.dumps(summary.as_json(), indent=2))
    else:
        print_summary(summary, console)
    return 0 if summary.passed else 1
