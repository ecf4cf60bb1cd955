"""The recipe: from options to a trained classifier, in this process and those that ``torchrun`` started beside it."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional

from thinwire.errors import MalformedError, MisuseError
from thinwire.lab.config import to_mapping, to_yaml
from thinwire.lab.progress import RunProgress
from thinwire.lab.runlog import RunLog, open_log
from thinwire.lab.trainer.checkpoints import Checkpoint, Checkpoints, read_checkpoint
from thinwire.lab.trainer.learner import Bytes, Learner
from thinwire.lab.trainer.workers import Workers, joined
from thinwire.lab.vision.augment import augment, normalise
from thinwire.lab.vision.config import VisionConfig
from thinwire.lab.vision.data import load_images
from thinwire.lab.vision.models import make_model
from thinwire.lab.vision.shards import epoch_order, make_shards, mixed_seed
from thinwire.lab.vision.summary import Epoch, Summary, weights_digest
from thinwire.sync.files import staged_file

__all__ = ["train"]

Batch = tuple[Tensor, Tensor]
_TEST_BATCH = 512
_MUST_AGREE = ("model", "stem", "width", "data", "optimizer", "compress", "error_feedback", "seed")


def train(config: VisionConfig, *, console: Console | None = None) -> Summary:
    """Train as ``config`` says and return what came of it, the same on every worker but for the bytes it moved.

    Runs in this process; where ``torchrun`` has started several, all of them call this. Torch's global random state is
    left as it was. ``console`` shows progress (of rank 0); nothing is printed without.

    Raises:
        MisuseError: data, a device or a package is missing, or the options do not fit each other or the checkpoint.
        MalformedError: data or the checkpoint are damaged.

    >>> from thinwire.lab.vision.config import VisionConfig
    >>> summary = train(VisionConfig(epochs=2, batch_size=16, width=8, train_limit=640))
    >>> summary.steps, summary.accuracy > 0.6
    (80, True)
    """
    with joined(config) as workers, _reproducible(config, workers):
        run = _Run(config, workers, console)
        try:
            return run.go()
        finally:
            run.close()


@contextmanager
def _reproducible(config: VisionConfig, workers: Workers) -> Iterator[None]:
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


class _Run:
    """One call of :func:`train`: what it holds, and where it is."""

    def __init__(self, config: VisionConfig, workers: Workers, console: Console | None) -> None:
        self.config, self.workers = config, workers
        self.started = time.perf_counter()
        self.out = None if config.out is None else Path(config.out)
        with workers.one_after_the_first():
            images = load_images(config.data, config.data_root, config.cache)
        self.images = images.first(config.train_limit, config.test_limit).to(workers.device)
        shards = make_shards(self.images.train_labels.cpu(), workers.size, skew=config.skew, seed=config.seed)
        self.shard = shards[workers.rank]
        self.epoch_steps = len(self.shard) // config.batch_size
        if self.epoch_steps == 0:
            raise MisuseError(
                f"a worker has {len(self.shard)} samples, fewer than a batch of {config.batch_size}; "
                "make --batch-size smaller or start fewer workers"
            )
        self.steps = self.epoch_steps * config.epochs
        model = make_model(config, images.shape, images.classes).to(workers.device)
        if config.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.learner = Learner(
            model, config, workers, steps=self.steps, warmup_steps=round(config.warmup_epochs * self.epoch_steps)
        )
        torch.manual_seed(mixed_seed(config.seed, workers.rank))  # dropout differs between workers, weights do not
        self.history: list[Epoch] = []
        self.step = 0
        self.counted, self.loss_sum, self.seconds = 0, 0.0, 0.0  # steps of the epoch under way, and what they came to
        self.moved = Bytes()
        self.checkpoints = None
        if self.out is not None:
            self.checkpoints = Checkpoints(self.out / "checkpoints", workers, keep=config.keep_checkpoints)
        self.resumed = self._resume()
        self.written = self.step if self.resumed else -1
        self.progress = RunProgress(
            console if workers.first else None, steps=self.steps, every=config.print_every, start=self.step
        )

    def close(self) -> None:
        self.learner.close()

    # --- the loop --------------------------------------------------------------------------------------------------

    def go(self) -> Summary:
        config = self.config
        stop = min(self.steps, config.stop_after or self.steps)
        with self._log() as log, self.progress:
            if config.compress != "none" and self.workers.size == 1:
                self.progress.say("one worker exchanges no gradients: --compress has no effect; see --workers")
            while self.step < stop:
                epoch = self.step // self.epoch_steps
                order = epoch_order(self.shard, epoch=epoch, rank=self.workers.rank, seed=config.seed)
                while self.step < min(stop, (epoch + 1) * self.epoch_steps):
                    self._one_step(order, epoch, log)
                    if self.step % self.epoch_steps == 0:
                        self._end_epoch(epoch, log)
                    if self._checkpoint_is_due():
                        self._checkpoint()
            if self.checkpoints is not None and self.written != self.step:
                self._checkpoint()
        return self._summary()

    def _one_step(self, order: Tensor, epoch: int, log: RunLog) -> None:
        batch = self._batch(order, self.step % self.epoch_steps, epoch)
        pieces = [x.chunk(self.config.accumulate) for x in batch]
        step = self.learner.step(self.step, list(zip(*pieces, strict=True)), self._loss)
        self.step += 1
        self.counted += 1
        self.loss_sum += step.loss
        self.seconds += step.seconds
        self.moved += step.bytes
        log.write(
            "step", self.step, epoch=epoch + 1, loss=step.loss, lr=step.lr, density=step.density,
            bytes_received=step.bytes.received, bytes_sent=step.bytes.sent, bytes_dense=step.bytes.dense,
            seconds=step.seconds,
        )  # fmt: skip
        self.progress.step(self.step, f"epoch {epoch + 1}/{self.config.epochs}  loss {step.loss:.4f}  lr {step.lr:.3g}")

    def _batch(self, order: Tensor, step: int, epoch: int) -> Batch:
        """The images of a step, augmented and normalised, and their labels; a function of seed, rank and step alone."""
        size = self.config.batch_size
        chosen = order[step * size : (step + 1) * size].to(self.workers.device)
        generator = torch.Generator().manual_seed(mixed_seed(self.config.seed, self.workers.rank, epoch, step))
        images = augment(self.images.train_images[chosen], self.config.augmentation, generator)
        return self._ready(images), self.images.train_labels[chosen]

    def _ready(self, images: Tensor) -> Tensor:
        images = normalise(images, self.images.mean, self.images.deviation)
        return images.contiguous(memory_format=torch.channels_last) if self.config.channels_last else images

    def _loss(self, model: nn.Module, batch: Batch) -> Tensor:
        images, labels = batch
        return functional.cross_entropy(model(images), labels, label_smoothing=self.config.label_smoothing)

    def _end_epoch(self, epoch: int, log: RunLog) -> None:
        accuracy, test_loss = self._evaluate()
        train_loss, workers = self.workers.sums([self.loss_sum / self.counted, 1.0])
        samples = self.counted * self.config.batch_size * self.workers.size
        row = Epoch(
            epoch=epoch + 1, step=self.step, train_loss=train_loss / workers, test_loss=test_loss, accuracy=accuracy,
            seconds=self.seconds, samples_per_s=samples / self.seconds,
        )  # fmt: skip
        self.history.append(row)
        self.counted, self.loss_sum, self.seconds = 0, 0.0, 0.0
        log.write("epoch", self.step, **{name: value for name, value in asdict(row).items() if name != "step"})
        self.progress.say(
            f"epoch {row.epoch}/{self.config.epochs}  accuracy {100 * row.accuracy:.2f} %  loss {row.train_loss:.4f}  "
            f"test loss {row.test_loss:.4f}  {row.samples_per_s:,.0f} images/s"
        )

    @torch.no_grad()
    def _evaluate(self) -> tuple[float, float]:
        """Accuracy and mean cross-entropy on all test samples, shared out over the workers."""
        model, rank, size = self.learner.model, self.workers.rank, self.workers.size
        self.workers.copy_buffers(model)
        model.eval()
        right, loss, count = 0.0, 0.0, 0.0
        for start in range(rank, len(self.images.test_labels), _TEST_BATCH * size):
            chosen = slice(start, start + _TEST_BATCH * size, size)
            images, labels = self.images.test_images[chosen], self.images.test_labels[chosen]
            with self.learner.autocast():
                logits = model(self._ready(images)).float()
            right += float((logits.argmax(1) == labels).sum())
            loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
            count += len(labels)
        model.train()
        right, loss, count = self.workers.sums([right, loss, count])
        return right / count, loss / count

    # --- keeping and finding again ---------------------------------------------------------------------------------

    def _checkpoint_is_due(self) -> bool:
        every = self.config.checkpoint_every or self.epoch_steps
        return self.checkpoints is not None and self.step % every == 0

    def _checkpoint(self) -> None:
        assert self.checkpoints is not None
        epoch, within = divmod(self.step, self.epoch_steps)
        shared = self.learner.shared_state() | {
            "epoch": epoch,
            "samples": within * self.config.batch_size * self.workers.size,
            "history": [asdict(row) for row in self.history],
            "config": to_mapping(self.config),
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
        shared, own = checkpoint.shared, checkpoint.own
        then, now = shared.get("config", {}), to_mapping(self.config)
        differing = [name for name in _MUST_AGREE if then.get(name) != now[name]]
        if differing:
            raise MisuseError(
                f"{checkpoint.path} was made with other options: "
                + ", ".join(f"{name} {then.get(name)!r} instead of {now[name]!r}" for name in differing),
                path=str(checkpoint.path),
            )
        order = epoch_order(self.shard, epoch=0, rank=self.workers.rank, seed=self.config.seed)
        self.learner.load(shared, own, self._batch(order, 0, 0), self._loss)
        try:
            self.history = [Epoch(**row) for row in shared["history"]]
            within = int(shared["samples"]) // (self.config.batch_size * self.workers.size)
            self.step = int(shared["epoch"]) * self.epoch_steps + min(within, self.epoch_steps - 1)
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
        _write_text(self.out / "config.yaml", to_yaml(self.config))
        return open_log(self.config.logs, self.out, run=self.out.name, config=to_mapping(self.config), after=self.step)

    def _summary(self) -> Summary:
        self.workers.copy_buffers(self.learner.model)
        summary = Summary(
            config=to_mapping(self.config),
            workers=self.workers.size,
            device=str(self.workers.device),
            parameters=sum(weight.numel() for weight in self.learner.model.parameters()),
            steps=self.step,
            finished=self.step == self.steps,
            history=tuple(self.history),
            bytes_received=self.moved.received,
            bytes_sent=self.moved.sent,
            bytes_dense=self.moved.dense,
            seconds=time.perf_counter() - self.started,
            digest=weights_digest(self.learner.model),
        )
        if self.out is not None and self.workers.first:
            _write_weights(self.out / "model.safetensors", self.learner.model)
            _write_text(self.out / "summary.json", json.dumps(summary.as_json(), indent=2) + "\n")
        return summary


def _write_text(path: Path, text: str) -> None:
    with staged_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _write_weights(path: Path, model: nn.Module) -> None:
    from safetensors.torch import save_file

    tensors: dict[str, Any] = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    with staged_file(path) as temporary:
        save_file(tensors, str(temporary))
