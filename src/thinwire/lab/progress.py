"""Progress of a run for people: one bar on a terminal, elsewhere a plain line now and then."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["RunProgress"]


class RunProgress:
    """Steps of ``steps``, with a few words each; ``every`` is the number of steps between plain lines.

    Above the bar there may be something that changes with the steps (:meth:`show`). Without a console, as on all ranks
    but the first and in programs, it says nothing.
    """

    def __init__(self, console: Console | None, *, steps: int, every: int, start: int = 0) -> None:
        self._console, self._steps, self._every = console, steps, every
        self._bar: Progress | None = None
        self._shown: RenderableType = ""
        if console is not None and console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task("", total=steps, completed=start)
            self._live = Live(console=console, transient=True, get_renderable=self._rendered, refresh_per_second=10)

    def _rendered(self) -> RenderableType:
        assert self._bar is not None
        return Group(self._shown, self._bar) if self._shown else self._bar

    def __enter__(self) -> RunProgress:
        if self._bar is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._live.stop()

    def step(self, step: int, words: str) -> None:
        """Step ``step`` (from 1) is done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=words)
        elif self.due(step):
            self.say(f"step {step}/{self._steps}  {words}")

    def due(self, step: int) -> bool:
        """Whether ``step`` gets a plain line where there is no terminal."""
        return step % self._every == 0

    def show(self, step: int, item: RenderableType, line: str) -> None:
        """Something to look at: ``item`` stays above the bar until the next; elsewhere it is ``line``, now and then."""
        if self._bar is not None:
            self._shown = item
        elif self.due(step):
            self.say(line)

    def say(self, line: str) -> None:
        """A line that stays, above the bar."""
        if self._console is not None:
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)
