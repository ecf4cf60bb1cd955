"""What a demo run is asked to do, and what each of its processes is told."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from thinwire.errors import MisuseError

__all__ = ["DemoOptions", "RunPlan"]


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """Options of the demo; None takes the model's own default.

    ``model`` is a name in :data:`thinwire.lab.recipes.RECIPES`. The run ends after ``steps`` optimiser steps or
    ``minutes`` of them, whichever comes first; the warm start and the evaluations are not counted. Each run makes a
    folder of its own in ``out``. ``max_staleness`` is in versions: older rollouts are dropped.

    Raises:
        MisuseError: a number is out of range.
    """

    model: str = "tiny"
    steps: int | None = None
    minutes: float | None = None
    workers: int = 3
    seed: int = 1
    lr: float | None = None
    out: Path = Path("out/demo")
    max_staleness: int = 4
    restart_delay_s: float = 4.0

    def __post_init__(self) -> None:
        fine = (
            1 <= self.workers <= 64
            and (self.steps is None or self.steps >= 1)
            and (self.minutes is None or self.minutes > 0)
            and (self.lr is None or self.lr > 0)
            and self.max_staleness >= 0
        )
        if not fine:
            raise MisuseError(
                "use 1 to 64 workers, at least 1 step, and minutes and a learning rate above 0",
                options=dataclasses.asdict(self),
            )


@dataclass(frozen=True, slots=True)
class RunPlan:
    """A run's settings after defaults, kept in ``run.json`` where every process of the run reads them."""

    folder: Path
    model: str
    about: str
    seed: int
    lr: float
    steps: int
    seconds: float
    workers: int
    max_staleness: int

    @property
    def store(self) -> Path:
        """The store that carries the weights, a folder."""
        return self.folder / "store"

    @property
    def spool(self) -> Path:
        """Rollouts on their way to the trainer."""
        return self.folder / "spool"

    @property
    def journals(self) -> Path:
        """What each process reports."""
        return self.folder / "journals"

    @property
    def stop(self) -> Path:
        """Workers end when this file exists."""
        return self.folder / "stop"

    def save(self) -> None:
        """Write ``run.json``."""
        facts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "folder"}
        (self.folder / "run.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> RunPlan:
        """Read ``run.json`` in ``folder``."""
        return cls(folder=folder, **json.loads((folder / "run.json").read_text(encoding="utf-8")))
