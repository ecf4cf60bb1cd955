"""``thinwire train``: recipes whose every option is a command-line option and a line of YAML alike.

The options come from the recipe's config (:mod:`thinwire.lab.config`): what is added there appears here.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer

from thinwire.cli.group import Commands
from thinwire.cli.options import Json, examples
from thinwire.cli.output import Output, bytes_text, count_text, share_text
from thinwire.lab.config import Option, from_mapping, from_yaml, options_of, to_yaml
from thinwire.lab.text.config import LmConfig
from thinwire.lab.vision.config import VisionConfig

if TYPE_CHECKING:
    from thinwire.lab.trainer.outcome import Outcome

__all__ = ["app"]

app = typer.Typer(
    cls=Commands,
    help="Train with compressed gradients.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_METAVARS = {int: "N", float: "X"}


@app.callback()
def train() -> None:
    """Recipes that run in one process, in several of this machine (--workers), or wherever torchrun starts them."""


def _vision(output: Output, config: VisionConfig) -> None:
    """Train an image classifier, with compressed gradients if asked to.

    Without options: a small CNN on scikit-learn's digits, in seconds. --config reads options from a YAML file, over
    which those of the command line go; --print-config writes such a file.
    """
    from thinwire.lab.vision.recipe import train

    summary = train(config, console=output.stderr)
    if _first():
        output.document(summary.as_json())
        found = {}
        if summary.accuracy is not None and summary.best_accuracy is not None:
            found["accuracy"] = f"{100 * summary.accuracy:.2f} % (best {100 * summary.best_accuracy:.2f} %)"
        _show(output, summary, found)


def _lm(output: Output, config: LmConfig) -> None:
    """Train a language model, with compressed gradients and corrupted workers if asked to.

    Without options: a GPT of 0.1 million weights on sentences that a program writes, in seconds. --config reads options
    from a YAML file, over which those of the command line go; --print-config writes such a file.
    """
    from thinwire.lab.text.recipe import train

    summary = train(config, console=output.stderr)
    if _first():
        output.document(summary.as_json())
        found = {}
        if summary.loss is not None:
            found["validation"] = f"loss {summary.loss:.4f} nats a token, perplexity {summary.perplexity:.2f}"
            found["validation"] += f"; the text's entropy is {summary.entropy:.4f}" if summary.entropy else ""
        if summary.corrupted:
            found["corrupted"] = f"workers {', '.join(map(str, summary.corrupted))}: {config.corruption}"
        _show(output, summary, found)
        if summary.sample:
            output.say(f"\n{summary.sample}")


def _first() -> bool:
    """Whether this is the process that prints."""
    return os.environ.get("RANK", "0") == "0"


def _show(output: Output, summary: Outcome, found: dict[str, str]) -> None:
    """A run's result for people; ``found`` is what is peculiar to the recipe."""
    facts = {"steps": count_text(summary.steps) + ("" if summary.finished else " (stopped early)"), **found}
    facts["parameters"] = count_text(summary.parameters)
    if summary.bytes_dense:
        less = f"{share_text(abs(summary.saved), 1)} {'less' if summary.saved >= 0 else 'more'}"
        facts["received"] = (
            f"{bytes_text(summary.bytes_received)} of gradients a worker, {less} than the "
            f"{bytes_text(summary.bytes_dense)} of a dense all-reduce"
        )
    facts["time"] = f"{summary.seconds:.1f} s, {summary.workers} worker{'s' * (summary.workers > 1)}, {summary.device}"
    facts["state"] = summary.digest
    if summary.config["out"] is not None:
        facts["kept in"] = summary.config["out"]
    output.facts(facts)


# --- from a config to a command ------------------------------------------------------------------------------------


def _command(name: str, config_type: type[Any], run: Callable[[Output, Any], None], *lines: str) -> None:
    """Add the command ``name``, whose options are those of ``config_type``."""

    def command(ctx: typer.Context, config: Path | None, print_config: bool, as_json: bool, **options: Any) -> None:
        output = Output(ctx, as_json=as_json and _first())
        given = {key: value for key, value in options.items() if value is not None}
        made = from_mapping(config_type, given) if config is None else from_yaml(config_type, config, given)
        if print_config:
            print(to_yaml(made), end="")
        elif made.workers > 1 and "WORLD_SIZE" not in os.environ:
            _launch(made.workers, name, config, given, as_json)
        else:
            run(output, made)

    known = [
        _parameter("ctx", typer.Context),
        _parameter("config", Annotated[Path | None, typer.Option(help="YAML file with options.")], None),
        _parameter("print_config", Annotated[bool, typer.Option("--print-config", help="Print all as YAML.")], False),
        _parameter("as_json", Json, False),
    ]
    own = [_parameter(option.name, _annotation(option), None) for option in options_of(config_type)]
    command.__signature__ = inspect.Signature([*known, *own])  # type: ignore[attr-defined]
    command.__annotations__ = {x.name: x.annotation for x in (*known, *own)}
    words = (inspect.getdoc(run) or "").split("\n\n")
    app.command(name, help="\n\n".join(x.replace("\n", " ") for x in words), epilog=examples(*lines))(command)


def _parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _annotation(option: Option) -> Any:
    """How Typer is told of an option. None stands for one that was not given, so that YAML is not overridden."""
    flag, default = "--" + option.name.replace("_", "-"), option.default
    if isinstance(default, bool):
        default = "on" if default else "off"
    details = typer.Option(
        f"{flag}/--no-{flag[2:]}" if option.kind is bool else flag,
        help=option.text + ("" if default is None else f" Default: {default}."),
        show_default=False,
        rich_help_panel=option.section,
        metavar=None if option.kind is bool else _METAVARS.get(option.kind, "NAME" if option.choices else "TEXT"),
        click_type=click.Choice(option.choices) if option.choices else None,
    )
    return Annotated[option.kind | None, details]


def _launch(workers: int, name: str, config: Path | None, given: dict[str, Any], as_json: bool) -> None:
    """Become torchrun, which starts this command once for each worker. The cores are shared out among them."""
    words = [] if config is None else ["--config", str(config)]
    for key, value in given.items():
        flag = key.replace("_", "-")
        words += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    sys.stdout.flush()
    # Without "--", torchrun takes --log and --signal for its own options, abbreviated.
    command = [*torchrun, "-m", "--", "thinwire", "train", name, *words, *(["--json"] if as_json else [])]
    os.execv(sys.executable, command)


_command(
    "vision",
    VisionConfig,
    _vision,
    "thinwire train vision",
    "thinwire train vision --workers 2 --compress topk --density 0.01",
    "thinwire train vision --model resnet18 --data cifar10 --out run --resume auto",
    "thinwire train vision --config compressed.yaml --print-config",
)
_command(
    "lm",
    LmConfig,
    _lm,
    "thinwire train lm",
    "thinwire train lm --data tinyshakespeare --workers 2 --compress topk",
    "thinwire train lm --data notes.txt --tokens bpe --out run --resume auto",
    "thinwire train lm --shards clean_vs_corrupt --corruption sign_flip",
)
