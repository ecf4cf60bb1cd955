"""The run as it happens: a Rich live view on a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from thinwire.lab.demo.picture import Picture, WorkerPicture

__all__ = ["LiveView", "byte_text", "render", "smooth", "sparkline"]

_BLOCKS = "▁▂▃▄▅▆▇█"
_STATES = {
    "absent": ("not started", "dim"),
    "starting": ("starting", "yellow"),
    "waiting": ("waiting for a version", "yellow"),
    "running": ("sampling", "green"),
    "killed": ("killed", "bold red"),
    "done": ("done", "cyan"),
}


def byte_text(count: float) -> str:
    """A number of bytes for people, in decimal units.

    >>> byte_text(999), byte_text(61_400), byte_text(9_650_000)
    ('999 B', '61.4 kB', '9.65 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}" if count < 1000 else f"{count:.0f} {unit}"


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and up to ``window - 1`` before it.

    >>> smooth([1.0, 3.0, 5.0], 2)
    [1.0, 2.0, 4.0]
    """
    parts = [values[max(0, end - window) : end] for end in range(1, len(values) + 1)]
    return [sum(part) / len(part) for part in parts]


def sparkline(values: Sequence[float], width: int) -> str:
    """``values`` as at most ``width`` blocks, lowest to highest.

    >>> sparkline([0.0, 0.5, 1.0], 10)
    '▁▅█'
    """
    if not values:
        return ""
    columns = min(width, len(values))
    edges = [column * len(values) // columns for column in range(columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[int((mean - low) * scale + 0.5)] for mean in means)


def _header(picture: Picture) -> RenderableType:
    plan = picture.plan
    grid = Table.grid(expand=True, padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1)
    grid.add_column(justify="right", no_wrap=True)
    phase = picture.phase
    if phase == "warm start" and picture.warm:
        phase = f"warm start, reward {picture.warm[-1][1]:.2f}"
    grid.add_row(
        Text(phase, style="bold"),
        ProgressBar(total=1.0, completed=picture.progress),
        f"step {len(picture.steps)}/{plan.steps}   {picture.now:.0f} s",
    )
    return grid


def _reward(picture: Picture) -> RenderableType:
    rewards = [event["reward"] for event in picture.steps]
    if not rewards:
        return Text("no step yet", style="dim")
    window = max(1, min(20, len(rewards) // 3))
    curve = smooth(rewards, window)
    text = Text()
    text.append(sparkline(curve[window - 1 :], 44), style="green")
    text.append(f"\n{curve[window - 1]:.3f} → {curve[-1]:.3f}", style="bold")
    text.append(f"  mean of {window} steps", style="dim")
    if before := picture.evaluations.get("before"):
        text.append(f"\nheld-out before {before['sampled']:.3f}", style="dim")
    if after := picture.evaluations.get("after"):
        text.append(f", after {after['sampled']:.3f}", style="bold green")
    return text


def _traffic(picture: Picture) -> RenderableType:
    if not picture.published:
        return Text("nothing published yet", style="dim")
    last = picture.published[-1]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(justify="right")
    table.add_row("last version", f"{byte_text(last['patch_bytes'])} of {byte_text(last['full_bytes'])}")
    table.add_row("weights changed", f"{100 * last['density']:.2f} %")
    table.add_row("sent in all", byte_text(picture.sent_bytes))
    table.add_row("full checkpoints", byte_text(picture.full_bytes))
    saved = 1 - picture.sent_bytes / picture.full_bytes
    table.add_row("saved", Text(f"{100 * saved:.1f} %", style="bold green"))
    return table


def _worker_row(picture: Picture, worker: WorkerPicture) -> list[RenderableType]:
    label, style = _STATES[worker.state]
    newest = picture.published[-1]["version"] if picture.published else None
    behind = "" if worker.version is None or newest is None else str(newest - worker.version)
    digest = next((d for v, d in worker.ran if v == worker.version), "")
    same = picture.digests.get(worker.version or 0) == digest and digest
    return [
        worker.name,
        Text(label, style=style),
        "" if worker.version is None else str(worker.version),
        behind,
        Text(f"{digest[:12]} {'=' if same else '≠'}" if digest else "", style="green" if same else "red"),
        str(len({version for version, _ in worker.ran})),
        byte_text(worker.bytes_fetched),
        f"{worker.answers:,}",
        str(worker.life),
    ]


def _workers(picture: Picture) -> RenderableType:
    table = Table(expand=True, box=None, header_style="dim", padding=(0, 1))
    table.add_column("worker")
    table.add_column("state", min_width=12)
    for name in ("version", "behind"):
        table.add_column(name, justify="right")
    table.add_column("digest, as the trainer's", min_width=14)
    for name in ("versions run", "fetched", "answers", "lives"):
        table.add_column(name, justify="right")
    for number in range(picture.plan.workers):
        name = f"worker-{number}"
        table.add_row(*_worker_row(picture, picture.workers.get(name) or WorkerPicture(name)))
    return table


def render(picture: Picture) -> RenderableType:
    """The whole view."""
    middle = Table.grid(expand=True)
    middle.add_column(ratio=1)
    middle.add_column(ratio=1)
    middle.add_row(
        Panel(_reward(picture), title="reward", title_align="left", border_style="dim", height=7),
        Panel(_traffic(picture), title="bytes", title_align="left", border_style="dim", height=7),
    )
    wrong = picture.mismatches()
    status = Text(f"{sum(len(w.ran) for w in picture.workers.values())} digests compared, ", style="dim")
    status.append(f"{len(wrong)} differ", style="bold red" if wrong else "green")
    marks = Text("   ".join(f"{at:.0f} s {action} {target}" for at, target, action in picture.marks[-4:]), style="dim")
    title = f"thinwire demo: {picture.plan.about}, lr {picture.plan.lr:g}"
    return Panel(
        Group(
            _header(picture),
            middle,
            Panel(_workers(picture), title="workers", title_align="left", border_style="dim"),
            status,
            marks,
        ),
        title=title,
    )


class LiveView:
    """Shows pictures: a live screen on a terminal, a line every ``every_s`` seconds on anything else."""

    def __init__(self, console: Console, *, every_s: float = 5.0) -> None:
        self._console = console
        self._every_s = every_s
        self._live = Live(console=console, refresh_per_second=8, transient=False) if console.is_terminal else None
        self._next_s = 0.0

    def __enter__(self) -> LiveView:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, picture: Picture) -> None:
        """Show ``picture``; cheap enough to be called often."""
        if self._live is not None:
            self._live.update(render(picture))
        elif time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + self._every_s
            self._console.print(_line(picture), highlight=False, soft_wrap=True)
            sys.stdout.flush()


def _line(picture: Picture) -> str:
    parts = [f"{picture.now:6.1f} s", picture.phase]
    rewards = [event["reward"] for event in picture.steps]
    if rewards:
        last = picture.published[-1]
        parts += [
            f"step {len(rewards)}",
            f"reward {smooth(rewards, 20)[-1]:.3f}",
            f"changed {100 * last['density']:.2f} %",
            f"sent {byte_text(picture.sent_bytes)} of {byte_text(picture.full_bytes)}",
        ]
    elif picture.warm:
        parts.append(f"warm-up step {picture.warm[-1][0]}, reward {picture.warm[-1][1]:.3f}")
    for name, worker in sorted(picture.workers.items()):
        state = worker.version if worker.state == "running" else _STATES[worker.state][0]
        parts.append(f"{name} {state}")
    return "  ".join(parts)
