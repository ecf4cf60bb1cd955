"""Federated learning, method beside method: accuracy by round and by byte, fairness, time on slow links.

Every run goes through Flower: its strategies on the server, its ClientApp on the clients, every message through its
serialisation, on :class:`~thinwire.integrations.flower_grid.LocalGrid`. Bytes are those of the serialised messages.
Time is *simulated*: a virtual clock that takes each device's link and speed from a log-normal distribution.

A run is a file ``OUT/runs/ID.json``; what is there is not run again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from thinwire.bench.federated_methods import Settings, method_of
from thinwire.bench.measure import machine, versions
from thinwire.errors import MisuseError
from thinwire.integrations.flower import SparseSync
from thinwire.integrations.flower_grid import LocalGrid
from thinwire.lab.federated.learning import Federation, World, evaluate, fairness, learn, world_of

__all__ = ["Devices", "FederatedRun", "client_app", "federate", "run_all"]

Row = dict[str, Any]


@final
@dataclass(frozen=True, slots=True)
class Devices:
    """Simulated devices. Links have a median of ``mbit`` Mbit/s up (down is ``down_ratio`` times as fast) and spread by
    ``spread`` (of the logarithm); a round of local learning takes ``compute_s``, spread alike; replies later than
    ``deadline_s`` are lost; a client drops out of a round with probability ``dropout``."""

    mbit: float = 10.0
    down_ratio: float = 5.0
    spread: float = 0.75
    compute_s: float = 5.0
    deadline_s: float = 600.0
    dropout: float = 0.0

    def seconds(self, clients: int, seed: int) -> Callable[[int, int], float]:
        """How long ``nbytes`` take to or from a node; the way up comes second, and has the learning before it."""
        source = np.random.default_rng(seed)
        rates = self.mbit * 1e6 / 8 * np.exp(self.spread * source.standard_normal(clients))
        compute = self.compute_s * np.exp(self.spread * source.standard_normal(clients))
        turn: dict[int, int] = {}

        def seconds(node: int, nbytes: int) -> float:
            turn[node] = 1 - turn.get(node, 1)  # the grid asks for the way down, then for the way up
            i = (node - 2) % clients
            if turn[node] == 0:
                return float(nbytes / (rates[i] * self.down_ratio))
            return float(nbytes / rates[i] + compute[i])

        return seconds


@final
@dataclass(frozen=True, slots=True)
class FederatedRun:
    """One run. ``partition``, ``train`` and ``test`` as in :class:`~thinwire.lab.federated.learning.Federation`."""

    method: str = "sparsesync"
    data: str = "digits"
    partition: str = "dirichlet-0.5"
    clients: int = 10
    rounds: int = 20
    epochs: int = 1
    batch: int = 32
    lr: float = 0.05
    momentum: float = 0.9
    train: int | None = None
    test: int | None = None
    seed: int = 0
    settings: Settings = field(default_factory=Settings)
    devices: Devices = field(default_factory=Devices)
    evaluate_every: int = 1

    def __post_init__(self) -> None:
        method_of(self.method)
        if min(self.rounds, self.epochs, self.batch, self.evaluate_every) < 1 or self.lr <= 0:
            raise MisuseError("rounds, epochs, batch and evaluate_every are 1 or more, lr is positive")
        if not 0 < self.settings.participation <= 1 or not 0 <= self.devices.dropout < 1:
            raise MisuseError("participation is a share in (0, 1], dropout one in [0, 1)")

    @property
    def id(self) -> str:
        """16 hex digits that all the run's result depends on, but for the versions of packages."""
        facts = json.dumps(asdict(self), sort_keys=True).encode()
        return hashlib.blake2s(facts, digest_size=8).hexdigest()

    def federation(self, root: str | None) -> Federation:
        """Its clients."""
        return Federation(self.data, self.clients, self.partition, self.seed, self.train, self.test, root)


def client_app(world: World, run: FederatedRun, mods: Sequence[Any]) -> ClientApp:
    """The ClientApp of a run: local SGD from the arrays that come, and ordinary arrays back."""
    app = ClientApp(mods=list(mods))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        config = message.content.config_records["config"]
        model = world.model(run.seed)
        model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
        client = world.clients[int(context.node_config["partition-id"])]
        proximal, turn = config.get("proximal-mu", 0.0), config["server-round"]
        assert isinstance(proximal, float)
        assert isinstance(turn, int)
        loss = learn(
            model, client, epochs=run.epochs, batch=run.batch, lr=run.lr, momentum=run.momentum, proximal=proximal,
            seed=hash((run.seed, turn, context.node_id)) & 0x7FFFFFFF,
        )  # fmt: skip
        metrics = MetricRecord({"num-examples": len(client.targets), "train_loss": loss})
        content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
        return Message(content, reply_to=message)

    return app


def federate(run: FederatedRun, *, root: str | None = None, on_round: Callable[[int, Row], Any] | None = None) -> Row:
    """Make one run; equal runs give equal rows, but for ``seconds`` and Flower's time stamps in the bytes.

    The row: the run; ``rounds``, by evaluated round the global ``loss`` and ``accuracy``, and bytes ``up`` and ``down``
    and simulated ``clock_s`` so far; ``fairness`` of the last model; ``sent``, by the ledger's kinds (SparseSync);
    ``lost`` messages.
    """
    began = time.perf_counter()
    torch.manual_seed(run.seed)
    random.seed(run.seed)  # Flower samples clients by it
    world = world_of(run.federation(root))
    with _quiet():
        strategy, mods = method_of(run.method)(run.settings)
    model = world.model(run.seed)
    faults = [_Dropout(run.devices.dropout, run.seed)] if run.devices.dropout else []
    grid = LocalGrid(
        client_app(world, run, mods), run.clients, faults=faults, seconds=run.devices.seconds(run.clients, run.seed)
    )
    points: list[Row] = []
    sums = {"up": 0, "down": 0, "lost": 0, "at": 0}

    def watch(turn: int, arrays: ArrayRecord) -> MetricRecord | None:
        if turn % run.evaluate_every and turn != run.rounds:
            return None
        model.load_state_dict(arrays.to_torch_state_dict())
        score = evaluate(model, world.test_inputs, world.test_targets)
        for sent in grid.log[sums["at"] :]:
            sums[sent.direction] += sent.nbytes
            sums["lost"] += not sent.arrived
        sums["at"] = len(grid.log)
        points.append({
            "round": turn, "loss": round(score.loss, 6), "accuracy": round(score.accuracy, 6), "up": sums["up"],
            "down": sums["down"], "clock_s": round(grid.clock, 3),
        })  # fmt: skip
        if on_round is not None:
            on_round(turn, points[-1])
        return None

    with _quiet():
        strategy.start(
            grid, ArrayRecord(model.state_dict()), num_rounds=run.rounds, timeout=run.devices.deadline_s,
            train_config=ConfigRecord({}), evaluate_fn=watch,
        )  # fmt: skip
    sent = {} if not isinstance(strategy, SparseSync) else {
        "/".join(key): nbytes for key, nbytes in strategy.ledger.by("hop", "direction", "kind").items()
    }  # fmt: skip
    return {
        "bench": "federated", "id": run.id, **asdict(run), "parameters": sum(w.numel() for w in model.parameters()),
        "points": points, "fairness": dict(fairness(model, world)), "sent": sent, "lost": sums["lost"],
        "seconds": round(time.perf_counter() - began, 2), "machine": machine(), "versions": versions() | _flower(),
    }  # fmt: skip


def _flower() -> dict[str, str]:
    from importlib import metadata

    return {"flwr": metadata.version("flwr")}


@final
class _Dropout:
    """Loses a client's answer with a probability that depends on the seed and the turn alone."""

    def __init__(self, probability: float, seed: int) -> None:
        self._probability, self._source = probability, random.Random(f"dropout {seed}")

    def __call__(self, node: int, direction: str, turn: int, data: bytes) -> bytes | None:
        del node, turn
        lost = direction == "up" and self._source.random() < self._probability
        return None if lost else data


@contextmanager
def _quiet() -> Iterator[None]:
    """Flower logs every round at INFO; a bench has a table of its own."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _result(out: Path, run: FederatedRun) -> Path:
    return out / "runs" / f"{run.id}.json"


def _one(run: FederatedRun, out: Path, root: str | None) -> Row:
    path = _result(out, run)
    if path.exists():
        row: Row = json.loads(path.read_text())
        return row
    torch.set_num_threads(1)
    row = federate(run, root=root)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.part")
    scratch.write_text(json.dumps(row))
    os.replace(scratch, path)
    return row


def run_all(
    runs: Sequence[FederatedRun], out: Path, *, jobs: int = 1, root: str | None = None,
    on_done: Callable[[Row], Any] | None = None,
) -> list[Row]:  # fmt: skip
    """All runs, those that are in ``out`` read, the others made, ``jobs`` at a time; rows in the order of the runs.

    Raises:
        MisuseError: ``jobs`` is not positive; a run's data set is not here.
    """
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from multiprocessing import get_context

    if jobs < 1:
        raise MisuseError(f"jobs is {jobs}; give 1 or more")
    found: dict[str, Row] = {}

    def done(row: Row) -> None:
        found[row["id"]] = row
        if on_done is not None:
            on_done(row)

    left = [run for run in runs if not _result(out, run).exists()]
    for run in runs:
        if run not in left:
            done(_one(run, out, root))
    if jobs == 1:
        for run in left:
            done(_one(run, out, root))
    elif left:
        with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
            for future in as_completed([pool.submit(_one, run, out, root) for run in left]):
                done(future.result())
    return [found[run.id] for run in runs]
