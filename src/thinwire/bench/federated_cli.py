"""The commands ``thinwire bench federated`` and ``thinwire bench inversion``."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

__all__ = ["federated", "inversion"]

Row = dict[str, Any]


def federated(
    data: Annotated[str, typer.Option(help="digits, mnist, cifar10 or plays.")] = "digits",
    method: Annotated[list[str] | None, typer.Option(
        "--method", "-m", help="A method; several; all by default.")] = None,
    clients: Annotated[int, typer.Option(min=1, help="Clients.")] = 10,
    partition: Annotated[list[str] | None, typer.Option(
        "--partition", "-p", help="iid, dirichlet-ALPHA or pathological-CLASSES; several.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds.")] = 20,
    epochs: Annotated[int, typer.Option(min=1, help="Local epochs of a round.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Samples of a local step.")] = 32,
    lr: Annotated[float, typer.Option(help="Local learning rate.")] = 0.05,
    train: Annotated[int | None, typer.Option(help="Use so many training samples; all by default.")] = None,
    test: Annotated[int | None, typer.Option(help="Use so many test samples; all by default.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each.")] = 3,
    density: Annotated[float, typer.Option(help="Share of the weights that a client sends.")] = 0.01,
    down_density: Annotated[float, typer.Option(help="Share that the server sends.")] = 0.05,
    anchor_every: Annotated[int, typer.Option(help="Rounds from one exact model to the next; 0 never.")] = 50,
    participation: Annotated[float, typer.Option(help="Share of the clients in a round.")] = 1.0,
    dropout: Annotated[float, typer.Option(help="Probability that an answer is lost.")] = 0.0,
    mbit: Annotated[float, typer.Option(help="Median up-link of the simulated devices, Mbit/s.")] = 10.0,
    evaluate_every: Annotated[int, typer.Option(min=1, help="Rounds from one evaluation to the next.")] = 1,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Runs at a time.")] = 2,
    data_root: Annotated[str | None, typer.Option(help="Folder of data sets; else THINWIRE_DATA.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of results, kept.")] = Path("federated"),
    figure: Annotated[Path | None, typer.Option(help="Draw accuracy by round and by byte into this PNG.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows of JSON.")] = False,
) -> None:  # fmt: skip
    """Federated learning, method beside method, on Flower: accuracy by round and by byte, fairness, bytes.

    A bench that was interrupted goes on where it was. Times are simulated, bytes are those of Flower's messages.
    """
    from thinwire.bench.federated import Devices, FederatedRun, run_all
    from thinwire.bench.federated_methods import METHODS, Settings
    from thinwire.bench.federated_report import federated_figure, federated_table
    from thinwire.bench.measure import write_rows

    settings = Settings(density, down_density, anchor_every, participation=participation)
    devices = Devices(mbit, dropout=dropout)
    parts = partition or ["dirichlet-0.5"]
    runs = [
        FederatedRun(
            one, data, how, clients, rounds, epochs, batch, lr, train=train, test=test, seed=seed, settings=settings,
            devices=devices, evaluate_every=evaluate_every,
        )
        for how, seed, one in itertools.product(parts, range(seeds), method or METHODS)
    ]  # fmt: skip
    console = Console(stderr=as_json)
    console = console if console.is_terminal else Console(stderr=as_json, width=130)
    from rich.progress import Progress

    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("runs", total=len(runs))
        rows = run_all(runs, out, jobs=jobs, root=data_root, on_done=lambda _: bar.advance(task))
    write_rows(out / "rows.jsonl", rows)
    for how in parts:
        console.print(federated_table([row for row in rows if row["partition"] == how]))
    if figure is not None:
        federated_figure([row for row in rows if row["partition"] == parts[0]], figure)
        console.print(f"figure in {figure}")
    if as_json:
        for row in rows:
            typer.echo(json.dumps(row, sort_keys=True))


def inversion(
    data: Annotated[str, typer.Option(help="digits, mnist or cifar10.")] = "mnist",
    pictures: Annotated[int, typer.Option(min=1, help="How many to attack.")] = 8,
    density: Annotated[list[float] | None, typer.Option(help="Share of an update that is sent; several.")] = None,
    steps: Annotated[list[int] | None, typer.Option(help="Local steps before it is sent; several.")] = None,
    iterations: Annotated[int, typer.Option(min=1, help="Of the search for pictures.")] = 300,
    data_root: Annotated[str | None, typer.Option(help="Folder of data sets; else THINWIRE_DATA.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Show what was found in this PNG.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows of JSON.")] = False,
) -> None:
    """Rebuild clients' pictures from their updates: naive, mask-aware and learned attackers, against density."""
    from rich.table import Table

    from thinwire.bench.inversion import InversionOptions, inversion_figure, run_inversion
    from thinwire.bench.measure import write_rows

    chosen: dict[str, Any] = {}
    if density:
        chosen["densities"] = tuple(density)
    if steps:
        chosen["steps"] = tuple(steps)
    options = InversionOptions(data, pictures, iterations=iterations, **chosen)
    console = Console(stderr=as_json)
    with console.status("attacking") as status:
        rows, found = run_inversion(
            options, root=data_root,
            on_row=lambda row: status.update(f"{row['attack']}, {row['steps']} steps, density {row['density']:g}"),
        )  # fmt: skip
    table = Table("attack", "local steps", "density", "PSNR, dB", "SSIM", title=f"{pictures} pictures of {data}")
    for row in rows:
        numbers = f"{row['psnr']:.1f}", f"{row['ssim']:.2f}"
        table.add_row(row["attack"], str(row["steps"]), f"{100 * row['density']:g} %", *numbers)
    console.print(table)
    if out is not None:
        write_rows(out, rows)
    if figure is not None:
        inversion_figure(found, figure)
    if as_json:
        for row in rows:
            typer.echo(json.dumps(row, sort_keys=True))
