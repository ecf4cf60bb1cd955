"""``thinwire study``: many short training runs, what changed in each, and what that says."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thinwire.cli.options import Json, examples
from thinwire.cli.output import Output
from thinwire.errors import MisuseError

if TYPE_CHECKING:
    from thinwire.lab.study.findings import Finding
    from thinwire.lab.study.matrix import Run, Study

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="rich",
                  context_settings={"help_option_names": ["-h", "--help"]})  # fmt: skip


@app.callback()
def _study() -> None:
    """Answer questions by experiments: many small runs, a table, figures, verdicts with intervals."""


@app.command(epilog=examples(
    "thinwire study sparsity --config configs/study.yaml -o study",
    "thinwire study sparsity -c configs/study.yaml -o study --report-only",
    "thinwire study sparsity -c configs/study.yaml -o study --list",
))  # fmt: skip
def sparsity(
    ctx: typer.Context,
    config: Annotated[Path, typer.Option("--config", "-c", help="The study, a YAML file.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the results; runs in it are kept.")] = Path(
        "study"
    ),
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=0, help="Runs at a time; 0: one a core.")] = 0,
    list_only: Annotated[bool, typer.Option("--list", help="Say which runs there are, and make none.")] = False,
    report_only: Annotated[bool, typer.Option("--report-only", help="Report on the runs that there are.")] = False,
    as_json: Json = False,
) -> None:
    """Train small models in many ways and tell which weights move, beside what rounding alone would move.

    A study that was interrupted goes on where it was: every run is a file. In the folder: runs.parquet (all rows),
    summaries.jsonl, findings.md, figures, and report.html.
    """
    output = Output(ctx, as_json=as_json)
    from thinwire.lab.study.execute import pending, run_study
    from thinwire.lab.study.matrix import read_study

    study = read_study(config)
    left = pending(study, out)
    if list_only:
        output.document({"runs": [asdict(run) | {"id": study.id(run), "done": run not in left} for run in study.runs]})
        output.say(
            f"{len(study.runs)} runs of {len({r.condition for r in study.runs})} conditions, {len(left)} to make"
        )
        return
    failed: list[Run] = []
    if not report_only and left:
        began = time.perf_counter()
        with _Progress(output, study, left) as progress:
            failed = run_study(study, out, jobs=jobs or os.cpu_count() or 1, on_done=progress)
        output.note(f"{len(left) - len(failed)} runs in {(time.perf_counter() - began) / 60:.1f} min")
    facts, findings = _report(study, out)
    output.document({
        "out": str(out), "runs": facts["runs"], "rows": facts["rows"], "failed": len(failed),
        "findings": [asdict(finding) for finding in findings],
    })  # fmt: skip
    _show(output, findings)
    output.say(f"{out}/report.html, findings.md, runs.parquet ({facts['rows']:,} rows of {facts['runs']} runs)")
    if failed:
        raise MisuseError(
            f"{len(failed)} of {len(left)} runs failed, the reasons are in {out}/failed; the same command tries again"
        )


@app.command(epilog=examples(
    "thinwire study sharpness",
    "thinwire study sharpness --recipe tiny --seeds 5 -o rows.jsonl",
    "thinwire study sharpness --optimiser descent --json",
))  # fmt: skip
def sharpness(
    ctx: typer.Context,
    recipe: Annotated[str, typer.Option(help="nano or tiny.")] = "nano",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each smoothing.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a run.")] = 8,
    optimiser: Annotated[str, typer.Option(help="adamw, or descent: steps of one size along the gradient.")] = "adamw",
    rows: Annotated[Path | None, typer.Option("--out", "-o", help="Write the rows here, a line of JSON each.")] = None,
    as_json: Json = False,
) -> None:
    """Ask whether sharp advantages make sparse updates: the same answers, learned from with advantages smoothed."""
    output = Output(ctx, as_json=as_json)
    from thinwire.lab.sharpness import SharpnessOptions, summarise
    from thinwire.lab.sharpness import sharpness as run

    options = SharpnessOptions(recipe, tuple(range(seeds)), steps, optimiser=optimiser, measured=(1, steps))  # type: ignore[arg-type]
    with output.stderr.status("warm start"):
        found = run(options)
    lines = summarise(found)
    _write_rows(rows, found)
    output.document({"options": asdict(options), "lines": lines})
    if not as_json:
        from rich.table import Table

        table = Table("advantages", "number", "changed", "against plain", "gradient's rank")
        table.columns[0].no_wrap = True
        for line in lines:
            gap = 100 * line["density_gap"] / lines[0]["density"]
            error = 100 * line["density_error"] / lines[0]["density"]
            table.add_row(
                line["smoothing"] + (f" {line['level']:g}" if line["level"] else ""), f"{line['number']:.1f}",
                f"{100 * line['density']:.2f} %", f"{gap:+.1f} ± {error:.1f} %" if line is not lines[0] else "",
                f"{100 * line['rank_gradient']:.1f} %",
            )  # fmt: skip
        output.show(table)
        output.say(f"mean over {seeds} seeds and {steps} steps; ± is the standard error over seeds. Number: of answers "
                   "that count; rank: of full")  # fmt: skip


@app.command(epilog=examples("thinwire study prediction", "thinwire study prediction --recipe tiny -o rows.jsonl"))
def prediction(
    ctx: typer.Context,
    recipe: Annotated[str, typer.Option(help="nano or tiny.")] = "nano",
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-5,
    steps: Annotated[int, typer.Option(min=8, help="Steps of each run.")] = 32,
    rows: Annotated[Path | None, typer.Option("--out", "-o", help="Write the rows here, a line of JSON each.")] = None,
    as_json: Json = False,
) -> None:
    """Ask which weights a step will change, before it: rules and small models, on steps they were not fitted to."""
    output = Output(ctx, as_json=as_json)
    from thinwire.lab.foretelling import ForetellingOptions, foretell

    options = ForetellingOptions(recipe, lr, steps)
    with output.stderr.status("") as status:
        found = foretell(options, say=status.update)
    _write_rows(rows, found)
    output.document({"options": asdict(options), "rows": found})
    if not as_json:
        from rich.table import Table

        settings = list(dict.fromkeys(row["setting"] for row in found))
        table = Table("predictor", *settings, title="average precision (base rate)", title_justify="left")
        for name in dict.fromkeys(row["predictor"] for row in found):
            by = {row["setting"]: row for row in found if row["predictor"] == name}
            cells = [
                f"{by[s]['average_precision']:.3f} ({by[s]['base_rate']:.3f})" if s in by else "" for s in settings
            ]
            table.add_row(name, *cells)
        output.show(table)


def _write_rows(path: Path | None, rows: list[dict[str, Any]]) -> None:
    import json

    if path is not None:
        short = [{k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in short))


def _report(study: Study, out: Path) -> tuple[dict[str, int], list[Finding]]:
    from thinwire.lab.study.execute import read_records
    from thinwire.lab.study.figures import draw_all
    from thinwire.lab.study.findings import answers
    from thinwire.lab.study.overlap import add_overlaps
    from thinwire.lab.study.report import findings_markdown, write_page
    from thinwire.lab.study.summary import summary_of, write_summaries
    from thinwire.lab.study.table import write_table

    records = read_records(study, out)
    if not records:
        raise MisuseError(f"{out} holds no run of this study; leave --report-only out to make them")
    rows = write_table(records, out / "runs.parquet")
    summaries = [summary_of(record) for record in records]
    centre = asdict(study.centre)
    add_overlaps(summaries, out, centre)
    write_summaries(summaries, out / "summaries.jsonl")
    findings = answers(summaries, centre)
    pictures = draw_all(summaries, centre, out / "figures")
    (out / "findings.md").write_text(findings_markdown(findings))
    write_page(summaries, findings, pictures, out / "report.html", study.about)
    return {"runs": len(records), "rows": rows}, findings


def _show(output: Output, findings: list[Finding]) -> None:
    from rich.table import Table

    table = Table("hypothesis", "verdict", "why")
    colors = {"supported": "green", "refuted": "red", "undecided": "dim"}
    for finding in findings:
        table.add_row(finding.hypothesis, f"[{colors[finding.verdict]}]{finding.verdict}[/]", finding.why)
    output.show(table)


class _Progress:
    """A bar on a terminal; elsewhere a line every tenth of the runs."""

    def __init__(self, output: Output, study: Study, left: list[Run]) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._output, self._total, self._done, self._failed = output, len(left), 0, 0
        self._starts = 0
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=output.stderr, transient=True, disable=not output.stderr.is_terminal,
        )  # fmt: skip
        self._task: Any = self._bar.add_task("runs", total=len(left))
        output.note(f"{len(left)} of {len(study.runs)} runs to make")

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def __call__(self, stage: str, run: Run, sound: bool) -> None:
        if stage == "start":
            self._starts += 1
            self._bar.update(self._task, description=f"warm start {self._starts}")
            return
        self._done += 1
        self._failed += not sound
        text = f"{run.objective}, {run.optimiser}" + (f" ({self._failed} failed)" if self._failed else "")
        self._bar.update(self._task, completed=self._done, description=text)
        if not self._output.stderr.is_terminal and self._done % max(1, self._total // 10) == 0:
            self._output.note(
                f"{self._done} of {self._total} runs" + (f", {self._failed} failed" if self._failed else "")
            )
