"""Accuracy under compression: the same training, dense and compressed, on even and on skewed shards.

The workers are threads of one process that take turns at one model (their weights are equal at every step, so one copy
holds them all); what they exchange goes through the real exchange, over an in-memory group. BatchNorm's running
statistics are those of all workers' batches in turn. Two controls show why the residual must be kept, and kept local:
one drops it, one keeps ``compensated - the mean of all`` instead of ``compensated - what this worker sent``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from math import cos, pi, sqrt
from statistics import mean, stdev
from typing import Any, final

import torch
from torch import Tensor, nn

from thinwire.bench.measure import machine, versions
from thinwire.compress import Compressor, ErrorFeedback, TopK, Warmup
from thinwire.compress.group import MemoryGroup
from thinwire.errors import MisuseError
from thinwire.integrations.exchange import Exchange
from thinwire.integrations.reduction import Mode
from thinwire.lab.vision.augment import augment, normalise
from thinwire.lab.vision.data import Images
from thinwire.lab.vision.models import SimpleCNN, resnet18
from thinwire.lab.vision.shards import epoch_order, make_shards

__all__ = ["VARIANTS", "AccuracyOptions", "matrix", "run_accuracy", "summarise"]

Row = dict[str, Any]
VARIANTS = ("dense", "feedback", "corrected", "no feedback", "averaged residual")
BUCKET_ELEMENTS = 25 * (1 << 20) // 4  # DDP's default buckets of 25 MiB


@final
@dataclass(frozen=True)
class AccuracyOptions:
    """One run. ``rate`` is the peak learning rate (linear warm-up over ``rate_warmup`` of the steps, then cosine);
    ``density_warmup`` the share of steps in which the density falls from 25 % to ``density``."""

    variant: str = "feedback"
    model: str = "simple-cnn"
    workers: int = 4
    skew: float = 0.0
    seed: int = 0
    epochs: int = 5
    batch: int = 32
    rate: float = 0.1
    rate_warmup: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    density: float = 0.01
    density_warmup: float = 0.0
    values: str = "float32"
    mode: Mode = "split"
    augment: str = "none"
    bfloat16: bool = False


@final
class _Workers:
    """The ranks of one run, and the way their gradients become one."""

    def __init__(self, options: AccuracyOptions, parameters: Sequence[Tensor], steps: int) -> None:
        self.options = options
        self.parameters = list(reversed(parameters))
        self.buckets = list(_buckets(self.parameters))
        self.pool = ThreadPoolExecutor(options.workers)
        self.averaged: list[list[Tensor]] = []
        self.exchanges: list[Exchange] = []
        if options.variant != "dense":
            warmup = round(options.density_warmup * steps)
            schedule = Warmup(0.25, options.density, warmup) if warmup else None
            groups = MemoryGroup.of(options.workers, timeout_s=120)
            make = lambda group: Exchange(self._compressor(), group, mode=options.mode, schedule=schedule)  # noqa: E731
            self.exchanges = list(self.pool.map(make, groups))

    def _compressor(self) -> Compressor:
        top = TopK(self.options.density, self.options.values)
        if self.options.variant == "feedback":
            return ErrorFeedback(top)
        if self.options.variant == "corrected":
            return ErrorFeedback(top, momentum=self.options.momentum)
        return top

    def reduce(self, gradients: list[list[Tensor]]) -> list[Tensor]:
        """Every worker's gradients, one flat tensor a bucket, to their means."""
        if self.options.variant == "dense":
            return [torch.stack(parts).mean(0) for parts in zip(*gradients, strict=True)]
        if self.options.variant == "averaged residual":
            return self._averaged(gradients)
        list(self.pool.map(self._exchange, range(self.options.workers), gradients))
        return gradients[0]

    def _averaged(self, gradients: list[list[Tensor]]) -> list[Tensor]:
        if self.averaged:
            gradients = [
                [g + r for g, r in zip(*both, strict=True)] for both in zip(gradients, self.averaged, strict=True)
            ]
        sent = [[bucket.clone() for bucket in own] for own in gradients]
        list(self.pool.map(self._exchange, range(self.options.workers), sent))
        self.averaged = [[g - m for g, m in zip(own, sent[0], strict=True)] for own in gradients]
        return sent[0]

    def _exchange(self, rank: int, gradients: list[Tensor]) -> None:
        if gradients[0].is_cuda:
            torch.cuda.set_device(gradients[0].device)
        for i, (bucket, flat) in enumerate(zip(self.buckets, gradients, strict=True)):
            keys = [f"{i}.{j}" for j in range(len(bucket))]
            self.exchanges[rank].reduce_(flat, keys, [tuple(parameter.shape) for parameter in bucket])

    def gather(self) -> list[Tensor]:
        """The gradients that backward has left, one flat tensor a bucket."""
        return [torch.cat([p.grad.reshape(-1) for p in bucket if p.grad is not None]) for bucket in self.buckets]

    def scatter(self, flats: list[Tensor]) -> None:
        for bucket, flat in zip(self.buckets, flats, strict=True):
            for parameter, piece in zip(bucket, torch.split(flat, [p.numel() for p in bucket]), strict=True):
                parameter.grad = piece.view_as(parameter)

    def residual_norm(self) -> float:
        if self.averaged:
            return float(torch.stack([bucket.square().sum() for bucket in self.averaged[0]]).sum().sqrt())
        if not self.exchanges or self.exchanges[0].feedback is None:
            return 0.0
        states = list(self.pool.map(Exchange.state_dict, self.exchanges))  # it ends the step, which is collective
        parts = states[0]["parameters"].values()
        return float(torch.stack([part["residual"].square().sum() for part in parts]).sum().sqrt())


def _buckets(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for parameter in parameters:
        bucket.append(parameter)
        if sum(p.numel() for p in bucket) >= BUCKET_ELEMENTS:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def run_accuracy(options: AccuracyOptions, images: Images, *, report: Callable[[str], object] = lambda _: None) -> Row:
    """Trains and tests; the row has the accuracy and the residual's norm after every epoch."""
    if options.variant not in VARIANTS:
        raise MisuseError(f"there is no variant {options.variant!r}; give one of {', '.join(VARIANTS)}")
    began = time.perf_counter()
    device = images.train_images.device
    torch.manual_seed(options.seed)
    model: nn.Module = (
        SimpleCNN(images.shape, images.classes)
        if options.model == "simple-cnn"
        else resnet18(classes=images.classes, channels=images.shape[0], stem="cifar")
    )
    model = model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    shards = make_shards(images.train_labels.cpu(), options.workers, skew=options.skew, seed=options.seed)
    steps_an_epoch = len(shards[0]) // options.batch
    steps = options.epochs * steps_an_epoch
    workers = _Workers(options, list(model.parameters()), steps)
    # The velocity is built before compression where the momentum is corrected, and by the optimiser elsewhere.
    momentum = 0.0 if options.variant == "corrected" else options.momentum
    optimizer = torch.optim.SGD(
        model.parameters(), lr=options.rate, momentum=momentum, weight_decay=options.weight_decay
    )
    augmenting = torch.Generator().manual_seed(options.seed)
    accuracies, norms, step = [], [], 0
    for epoch in range(options.epochs):
        orders = [epoch_order(s, epoch=epoch, rank=r, seed=options.seed).to(device) for r, s in enumerate(shards)]
        for i in range(steps_an_epoch):
            optimizer.param_groups[0]["lr"] = _rate(options, step, steps)
            gradients = []
            for order in orders:
                chosen = order[i * options.batch : (i + 1) * options.batch]
                _backward(model, images, chosen, options, augmenting)
                gradients.append(workers.gather())
            workers.scatter(workers.reduce(gradients))
            optimizer.step()
            step += 1
        accuracies.append(_test(model, images, options.bfloat16))
        norms.append(workers.residual_norm())
        report(
            f"{options.variant}, skew {options.skew:g}, seed {options.seed}: epoch {epoch + 1}, {accuracies[-1]:.4f}"
        )
    traffic = workers.exchanges[0].traffic() if workers.exchanges else None
    return {
        "bench": "accuracy",
        **asdict(options),
        "train": len(images.train_labels),
        "test": len(images.test_labels),
        "classes": images.classes,
        "accuracy": accuracies[-1],
        "accuracies": accuracies,
        "residual_norms": norms,
        "received_share": traffic.received_bytes / traffic.dense_bytes if traffic else 1.0,
        "seconds": round(time.perf_counter() - began, 1),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "machine": machine(),
        "versions": versions(),
    }


def _rate(options: AccuracyOptions, step: int, steps: int) -> float:
    warmup = options.rate_warmup * steps
    if step < warmup:
        return options.rate * (step + 1) / (warmup + 1)
    return options.rate * 0.5 * (1 + cos(pi * (step - warmup) / max(1.0, steps - warmup)))


def _backward(
    model: nn.Module, images: Images, chosen: Tensor, options: AccuracyOptions, generator: torch.Generator
) -> None:
    batch = augment(images.train_images[chosen], options.augment, generator)
    batch = normalise(batch, images.mean, images.deviation).to(memory_format=torch.channels_last)
    model.zero_grad(set_to_none=True)
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=options.bfloat16):
        logits = model(batch)
    torch.autograd.backward(nn.functional.cross_entropy(logits.float(), images.train_labels[chosen]))


@torch.no_grad()
def _test(model: nn.Module, images: Images, bfloat16: bool) -> float:
    model.eval()
    right = 0
    for batch, labels in zip(torch.split(images.test_images, 500), torch.split(images.test_labels, 500), strict=True):
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=bfloat16):
            logits = model(normalise(batch, images.mean, images.deviation).to(memory_format=torch.channels_last))
        right += int((logits.argmax(1) == labels).sum())
    model.train()
    return right / len(images.test_labels)


def summarise(rows: Sequence[Row]) -> list[Row]:
    """One line for each skew, variant and warm-up of the density: mean accuracy over seeds, its standard error, and how
    far below dense it is, seed by seed, in points."""
    lines = []
    for skew in sorted({row["skew"] for row in rows}):
        here = [row for row in rows if row["skew"] == skew]
        dense = {row["seed"]: row["accuracy"] for row in here if row["variant"] == "dense"}
        kinds = {(VARIANTS.index(row["variant"]), row.get("density_warmup", 0.0)) for row in here}
        for index, warmup in sorted(kinds):
            variant = VARIANTS[index]
            found = [row for row in here if (row["variant"], row.get("density_warmup", 0.0)) == (variant, warmup)]
            values = [100 * row["accuracy"] for row in found]
            below = [100 * (dense[row["seed"]] - row["accuracy"]) for row in found if row["seed"] in dense]
            lines.append(
                {
                    "variant": variant,
                    "skew": skew,
                    "density_warmup": None if variant == "dense" else warmup,
                    "seeds": len(found),
                    "accuracy": mean(values),
                    "error": stdev(values) / sqrt(len(values)) if len(values) > 1 else None,
                    "below_dense": mean(below) if below else None,
                    "below_error": stdev(below) / sqrt(len(below)) if len(below) > 1 else None,
                    "received_share": mean(row["received_share"] for row in found),
                }
            )
    return lines


def matrix(base: AccuracyOptions, variants: Sequence[str], skews: Sequence[float], seeds: int) -> list[AccuracyOptions]:
    """All runs, the controls last."""
    return [
        replace(base, variant=variant, skew=skew, seed=seed)
        for variant in variants
        for skew in skews
        for seed in range(seeds)
    ]
