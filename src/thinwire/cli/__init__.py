"""The thinwire command.

One file per group of commands. What is heavy (torch, numba) is imported by the command that needs it, so that
``--help`` and ``log`` answer at once.
"""

from __future__ import annotations

import inspect as inspect_module
from collections.abc import Callable
from typing import Annotated

import typer

from thinwire.cli.compacting import compact
from thinwire.cli.following import follow, pull
from thinwire.cli.group import Commands
from thinwire.cli.history import gc, log, verify
from thinwire.cli.inspecting import inspect
from thinwire.cli.keys import keygen
from thinwire.cli.meeting import rendezvous
from thinwire.cli.options import examples
from thinwire.cli.patching import apply, diff
from thinwire.cli.publishing import publish
from thinwire.cli.reporting import report
from thinwire.cli.serving import serve

__all__ = ["app", "main"]

_EXIT_CODES = (
    "[bold]Exit codes[/]\n\n  0 done   2 wrong call   3 refused: malformed or untrusted\n\n"
    "  4 wrong base   5 damaged or missing object   6 store failed, try again later"
)


class _Commands(Commands):
    mounts = {  # noqa: RUF012 - a ClassVar by its base
        "bench": ("thinwire.bench.cli", "app", "Measure patches, kernels and stores, side by side with others."),
        "demo": ("thinwire.lab.demo.command", "main", "Watch an RL run whose weights travel as patches."),
        "merge": ("thinwire.cli.merging", "app", "Merge fine-tunes of one base, sparse as they are."),
        "probe": ("thinwire.cli.probing", "app", "Measure which weights move, and how much of it is rounding."),
        "study": ("thinwire.cli.studying", "app", "Answer questions about sparsity by experiments."),
        "trust": ("thinwire.cli.keys", "app", "Say whose signatures count, and renew that nothing is stale."),
        "train": ("thinwire.cli.training", "app", "Train with compressed gradients, on one process or many."),
    }


app = typer.Typer(
    name="thinwire",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_EXIT_CODES,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from thinwire import __version__

        print(f"thinwire {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Send only what changed; prove that what arrived is the same.

    Patches between checkpoints, and chains of versions in a store that workers follow bit for bit.
    """


def _add(command: Callable[..., None], *lines: str) -> None:
    """Add a command with its examples; paragraphs of its docstring are flowed to the terminal's width."""
    paragraphs = inspect_module.getdoc(command).split("\n\n")  # type: ignore[union-attr]
    app.command(help="\n\n".join(p.replace("\n", " ") for p in paragraphs), epilog=examples(*lines))(command)


_add(
    diff,
    "thinwire diff step-100.safetensors step-101.safetensors -o 101.patch",
    "thinwire diff ./base ./tuned -o tuned.patch --level smallest",
)
_add(
    apply,
    "thinwire apply step-100.safetensors 101.patch -o step-101.safetensors",
    "thinwire apply ./base tuned.patch -o ./tuned-here",
)
_add(
    inspect,
    "thinwire inspect 101.patch",
    "thinwire inspect ./base --digest",
    "thinwire inspect s3://bucket/run --json",
)
_add(
    publish,
    "thinwire publish /shared/run step-100.safetensors --step 100",
    "thinwire publish s3://bucket/run ./checkpoint --dtype bf16",
)
_add(
    pull,
    "thinwire pull s3://bucket/run -o ./model",
    "thinwire pull /shared/run -o ./model --version 12",
)
_add(
    follow,
    "thinwire follow /shared/run -o ./model",
    "thinwire follow s3://bucket/run -o ./model --exec ./reload.sh",
    "thinwire follow s3://bucket/run -o ./model --json --timeout 10m",
    "thinwire follow s3://bucket/run -o ./model --peers swarm",
)
_add(
    serve,
    "thinwire serve s3://bucket/run --model ./SmolLM2-135M-Instruct",
    "thinwire serve /shared/run --model ./model --device cuda --port 8080",
)
_add(
    log,
    "thinwire log /shared/run",
    "thinwire log s3://bucket/run --limit 5 --json",
)
_add(
    report,
    "thinwire report /shared/run -o report.html",
    "thinwire report s3://bucket/run --last 200 --json",
)
_add(
    verify,
    "thinwire verify s3://bucket/run",
    "thinwire verify /shared/run --deep",
    "thinwire verify 101.patch --base step-100.safetensors",
)
_add(
    compact,
    "thinwire compact s3://bucket/run",
    "thinwire compact /shared/run --dry-run --json",
)
_add(
    gc,
    "thinwire gc s3://bucket/run --dry-run",
    "thinwire gc /shared/run --keep-last 50 --keep 1 --grace 1d",
)
_add(
    rendezvous,
    "thinwire rendezvous --port 6969",
)
_add(
    keygen,
    "thinwire keygen publisher.key",
    "thinwire keygen objects.key --objects",
)


def main() -> None:
    """The program's entry point."""
    app(prog_name="thinwire")
