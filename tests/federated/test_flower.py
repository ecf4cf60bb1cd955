"""SparseSync on Flower: real apps through Flower's own messages."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import fixedclipping_mod
from flwr.serverapp import strategy as flower

from tests.federated.apps import accuracy, client_app, flat, initial, run
from thinwire.compress.schedule import Warmup
from thinwire.errors import MisuseError
from thinwire.federated.density import Adaptive, Bandwidths
from thinwire.federated.hierarchy import Coverage, Hop
from thinwire.integrations.flower import SparseSync
from thinwire.integrations.flower_grid import LocalGrid
from thinwire.integrations.flower_mod import SparseSyncMod, _load
from thinwire.integrations.flower_records import message_bytes
from thinwire.testing.federated import Drop

EXACT = {"density": 1.0, "down_density": 1.0, "feedback": "none", "values": "float32"}


def same(a: ArrayRecord, b: ArrayRecord) -> bool:
    return list(a) == list(b) and all(a[k].data == b[k].data and a[k].dtype == b[k].dtype for k in a)


INNER = {
    "FedAvg": lambda: flower.FedAvg(),
    "FedAdam": lambda: flower.FedAdam(eta=0.01),
    "FedYogi": lambda: flower.FedYogi(eta=0.01),
    "FedAdagrad": lambda: flower.FedAdagrad(eta=0.01),
    "FedAvgM": lambda: flower.FedAvgM(server_momentum=0.5),
    "FedProx": lambda: flower.FedProx(proximal_mu=0.1),
    "FedMedian": lambda: flower.FedMedian(),
    "FedTrimmedAvg": lambda: flower.FedTrimmedAvg(beta=0.25),
    "Krum": lambda: flower.Krum(num_malicious_nodes=1),
    "half": lambda: flower.FedAvg(fraction_train=0.5, fraction_evaluate=0.5),
}


SLOW = ("FedYogi", "FedAdagrad", "FedMedian", "FedTrimmedAvg", "Krum")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in INNER])
def test_with_everything_sent_it_is_the_inner_strategy_bit_for_bit(name):
    plain = run(INNER[name](), LocalGrid(client_app(), 5))
    ours = run(SparseSync(INNER[name](), **EXACT), LocalGrid(client_app(SparseSyncMod()), 5))
    assert same(plain.arrays, ours.arrays)
    assert plain.train_metrics_clientapp == ours.train_metrics_clientapp
    assert plain.evaluate_metrics_clientapp == ours.evaluate_metrics_clientapp


@pytest.mark.parametrize("options", [{}, {"down_density": 0.1}])
def test_batch_norm_and_its_counters_survive(options):
    plain = run(flower.FedAvg(), LocalGrid(client_app(norm=True), 3), arrays=initial(norm=True))
    grid = LocalGrid(client_app(SparseSyncMod(), norm=True), 3)
    ours = run(SparseSync(flower.FedAvg(), **{**EXACT, **options}), grid, arrays=initial(norm=True))
    if not options:
        assert same(plain.arrays, ours.arrays)
    assert ours.arrays["1.num_batches_tracked"].numpy() == plain.arrays["1.num_batches_tracked"].numpy()
    for node in grid.get_node_ids():
        assert _load(grid.contexts[node]).model is not None


def test_sparse_rounds_learn_and_models_agree_bit_for_bit():
    grid = LocalGrid(client_app(SparseSyncMod(), epochs=2), 4)
    sync = SparseSync(flower.FedAvg(fraction_evaluate=0.0), density=0.05, down_density=0.2, anchor_every=6)
    result = run(sync, grid, rounds=10)
    assert accuracy(result.arrays) > 0.7
    held = {_load(grid.contexts[node]).model.digest for node in grid.get_node_ids()}
    assert held == {sync.down.view.digest}
    dense = sum(len(a.data) for a in initial().values()) * 2 * 4 * 10
    assert sync.ledger.total(direction="up", kind="update") < 0.04 * dense


def test_the_ledger_counts_what_flower_serialises():
    grid = LocalGrid(client_app(SparseSyncMod()), 4, faults=(Drop(0.2, seed=3, directions=("up",)),))
    sync = SparseSync(flower.FedAvg(), density=0.02)
    run(sync, grid, rounds=4)
    for direction in ("down", "up"):
        real = sum(s.nbytes for s in grid.log if s.direction == direction and (s.arrived or direction == "down"))
        assert sync.ledger.total(direction=direction) == real
    kinds = sync.ledger.by("direction", "kind")
    assert set(kinds) == {("down", "anchor"), ("down", "delta"), ("down", "header"), ("up", "update"), ("up", "header")}
    for node in grid.get_node_ids():
        assert sync.ledger.total(node=node, direction="down") == sum(
            s.nbytes for s in grid.log if s.node == node and s.direction == "down"
        )


# --- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "feedback", "values"),
    [("energy", "residual", "int8"), ("sensitivity", "ef21", "bfloat16"), ("even", "none", "float8")],
)
def test_layers_feedbacks_and_values_all_run(layers, feedback, values):
    sync = SparseSync(
        flower.FedAvg(fraction_evaluate=0.0), density=0.05, layers=layers, feedback=feedback, values=values
    )
    run(sync, LocalGrid(client_app(SparseSyncMod()), 2), rounds=2)
    assert set(sync.up.accepted.values()) == {2}


def test_slow_clients_send_less_and_clients_know_their_own_limits():
    sync = SparseSync(
        flower.FedAvg(fraction_evaluate=0.0), density=0.2, bandwidths=Bandwidths({2: 60.0}, seconds=5.0), anchor_every=0
    )
    run(sync, LocalGrid(client_app(SparseSyncMod()), 3), rounds=2)
    sizes = sync.ledger.by("node", direction="up", kind="update", round=2)
    assert sizes[(2,)] < 420 < 900 < sizes[(3,)]
    sync = SparseSync(flower.FedAvg(fraction_evaluate=0.0), density=0.2)
    run(sync, LocalGrid(client_app(SparseSyncMod(bytes_max=300)), 3), rounds=2)
    assert max(sync.ledger.by("node", direction="up", kind="update", round=2).values()) < 330


def test_a_schedule_follows_the_loss_and_a_budget_is_kept():
    sync = SparseSync(flower.FedAvg(fraction_evaluate=0.0), density=Adaptive(0.01, patience=1, improvement=0.9))
    run(sync, LocalGrid(client_app(SparseSyncMod()), 2), rounds=4)
    sizes = [sync.ledger.total(direction="up", kind="update", round=r) for r in (1, 2, 3, 4)]
    assert sizes[0] < sizes[2] < sizes[3]
    for budget in (60_000,):
        options = {"budget_bytes": budget, "budget_rounds": 8, "anchor_every": 0}
        sync = SparseSync(flower.FedAvg(fraction_evaluate=0.0), density=0.5, down_density=0.05, **options)
        run(sync, LocalGrid(client_app(SparseSyncMod()), 3), rounds=8)
        assert 0.7 * budget < sync.ledger.total() <= 1.02 * budget


@pytest.mark.parametrize("told", [None, 0.05])
def test_what_goes_down_follows_the_schedule_unless_it_is_told(told):
    inner = flower.FedAvg(fraction_evaluate=0.0)
    sync = SparseSync(inner, density=Warmup(0.1, 0.01, 2), down_density=told, anchor_every=0)
    run(sync, LocalGrid(client_app(SparseSyncMod()), 2), rounds=4)
    sizes = [sync.ledger.total(direction="down", kind="delta", round=r) for r in (2, 3, 4)]
    # the version of round 2 is published with the density of round 2
    if told is None:
        assert sizes[0] > 1.6 * sizes[1]
        assert sizes[1] == pytest.approx(sizes[2], rel=0.2)
    else:
        assert sizes == pytest.approx([sizes[0]] * 3, rel=0.2)


def test_a_strategy_that_answers_in_wider_numbers_costs_no_more():
    """Flower's FedAdam returns float64, and what clients train stays float32."""
    totals = []
    for inner in (flower.FedAvg(fraction_evaluate=0.0), flower.FedAdam(fraction_evaluate=0.0, eta=0.01)):
        sync = SparseSync(inner, density=0.01)
        result = run(sync, LocalGrid(client_app(SparseSyncMod()), 2), rounds=4)
        totals.append(sync.ledger.total(direction="up", kind="update"))
        assert accuracy(result.arrays) > 0
    assert totals[1] < 1.3 * totals[0]


def test_hops_learn_and_are_counted():
    hops = (Hop(3, 0.1), Hop(2, Coverage(0.9, maximum=0.5)))
    sync = SparseSync(flower.FedAvg(fraction_evaluate=0.0), density=0.05, down_density=0.2, hops=hops)
    result = run(sync, LocalGrid(client_app(SparseSyncMod(), epochs=2), 6), rounds=6)
    assert accuracy(result.arrays) > 0.4
    assert len(sync.hierarchy.residuals) == 3
    up = sync.ledger.by("hop", direction="up", kind="update")
    assert set(up) == {("client",), ("edge0",), ("edge1",)}
    assert sync.ledger.by("hop", direction="down", kind="delta")[("edge1",)] > 0


def test_hops_that_send_everything_are_as_none():
    plain = SparseSync(flower.FedAvg(fraction_evaluate=0.0), density=0.1)
    hops = SparseSync(flower.FedAvg(fraction_evaluate=0.0), density=0.1, hops=(Hop(2, 1.0, "float32"),))
    a = run(plain, LocalGrid(client_app(SparseSyncMod()), 4), rounds=1)
    b = run(hops, LocalGrid(client_app(SparseSyncMod()), 4), rounds=1)
    torch.testing.assert_close(flat(a.arrays), flat(b.arrays), rtol=0, atol=1e-6)


def test_a_saved_strategy_goes_on(tmp_path):
    make = lambda: SparseSync(flower.FedAvg(fraction_evaluate=0.0), density=Adaptive(0.05), hops=(Hop(2, 0.2),))  # noqa: E731
    whole, grid = make(), LocalGrid(client_app(SparseSyncMod()), 3)
    first = run(whole, grid, rounds=2)
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    again = make()
    again.load_state_dict(torch.load(tmp_path / "state.pt"))
    run(again, grid, rounds=2, arrays=first.arrays)
    assert set(again.up.accepted.values()) == {4}
    assert again.hierarchy.residuals.keys() == whole.hierarchy.residuals.keys()


# --- beside other parts of Flower ----------------------------------------------------------------------------------


def test_server_side_privacy_works_inside():
    inner = flower.DifferentialPrivacyServerSideFixedClipping(
        flower.FedAvg(fraction_evaluate=0.0), noise_multiplier=0.0, clipping_norm=0.5, num_sampled_clients=3
    )
    plain = run(inner, LocalGrid(client_app(), 3), rounds=2)
    inner = flower.DifferentialPrivacyServerSideFixedClipping(
        flower.FedAvg(fraction_evaluate=0.0), noise_multiplier=0.0, clipping_norm=0.5, num_sampled_clients=3
    )
    ours = run(SparseSync(inner, **EXACT), LocalGrid(client_app(SparseSyncMod()), 3), rounds=2)
    assert same(plain.arrays, ours.arrays)
    sync = SparseSync(inner, density=0.05)
    run(sync, LocalGrid(client_app(SparseSyncMod()), 3), rounds=2)
    assert set(sync.up.accepted.values()) == {2}


def test_privacy_outside_is_refused_by_name():
    outside = flower.DifferentialPrivacyServerSideFixedClipping(
        SparseSync(flower.FedAvg(fraction_evaluate=0.0)), 0.0, 0.5, num_sampled_clients=3
    )
    with pytest.raises(TypeError, match=r"thinwire\.frames"):
        run(outside, LocalGrid(client_app(SparseSyncMod()), 3), rounds=1)


def test_client_side_privacy_works_without_what_would_exceed_its_bound():
    def inner():
        return flower.DifferentialPrivacyClientSideFixedClipping(
            flower.FedAvg(fraction_evaluate=0.0), noise_multiplier=0.0, clipping_norm=0.3, num_sampled_clients=3
        )

    with pytest.raises(MisuseError, match="exceed the bound"):
        SparseSync(inner())
    sync = SparseSync(inner(), density=0.1, feedback="none", values="float32")
    run(sync, LocalGrid(client_app(SparseSyncMod(), fixedclipping_mod), 3), rounds=2)
    assert set(sync.up.accepted.values()) == {2}


@pytest.mark.parametrize("order", [0, 1])
def test_secure_aggregation_is_refused_with_the_reason(order):
    seen = []

    def watch(message, context, call_next):
        try:
            return call_next(message, context)
        except MisuseError as error:
            seen.append(str(error))
            raise

    mods = [SparseSyncMod(), secaggplus_mod] if order == 0 else [secaggplus_mod, SparseSyncMod()]
    grid = LocalGrid(client_app(watch, *mods), 2)
    if order == 0:
        stage = {"stage": "setup"}
        content = RecordDict({"arrays": initial(), "secaggplus_configs": ConfigRecord(stage)})
        replies = grid.send_and_receive([Message(content, 2, "train")])
        assert [reply.has_error() for reply in replies] == [True]
        assert "masks cancel only" in seen[0]
    else:  # the masks' mod does not know our server's messages, and says so
        content = RecordDict({"arrays": initial(), "c": ConfigRecord({"stage": "setup"})})
        assert [r.has_error() for r in grid.send_and_receive([Message(content, 2, "train")])] == [True]


def test_a_client_with_the_mod_also_serves_a_plain_server():
    plain = run(flower.FedAvg(), LocalGrid(client_app(), 3), rounds=2)
    assert same(plain.arrays, run(flower.FedAvg(), LocalGrid(client_app(SparseSyncMod()), 3), rounds=2).arrays)


def test_misuse_is_said():
    with pytest.raises(MisuseError, match="wraps one strategy"):
        SparseSync(SparseSync(flower.FedAvg()))
    for wrong in ({"density": 0.0}, {"values": "x"}, {"feedback": "x"}, {"budget_bytes": 5}, {"anchor_every": -1}):
        with pytest.raises(MisuseError):
            SparseSync(flower.FedAvg(), **wrong)
    for wrong in ({"density_max": 0.0}, {"bytes_max": 0}):
        with pytest.raises(MisuseError):
            SparseSyncMod(**wrong)
    counters = ArrayRecord([np.zeros(3, np.int64)])
    with pytest.raises(MisuseError, match="no floating-point"):
        run(SparseSync(flower.FedAvg()), LocalGrid(client_app(SparseSyncMod()), 2), arrays=counters)


# --- the grid ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_worker_processes_give_the_same_bits():
    options = {"density": 0.1}
    alone = LocalGrid("tests.federated.apps:sparse_app", 3)
    a = run(SparseSync(flower.FedAvg(fraction_evaluate=0.0), **options), alone, rounds=2)
    several = LocalGrid("tests.federated.apps:sparse_app", 3, workers=2)
    try:
        b = run(SparseSync(flower.FedAvg(fraction_evaluate=0.0), **options), several, rounds=2)
    finally:
        several.close()
    assert same(a.arrays, b.arrays)
    with pytest.raises(MisuseError, match="module:name"):
        LocalGrid(ClientApp(), 2, workers=2)
    with pytest.raises(MisuseError, match="ids"):
        LocalGrid(ClientApp(), [1, 5])


def test_replies_later_than_the_timeout_are_lost_on_a_virtual_clock():
    grid = LocalGrid(client_app(SparseSyncMod()), 3, seconds=lambda node, nbytes: 10.0 * node)
    sync = SparseSync(flower.FedAvg(fraction_evaluate=0.0), density=0.1)
    run(sync, grid, rounds=2, timeout=70.0)
    assert sync.up.accepted == {2: 2, 3: 2}
    assert grid.clock == 120.0  # two rounds of node 3's 60 s; node 4's 80 s came too late


def test_message_bytes_are_those_of_the_wire():
    from flwr.common.serde import message_to_proto

    LocalGrid(ClientApp(), 1)
    message = Message(RecordDict({"a": initial()}), 2, "train")
    assert message_bytes(message) == len(message_to_proto(message).SerializeToString())
