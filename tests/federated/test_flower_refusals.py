"""Clients that vanish, answer twice, answer late or answer nonsense: the round goes on, and no mass is lost."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp import strategy as flower

from tests.federated.apps import accuracy, client_app, flat, initial, run
from thinwire.federated import frame as frames
from thinwire.federated.client import Orders
from thinwire.integrations.flower import SparseSync
from thinwire.integrations.flower_grid import LocalGrid
from thinwire.integrations.flower_mod import STATE, SparseSyncMod, _load
from thinwire.testing.federated import Damage, Drop, Replay


def conserved(grid, sync, mass) -> None:
    """What each client has made is what was taken of it and what it carries."""
    from thinwire.federated.client import settle

    for node, (made, taken) in mass.items():
        state = settle(_load(grid.contexts[node]), Orders(accepted=sync.up.accepted.get(node, 0)))
        torch.testing.assert_close(taken + state.carry, made, rtol=0, atol=1e-5)


class Watched:
    """An app whose updates, and what the server takes of them, are summed."""

    def __init__(self, sync: SparseSync) -> None:
        self.made: dict[int, torch.Tensor] = {}
        self.taken: dict[int, torch.Tensor] = {}
        inner = sync.strategy.aggregate_train

        def aggregate_train(server_round, replies):
            replies = list(replies)
            arrays, metrics = inner(server_round, replies)
            for reply in replies if arrays is not None else ():
                if reply.has_content():
                    restored = flat(reply.content["arrays"]) - flat_state(sync.down.model)
                    node = reply.metadata.src_node_id
                    self.taken[node] = self.taken.get(node, 0) + restored
            return arrays, metrics

        sync.strategy.aggregate_train = aggregate_train

    def mod(self, message, context, call_next):
        before = flat(message.content["arrays"])
        reply = call_next(message, context)
        if message.metadata.message_type == "train" and reply.has_content():
            made = flat(reply.content["arrays"]) - before
            self.made[context.node_id] = self.made.get(context.node_id, 0) + made
        return reply

    def mass(self):
        return {n: (made, self.taken.get(n, torch.zeros_like(made))) for n, made in self.made.items()}


def flat_state(state):
    return torch.cat([t.reshape(-1) for t in state.tensors])


@pytest.mark.parametrize("share", [0.3])
@pytest.mark.parametrize("directions", [("down",), ("up",), ("down", "up")])
def test_clients_that_vanish_mid_round_lose_nothing(share, directions):
    sync = SparseSync(flower.FedAvg(fraction_evaluate=0.5), density=0.05, anchor_every=3)
    watched = Watched(sync)
    grid = LocalGrid(client_app(SparseSyncMod(), watched.mod), 4, faults=(Drop(share, 2, directions=directions),))
    run(sync, grid, rounds=8)
    assert any(not s.arrived for s in grid.log)
    conserved(grid, sync, watched.mass())


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_flipped_byte_costs_one_clients_round(direction, caplog):
    sync = SparseSync(flower.FedAvg(fraction_evaluate=0.0), density=0.05)
    watched = Watched(sync)
    damage = Damage(nodes=(3,), direction=direction, times=2)
    grid = LocalGrid(client_app(SparseSyncMod(), watched.mod), 4, faults=(damage,))
    with caplog.at_level(logging.INFO, logger="flwr"):
        logging.getLogger("flwr").propagate = True
        result = run(sync, grid, rounds=5)
    assert damage.done == 2
    assert len(result.train_metrics_clientapp) == 5
    assert sync.up.accepted == {2: 5, 3: 5 if direction == "up" else 3, 4: 5, 5: 5}
    assert "damaged on the way" in caplog.text
    conserved(grid, sync, watched.mass())


def test_a_replayed_update_is_taken_once(caplog):
    sync = SparseSync(flower.FedAvg(fraction_evaluate=0.0), density=0.05)

    class Thief:
        """Answers every round with the first round's update."""

        kept: ArrayRecord | None = None

        def __call__(self, message, context, call_next):
            reply = call_next(message, context)
            if context.node_id == 3 and reply.has_content():
                Thief.kept = Thief.kept or reply.content["arrays"]
                reply.content["arrays"] = Thief.kept
            return reply

    grid = LocalGrid(client_app(Thief(), SparseSyncMod()), 3)
    with caplog.at_level(logging.WARNING, logger="flwr"):
        logging.getLogger("flwr").propagate = True
        result = run(sync, grid, rounds=4)
    assert sync.up.accepted == {2: 4, 3: 1, 4: 4}
    assert "taken already" in caplog.text
    assert len(result.train_metrics_clientapp) == 4


def test_replayed_messages_do_no_harm():
    grid = LocalGrid(client_app(SparseSyncMod()), 3, faults=(replay := Replay(node=3),))
    sync = SparseSync(flower.FedAvg(fraction_evaluate=0.0), density=0.05)
    result = run(sync, grid, rounds=4)
    assert replay.done
    assert sync.up.accepted[3] == 1
    assert sync.up.accepted[2] == 4
    assert np.isfinite(accuracy(result.arrays))


def broken(how):
    """A mod inside SparseSync that spoils what node 3 trains."""

    def mod(message, context, call_next):
        reply = call_next(message, context)
        if context.node_id != 3 or not reply.has_content() or message.metadata.message_type != "train":
            return reply
        arrays = reply.content["arrays"]
        if how == "nan":
            arrays["0.bias"] = type(arrays["0.bias"])(np.full(32, np.nan, np.float32))
        elif how == "shapes":
            arrays["0.bias"] = type(arrays["0.bias"])(np.zeros(31, np.float32))
        elif how == "names":
            reply.content["arrays"] = ArrayRecord({"other": arrays["0.bias"]})
        elif how == "two records":
            reply.content["more"] = ArrayRecord({"other": arrays["0.bias"]})
        elif how == "no weight":
            reply.content["metrics"] = MetricRecord({"train_loss": 0.0})
        elif how == "nan weight":
            reply.content["metrics"] = MetricRecord({"train_loss": 0.0, "num-examples": float("nan")})
        elif how == "other metrics":
            reply.content["metrics"] = MetricRecord({"num-examples": 4})
        elif how == "raises":
            raise RuntimeError("out of memory")
        return reply

    return mod


@pytest.mark.parametrize(
    "how", ["nan", "shapes", "names", "two records", "no weight", "nan weight", "other metrics", "raises"]
)
def test_the_round_goes_on_without_a_client_that_answers_nonsense(how):
    grid = LocalGrid(client_app(SparseSyncMod(), broken(how)), 4)
    sync = SparseSync(flower.FedAvg(), density=0.05)
    result = run(sync, grid, rounds=3)
    assert len(result.train_metrics_clientapp) == 3
    assert sync.up.accepted == {2: 3, 4: 3, 5: 3}
    assert all(np.isfinite(a.numpy()).all() for a in result.arrays.values())
    held = _load(grid.contexts[3])
    if how != "raises":  # then its context is as before, and it is sent what it lacks
        assert held.model.digest == sync.down.view.digest


@pytest.mark.parametrize("what", ["garbage", "plain", "wrong shapes"])
def test_a_client_that_ignores_the_protocol_is_left_out(what):
    def outside(message, context, call_next):
        reply = call_next(message, context)
        if context.node_id == 3 and reply.has_content() and message.metadata.message_type == "train":
            if what == "plain":
                reply.content["arrays"] = initial()
            else:
                data = b"tw\x01 nonsense" * 20
                if what == "wrong shapes":
                    data = frames.encode_sparse(torch.tensor([1], dtype=torch.int32), torch.ones(1), 5, sequence=9)
                array = reply.content["arrays"]["thinwire"]
                reply.content["arrays"]["thinwire"] = type(array)("uint8", (len(data),), array.stype, data)
        return reply

    grid = LocalGrid(client_app(outside, SparseSyncMod()), 3)
    sync = SparseSync(flower.FedAvg(), density=0.05)
    run(sync, grid, rounds=2)
    assert sync.up.accepted == {2: 2, 4: 2}


def test_a_client_that_lost_its_state_is_sent_an_anchor():
    grid = LocalGrid(client_app(SparseSyncMod()), 3)

    class Forgetful:
        def __call__(self, node, direction, turn, data):
            if node == 3 and direction == "down" and turn > 6 and STATE in grid.contexts[3].state and not self.done:
                del grid.contexts[3].state[STATE]
                self.done = True
            return data

        done = False

    grid.faults = (Forgetful(),)
    sync = SparseSync(flower.FedAvg(fraction_evaluate=0.0), density=0.05, anchor_every=0)
    run(sync, grid, rounds=5)
    assert sync.ledger.by("node", kind="anchor", round=1).keys() == {(2,), (3,), (4,)}
    again = {e.round for e in sync.ledger.entries if e.kind == "anchor" and e.node == 3 and e.round > 1}
    assert len(again) == 1
    assert sync.up.accepted == {2: 5, 3: 4, 4: 5}  # and its numbers go on where they were


def test_an_aggregation_that_fails_takes_nothing():
    sync = SparseSync(flower.FedAvg(fraction_evaluate=0.0), density=0.05)
    watched = Watched(sync)
    inner = sync.strategy.aggregate_train
    sync.strategy.aggregate_train = lambda r, replies: (None, None) if r == 2 else inner(r, replies)
    grid = LocalGrid(client_app(SparseSyncMod(), watched.mod), 3)
    run(sync, grid, rounds=4)
    assert set(sync.up.accepted.values()) == {4}
    conserved(grid, sync, watched.mass())
