"""The command ``thinwire bench``, also ``python -m thinwire.bench``."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from thinwire.bench.accuracy_report import accuracy
from thinwire.bench.carriers import carriers
from thinwire.bench.convergence_cli import convergence
from thinwire.bench.federated_cli import federated, inversion
from thinwire.bench.federated_wire_cli import federated_wire
from thinwire.bench.fleet_cli import fleet
from thinwire.bench.instruments_cli import instruments
from thinwire.bench.link_cli import link
from thinwire.bench.merge_cli import merge
from thinwire.bench.momentum_cli import momentum
from thinwire.bench.predictive_cli import predictive
from thinwire.bench.roofline_cli import roofline
from thinwire.bench.selection_cli import selection
from thinwire.bench.sharded_cli import sharded
from thinwire.bench.signal_report import signal
from thinwire.bench.skips_cli import skips
from thinwire.bench.sparse_update_cli import sparse_update
from thinwire.bench.sparserl_cli import app as sparserl
from thinwire.bench.suite_cli import merge_suite
from thinwire.bench.swarm_cli import swarm
from thinwire.bench.switch_cli import switch
from thinwire.bench.sync_cli import app as sync
from thinwire.bench.trust_cli import trust

if TYPE_CHECKING:
    import torch

__all__ = ["app"]

app = typer.Typer(help="Measure thinwire beside what others send.", no_args_is_help=True, add_completion=False)
app.command()(accuracy)
app.command()(carriers)
app.command()(convergence)
app.command()(federated)
app.command()(fleet)
app.command()(instruments)
app.command()(inversion)
app.command()(link)
app.command()(merge)
app.command()(momentum)
app.command()(predictive)
app.command()(roofline)
app.command()(selection)
app.command()(sharded)
app.command()(signal)
app.command()(skips)
app.command()(swarm)
app.command()(switch)
app.command()(trust)
app.command("federated-wire")(federated_wire)
app.command("merge-suite")(merge_suite)
app.add_typer(sparserl, name="sparserl")
app.add_typer(sync, name="sync")
app.command("sparse-update")(sparse_update)


@app.callback()
def bench() -> None:
    """Every figure comes with its peers beside it, and is verified before it is timed."""


def _console(as_json: bool) -> Console:
    console = Console(stderr=as_json)
    return console if console.is_terminal else Console(stderr=as_json, width=132)


@app.command()
def codec(
    size: Annotated[str, typer.Option(help="Bytes of one version, such as 256MiB or 1GiB.")] = "1GiB",
    workload: Annotated[str, typer.Option(help="ulp, adam or both.")] = "both",
    density: Annotated[float, typer.Option(help="Share of weights that change in workload ulp.")] = 0.01,
    adam_density: Annotated[float, typer.Option(help="Share of weights that change in workload adam, about.")] = 0.025,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; best and median are shown.")] = 5,
    threads: Annotated[int, typer.Option(min=0, help="0: one a core.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
    peers: Annotated[bool, typer.Option(help="Measure what others send, too.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows of JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
    figures: Annotated[Path | None, typer.Option(help="Draw PNG and HTML into this folder.")] = None,
) -> None:
    """Size, speed and memory of thinwire's levels and their peers, on simulated steps."""
    from thinwire.bench.codec import run_codecs
    from thinwire.bench.measure import parse_size, write_rows
    from thinwire.bench.report import codec_figure, codec_html, codec_table, folder_lines, stage_line
    from thinwire.bench.workloads import WORKLOADS
    from thinwire.errors import MisuseError

    names = list(WORKLOADS) if workload == "both" else [workload]
    if not set(names) <= set(WORKLOADS):
        raise MisuseError(f"workload must be both, {' or '.join(WORKLOADS)}, not {workload!r}")
    console, rows = _console(as_json), []
    for name in names:
        with console.status(f"{name}: making the weights") as status:
            pair = WORKLOADS[name](parse_size(size), density if name == "ulp" else adam_density, seed)
            found = run_codecs(
                pair, repeats=repeats, threads=threads, peers=peers,
                report=lambda text, name=name: status.update(f"{name}: {text}"),  # type: ignore[misc]
            )  # fmt: skip
            del pair
        rows += found
        console.print(codec_table(found))
        console.print(folder_lines(found))
        console.print(stage_line(found))
        if figures is not None:
            codec_figure(found, figures / f"codec-{name}.png")
            codec_html(found, figures / f"codec-{name}.html")
    if out is not None:
        write_rows(out, rows)
    if as_json:
        for row in rows:
            typer.echo(json.dumps(row, sort_keys=True))


@app.command()
def follow(
    versions: Annotated[int, typer.Option(min=10, help="Versions to publish.")] = 300,
    consumers: Annotated[int, typer.Option(min=1, help="Processes that follow.")] = 3,
    kills: Annotated[int, typer.Option(min=0, help="How often one of them is killed, at random.")] = 20,
    model: Annotated[str, typer.Option(help="Bytes of the model.")] = "4MiB",
    seed: Annotated[int, typer.Option(help="Seed of the weights, the kills and the joins.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the row as JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the row to this file.")] = None,
) -> None:
    """Consumers that are killed and join late; ends with 1 if any digest is wrong."""
    from thinwire.bench.follow import FollowOptions, run_follow
    from thinwire.bench.measure import parse_size, write_rows
    from thinwire.bench.report import follow_table

    console = _console(as_json)
    options = FollowOptions(versions, consumers, kills, parse_size(model), seed=seed)
    with tempfile.TemporaryDirectory() as folder, console.status("following") as status:
        row = run_follow(Path(folder), options, report=status.update)
    console.print(follow_table(row))
    if out is not None:
        write_rows(out, [row])
    if as_json:
        typer.echo(json.dumps(row, sort_keys=True))
    for kind in ("mismatches", "stalled", "crashes"):
        for line in row[kind]:
            console.print(f"[bold red]{kind}[/bold red]: {line}")
    if row["mismatches"] or row["stalled"] or row["crashes"]:
        raise typer.Exit(1)


@app.command()
def real(
    steps: Annotated[int, typer.Option(min=1, help="GRPO steps.")] = 20,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-6,
    seed: Annotated[int, typer.Option(help="Seed of the trainer.")] = 0,
    simulated: Annotated[bool, typer.Option("--simulated", help="Simulated Adam steps of a small model.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows of JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
    figures: Annotated[Path | None, typer.Option(help="Draw PNG and HTML into this folder.")] = None,
) -> None:
    """Real versions: SmolLM2-135M under GRPO, published, followed and compared bit for bit."""
    from thinwire.bench.measure import write_rows
    from thinwire.bench.real import run_real, summary
    from thinwire.bench.report import real_figure, real_html, real_table

    console = _console(as_json)
    if simulated:
        from thinwire.bench.workloads import adam_versions

        states: Iterator[dict[str, torch.Tensor]] = islice(adam_versions(16 << 20, lr, seed), steps + 1)
        source = f"simulated Adam, lr {lr:g}"
    else:
        from thinwire.lab.real import smollm2_grpo_versions

        states = smollm2_grpo_versions(steps, lr, seed)
        source = f"SmolLM2-135M, GRPO, lr {lr:g}"
    with tempfile.TemporaryDirectory() as folder:
        rows = run_real(states, Path(folder), source=source, report=console.print)
    total = summary(rows)
    console.print(real_table(rows, total))
    if figures is not None:
        real_figure(rows, figures / "real.png")
        real_html(rows, figures / "real.html")
    if out is not None:
        write_rows(out, rows)
    if as_json:
        for row in rows:
            typer.echo(json.dumps(row, sort_keys=True))
    if not total["exact"]:
        console.print("[bold red]A version was not exact.[/bold red]")
        raise typer.Exit(1)


_GRADIENT_EXAMPLES = """\b
thinwire bench gradients                                   # 8 workers, 1 Gbit/s: minutes, and 6 GB of memory
thinwire bench gradients --workers 4 --width 16 --repeats 3          # a narrower ResNet-50, to try it
thinwire bench gradients --rate 100mbit --methods fp32,fp16,split    # a slower line, three methods
thinwire bench gradients --rate loopback --methods ours              # without root: no limit, no counted bytes
"""


@app.command(epilog=_GRADIENT_EXAMPLES)
def gradients(
    workers: Annotated[int, typer.Option(min=2, max=64, help="Ranks, one process and one host each.")] = 8,
    rate: Annotated[str, typer.Option(help="Of each host's line: 1gbit, 100mbit, none; or loopback.")] = "1gbit",
    density: Annotated[float, typer.Option(help="Share of elements that sparse methods send.")] = 0.01,
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps of each method.")] = 7,
    methods: Annotated[str, typer.Option(help="Names with commas between; baselines, ours, all.")] = "all",
    bucket_mb: Annotated[float, typer.Option(min=0, help="MiB of DDP's buckets; 0: one flat tensor.")] = 25,
    width: Annotated[int, typer.Option(min=1, help="Channels of ResNet-50's first layer; less is narrower.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the gradients.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows of JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
) -> None:
    """Gradient exchange side by side over a slow network: all-reduce, fp16, PowerSGD, all-gather, thinwire."""
    from thinwire.bench.gradients import gradients_table, run_gradients
    from thinwire.bench.gradients_methods import choose
    from thinwire.bench.gradients_worker import GradientOptions
    from thinwire.bench.measure import write_rows

    console = _console(as_json)
    if rate != "loopback" and not _has_slow_network(console):
        return
    names = tuple(method.name for method in choose(methods))
    options = GradientOptions(names, density, repeats, bucket_mb=bucket_mb, width=width, seed=seed)
    with console.status("starting the ranks") as status:
        line = None if rate == "loopback" else rate
        rows = run_gradients(options, workers, line, report=lambda text: status.update(f"gradients: {text}"))
    console.print(gradients_table(rows))
    if out is not None:
        write_rows(out, rows)
    if as_json:
        for row in rows:
            typer.echo(json.dumps(row, sort_keys=True))


_SCALING_EXAMPLES = """\b
thinwire bench scaling                                    # 1 to 8 workers measured, 16 for bytes, 64 simulated
thinwire bench scaling --width 16 --measured 2,4 --bytes-only "" --simulated 2,4,8     # small, to try it
"""


@app.command(epilog=_SCALING_EXAMPLES)
def scaling(
    rate: Annotated[str, typer.Option(help="Of each host's line: 1gbit, 100mbit, none.")] = "1gbit",
    measured: Annotated[str, typer.Option(help="Numbers of workers to measure; the largest is held out.")] = "1,2,4,8",
    bytes_only: Annotated[str, typer.Option(help="Numbers of workers at which bytes alone are measured.")] = "16",
    simulated: Annotated[str, typer.Option(help="Numbers of workers to simulate.")] = "1,2,4,8,16,32,64",
    density: Annotated[float, typer.Option(help="Share of elements that sparse methods send.")] = 0.01,
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps of each method; the best counts.")] = 5,
    width: Annotated[int, typer.Option(min=1, help="Channels of ResNet-50's first layer; less is narrower.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the gradients.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows of JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
    figures: Annotated[Path | None, typer.Option(help="Draw gradients-scaling.png into this folder.")] = None,
    again: Annotated[Path | None, typer.Option(help="Measure nothing: simulate anew from rows in this file.")] = None,
) -> None:
    """Gradient exchange from 1 to 64 workers: measured, then simulated by a model held against held-out points."""
    from thinwire.bench.measure import write_rows
    from thinwire.bench.scaling import ScalingOptions, run_scaling, scaling_table, simulate
    from thinwire.bench.scaling_figure import scaling_figure

    console = _console(as_json)
    options = ScalingOptions(
        rate, _numbers(measured), _numbers(bytes_only), _numbers(simulated), density, repeats, width=width, seed=seed
    )
    if again is None and not _has_slow_network(console):
        return
    with console.status("starting the ranks") as status:

        def report(text: str) -> None:
            status.update(f"scaling: {text}")

        if again is None:
            rows = run_scaling(options, report)
        else:
            rows = simulate([json.loads(line) for line in again.read_text().splitlines()], options.simulated, report)
    console.print(scaling_table(rows))
    if figures is not None:
        scaling_figure(rows, figures / "gradients-scaling.png")
    if out is not None:
        write_rows(out, rows)
    if as_json:
        for row in rows:
            typer.echo(json.dumps(row, sort_keys=True))


def _numbers(text: str) -> tuple[int, ...]:
    from thinwire.errors import MisuseError

    words = [word.strip() for word in text.split(",") if word.strip()]
    if not all(word.isdecimal() and 1 <= int(word) <= 64 for word in words):
        raise MisuseError(f"not numbers of workers: {text!r}; write them as 1,2,4,8, at most 64")
    return tuple(int(word) for word in words)


def _has_slow_network(console: Console) -> bool:
    """Says so if there can be none: the benchmark is skipped, which is no failure."""
    from thinwire.bench.net.namespaces import SlowNetwork

    reason = SlowNetwork.why_not()
    if reason is not None:
        console.print(f"skipped: {reason} (--rate loopback needs none of it, but has no limit and counts no bytes)")
    return reason is None
