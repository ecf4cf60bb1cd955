"""Running the command in this process, and in one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from tests.sync.checkpoints import State, nudged, save, state
from thinwire.cli import app

__all__ = ["Result", "command", "program", "series", "thinwire"]


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one document on stdout; anything else there is an error."""
        return json.loads(self.out)


def thinwire(*args: object, code: int = 0) -> Result:
    """Run the command here; its exit code must be ``code``, and no exception may have got out."""
    result = CliRunner().invoke(app, [str(arg) for arg in args], prog_name="thinwire")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr)
    return Result(result.exit_code, result.stdout, result.stderr)


def command(*args: object) -> list[str]:
    """The command line of a process of its own."""
    return [sys.executable, "-c", "from thinwire.cli import main; main()", *map(str, args)]


def program(*args: object, **how: Any) -> Result:
    """Run the command in a process of its own."""
    done = subprocess.run(command(*args), capture_output=True, text=True, timeout=120, env=environment(), **how)
    return Result(done.returncode, done.stdout, done.stderr)


def environment() -> dict[str, str]:
    return {**os.environ, "COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"}


def series(folder: Path, count: int) -> tuple[list[Path], list[State]]:
    """``count`` checkpoints as training makes them: files ``0.safetensors`` and so on, and their tensors."""
    states = [state()]
    for k in range(1, count):
        states.append(nudged(states[-1], seed=k))
    return [save(folder / f"{k}.safetensors", s) for k, s in enumerate(states)], states
