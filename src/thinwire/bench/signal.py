"""Training with bad workers: what each way of aggregating makes of it, between uniform weights and an oracle.

The workers are threads of one process that take turns at one model (their weights are equal at every step, so one copy
holds them all). What they exchange goes through the real exchange, over an in-memory group. The *oracle* knows who is
bad and leaves them out; *uniform* trusts everybody. How much of the gap between the two a method closes is its figure,
where there is a gap: where the corruption does no harm that exceeds the noise of seeds, there is nothing to close.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from math import cos, pi
from multiprocessing import get_context
from typing import Any, final

import torch
from torch import Tensor

from thinwire.aggregate import AGGREGATORS, SIGNALS, Aggregator, Reading, Signal, SignalWeighted, Uniform, Weighting
from thinwire.bench.measure import machine, versions
from thinwire.compress import Compressor, ErrorFeedback, TopK
from thinwire.compress.group import MemoryGroup
from thinwire.errors import MisuseError
from thinwire.integrations.ddp import CompressedAllReduce
from thinwire.integrations.reduction import Mode
from thinwire.lab.text.corruption import Corruption
from thinwire.lab.text.data import Text, load_text, windows
from thinwire.lab.text.evaluation import evaluate
from thinwire.lab.text.model import make_gpt, next_token_loss
from thinwire.lab.text.shards import make_text_shards
from thinwire.lab.trainer.order import epoch_order

__all__ = ["SCENARIOS", "Scenario", "SignalOptions", "methods_for", "plan", "run_all", "run_signal"]

Row = dict[str, Any]
EVALUATIONS = 20
"""Points of each curve."""


@final
@dataclass(frozen=True)
class Scenario:
    """``bad`` of ``workers`` have their data or gradients corrupted, with ``probability`` a token or step."""

    name: str
    workers: int
    bad: int = 0
    corruption: str = "none"
    probability: float = 0.0
    shards: str = "iid"


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("clean-2", 2),
        Scenario("swap30-1of2", 2, 1, "token_swap", 0.3),
        Scenario("swap100-1of2", 2, 1, "token_swap", 1.0),
        Scenario("repeat-1of2", 2, 1, "duplicated_batch", 1.0),
        Scenario("clean-8", 8),
        Scenario("noniid-8", 8, shards="non_iid"),
        Scenario("swap30-2of8", 8, 2, "token_swap", 0.3),
        Scenario("swap100-2of8", 8, 2, "token_swap", 1.0),
        Scenario("repeat-2of8", 8, 2, "duplicated_batch", 1.0),
        Scenario("flip-2of8", 8, 2, "sign_flip", 1.0),
        Scenario("labels-2of8", 8, 2, "label_noise", 1.0),
        Scenario("stale-2of8", 8, 2, "stale", 1.0),
    )
}


@final
@dataclass(frozen=True)
class SignalOptions:
    """One run. ``method`` is ``uniform``, ``oracle``, a signal (several with ``+`` between) or an aggregator. ``decay``
    is the signals', ``warmup`` the steps before anybody is judged: shorter than by default, as the runs are short."""

    scenario: str = "clean-2"
    method: str = "uniform"
    seed: int = 0
    data: str = "tinyshakespeare"
    layers: int = 2
    width: int = 64
    heads: int = 4
    context: int = 64
    batch: int = 8
    steps: int = 400
    rate: float = 0.01
    weight_decay: float = 0.1
    density: float | None = None
    decay: float = 0.9
    warmup: int = 30
    valid_tokens: int = 32_768


def methods_for(scenario: Scenario, signals: Sequence[str], *, baselines: bool) -> list[str]:
    """What can be compared there: an aggregator that needs more workers than there are is left out."""
    names = ["uniform", *(["oracle"] if scenario.bad else []), *signals]
    for name in AGGREGATORS if baselines else ():
        if name in ("mean", "weighted"):  # uniform and oracle are these
            continue
        try:
            _aggregator(name, scenario).init(scenario.workers)
        except MisuseError:
            continue
        names.append(name)
    return names


def _aggregator(name: str, scenario: Scenario) -> Aggregator:
    """Told how many bad workers there may be, where it asks; of two workers nobody can be outvoted."""
    faulty = max(1, scenario.bad)
    known: dict[str, dict[str, Any]] = {
        "trimmed_mean": {"trim": faulty}, "krum": {"faulty": faulty}, "multi_krum": {"faulty": faulty},
    }  # fmt: skip
    return AGGREGATORS[name](**known.get(name, {}))


def _aggregate(options: SignalOptions, scenario: Scenario) -> Weighting | Aggregator:
    if options.method == "uniform":
        return Uniform()
    if options.method == "oracle":
        return _Oracle(scenario.bad)
    if options.method in AGGREGATORS:
        return _aggregator(options.method, scenario)
    parts = options.method.split("+")
    if not set(parts) <= set(SIGNALS):
        known = ", ".join(["uniform", "oracle", *SIGNALS, *AGGREGATORS])
        raise MisuseError(f"there is no method {options.method!r}; give one of {known}, or signals with + between")
    return SignalWeighted(tuple(_signal(part, options.decay) for part in parts), warmup=options.warmup)


def _signal(name: str, decay: float) -> Signal:
    made: Any = SIGNALS[name]
    return made(decay=decay)  # type: ignore[no-any-return]


@final
@dataclass(frozen=True)
class _Oracle(Weighting):
    """Knows that the last ``bad`` workers are corrupted, and leaves them out."""

    bad: int

    @property
    def signals(self) -> tuple[Signal, ...]:
        return ()

    def init(self, size: int) -> dict[str, Any]:
        return {"size": size}

    def weights(
        self, readings: Sequence[Sequence[Reading]], tokens: Sequence[float] | None, state: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        del readings, tokens
        weights = torch.zeros(state["size"], dtype=torch.float64)
        weights[: state["size"] - self.bad] = 1 / (state["size"] - self.bad)
        return weights, state

    def resized(self, state: dict[str, Any], kept: Sequence[int | None]) -> dict[str, Any]:
        raise NotImplementedError("a run keeps its workers")


@lru_cache(maxsize=2)
def _text(name: str) -> Text:
    return load_text(name)


@final
class _Run:
    """The workers of one run, and the one model that they share."""

    def __init__(self, options: SignalOptions) -> None:
        self.options = options
        self.scenario = SCENARIOS[options.scenario]
        size = self.scenario.workers
        text = _text(options.data)
        self.vocabulary = text.vocabulary
        trusted = options.batch * options.context + 1  # not validated with
        valid = min(options.valid_tokens, len(text.tokens_valid) - trusted)
        self.valid, rest = text.tokens_valid[:valid], text.tokens_valid[valid:]
        self.trusted = windows(rest[:trusted], options.context).long()
        self.windows = windows(text.tokens_train, options.context)
        self.shards = make_text_shards(len(self.windows), size, kind=self.scenario.shards, seed=options.seed)
        bad = range(size - self.scenario.bad, size)
        kinds = [self.scenario.corruption if rank in bad else "none" for rank in range(size)]
        self.corruptions = [
            Corruption(kind, self.scenario.probability, seed=options.seed, rank=rank) for rank, kind in enumerate(kinds)
        ]
        self.model = make_gpt(
            text.vocabulary, context=options.context, layers=options.layers, width=options.width, heads=options.heads,
            seed=options.seed,
        )  # fmt: skip
        self.past: deque[list[Tensor]] = deque(maxlen=1 + max(c.delay_max for c in self.corruptions))
        self.parameters = dict(self.model.named_parameters())
        self.shapes = {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}
        self.pool = ThreadPoolExecutor(size)
        compressor: Compressor | None = None if options.density is None else ErrorFeedback(TopK(options.density))
        aggregate = _aggregate(options, self.scenario)
        self.needs = aggregate.needs if isinstance(aggregate, Weighting) else frozenset()
        mode: Mode = "split" if compressor else "auto"
        make = lambda group: CompressedAllReduce(compressor, group=group, aggregate=aggregate, mode=mode)  # noqa: E731
        self.exchanges = list(self.pool.map(make, MemoryGroup.of(size, timeout_s=300)))

    def close(self) -> None:
        list(self.pool.map(CompressedAllReduce.close, self.exchanges))
        self.pool.shutdown()

    def pair(self, rank: int, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a worker's step."""
        options, shard, corruption = self.options, self.shards[rank], self.corruptions[rank]
        epoch, index = divmod(step, max(1, len(shard) // options.batch))
        if corruption.repeats(epoch=epoch, index=index):
            epoch = index = 0
        order = epoch_order(shard, epoch=epoch, rank=rank, seed=options.seed)
        chosen = order[index * options.batch : (index + 1) * options.batch]
        return corruption.pair(self.windows[chosen], epoch=epoch, index=index, vocabulary=self.vocabulary)

    def gradient(self, rank: int, step: int) -> tuple[Tensor, float]:
        """A worker's, end to end, and its loss."""
        fault = self.corruptions[rank].fault(epoch=0, index=step)
        inputs, targets = self.pair(rank, step)
        if not fault.delay:
            loss = self._backward(inputs, targets)
            return self._flat() * fault.sign, loss
        self._write(self.past[max(0, len(self.past) - 1 - fault.delay)])
        loss = self._backward(inputs, targets)
        self._write(self.past[-1])
        return self._flat(), loss

    def _backward(self, inputs: Tensor, targets: Tensor) -> float:
        self.model.zero_grad(set_to_none=True)
        loss = next_token_loss(self.model, inputs, targets)
        torch.autograd.backward(loss)
        return float(loss.detach())

    def _flat(self) -> Tensor:
        return torch.cat([p.grad.reshape(-1) for p in self.parameters.values() if p.grad is not None])

    @torch.no_grad()
    def _write(self, weights: Sequence[Tensor]) -> None:
        for parameter, weight in zip(self.parameters.values(), weights, strict=True):
            parameter.copy_(weight)

    def _cut(self, flat: Tensor) -> list[Tensor]:
        parameters = self.parameters.values()
        pieces = torch.split(flat, [parameter.numel() for parameter in parameters])
        return [piece.view_as(parameter) for piece, parameter in zip(pieces, parameters, strict=True)]

    def step(self, step: int) -> float:
        """Leaves the aggregate in the parameters' gradients. Returns the seconds that went into the exchange."""
        self.past.append([parameter.detach().clone() for parameter in self.parameters.values()])
        if "dot_reference" in self.needs:
            self._backward(self.trusted[:, :-1], self.trusted[:, 1:])
            trusted = dict(zip(self.parameters, self._cut(self._flat()), strict=True))
            list(self.pool.map(lambda exchange: exchange.refer_to(trusted), self.exchanges))
        gradients = []
        for rank, exchange in enumerate(self.exchanges):
            gradient, loss = self.gradient(rank, step)
            gradients.append(gradient)
            exchange.observe(loss=loss)
            if "improvement" in self.needs:
                exchange.observe(improvement=self._improvement(gradient))
        began = time.perf_counter()
        reduce = lambda exchange, gradient: exchange.all_reduce(gradient, parts=self.shapes)  # noqa: E731
        mean, *_ = self.pool.map(reduce, self.exchanges, gradients)
        spent = time.perf_counter() - began
        for parameter, piece in zip(self.parameters.values(), self._cut(mean), strict=True):
            parameter.grad = piece
        return spent

    @torch.no_grad()
    def _improvement(self, gradient: Tensor) -> float:
        """Of the trusted batch's loss by a step of length 0.1 along ``-gradient``."""
        inputs, targets = self.trusted[:, :-1], self.trusted[:, 1:]
        before = float(next_token_loss(self.model, inputs, targets))
        direction = self._cut(gradient * (0.1 / max(1e-30, float(gradient.norm()))))
        self._write([now - change for now, change in zip(self.past[-1], direction, strict=True)])
        after = float(next_token_loss(self.model, inputs, targets))
        self._write(self.past[-1])
        return before - after


def run_signal(options: SignalOptions) -> Row:
    """Trains and validates, on one core. The row has the curves of loss and weights."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    run = _Run(options)
    size, good = run.scenario.workers, run.scenario.workers - run.scenario.bad
    decayed = [p for p in run.parameters.values() if p.dim() > 1]
    plain = [p for p in run.parameters.values() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.rate, betas=(0.9, 0.99))
    losses: list[float] = []
    weights: list[list[float]] = []
    effective, lowest_good, highest_bad, exchanging = 0.0, 1.0, 0.0, 0.0
    every = max(1, options.steps // EVALUATIONS)
    try:
        for step in range(options.steps):
            for group in optimizer.param_groups:
                group["lr"] = _rate(options, step)
            exchanging += run.step(step)
            torch.nn.utils.clip_grad_norm_(run.parameters.values(), 1.0)
            optimizer.step()
            now = run.exchanges[0].weights
            shares = now[:size].tolist() if now is not None else [1 / size] * size
            effective += 1 / max(1e-30, sum(w * w for w in shares)) / size
            lowest_good = min(lowest_good, min(shares[:good]) * size)
            highest_bad = max(highest_bad, max(shares[good:], default=0.0) * size)
            if (step + 1) % every == 0:
                losses.append(evaluate(run.model, run.valid, context=options.context))
                weights.append([round(share, 5) for share in shares])
    finally:
        run.close()
    return {
        "bench": "signal",
        **asdict(options),
        **{key: value for key, value in asdict(run.scenario).items() if key != "name"},
        "loss": losses[-1],
        "losses": losses,
        "weights": weights,
        "weighted": run.exchanges[0].weights is not None,
        "effective_workers": effective / options.steps,
        "lowest_good": lowest_good,
        "highest_bad": highest_bad,
        "parameters": sum(p.numel() for p in run.parameters.values()),
        "exchange_seconds": round(exchanging, 3),
        "seconds": round(time.perf_counter() - began, 1),
        "machine": machine(),
        "versions": versions(),
    }


def _rate(options: SignalOptions, step: int) -> float:
    warmup = 0.1 * options.steps
    if step < warmup:
        return options.rate * (step + 1) / (warmup + 1)
    return options.rate * (0.1 + 0.45 * (1 + cos(pi * (step - warmup) / max(1.0, options.steps - warmup))))


def plan(
    base: SignalOptions, scenarios: Sequence[str], signals: Sequence[str], seeds: int, *, baselines: bool
) -> list[SignalOptions]:
    """All runs, seed by seed, so that what is interrupted can be compared as far as it got.

    Raises:
        MisuseError: There is no such scenario.
    """
    for name in scenarios:
        if name not in SCENARIOS:
            raise MisuseError(f"there is no scenario {name!r}; give some of {', '.join(SCENARIOS)}")
    return [
        replace(base, scenario=name, method=method, seed=seed)
        for seed in range(seeds)
        for name in scenarios
        for method in methods_for(SCENARIOS[name], signals, baselines=baselines)
    ]


def run_all(
    runs: Sequence[SignalOptions], *, jobs: int, report: Callable[[Row, int], object] = lambda _row, _done: None
) -> list[Row]:
    """``jobs`` runs at a time, each in a process of its own; ``report`` sees every row as it comes."""
    if jobs == 1:
        rows = []
        for options in runs:
            rows.append(run_signal(options))
            report(rows[-1], len(rows))
        return rows
    found: dict[SignalOptions, Row] = {}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(run_signal, options): options for options in runs}
        for done in as_completed(waiting):
            found[waiting[done]] = done.result()
            report(found[waiting[done]], len(found))
    return [found[options] for options in runs]
