"""The command group: errors become messages and exit codes, and heavy commands are imported when they are called."""

from __future__ import annotations

import errno
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NoReturn, get_type_hints

import click
import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup

from thinwire.cli.output import Output
from thinwire.errors import MisuseError, RetryError, ThinwireError

__all__ = ["Commands", "Mount"]

_CALLERS_FAULT = {
    errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR,
    errno.ENOTEMPTY, errno.EPERM, errno.EROFS, errno.EXDEV,
}  # fmt: skip

Mount = tuple[str, str, str]
"""A module, the name in it of a Typer app or of ``main(argv) -> exit code``, and the line for the group's help."""


class Commands(TyperGroup):
    """Commands of this package, and those mounted from others: imported only when they are called, if they are there.

    A ThinwireError ends the program with its message on stderr and its exit code, an OSError likewise: no traceback for
    what is not a bug.
    """

    mounts: ClassVar[Mapping[str, Mount]] = {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *(name for name, mount in self.mounts.items() if _is_there(mount[0]))]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        mount = self.mounts.get(cmd_name)
        if mount is None or not _is_there(mount[0]):
            return _with_help(super().get_command(ctx, cmd_name))
        module, attribute, line = mount
        return TyperCommand(
            cmd_name,
            callback=_runner(module, attribute, f"thinwire {cmd_name}"),
            help=line,
            params=[click.Argument(["args"], nargs=-1, type=click.UNPROCESSED)],
            add_help_option=False,
            context_settings={"ignore_unknown_options": True},
        )

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ThinwireError as error:
            _fail(ctx, error)
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of our output has gone; click ends quietly
                raise
            _fail(ctx, _wrapped(error))


def _with_help(command: click.Command | None) -> click.Command | None:
    """Give arguments back their help, which click 8.5 takes from the parameters of this Typer release."""
    if command is not None and command.callback is not None:
        hints = get_type_hints(command.callback, include_extras=True)
        for param in command.params:
            if isinstance(param, TyperArgument) and param.help is None:
                infos = [i for i in getattr(hints.get(param.name or ""), "__metadata__", ()) if hasattr(i, "help")]
                param.help = infos[0].help if infos else None
    return command


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _runner(module: str, attribute: str, program: str) -> Callable[..., None]:
    def run(args: tuple[str, ...]) -> None:
        found = getattr(importlib.import_module(module), attribute)
        if isinstance(found, typer.Typer):
            command = typer.main.get_command(found)
            code = command.main(args=list(args), prog_name=program, standalone_mode=False)
        else:
            code = found(list(args))
        raise typer.Exit(code if isinstance(code, int) else 0)

    return run


def _wrapped(error: OSError) -> ThinwireError:
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    text = " to ".join(names) + (": " if names else "") + (error.strerror or str(error))
    if error.errno in _CALLERS_FAULT:
        return MisuseError(text, path=names[0] if names else None)
    return RetryError(f"{text}; check the disk, then try again", path=names[0] if names else None)


def _fail(ctx: click.Context, error: ThinwireError) -> NoReturn:
    output = ctx.find_root().obj
    if not isinstance(output, Output):
        output = Output(typer.Context(ctx.command), as_json=False)
    output.error(error)
    raise typer.Exit(error.exit_code)
