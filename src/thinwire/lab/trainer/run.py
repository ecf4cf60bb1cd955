"""A run from its first step, or from a checkpoint's, to its last: the loop that all recipes share.

A recipe is a :class:`Task`: its model, its batches, its loss, and what it finds out now and then. The run does the
rest: order of events, checkpoints, logs, progress, and the accounts of all that.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from rich.console import Console
from torch import Tensor, nn

from thinwire.errors import MalformedError, MisuseError
from thinwire.lab.config import to_mapping, to_yaml
from thinwire.lab.progress import RunProgress
from thinwire.lab.runlog import RunLog, open_log
from thinwire.lab.trainer.checkpoints import Checkpoint, Checkpoints, read_checkpoint
from thinwire.lab.trainer.faults import Fault
from thinwire.lab.trainer.learner import Bytes, Learner, Step
from thinwire.lab.trainer.options import TrainingOptions
from thinwire.lab.trainer.order import mixed_seed
from thinwire.lab.trainer.outcome import weights_digest, write_text, write_weights
from thinwire.lab.trainer.watch import WorkerRow, workers_line, workers_table
from thinwire.lab.trainer.workers import Workers

__all__ = ["Batch", "Measured", "Run", "Task", "reproducible"]

Batch = tuple[Tensor, ...]
Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class Measured:
    """What a run knows of itself when a report is due: ``train_loss`` is the mean since the last one over all workers,
    ``samples`` and ``seconds`` what was learnt from since then, by all, and in which time."""

    epoch: int
    step: int
    train_loss: float
    seconds: float
    samples: int


class Task(Protocol[Row]):
    """What a recipe brings to a run. ``Row`` is a dataclass: what it finds out when a report is due.

    Batches depend on the step alone, so that a run can go on anywhere. All workers have the same numbers of steps.
    """

    model: nn.Module
    epoch_steps: int  # one pass over this worker's samples
    steps: int  # of the whole run
    report_every: int  # steps
    unit: str  # of what is counted in samples: images, tokens
    step_samples: int  # of one worker
    must_agree: Sequence[str]  # options that a run has in common with the checkpoint from which it goes on
    facts: dict[str, Any]  # what else it must have in common: plain values by name
    delay_max: int  # of a fault
    watched: bool  # whether every worker's loss is to be gathered in each step

    def batch(self, step: int) -> Batch:
        """This worker's samples of ``step``, as tensors of equal length."""
        ...

    def loss(self, model: nn.Module, part: Batch) -> Tensor:
        """The mean loss of a batch or a part of one."""
        ...

    def fault(self, step: int) -> Fault:
        """What this worker does wrong on purpose."""
        ...

    def report(self, measured: Measured, learner: Learner) -> Row:
        """Evaluate; all workers call this together."""
        ...

    def row(self, values: dict[str, Any]) -> Row:
        """A row from its fields, as a checkpoint has them.

        Raises:
            TypeError: they are not those of a row.
        """
        ...

    def words(self, row: Row) -> str:
        """A report in one line."""
        ...


@contextmanager
def reproducible(config: TrainingOptions, workers: Workers) -> Iterator[None]:
    """Random numbers and kernels as ``config`` asks for them; outside, the random state is as it was."""
    cuda = workers.device.type == "cuda"
    fast = cuda and not config.deterministic
    with (
        torch.random.fork_rng(devices=[workers.device] if cuda else []),
        torch.backends.cudnn.flags(enabled=True, benchmark=fast, deterministic=config.deterministic),
        warnings.catch_warnings(),
    ):
        # Of 1 x 1 filters some kernels give gradients whose strides differ where they cannot matter.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        torch.manual_seed(config.seed)
        yield


class Run(Generic[Row]):
    """One run of a task: what it holds, and where it is.

    Raises:
        MisuseError: the options do not fit each other, the workers, or the checkpoint.
        MalformedError: the checkpoint is damaged.
    """

    def __init__(self, task: Task[Row], config: TrainingOptions, workers: Workers, console: Console | None) -> None:
        self.task, self.config, self.workers = task, config, workers
        self.started = time.perf_counter()
        self.out = None if config.out is None else Path(config.out)
        self.learner = Learner(
            task.model,
            config,
            workers,
            steps=task.steps,
            warmup_steps=round(config.warmup_epochs * task.epoch_steps),
            past=task.delay_max,
        )
        torch.manual_seed(mixed_seed(config.seed, workers.rank))  # dropout differs between workers, weights do not
        self.history: list[Row] = []
        self.step = 0
        self.counted, self.loss_sum, self.seconds = 0, 0.0, 0.0  # steps since the last report, and what they came to
        self.moved = Bytes()
        self.checkpoints = None
        if self.out is not None:
            self.checkpoints = Checkpoints(self.out / "checkpoints", workers, keep=config.keep_checkpoints)
        self.resumed = self._resume()
        self.written = self.step if self.resumed else -1
        self.progress = RunProgress(
            console if workers.first else None, steps=task.steps, every=config.print_every, start=self.step
        )

    def close(self) -> None:
        """End the exchange's thread."""
        self.learner.close()

    # --- the loop --------------------------------------------------------------------------------------------------

    def go(self) -> dict[str, Any]:
        """Make all steps that are left; returns the fields of :class:`~thinwire.lab.trainer.outcome.Outcome`."""
        config, task = self.config, self.task
        stop = min(task.steps, config.stop_after or task.steps)
        with self._log() as log, self.progress:
            exchanged = config.compress != "none" or config.aggregate != "uniform"
            if exchanged and self.workers.size == 1:
                self.progress.say("one worker exchanges no gradients: --compress has no effect; see --workers")
            while self.step < stop:
                self._one_step(log)
                if self.step % task.report_every == 0 or self.step == task.steps:
                    self._report(log)
                if self._checkpoint_is_due():
                    self._checkpoint()
            if self.checkpoints is not None and self.written != self.step:
                self._checkpoint()
        return self._outcome()

    def _one_step(self, log: RunLog) -> None:
        pieces = [x.chunk(self.config.accumulate) for x in self.task.batch(self.step)]
        parts = list(zip(*pieces, strict=True))
        step = self.learner.step(self.step, parts, self.task.loss, self.task.fault(self.step))
        epoch = self.step // self.task.epoch_steps + 1
        self.step += 1
        self.counted += 1
        self.loss_sum += step.loss
        self.seconds += step.seconds
        self.moved += step.bytes
        log.write(
            "step", self.step, epoch=epoch, loss=step.loss, lr=step.lr, density=step.density,
            bytes_received=step.bytes.received, bytes_sent=step.bytes.sent, bytes_dense=step.bytes.dense,
            seconds=step.seconds,
        )  # fmt: skip
        if self.task.watched:
            self._watch(step, log)
        epochs = -(-self.task.steps // self.task.epoch_steps)
        self.progress.step(self.step, f"epoch {epoch}/{epochs}  loss {step.loss:.4f}  lr {step.lr:.3g}")

    def _watch(self, step: Step, log: RunLog) -> None:
        """Every worker's loss, weight and signal: one row of the log, and a look at them."""
        found = self.learner.standing
        theirs = self.workers.gather([step.loss, step.seconds])
        rows = [
            WorkerRow(rank, loss, weight, self.task.step_samples / seconds, signals)
            for rank, ((loss, seconds), weight, signals) in enumerate(
                zip(theirs, found.weights, found.signals, strict=True)
            )
        ]
        values = {name: value for row in rows for name, value in row.values().items()}
        log.write("workers", self.step, **values)
        if self.config.live:
            self.progress.show(self.step, workers_table(rows, self.task.unit), workers_line(rows))

    def _report(self, log: RunLog) -> None:
        train_loss, workers = self.workers.sums([self.loss_sum / self.counted, 1.0])
        measured = Measured(
            epoch=-(-self.step // self.task.epoch_steps),
            step=self.step,
            train_loss=train_loss / workers,
            seconds=self.seconds,
            samples=self.counted * self.task.step_samples * self.workers.size,
        )
        row = self.task.report(measured, self.learner)
        self.history.append(row)
        self.counted, self.loss_sum, self.seconds = 0, 0.0, 0.0
        log.write("epoch", self.step, **{name: value for name, value in _fields(row).items() if name != "step"})
        self.progress.say(self.task.words(row))

    # --- keeping and finding again ---------------------------------------------------------------------------------

    def _checkpoint_is_due(self) -> bool:
        every = self.config.checkpoint_every or self.task.epoch_steps
        return self.checkpoints is not None and self.step % every == 0

    def _checkpoint(self) -> None:
        assert self.checkpoints is not None
        epoch, within = divmod(self.step, self.task.epoch_steps)
        shared = self.learner.shared_state() | {
            "epoch": epoch,
            "samples": within * self.config.batch_size * self.workers.size,
            "history": [_fields(row) for row in self.history],
            "config": to_mapping(self.config),
            "facts": self.task.facts,
        }
        own = self.learner.own_state() | {
            "counted": self.counted,
            "loss_sum": self.loss_sum,
            "seconds": self.seconds,
            "bytes": astuple(self.moved),
        }
        self.checkpoints.write(self.step, shared, own)
        self.written = self.step

    def _resume(self) -> bool:
        """Go on from the checkpoint asked for, if any."""
        config = self.config
        if config.resume is None:
            if self.out is not None and (self.out / "checkpoints").is_dir():
                raise MisuseError(
                    f"{self.out} holds a run; go on with it by --resume auto, or give another folder", out=str(self.out)
                )
            self.workers.barrier()  # nobody writes into the folder before all have looked
            return False
        path: Path | None = Path(config.resume)
        if config.resume == "auto":
            assert self.checkpoints is not None
            path = self.checkpoints.newest()
        elif path is not None and (path / "checkpoints").is_dir():  # a run's folder
            path = Checkpoints(path / "checkpoints", self.workers, keep=1).newest()
        self.workers.barrier()
        if path is None:
            if config.resume == "auto":
                return False
            raise MisuseError(f"{config.resume} holds no checkpoint that is whole", path=config.resume)
        self._load(read_checkpoint(path))
        return True

    def _load(self, checkpoint: Checkpoint) -> None:
        shared, own, task = checkpoint.shared, checkpoint.own, self.task
        then = {**_mapping(shared.get("config")), **_mapping(shared.get("facts"))}
        now = {name: to_mapping(self.config)[name] for name in task.must_agree} | task.facts
        differing = [name for name in now if then.get(name) != now[name]]
        if differing:
            raise MisuseError(
                f"{checkpoint.path} was made with other options: "
                + ", ".join(f"{name} {then.get(name)!r} instead of {now[name]!r}" for name in differing),
                path=str(checkpoint.path),
            )
        self.learner.load(shared, own, task.batch(0), task.loss)
        try:
            self.history = [task.row(row) for row in shared["history"]]
            within = int(shared["samples"]) // (self.config.batch_size * self.workers.size)
            self.step = int(shared["epoch"]) * task.epoch_steps + min(within, task.epoch_steps - 1)
            if len(own) == self.workers.size:
                mine = own[self.workers.rank]
                self.counted = int(mine["counted"])
                self.loss_sum, self.seconds = float(mine["loss_sum"]), float(mine["seconds"])
                self.moved = Bytes(*mine["bytes"])
        except (KeyError, TypeError, ValueError) as error:
            raise MalformedError(f"{checkpoint.path} is not a checkpoint of this recipe: {error}") from error

    def _log(self) -> RunLog:
        """The logs asked for, on rank 0 of a run that is kept."""
        if self.out is None or not self.workers.first:
            return RunLog()
        self.out.mkdir(parents=True, exist_ok=True)
        write_text(self.out / "config.yaml", to_yaml(self.config))
        return open_log(self.config.logs, self.out, run=self.out.name, config=to_mapping(self.config), after=self.step)

    def _outcome(self) -> dict[str, Any]:
        model = self.learner.model
        self.workers.copy_buffers(model)
        return {
            "config": to_mapping(self.config),
            "workers": self.workers.size,
            "device": str(self.workers.device),
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "steps": self.step,
            "finished": self.step == self.task.steps,
            "bytes_received": self.moved.received,
            "bytes_sent": self.moved.sent,
            "bytes_dense": self.moved.dense,
            "seconds": time.perf_counter() - self.started,
            "digest": weights_digest(model),
        }

    def keep(self, summary: dict[str, Any]) -> None:
        """Write the weights and the summary, on rank 0 of a run that is kept."""
        if self.out is not None and self.workers.first:
            write_weights(self.out / "model.safetensors", self.learner.model)
            write_text(self.out / "summary.json", json.dumps(summary, indent=2) + "\n")


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _fields(row: Any) -> dict[str, Any]:
    return asdict(row)
