"""The director: starts the processes, plays the faults, reads the journals, and ends the run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from thinwire.errors import ThinwireError
from thinwire.lab.demo.journal import Journal, JournalReader
from thinwire.lab.demo.options import RunPlan
from thinwire.lab.demo.picture import Picture

__all__ = ["DemoError", "Director"]

_CATCH_UP_MAX_S = 180.0


class DemoError(ThinwireError):
    """A process of the demo failed; the end of its log is in the message."""


@dataclass(frozen=True, slots=True)
class _Scene:
    """``action`` on a worker when the run has progressed to ``at`` and ``delay_s`` after the scene before."""

    at: float
    delay_s: float
    action: str
    worker: str


class Director:
    """Runs one plan to its end.

    Workers 0 to N-1 start with the trainer, except that the last one joins at half of the run. One is killed with
    SIGKILL at a third and started again some seconds later. With one worker there is no late one.

    Raises:
        DemoError: from :meth:`run`, when a process ends by itself with an error or the workers do not catch up.
    """

    def __init__(self, plan: RunPlan, *, restart_delay_s: float) -> None:
        self._plan = plan
        names = [f"worker-{number}" for number in range(plan.workers)]
        late = names[-1:] if plan.workers > 1 else []
        victim = names[1] if plan.workers > 2 else names[0]
        self._early = [name for name in names if name not in late]
        self._scenes = [
            _Scene(1 / 3, 0.0, "kill", victim),
            _Scene(1 / 3, restart_delay_s, "restart", victim),
            *[_Scene(1 / 2, 0.0, "join", name) for name in late],
        ]
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._lives: dict[str, int] = {}
        self._last_scene_s = 0.0

    def run(self, show: Callable[[Picture], None]) -> Picture:
        """Run to the end; ``show`` is called with the picture about eight times a second."""
        journal = Journal(self._plan.journals, "director", 1)
        reader = JournalReader(self._plan.journals)
        picture = Picture(self._plan, begin=time.time())
        try:
            self._start("kernels")
            self._start("trainer")
            for name in self._early:
                self._act(journal, "start", name)
            while not self._finished(picture):
                self._play(journal, picture)
                self._check()
                self._look(reader, picture, show)
            self._end(reader, picture, show)
        finally:
            for process in self._processes.values():
                if process.poll() is None:
                    process.kill()
                    process.wait()
        return picture

    def _look(self, reader: JournalReader, picture: Picture, show: Callable[[Picture], None]) -> None:
        for event in reader.read():
            picture.take(event)
        picture.now = time.time() - picture.begin
        show(picture)
        time.sleep(0.12)

    def _finished(self, picture: Picture) -> bool:
        """The trainer is done, every scene is played, and every worker holds the last version."""
        if picture.phase != "done" or self._scenes:
            return False
        last = picture.published[-1]["version"]
        behind = [
            worker.name for worker in picture.workers.values() if worker.version != last or worker.state != "running"
        ]
        late = time.time() - max(float(picture.published[-1]["t"]), self._last_scene_s)
        if behind and late > _CATCH_UP_MAX_S:
            raise DemoError(f"{', '.join(behind)} did not reach version {last} in {_CATCH_UP_MAX_S:.0f} s")
        return not behind

    def _play(self, journal: Journal, picture: Picture) -> None:
        while self._scenes:
            scene = self._scenes[0]
            if picture.progress < scene.at or time.time() < self._last_scene_s + scene.delay_s:
                return
            if scene.action == "kill" and picture.workers[scene.worker].version is None and picture.progress < 1:
                return  # kill a worker that works, not one that still starts
            self._act(journal, scene.action, scene.worker)
            self._last_scene_s = time.time()
            self._scenes.pop(0)

    def _act(self, journal: Journal, action: str, worker: str) -> None:
        if action == "kill":
            process = self._processes.pop(worker)
            process.kill()
            process.wait()
        else:
            self._start(worker)
        journal.write("mark", target=worker, action=action)

    def _start(self, name: str) -> None:
        self._lives[name] = self._lives.get(name, 0) + 1
        command = ["thinwire.lab.demo.worker", str(self._plan.folder), name, str(self._lives[name])]
        if name == "trainer":
            command = ["thinwire.lab.demo.trainer", str(self._plan.folder)]
        elif name == "kernels":  # compiled once while the trainer warms up, not by every process for itself
            command = ["thinwire.sync.warm"]
        with self._log(name).open("wb") as log:
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-m", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **_ENVIRONMENT},
            )

    def _log(self, name: str) -> Path:
        folder = self._plan.folder / "logs"
        folder.mkdir(exist_ok=True)
        return folder / f"{name}.{self._lives[name]}.log"

    def _check(self) -> None:
        """Every process that should run does."""
        for name, process in self._processes.items():
            code = process.poll()
            if code is None or (name in ("trainer", "kernels") and code == 0):
                continue
            tail = "\n".join(self._log(name).read_text(errors="replace").splitlines()[-20:])
            raise DemoError(f"{name} ended with exit code {code}; the end of {self._log(name)}:\n{tail}", exit=code)

    def _end(self, reader: JournalReader, picture: Picture, show: Callable[[Picture], None]) -> None:
        """Let the workers end, and read their last words."""
        self._plan.stop.touch()
        limit = time.time() + 60
        while any(process.poll() is None for process in self._processes.values()) and time.time() < limit:
            self._look(reader, picture, show)
        self._check_ended()
        self._look(reader, picture, show)

    def _check_ended(self) -> None:
        for name, process in self._processes.items():
            if process.poll() != 0:
                raise DemoError(f"{name} ended with exit code {process.poll()}; see {self._log(name)}")


# One thread a process: there are more processes than cores, and a second thread would only wait for the first.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
}
