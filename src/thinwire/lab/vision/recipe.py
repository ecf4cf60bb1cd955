"""The recipe: from options to a trained classifier, in this process and those that ``torchrun`` started beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional

from thinwire.errors import MisuseError
from thinwire.lab.trainer.faults import Fault
from thinwire.lab.trainer.learner import Learner
from thinwire.lab.trainer.run import Batch, Measured, Run, reproducible
from thinwire.lab.trainer.workers import Workers, joined
from thinwire.lab.vision.augment import augment, normalise
from thinwire.lab.vision.config import VisionConfig
from thinwire.lab.vision.data import load_images
from thinwire.lab.vision.models import make_model
from thinwire.lab.vision.shards import epoch_order, make_shards, mixed_seed
from thinwire.lab.vision.summary import Epoch, Summary

__all__ = ["train"]

_TEST_BATCH = 512


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
    with joined(config) as workers, reproducible(config, workers):
        run: Run[Epoch] = Run(_Classification(config, workers), config, workers, console)
        try:
            summary = Summary(**run.go(), history=tuple(run.history))
            run.keep(summary.as_json())
            return summary
        finally:
            run.close()


class _Classification:
    """The :class:`~thinwire.lab.trainer.run.Task` of telling images apart."""

    unit = "images"
    must_agree: Sequence[str] = ("model", "stem", "width", "data", "optimizer", "compress", "error_feedback", "seed")
    delay_max = 0

    def __init__(self, config: VisionConfig, workers: Workers) -> None:
        self.config, self.workers = config, workers
        self.facts: dict[str, Any] = {}
        self.watched = config.live or config.aggregate != "uniform"
        with workers.one_after_the_first():
            images = load_images(config.data, config.data_root, config.cache)
        self.images = images.first(config.train_limit, config.test_limit).to(workers.device)
        shards = make_shards(self.images.train_labels.cpu(), workers.size, skew=config.skew, seed=config.seed)
        self.shard = shards[workers.rank]
        self.epoch_steps = self.report_every = len(self.shard) // config.batch_size
        if self.epoch_steps == 0:
            raise MisuseError(
                f"a worker has {len(self.shard)} samples, fewer than a batch of {config.batch_size}; "
                "make --batch-size smaller or start fewer workers"
            )
        self.steps = self.epoch_steps * config.epochs
        self.step_samples = config.batch_size
        self._epoch, self._order = -1, self.shard
        self.model: nn.Module = make_model(config, images.shape, images.classes).to(workers.device)
        if config.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def batch(self, step: int) -> Batch:
        """The images of a step, augmented and normalised, and their labels; a function of seed, rank and step alone."""
        epoch, within = divmod(step, self.epoch_steps)
        size, rank, seed = self.config.batch_size, self.workers.rank, self.config.seed
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(self.shard, epoch=epoch, rank=rank, seed=seed)
        chosen = self._order[within * size : (within + 1) * size].to(self.workers.device)
        generator = torch.Generator().manual_seed(mixed_seed(seed, rank, epoch, within))
        images = augment(self.images.train_images[chosen], self.config.augmentation, generator)
        return self._ready(images), self.images.train_labels[chosen]

    def _ready(self, images: Tensor) -> Tensor:
        images = normalise(images, self.images.mean, self.images.deviation)
        return images.contiguous(memory_format=torch.channels_last) if self.config.channels_last else images

    def loss(self, model: nn.Module, part: Batch) -> Tensor:
        """Mean cross-entropy."""
        images, labels = part
        return functional.cross_entropy(model(images), labels, label_smoothing=self.config.label_smoothing)

    def fault(self, step: int) -> Fault:  # noqa: ARG002
        """None: all workers do their best."""
        return Fault()

    def report(self, measured: Measured, learner: Learner) -> Epoch:
        """One epoch's row."""
        accuracy, test_loss = self._evaluate(learner)
        return Epoch(
            epoch=measured.epoch, step=measured.step, train_loss=measured.train_loss, test_loss=test_loss,
            accuracy=accuracy, seconds=measured.seconds, samples_per_s=measured.samples / measured.seconds,
        )  # fmt: skip

    def row(self, values: dict[str, Any]) -> Epoch:
        """The row of a checkpoint."""
        return Epoch(**values)

    def words(self, row: Epoch) -> str:
        """The row in one line."""
        return (
            f"epoch {row.epoch}/{self.config.epochs}  accuracy {100 * row.accuracy:.2f} %  loss {row.train_loss:.4f}  "
            f"test loss {row.test_loss:.4f}  {row.samples_per_s:,.0f} images/s"
        )

    @torch.no_grad()
    def _evaluate(self, learner: Learner) -> tuple[float, float]:
        """Accuracy and mean cross-entropy on all test samples, shared out over the workers."""
        model, rank, size = learner.model, self.workers.rank, self.workers.size
        self.workers.copy_buffers(model)
        model.eval()
        right, loss, count = 0.0, 0.0, 0.0
        for start in range(rank, len(self.images.test_labels), _TEST_BATCH * size):
            chosen = slice(start, start + _TEST_BATCH * size, size)
            images, labels = self.images.test_images[chosen], self.images.test_labels[chosen]
            with learner.autocast():
                logits = model(self._ready(images)).float()
            right += float((logits.argmax(1) == labels).sum())
            loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
            count += len(labels)
        model.train()
        right, loss, count = self.workers.sums([right, loss, count])
        return right / count, loss / count
