"""The recipe: from options to a trained language model, in this process and those that ``torchrun`` started."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from thinwire.errors import MisuseError
from thinwire.lab.text.config import LmConfig
from thinwire.lab.text.corruption import Corruption
from thinwire.lab.text.data import load_text, windows
from thinwire.lab.text.evaluation import generate, loss_sum, perplexity
from thinwire.lab.text.model import make_gpt, next_token_loss
from thinwire.lab.text.shards import corrupted_ranks, make_text_shards
from thinwire.lab.text.summary import Report, Summary
from thinwire.lab.trainer.faults import Fault
from thinwire.lab.trainer.learner import Learner
from thinwire.lab.trainer.order import epoch_order, mixed_seed
from thinwire.lab.trainer.outcome import write_text
from thinwire.lab.trainer.run import Batch, Measured, Run, reproducible
from thinwire.lab.trainer.workers import Workers, joined

__all__ = ["train"]


def train(config: LmConfig, *, console: Console | None = None) -> Summary:
    """Train as ``config`` says and return what came of it, the same on every worker but for the bytes it moved.

    Runs in this process; where ``torchrun`` has started several, all of them call this. Torch's global random state is
    left as it was. ``console`` shows progress (of rank 0); nothing is printed without.

    Raises:
        MisuseError: a text, a device or a package is missing, or the options do not fit each other or the checkpoint.
        MalformedError: the text or the checkpoint are damaged.

    >>> summary = train(LmConfig(steps=60, sample=20))
    >>> summary.steps, summary.entropy < summary.loss < 2.0, len(summary.sample)
    (60, True, 20)
    """
    with joined(config) as workers, reproducible(config, workers):
        task = _LanguageModelling(config, workers)
        run: Run[Report] = Run(task, config, workers, console)
        try:
            outcome = run.go()
            summary = Summary(
                **outcome,
                history=tuple(run.history),
                vocabulary=task.text.vocabulary,
                entropy=task.text.entropy,
                corrupted=tuple(task.corrupted),
                sample=task.sample(),
            )
            run.keep(summary.as_json())
            if run.out is not None and workers.first:
                task.write_tokenizer(run.out)
            return summary
        finally:
            run.close()


class _LanguageModelling:
    """The :class:`~thinwire.lab.trainer.run.Task` of telling the next token."""

    unit = "tokens"
    must_agree: Sequence[str] = (
        "data", "tokens", "model", "layers", "width", "heads", "context", "tied", "optimizer", "compress",
        "error_feedback", "aggregate", "shards", "corruption", "seed",
    )  # fmt: skip

    def __init__(self, config: LmConfig, workers: Workers) -> None:
        self.config, self.workers = config, workers
        with workers.one_after_the_first():
            text = load_text(config.data, config.data_root, tokens=config.tokens, vocabulary=config.vocabulary)
        self.text = text.first(config.train_limit, config.valid_limit)
        self.facts: dict[str, Any] = {"text": self.text.digest}
        _check_same(workers, self.text.digest)
        self.pieces = windows(self.text.tokens_train, config.shape.context)
        self.held_out = windows(self.text.tokens_valid, config.shape.context)
        rank, size = workers.rank, workers.size
        self.shard = make_text_shards(len(self.pieces), size, kind=config.shards, seed=config.seed)[rank]
        self.corrupted = corrupted_ranks(size, kind=config.shards, corrupt_workers=config.corrupt_workers)
        self.corruption = Corruption()
        if rank in self.corrupted:
            self.corruption = Corruption(config.corruption, config.probability, config.seed, rank, config.stale_steps)
        self.epoch_steps = len(self.shard) // config.batch_size
        if self.epoch_steps == 0:
            raise MisuseError(
                f"a worker has {len(self.shard)} windows, fewer than a batch of {config.batch_size}; "
                "make --batch-size or --context smaller, or start fewer workers"
            )
        self.steps = config.steps or self.epoch_steps * config.epochs
        self.report_every = config.evaluate_every or self.epoch_steps
        self.step_samples = config.batch_size * config.shape.context
        self.delay_max = self.corruption.delay_max
        self.watched = config.live or config.aggregate != "uniform" or len(self.corrupted) > 0
        self._epoch, self._order = -1, self.shard
        self.model: nn.Module = make_gpt(
            self.text.vocabulary, **config.shape._asdict(), dropout=config.dropout, tied=config.tied
        ).to(workers.device)

    def batch(self, step: int) -> Batch:
        """Inputs and targets of a step, with what is wrong in them; a function of seed, rank and step alone."""
        epoch, index = divmod(step, self.epoch_steps)
        chosen = self._windows(0) if self.corruption.repeats(epoch=epoch, index=index) else self._windows(step)
        pair = self.corruption.pair(chosen, epoch=epoch, index=index, vocabulary=self.text.vocabulary)
        return tuple(x.to(self.workers.device) for x in pair)

    def _windows(self, step: int) -> Tensor:
        epoch, index = divmod(step, self.epoch_steps)
        if epoch != self._epoch:
            rank, seed = self.workers.rank, self.config.seed
            self._epoch, self._order = epoch, epoch_order(self.shard, epoch=epoch, rank=rank, seed=seed)
        return self.pieces[self._order[index * self.config.batch_size : (index + 1) * self.config.batch_size]]

    def loss(self, model: nn.Module, part: Batch) -> Tensor:
        """Mean cross-entropy in nats a token."""
        inputs, targets = part
        return next_token_loss(model, inputs, targets, smoothing=self.config.label_smoothing)

    def fault(self, step: int) -> Fault:
        """What is wrong with the gradient of a corrupted worker."""
        epoch, index = divmod(step, self.epoch_steps)
        return self.corruption.fault(epoch=epoch, index=index)

    def report(self, measured: Measured, learner: Learner) -> Report:
        """Validate on all held-out windows, shared out over the workers."""
        with learner.autocast():
            mine = loss_sum(learner.model, self.held_out[self.workers.rank :: self.workers.size])
        total, count = self.workers.sums(mine)
        return Report(
            epoch=measured.epoch, step=measured.step, train_loss=measured.train_loss, valid_loss=total / count,
            perplexity=perplexity(total / count), seconds=measured.seconds,
            tokens_per_s=measured.samples / measured.seconds,
        )  # fmt: skip

    def row(self, values: dict[str, Any]) -> Report:
        """The row of a checkpoint."""
        return Report(**values)

    def words(self, row: Report) -> str:
        """The row in one line."""
        return (
            f"step {row.step}/{self.steps}  validation loss {row.valid_loss:.4f} (perplexity {row.perplexity:.2f})  "
            f"loss {row.train_loss:.4f}  {row.tokens_per_s:,.0f} tokens/s"
        )

    def sample(self) -> str:
        """What rank 0's model writes, from the same beginning and seed each time."""
        written, wanted, context = "", self.config.sample, self.config.shape.context
        if self.workers.first:
            generator = torch.Generator().manual_seed(mixed_seed(self.config.seed, wanted))
            tokens = self.text.tokens_valid[-1:].long()
            while len(written) < wanted:
                more = generate(self.model, tokens, min(64, wanted), context=context, generator=generator)
                tokens = torch.cat([tokens, more])
                written = self.text.decode(tokens[1:])
        return self.workers.told_by_first(written[:wanted])

    def write_tokenizer(self, folder: Path) -> None:
        """Keep what tokens stand for beside the weights."""
        write_text(folder / "tokenizer.json", self.text.tokenizer.to_json() + "\n")


def _check_same(workers: Workers, digest: str) -> None:
    number = int(digest[:12], 16)  # exact in float64
    if any(int(found) != number for (found,) in workers.gather([float(number)])):
        raise MisuseError("the workers have read different texts; give all of them the same files")
