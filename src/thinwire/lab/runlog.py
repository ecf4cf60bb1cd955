"""Metrics of a run: rows that go to JSON lines, TensorBoard and Weights & Biases alike.

A row has a kind (``step``, ``epoch``, ``round``), the step at which it was taken, and values by name. Sinks are made by
name, import what they need only then, and know nothing of what they log; any recipe can use them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from thinwire.errors import MisuseError

__all__ = ["JsonLines", "RunLog", "Sink", "TensorBoard", "Wandb", "open_log", "read_rows"]

Value = float | int | str


class Sink(Protocol):
    """Takes rows; ``kind`` and ``step`` say where a row belongs."""

    def write(self, kind: str, step: int, values: Mapping[str, Value]) -> None:
        """Take one row."""
        ...

    def close(self) -> None:
        """Flush all; nothing is written afterwards."""
        ...


class RunLog:
    """Sends each row to all sinks. Without sinks, as on all ranks but the first, it does nothing.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with open_log(["jsonl"], Path(folder), run="demo", config={"lr": 0.1}) as log:
    ...         log.write("step", 1, loss=0.5, lr=0.1)
    ...         log.write("step", 2, loss=0.25, lr=0.1)
    ...     [row["loss"] for row in read_rows(Path(folder) / "metrics.jsonl")]
    [0.5, 0.25]
    """

    def __init__(self, sinks: Sequence[Sink] = ()) -> None:
        self._sinks = tuple(sinks)

    def write(self, kind: str, step: int, **values: Value) -> None:
        """Log one row."""
        for sink in self._sinks:
            sink.write(kind, step, values)

    def close(self) -> None:
        """Flush and close every sink."""
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class JsonLines:
    """One JSON object a row, ``{"kind": ..., "step": ..., ...}``, with the operating system when ``write`` returns.

    ``after`` is the step from which a run goes on: rows of later steps, which its predecessor wrote before it was
    killed, are dropped, and with them an unfinished last line. What is not finite becomes null: JSON has no NaN.
    """

    def __init__(self, path: Path, *, after: int = 0) -> None:
        kept = [row for row in read_rows(path) if row["step"] <= after] if path.exists() else []
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, kind: str, step: int, values: Mapping[str, Value]) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._file.write(json.dumps({"kind": kind, "step": step, **finite}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """TensorBoard's event files, numbers only, as ``kind/name``."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError:
            raise MisuseError("logging to TensorBoard needs it: pip install 'thinwire[train]'") from None
        self._writer: Any = SummaryWriter(str(folder))

    def write(self, kind: str, step: int, values: Mapping[str, Value]) -> None:
        for name, value in values.items():
            if not isinstance(value, str):
                self._writer.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """Weights & Biases. ``WANDB_MODE=offline`` keeps everything in ``folder``, to be sent later by ``wandb sync``."""

    def __init__(self, folder: Path, *, run: str, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ModuleNotFoundError:
            raise MisuseError("logging to Weights & Biases needs it: pip install 'thinwire[train]'") from None
        try:
            self._run = wandb.init(project="thinwire", name=run, dir=str(folder), config=dict(config))
        except wandb.errors.Error as error:
            raise MisuseError(f"Weights & Biases: {error}; wandb login, or set WANDB_MODE=offline") from error

    def write(self, kind: str, step: int, values: Mapping[str, Value]) -> None:
        self._run.log({"step": step, **{f"{kind}/{name}": value for name, value in values.items()}})

    def close(self) -> None:
        self._run.finish()


def open_log(names: Sequence[str], folder: Path, *, run: str, config: Mapping[str, Any], after: int = 0) -> RunLog:
    """The sinks called ``names`` (jsonl, tensorboard, wandb), all of which write into ``folder``.

    Raises:
        MisuseError: a name is none of these, or its package is not installed.
    """
    sinks: list[Sink] = []
    for name in names:
        if name == "jsonl":
            sinks.append(JsonLines(folder / "metrics.jsonl", after=after))
        elif name == "tensorboard":
            sinks.append(TensorBoard(folder / "tensorboard"))
        elif name == "wandb":
            sinks.append(Wandb(folder, run=run, config=config))
        else:
            raise MisuseError(f"there is no log {name!r}; there are jsonl, tensorboard, wandb", log=name)
    return RunLog(sinks)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; an unfinished last line, of a process that was killed, is left out."""
    text = path.read_bytes()
    return [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]
