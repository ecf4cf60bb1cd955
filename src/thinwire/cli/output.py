"""Where a command's words go: results to stdout; messages, progress and errors to stderr."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from thinwire.errors import ThinwireError

if TYPE_CHECKING:
    from thinwire.stores.protocol import Blob, ObjectInfo, Store

__all__ = ["Bars", "Output", "age_text", "bytes_text", "count_text", "share_text", "watched"]

_SHOW_AFTER_S = 1.0


def bytes_text(size: float) -> str:
    """A size in bytes for people, in powers of 1000.

    >>> bytes_text(999), bytes_text(1_230_000), bytes_text(0)
    ('999 B', '1.23 MB', '0 B')
    """
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(size) < 999.5 or unit == "TB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"


def share_text(part: float, whole: float) -> str:
    """A share in per cent.

    >>> share_text(1, 3), share_text(0, 0), share_text(1, 1_000_000)
    ('33.3 %', '0 %', '0.0001 %')
    """
    return f"{100 * part / whole:.3g} %" if whole and part else "0 %"


def count_text(count: int) -> str:
    """A count with its thousands set apart.

    >>> count_text(1234567)
    '1,234,567'
    """
    return f"{count:,}"


def age_text(seconds: float) -> str:
    """A time that has passed, in its largest unit.

    >>> age_text(5), age_text(7300), age_text(200000)
    ('5 s', '2 h', '2 d')
    """
    for limit, unit, length in ((120, "s", 1), (7200, "min", 60), (172800, "h", 3600)):
        if seconds < limit:
            return f"{max(seconds, 0) / length:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"


class Output:
    """One command's output. With ``as_json`` stdout holds JSON only."""

    def __init__(self, ctx: typer.Context, *, as_json: bool) -> None:
        self.as_json = as_json
        self.console = Console(highlight=False, soft_wrap=True)
        self.stderr = Console(stderr=True, highlight=False, soft_wrap=True)
        self.log: Callable[[int, str], None] | None = None  # where messages go instead of stderr, with their level
        ctx.find_root().obj = self  # where the group finds it when the command fails

    def document(self, value: Mapping[str, Any]) -> None:
        """Print the result for machines; nothing without ``as_json``."""
        if self.as_json:
            print(json.dumps(value, indent=2, default=str), flush=True)

    def line(self, value: Mapping[str, Any]) -> None:
        """Print one of many results for machines, in one line; nothing without ``as_json``."""
        if self.as_json:
            print(json.dumps(value, default=str), flush=True)

    def say(self, text: str) -> None:
        """Print a line of the result for people; nothing with ``as_json``."""
        if not self.as_json:
            print(text, flush=True)

    def facts(self, facts: Mapping[str, str]) -> None:
        """Print names and values, one a line, for people; nothing with ``as_json``."""
        width = max(map(len, facts), default=0) + 2
        for name, value in facts.items():
            self.show(Text.assemble((name.ljust(width), "bold"), value))

    def show(self, item: RenderableType) -> None:
        """Print a table for people; nothing with ``as_json``."""
        if not self.as_json:
            self.console.print(item)

    def note(self, text: str) -> None:
        """Print a remark on stderr."""
        self.stderr.print(text, markup=False)

    def warn(self, text: str) -> None:
        """Print a warning on stderr."""
        if self.log is not None:
            self.log(logging.WARNING, text)
            return
        self.stderr.print("[yellow]warning:[/] ", end="")
        self.stderr.print(text, markup=False)

    def error(self, error: ThinwireError) -> None:
        """Print an error on stderr, and for machines its facts on stdout."""
        if self.log is not None:
            self.log(logging.ERROR, str(error))
        else:
            self.stderr.print("[bold red]error:[/] ", end="")
            self.stderr.print(str(error), markup=False)
        self.document(
            {
                "error": {
                    "kind": type(error).__name__,
                    "message": str(error),
                    "exit_code": error.exit_code,
                    "facts": error.facts,
                }
            }
        )

    def bars(self) -> Bars:
        """Progress bars for the work in the ``with`` block."""
        return Bars(self.stderr)


class Bars:
    """Progress on a terminal's stderr, from the second second on; elsewhere nothing. Threads may report at once."""

    def __init__(self, console: Console, *, after_s: float = _SHOW_AFTER_S) -> None:
        self._shown = console.is_terminal
        self._progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn(),
            console=console, transient=True,
        )  # fmt: skip
        self._timer = threading.Timer(after_s, self._start)
        self._timer.daemon = True
        self._lock = threading.Lock()
        self._started = self._ended = False
        self._tasks: dict[str, TaskID] = {}

    def _start(self) -> None:
        with self._lock:
            if not self._ended:
                self._started = True
                self._progress.start()

    def __enter__(self) -> Bars:
        if self._shown:
            self._timer.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._timer.cancel()
        with self._lock:
            self._ended = True
            if self._started:
                self._progress.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """``done`` of ``total`` bytes of a stage; a total of 0 is one that is not known."""
        if not self._shown:
            return
        with self._lock:
            if stage not in self._tasks:
                self._tasks[stage] = self._progress.add_task(stage, total=total or None)
            self._progress.update(self._tasks[stage], completed=done, total=total or None)


class _Watched:
    """A store whose whole-object reads and writes are counted; all else goes straight to it."""

    def __init__(self, store: Store, bars: Bars) -> None:
        self._store, self._bars = store, bars
        self._done = {"fetch": 0, "upload": 0}
        self._lock = threading.Lock()

    def _count(self, stage: str, size: int) -> None:
        with self._lock:
            self._done[stage] += size
        self._bars(stage, self._done[stage], 0)

    def get(self, key: str, *, size_max: int) -> bytes:
        self._count("fetch", 0)
        data = self._store.get(key, size_max=size_max)
        self._count("fetch", len(data))
        return data

    def put(self, key: str, data: Blob) -> None:
        self._count("upload", 0)
        self._store.put(key, data)
        self._count("upload", sum(memoryview(part).nbytes for part in data))

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        return self._store.list(prefix, start_after=start_after)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def watched(store: Store, bars: Bars) -> Store:
    """``store``, its traffic shown in ``bars``."""
    return cast("Store", _Watched(store, bars))
