"""Small Flower apps on scikit-learn's digits, for tests: real training, real records, no randomness but by seed."""

from __future__ import annotations

import random
from functools import cache

import numpy as np
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from thinwire.integrations.flower_mod import SparseSyncMod


@cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    return torch.tensor(data.data[order] / 16, dtype=torch.float32), torch.tensor(data.target[order])


def network(norm: bool = False) -> torch.nn.Module:
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = [torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10)]
    if norm:
        layers.insert(1, torch.nn.BatchNorm1d(32))
    return torch.nn.Sequential(*layers)


def initial(norm: bool = False) -> ArrayRecord:
    return ArrayRecord(network(norm).state_dict())


def accuracy(arrays: ArrayRecord, norm: bool = False) -> float:
    model = network(norm).eval()
    model.load_state_dict({name: torch.from_numpy(a.numpy().copy()) for name, a in arrays.items()})
    x, y = digits()
    with torch.no_grad():
        return float((model(x[1500:]).argmax(1) == y[1500:]).float().mean())


def client_app(*mods, norm: bool = False, epochs: int = 1, rate: float = 0.2) -> ClientApp:
    app = ClientApp(mods=list(mods))

    @app.train()
    def train(message, context):
        torch.set_num_threads(1)
        model = network(norm)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        x, y = digits()
        part, parts = int(context.node_config["partition-id"]), int(context.node_config["num-partitions"])
        x, y = x[:1500][part::parts], y[:1500][part::parts]
        torch.manual_seed(int(message.content["config"]["server-round"]) * 1000 + part)
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        total = 0.0
        for _ in range(epochs):
            order = torch.randperm(len(x))
            for batch in order.split(32):
                if norm and len(batch) < 2:
                    continue
                optimizer.zero_grad()
                error = torch.nn.functional.cross_entropy(model(x[batch]), y[batch])
                error.backward()
                optimizer.step()
                total += error.item() * len(batch)
        loss = total / len(x) / epochs
        metrics = MetricRecord({"num-examples": len(x), "train_loss": loss, "partition": part})
        return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message, context):
        torch.set_num_threads(1)
        score = accuracy(message.content["arrays"], norm)
        metrics = MetricRecord({"num-examples": 10, "accuracy": score})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


sparse_app = client_app(SparseSyncMod())


class Ordered(FedAvg):
    """FedAvg that sums in order of the partitions, so that the order of arrival does not matter."""

    def aggregate_train(self, server_round, replies):
        good = [reply for reply in replies if reply.has_content()]
        good.sort(key=lambda reply: next(iter(reply.content.metric_records.values()))["partition"])
        return super().aggregate_train(server_round, good)


def ordered() -> FedAvg:
    return Ordered(fraction_evaluate=0.0)


def run(strategy, grid, rounds=3, arrays=None, timeout=3600.0):
    random.seed(0)
    return strategy.start(grid, arrays or initial(), num_rounds=rounds, timeout=timeout)


def flat(record):
    return torch.cat([torch.from_numpy(a.numpy().reshape(-1)) for a in record.values()])
