"""The contract of a signal, as tests that run on any implementation.

Subclass :class:`SignalContract`, give it a fixture ``signal``, and let pytest collect it::

    class TestMySignal(SignalContract):
        @pytest.fixture
        def signal(self):
            return MySignal()
"""

from __future__ import annotations

import copy
import io
from dataclasses import fields, replace
from math import inf, isfinite, nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thinwire.aggregate.base import Observation, Reading, Signal, State
from thinwire.testing.laws import quick, same

__all__ = ["SignalContract", "observations", "usual"]

NAMES = tuple(field.name for field in fields(Observation))

_numbers = st.floats(-10, 10) | st.sampled_from([0.0, nan, inf, -inf, 1e300, -1e300, 5e-324])


def observations() -> st.SearchStrategy[Observation]:
    """Of anything: missing, not finite, huge, of an impossible sign."""
    return st.builds(Observation, **{name: st.none() | _numbers for name in NAMES})


def usual(step: int, seed: int = 0) -> Observation:
    """What a healthy worker sees in ``step``: all fields, noisy, the loss and the norms falling."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    noise = torch.randn(6, generator=generator, dtype=torch.float64).tolist()
    level = 2.0 + 3.0 * 0.99**step
    norm2 = level * (1.0 + 0.1 * noise[0] ** 2)
    return Observation(
        loss=level * (1 + 0.02 * noise[1]),
        tokens=512.0,
        norm2=norm2,
        dot_previous=0.3 * norm2 * (1 + 0.1 * noise[2]),
        previous_norm2=norm2,
        dot_reference=0.5 * norm2 * (1 + 0.1 * noise[3]),
        reference_norm2=norm2,
        improvement=0.01 * level * (1 + 0.3 * noise[4]),
        agreement=0.6 + 0.05 * noise[5],
    )


def _after(signal: Signal, seen: list[Observation]) -> State:
    state = signal.init()
    for observation in seen:
        state = signal.update(state, observation)
    return state


class SignalContract:
    """What a weighting and the exchange rely on. Fixture: ``signal``."""

    @pytest.fixture
    def signal(self) -> Signal:
        raise NotImplementedError("give the subclass a fixture 'signal'")

    def test_it_says_what_it_is(self, signal: Signal) -> None:
        assert signal.name
        assert signal.needs
        assert signal.needs <= set(NAMES)
        assert signal.better in ("low", "high")
        assert repr(copy.deepcopy(signal)) == repr(signal)
        assert copy.deepcopy(signal) == signal
        assert " at 0x" not in repr(signal), "ranks compare reprs"

    def test_what_it_reads_is_finite_and_travels(self, signal: Signal) -> None:
        @quick
        @given(st.lists(observations(), max_size=30))
        def law(seen: list[Observation]) -> None:
            reading = signal.read(_after(signal, seen))
            assert all(map(isfinite, (reading.value, reading.error, reading.noise)))
            assert reading.error >= 0
            assert reading.noise >= 0
            assert not (reading.valid and reading.is_missing)
            assert Reading.unpack(Reading.pack([reading])) == (reading,)

        law()

    def test_update_is_pure(self, signal: Signal) -> None:
        @quick
        @given(st.lists(observations(), min_size=1, max_size=6))
        def law(seen: list[Observation]) -> None:
            state = _after(signal, [usual(step) for step in range(12)])
            for observation in seen:
                before = copy.deepcopy(state)
                after = signal.update(state, observation)
                assert same(_comparable(state), _comparable(before)), "update changed the state it was given"
                assert same(_comparable(after), _comparable(signal.update(state, observation)))
                state = after

        law()

    def test_a_saved_state_continues_alike(self, signal: Signal) -> None:
        state = _after(signal, [usual(step) for step in range(40)])
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        for step in range(40, 80):
            state, loaded = (signal.update(each, usual(step)) for each in (state, loaded))
            assert signal.read(state) == signal.read(loaded)

    def test_what_it_does_not_need_changes_nothing(self, signal: Signal) -> None:
        plain = replace(Observation(), **{name: getattr(usual(0), name) for name in sorted(signal.needs)})
        assert signal.needs, "there is something to leave out"
        first, second = signal.init(), signal.init()
        for step in range(30):
            seen = usual(step)
            plain = replace(Observation(), **{name: getattr(seen, name) for name in sorted(signal.needs)})
            first, second = signal.update(first, seen), signal.update(second, plain)
        assert signal.read(first) == signal.read(second)
        assert signal.read(first).count >= 29

    def test_without_what_it_needs_it_stays_as_it_was(self, signal: Signal) -> None:
        state = _after(signal, [usual(step) for step in range(30)])
        before = signal.read(state)
        for name in sorted(signal.needs):
            assert signal.read(signal.update(state, replace(usual(30), **{name: None}))) == before
        assert signal.read(signal.update(signal.init(), Observation())).is_missing

    @pytest.mark.parametrize("bad", [nan, inf, -inf])
    def test_what_is_not_finite_shows_until_it_is_over(self, signal: Signal, bad: float) -> None:
        state = _after(signal, [usual(step) for step in range(30)])
        for name in sorted(signal.needs):
            hit = signal.update(state, replace(usual(30), **{name: bad}))
            assert signal.read(hit).is_broken
            healed = signal.read(signal.update(hit, usual(31)))
            assert healed.valid
            assert healed.value == pytest.approx(signal.read(signal.update(state, usual(31))).value)

    def test_the_error_shrinks_while_evidence_grows(self, signal: Signal) -> None:
        errors = []
        for steps in (20, 150):
            readings = [signal.read(_after(signal, [usual(1000 + s, seed) for s in range(steps)])) for seed in range(5)]
            errors.append(sorted(reading.error for reading in readings)[2])
        assert 0 < errors[1] < errors[0]

    def test_values_scatter_as_their_errors_say(self, signal: Signal) -> None:
        """Over many workers that are alike, the spread of the averages is the standard error, give or take."""
        readings = [signal.read(_after(signal, [usual(1000 + s, seed) for s in range(150)])) for seed in range(40)]
        values = torch.tensor([reading.value for reading in readings], dtype=torch.float64)
        typical = sorted(reading.error for reading in readings)[20]
        assert 0.5 < float(values.std()) / typical < 1.6


def _comparable(state: State) -> State:
    """NaN marks what is not there yet, and is not equal to itself; its bits are."""
    return {key: repr(value) if isinstance(value, float) else value for key, value in state.items()}
