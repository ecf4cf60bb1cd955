"""The protocol's laws: no mass is lost, models agree bit for bit, nobody is believed twice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.federated.strategies import moved
from thinwire.errors import MalformedError, MisuseError, RebaseError, RefuseError, UntrustedError, WrongBaseError
from thinwire.federated import frame as frames
from thinwire.federated.client import ClientState, Orders, carried_over, follow, send, settle
from thinwire.federated.model import ModelLayout, ModelState
from thinwire.federated.selection import entries, select
from thinwire.federated.server import DownLink, UpLink, load_state_dict, state_dict


def start(seed: int = 0, **extra: torch.Tensor) -> ModelState:
    generator = torch.Generator().manual_seed(seed)
    tensors = {"a": torch.randn(30, generator=generator), "b": torch.randn((4, 5), generator=generator)}
    return ModelState.of({**tensors, **extra})


def trained(model: ModelState, seed: int) -> ModelState:
    return moved(model, seed, 0.1)


class Federation:
    """A server and clients without any framework: messages are bytes, and may be lost."""

    def __init__(self, clients: int, orders: Orders, **down) -> None:
        self.down, self.up, self.orders = DownLink(**down), UpLink(), orders
        self.clients = {node: ClientState() for node in range(clients)}
        self.sent = {node: torch.zeros(0) for node in range(clients)}
        self.mass = dict(self.sent)
        self.model = start()

    def told(self, node: int) -> Orders:
        return Orders(
            self.orders.density, self.orders.values, self.orders.feedback, self.orders.layers,
            self.up.accepted.get(node, 0),
        )  # fmt: skip

    def round(self, number: int, downs: dict[int, bool], ups: dict[int, bool], used: bool = True) -> None:
        self.down.publish(self.model)
        received = {}
        for node, arrives in downs.items():
            delivery, orders = self.down.deliver(node), self.told(node)
            if not arrives:
                continue
            try:
                state = follow(settle(self.clients[node], orders), delivery.data, delivery.digest)
            except RebaseError:
                self.down.lost(node)
                continue
            assert state.model.digest == self.down.view.digest == delivery.digest
            new = trained(state.model, 1000 * number + node)
            self.add(self.mass, node, new.minus(state.model))
            data, self.clients[node] = send(state, new, orders)
            if not ups[node]:
                continue
            received[node] = self.up.receive(
                node, data, view=self.down.view, model=self.model, feedback=self.orders.feedback
            )
            self.down.holds(node, delivery.version)
        model = self.model
        for node, moved_to in received.items():
            if used:
                self.add(self.sent, node, moved_to.minus(model))
                self.up.accept(node)
            else:
                self.up.drop(node)
        if used and received:
            mean = sum(m.minus(model) for m in received.values()) / len(received)
            self.model = model.plus(torch.arange(mean.numel(), dtype=torch.int32), mean)

    @staticmethod
    def add(sums, node, update):
        sums[node] = update if not sums[node].numel() else sums[node] + update


patterns = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7), st.booleans()), min_size=2, max_size=9)


@settings(deadline=None, max_examples=15)
@given(patterns, st.sampled_from(["float32", "float16", "int8"]), st.sampled_from([0, 3]), st.sampled_from([0.05, 0.3]))
def test_no_mass_is_lost_whoever_vanishes(pattern, values, anchor_every, density):
    orders = Orders(density, values, "residual")
    fed = Federation(3, orders, density=0.2, values=values, anchor_every=anchor_every)
    for number, (downs, ups, used) in enumerate(pattern):
        bits = {n: bool(downs >> n & 1) for n in range(3)}
        fed.round(number, bits, {n: bool(ups >> n & 1) for n in range(3)}, used)
    for node, state in fed.clients.items():
        if not fed.mass[node].numel():
            continue
        carry = settle(state, fed.told(node)).carry
        applied = fed.sent[node] if fed.sent[node].numel() else torch.zeros_like(fed.mass[node])
        torch.testing.assert_close(applied + carry, fed.mass[node], rtol=0, atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(patterns, st.sampled_from([0.05, 0.5]), st.sampled_from([0, 2, 5]), st.integers(0, 4))
def test_models_agree_bit_for_bit_and_the_view_keeps_the_rest(pattern, density, anchor_every, history):
    """The asserts inside the round are the law; here, that the view with all that waits is the model."""
    fed = Federation(3, Orders(0.3), density=density, anchor_every=anchor_every, history_max=history)
    for number, (downs, ups, used) in enumerate(pattern):
        fed.round(number, {n: bool(downs >> n & 1) for n in range(3)}, {n: bool(ups >> n & 1) for n in range(3)}, used)
        if anchor_every and fed.down.since_anchor == 0:
            assert fed.down.view.digest == fed.down.model.digest
    waits = fed.down.model.minus(fed.down.view)
    everywhere = torch.arange(waits.numel(), dtype=torch.int32)
    torch.testing.assert_close(
        fed.down.view.plus(everywhere, waits).minus(fed.down.model), torch.zeros_like(waits), rtol=0, atol=1e-6
    )


@settings(deadline=None, max_examples=15)
@given(patterns)
def test_ef21_memories_agree_on_both_sides_whatever_is_lost(pattern):
    fed = Federation(2, Orders(0.2, "float16", "ef21"), density=1.0, values="float32", anchor_every=0)
    for number, (downs, ups, used) in enumerate(pattern):
        fed.round(number, {n: bool(downs >> n & 1) for n in range(2)}, {n: bool(ups >> n & 1) for n in range(2)}, used)
    for node, state in fed.clients.items():
        if state.model is None:
            continue
        mine = settle(state, fed.told(node)).carry
        its = fed.up.memory(node, state.model.layout)
        assert torch.equal(its, torch.zeros_like(its) if mine is None else mine)


def test_without_feedback_what_is_not_sent_is_gone():
    model = start()
    _, state = send(ClientState(model=model), trained(model, 1), Orders(0.1, feedback="none"))
    assert state.carry is None
    assert not state.pending


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_everything_at_float32_is_bit_exact(dtype):
    model = ModelState.of({"w": torch.randn(50).to(dtype), "n": torch.tensor(3), "flag": torch.tensor([True])})
    new = moved(model, 3)
    for feedback in ("none", "residual"):
        data, state = send(ClientState(model=model), new, Orders(1.0, "float32", feedback))
        assert UpLink().receive(1, data, view=model, model=model).digest == new.digest
        assert state.carry is None


def test_an_exact_update_in_other_types_arrives_and_shifts_a_lagging_view():
    view = ModelState.of({"w": torch.zeros(3), "n": torch.tensor(2.5).double()})
    model = ModelState.of({"w": torch.tensor([0.0, 0.0, 5.0]), "n": torch.tensor(2.5).double()})
    new = ModelState.of({"w": torch.tensor([1.0, 0.25, 1.0]), "n": torch.tensor(3)})
    data, _ = send(ClientState(model=view), new, Orders(1.0, "float32", "none"))
    got = UpLink().receive(1, data, view=view, model=model)
    assert got.tensors[0].tolist() == [1.0, 0.25, 6.0]  # what waits for the view is not lost
    assert got.tensors[1].dtype == torch.int64


# --- refusals ---------------------------------------------------------------------------------------------------------


def exchange() -> tuple[ModelState, bytes, UpLink]:
    model = start()
    data, _ = send(ClientState(model=model), trained(model, 5), Orders(0.2))
    return model, data, UpLink()


def test_a_replayed_update_is_refused():
    model, data, up = exchange()
    up.receive(4, data, view=model, model=model)
    up.accept(4)
    with pytest.raises(UntrustedError, match="again"):
        up.receive(4, data, view=model, model=model)
    up.receive(5, data, view=model, model=model)  # another client's numbers are its own


def test_a_stale_update_is_refused():
    model, data, up = exchange()
    with pytest.raises(WrongBaseError, match="stale"):
        up.receive(4, data, view=trained(model, 1), model=model)
    assert up.accepted == {}


def test_a_damaged_update_is_refused_and_its_client_keeps_it():
    model, data, up = exchange()
    spoilt = bytearray(data)
    spoilt[len(data) // 2] ^= 1
    with pytest.raises(MalformedError):
        up.receive(4, bytes(spoilt), view=model, model=model)
    new = trained(model, 5)
    _, state = send(ClientState(model=model), new, Orders(0.2))
    assert torch.equal(settle(state, Orders(accepted=0)).carry, new.minus(model))


def test_wrong_shapes_are_refused_on_both_sides():
    model, _, up = exchange()
    other = ModelState.of({"a": torch.zeros(31)})
    with pytest.raises(WrongBaseError, match="names, order and shapes"):
        send(ClientState(model=model), other, Orders())
    data, _ = send(ClientState(model=other), moved(other, 1), Orders(0.5))
    with pytest.raises((RefuseError, RebaseError)):
        up.receive(1, data, view=model, model=model)
    forged = frames.encode_sparse(
        torch.tensor([0], dtype=torch.int32), torch.ones(1), 31, base=model.digest, sequence=1
    )
    with pytest.raises(MalformedError):
        up.receive(1, forged, view=model, model=model)
    anchor = frames.encode_anchor(other, 1, base=model.digest)
    with pytest.raises(RebaseError):
        up.receive(1, anchor, view=model, model=model)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("orders", [Orders(0.5), Orders(1.0, "float32", "none")])
def test_nan_is_not_sent_and_changes_nothing(bad, orders):
    model = start()
    tensors = model.state_dict()
    tensors["a"][3] = bad
    state = ClientState(model=model, carry=torch.ones(50), sequence=3)
    with pytest.raises(MisuseError, match="NaN"):
        send(state, ModelState.of(tensors), orders)
    data = frames.encode_anchor(ModelState.of(tensors), 9, base=model.digest)
    with pytest.raises(MalformedError, match="finite"):
        UpLink().receive(1, data, view=model, model=model)
    with pytest.raises(MisuseError, match="NaN"):
        DownLink().publish(ModelState.of(tensors))


def test_a_client_without_the_base_asks_for_an_anchor_and_one_ahead_skips():
    down = DownLink(density=0.2, anchor_every=0)
    models = [start()]
    for seed in range(4):
        models.append(trained(models[-1], seed))
    down.publish(models[0])
    ahead = behind = follow(ClientState(), *_of(down.deliver(1)))
    down.holds(1, down.version)
    for model in models[1:]:
        down.publish(model)
        fresh = down.deliver(1)
        with pytest.raises(WrongBaseError, match="anchor"):
            follow(ClientState(), *_of(fresh))
        ahead = follow(ahead, *_of(fresh))  # the server believes it to be at the first version throughout
        assert ahead.model.digest == down.view.digest
    assert follow(behind, *_of(down.deliver(1))).model.digest == down.view.digest
    down.lost(1)
    assert down.deliver(1).kind == "anchor"
    assert follow(ClientState(), *_of(down.deliver(1))).model.digest == down.view.digest


def _of(delivery):
    return delivery.data, delivery.digest


def test_the_cheapest_way_is_taken():
    moving = torch.arange(0, 20_000, 100)
    model = ModelState.of({"w": torch.randn(20_000, generator=torch.Generator().manual_seed(0))})
    down = DownLink(density=0.01, anchor_every=0)
    down.publish(model)
    down.holds(1, 1)
    for seed in range(10):
        tensor = model.state_dict()["w"]
        tensor[moving] += torch.randn(moving.numel(), generator=torch.Generator().manual_seed(seed))
        model = ModelState.of({"w": tensor})
        down.publish(model)
        chain = sum(len(delta.data) for delta in down.deltas)
        sent = len(down.deliver(1).data)
        assert sent <= chain + 3 * len(down.deltas)
        if seed == 0:
            assert sent < 800
    assert sent < chain / 3  # the bits of 200 weights once, rather than their changes ten times
    assert follow(ClientState(), *_of(down.deliver(2))).model.digest == down.view.digest
    assert sent < len(down.deliver(2).data) == 20_000 * 4 + len(model.layout.encode()) + frames.FRAME_OVERHEAD + 4


def test_a_publisher_that_publishes_the_same_again_makes_no_version():
    down = DownLink()
    assert down.publish(start())
    assert not down.publish(start())
    assert down.version == 1
    with pytest.raises(MisuseError):
        DownLink().deliver(1)
    for wrong in ({"density": 0.0}, {"values": "x"}, {"anchor_every": -1}, {"history_max": -1}):
        with pytest.raises(MisuseError):
            DownLink(**wrong)


def test_a_change_of_data_types_goes_on_without_an_anchor():
    """FedAvg turns integer counters into float64 in the first round."""
    down = DownLink(density=0.1, anchor_every=0)
    first = start(n=torch.tensor(3))
    down.publish(first)
    down.holds(1, 1)
    state = follow(ClientState(carry=None), *_of(down.deliver(2)))
    _, state = send(state, trained(first, 1), Orders(0.1))
    second = ModelState.of({**trained(first, 2).state_dict(), "n": torch.tensor(3.5).double()})
    down.publish(second)
    assert down.deliver(1).kind == "delta"
    held = settle(state, Orders())
    after = follow(held, *_of(down.deliver(1)))
    assert after.model.digest == down.view.digest
    assert after.carry.numel() == held.carry.numel() + 1
    assert torch.equal(after.carry[:50], held.carry)


def test_residuals_move_by_name():
    old = ModelLayout((("a", "F32", (2,)), ("n", "I64", ()), ("b", "F32", (3,))))
    new = ModelLayout((("b", "F32", (3,)), ("n", "F64", ()), ("a", "F32", (4,))))
    assert carried_over(torch.arange(5.0), old, new).tolist() == [2, 3, 4, 0, 0, 0, 0, 0]


def test_a_server_goes_on_from_its_saved_state(tmp_path):
    fed = Federation(2, Orders(0.2, "float16", "ef21"), density=0.2, anchor_every=4)
    everyone = dict.fromkeys(range(2), True)
    for number in range(3):
        fed.round(number, everyone, everyone)
    torch.save(dict(state_dict(fed.down, fed.up)), tmp_path / "server.pt")
    saved = torch.load(tmp_path / "server.pt")
    fed.down, fed.up = DownLink(density=0.2, anchor_every=4), UpLink()
    load_state_dict(fed.down, fed.up, saved)
    for number in range(3, 7):
        fed.round(number, everyone, everyone)
    assert fed.up.accepted == {0: 7, 1: 7}


# --- selection --------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.floats(0.01, 1), st.sampled_from(["global", "energy", "sensitivity", "even"]))
def test_selections_are_increasing_of_the_right_number_and_never_zero(seed, density, layers):
    model = start(seed, scalar=torch.tensor(2.0), none=torch.empty(0))
    update = trained(model, seed).minus(model)
    update[::7] = 0
    positions = select(update, density, model, layers=layers)
    assert positions.dtype == torch.int32
    assert bool((positions[1:] > positions[:-1]).all())
    assert positions.numel() <= entries(density, update.numel())
    assert bool((update[positions.long()] != 0).all())
    assert select(torch.zeros(51), density, model, layers=layers).numel() == 0


def test_layers_share_by_energy():
    model = ModelState.of({"a": torch.ones(10), "b": torch.ones(10)})
    update = torch.cat([torch.full((10,), 3.0), torch.full((10,), 1.0)])
    counts = [int((select(update, 0.5, model, layers=how) < 10).sum()) for how in ("global", "energy", "even")]
    assert counts == [10, 9, 5]
    with pytest.raises(MisuseError):
        select(update, 0.5, model, layers="?")
