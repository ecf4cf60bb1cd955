"""The contract of an aggregator, as tests that run on any implementation.

Subclass :class:`AggregatorContract`, give it a fixture ``aggregator`` for seven workers, say what it claims beyond the
common laws, and let pytest collect it::

    class TestMyAggregator(AggregatorContract):
        @pytest.fixture
        def aggregator(self):
            return MyAggregator()

        @pytest.fixture
        def claims(self):
            return AggregatorClaims(survives=3, breaks_at=4)
"""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from thinwire.aggregate.base import (
    Aggregator,
    Coordinatewise,
    Linear,
    State,
    aggregate,
    finite_workers,
    gram_matrix,
    weighted_sum,
)
from thinwire.errors import MisuseError, RefuseError
from thinwire.testing.laws import quick, same

__all__ = ["AggregatorClaims", "AggregatorContract", "in_slices", "update_sets"]

WORKERS = 7


@dataclass(frozen=True)
class AggregatorClaims:
    """What an aggregator promises beyond the common laws.

    - ``survives``: so many of seven workers may send what they like, and the result stays as near to the good workers'
      mean as ``within`` times the farthest good one.
    - ``breaks_at``: so many can carry it anywhere; None where no number can within a few steps.
    - ``permutation``: the order of the workers does not matter.
    - ``scale``: all updates times a factor give the result times the factor.
    - ``translation``: all updates plus a vector give the result plus the vector.
    - ``identity``: equal updates come out as they are.
    """

    survives: int = 0
    breaks_at: int | None = 1
    within: float = 3.0
    permutation: bool = True
    scale: bool = True
    translation: bool = True
    identity: bool = True


@st.composite
def update_sets(draw: st.DrawFn, workers: int = WORKERS) -> Tensor:
    """Float32 ``[workers, n]``, finite: a common part and each worker's own, of any usual scale."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    numel = draw(st.integers(1, 40))
    common = torch.randn(numel, generator=generator)
    own = torch.randn(workers, numel, generator=generator) * draw(st.sampled_from([0.1, 1.0, 3.0]))
    return (common + own) * 10.0 ** draw(st.integers(-6, 6))


def in_slices(updates: Tensor, aggregator: Aggregator, state: State, parts: int) -> tuple[Tensor, State]:
    """What :func:`~thinwire.aggregate.base.aggregate` does, as ``parts`` ranks do it that hold a slice of all each."""
    slices = torch.tensor_split(updates, parts, dim=1)
    if isinstance(aggregator, Coordinatewise):
        kept = torch.stack([finite_workers(part) for part in slices]).all(0)
        return torch.cat([aggregator.combine(part[kept]) for part in slices]), state
    assert isinstance(aggregator, Linear)
    if aggregator.uses_previous:
        previous = state.get("previous", torch.zeros(updates.shape[1])).unsqueeze(0)
        slices = torch.tensor_split(torch.cat([updates, previous]), parts, dim=1)
    total = torch.stack([gram_matrix(part) for part in slices]).sum(0)
    coefficients, after = aggregator.coefficients(total, state)
    result = torch.cat([weighted_sum(part, coefficients) for part in slices])
    return result, {**after, "previous": result.clone()} if aggregator.uses_previous else after


class AggregatorContract:
    """What the exchange relies on. Fixtures: ``aggregator``, for seven workers; ``claims``."""

    @pytest.fixture
    def aggregator(self) -> Aggregator:
        raise NotImplementedError("give the subclass a fixture 'aggregator'")

    @pytest.fixture
    def claims(self) -> AggregatorClaims:
        return AggregatorClaims()

    # --- the call ----------------------------------------------------------------------------------------------------

    def test_the_result_is_one_finite_update(self, aggregator: Aggregator) -> None:
        @quick
        @given(update_sets())
        def law(updates: Tensor) -> None:
            result, _ = aggregate(updates, aggregator, aggregator.init(WORKERS))
            assert (result.dtype, result.shape) == (torch.float32, updates.shape[1:])
            assert bool(result.isfinite().all())

        law()

    def test_updates_are_float32_rows(self, aggregator: Aggregator) -> None:
        for wrong in (torch.zeros(WORKERS), torch.zeros(WORKERS, 3, dtype=torch.float64), torch.zeros(0, 3)):
            with pytest.raises(MisuseError):
                aggregate(wrong, aggregator, aggregator.init(WORKERS))

    @pytest.mark.parametrize("values", [0.0, 1e-40, 1e30, -3e38])
    def test_updates_at_the_edge(self, aggregator: Aggregator, values: float) -> None:
        updates = torch.full((WORKERS, 5), values)
        state = aggregator.init(WORKERS)
        for _ in range(3):
            result, state = aggregate(updates, aggregator, state)
            assert bool(result.isfinite().all())
            assert values or not result.any(), "out of nothing comes something"

    def test_it_is_pure(self, aggregator: Aggregator) -> None:
        @quick
        @given(st.lists(st.integers(0, 2**31), min_size=1, max_size=4))
        def law(seeds: list[int]) -> None:
            state = aggregator.init(WORKERS)
            for seed in seeds:
                updates = torch.randn(WORKERS, 9, generator=torch.Generator().manual_seed(seed))
                updates_before, state_before = updates.clone(), copy.deepcopy(state)
                first = aggregate(updates, aggregator, state)
                assert same(updates, updates_before), "it changed its updates"
                assert same(state, state_before), "it changed the state it was given"
                kept = copy.deepcopy(first)
                assert same(aggregate(updates, aggregator, state), kept)
                updates.fill_(-77.0)  # gradients are written anew into the same memory
                assert same(first, kept), "the result or the state is a view of the updates"
                first[0].fill_(-88.0)  # and the caller may do with his result what he likes
                assert same(first[1], kept[1]), "the state is a view of the result"
                state = kept[1]

        law()

    def test_a_saved_state_continues_alike(self, aggregator: Aggregator) -> None:
        state = aggregator.init(WORKERS)
        for step in range(12):
            updates = torch.randn(WORKERS, 9, generator=torch.Generator().manual_seed(step)) * (1 + step % 3)
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            resumed = torch.load(file, weights_only=True)
            assert same(aggregate(updates, aggregator, resumed), aggregate(updates, aggregator, state))
            _, state = aggregate(updates, aggregator, state)

    def test_equal_ones_have_equal_reprs(self, aggregator: Aggregator) -> None:
        assert repr(copy.deepcopy(aggregator)) == repr(aggregator)
        assert copy.deepcopy(aggregator) == aggregator
        assert " at 0x" not in repr(aggregator), "ranks compare reprs"

    # --- in slices, as ranks do it -----------------------------------------------------------------------------------

    def test_slices_give_what_the_whole_gives(self, aggregator: Aggregator) -> None:
        @quick
        @given(st.lists(update_sets(), min_size=1, max_size=1), st.integers(1, 9), st.booleans())
        def law(first: list[Tensor], parts: int, poisoned: bool) -> None:
            whole = sliced = aggregator.init(WORKERS)
            for step in range(3):
                updates = first[0] * (1 + step)
                if poisoned:
                    updates[2, 0] = torch.nan  # in one slice of that worker's only
                expected, whole = aggregate(updates, aggregator, whole)
                result, sliced = in_slices(updates, aggregator, sliced, parts)
                largest = float(updates[updates.isfinite()].abs().max())
                assert torch.allclose(result, expected, rtol=1e-4, atol=1e-5 * largest)

        law()

    # --- workers that are not finite ---------------------------------------------------------------------------------

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    def test_a_worker_that_is_not_finite_has_no_part(self, aggregator: Aggregator, bad: float) -> None:
        @quick
        @given(update_sets(), st.integers(0, WORKERS - 1))
        def law(updates: Tensor, worker: int) -> None:
            state = aggregator.init(WORKERS)
            updates[worker, -1] = bad
            result, after = aggregate(updates, aggregator, state)
            assert bool(result.isfinite().all())
            updates[worker] = bad
            assert same(aggregate(updates, aggregator, state), (result, after)), "what else it sent came through"
            healed, _ = aggregate(updates.nan_to_num(0, 0, 0), aggregator, after)
            assert bool(healed.isfinite().all())

        law()

    def test_without_any_finite_worker_the_step_is_refused(self, aggregator: Aggregator) -> None:
        state = aggregator.init(WORKERS)
        before = copy.deepcopy(state)
        with pytest.raises(RefuseError, match="skip"):
            aggregate(torch.full((WORKERS, 4), torch.nan), aggregator, state)
        assert same(state, before)

    def test_one_finite_worker_is_enough(self, aggregator: Aggregator) -> None:
        updates = torch.full((WORKERS, 4), torch.nan)
        updates[3] = torch.arange(4.0)
        result, _ = aggregate(updates, aggregator, aggregator.init(WORKERS))
        assert bool(result.isfinite().all())

    # --- promises ----------------------------------------------------------------------------------------------------

    def test_equal_updates_come_out_as_they_are(self, aggregator: Aggregator, claims: AggregatorClaims) -> None:
        if not claims.identity:
            pytest.skip("not claimed")

        @quick
        @given(update_sets(workers=1))
        def law(update: Tensor) -> None:
            result, _ = aggregate(update.expand(WORKERS, -1).contiguous(), aggregator, aggregator.init(WORKERS))
            assert torch.allclose(result, update[0], rtol=1e-5, atol=0)

        law()

    def test_the_order_of_the_workers_does_not_matter(self, aggregator: Aggregator, claims: AggregatorClaims) -> None:
        if not claims.permutation:
            pytest.skip("not claimed")

        @quick
        @given(update_sets(), st.permutations(range(WORKERS)))
        def law(updates: Tensor, order: list[int]) -> None:
            self._close(aggregator, updates[order], updates, lambda result: result)

        law()

    @pytest.mark.parametrize("factor", [-1.0, 2.0**-20, 3.0, 2.0**30])
    def test_it_has_no_scale(self, aggregator: Aggregator, claims: AggregatorClaims, factor: float) -> None:
        if not claims.scale:
            pytest.skip("not claimed")

        @quick
        @given(update_sets())
        def law(updates: Tensor) -> None:
            self._close(aggregator, updates * factor, updates, lambda result: result * factor)

        law()

    def test_it_has_no_origin(self, aggregator: Aggregator, claims: AggregatorClaims) -> None:
        if not claims.translation:
            pytest.skip("not claimed")

        @quick
        @given(update_sets(), st.floats(-3, 3, width=32))
        def law(updates: Tensor, shift: float) -> None:
            moved = shift * updates.abs().max()
            self._close(aggregator, updates + moved, updates, lambda result: result + moved)

        law()

    def _close(self, aggregator: Aggregator, changed: Tensor, updates: Tensor, expected: object) -> None:
        assert callable(expected)
        state = aggregator.init(WORKERS)
        wanted = expected(aggregate(updates, aggregator, state)[0])
        result = aggregate(changed, aggregator, state)[0]
        assert torch.allclose(result, wanted, rtol=1e-3, atol=1e-4 * float(changed.abs().max()))

    @pytest.mark.parametrize("attack", ["far away together", "far away apart", "the others' opposite", "a bit off"])
    def test_it_survives_as_many_as_it_claims(
        self, aggregator: Aggregator, claims: AggregatorClaims, attack: str
    ) -> None:
        @quick
        @given(st.integers(0, 2**31), st.permutations(range(WORKERS)))
        def law(seed: int, order: list[int]) -> None:
            good, result = _attacked(aggregator, claims.survives, attack, seed, order)
            assert _distance(good, result) <= claims.within

        if not claims.survives:
            pytest.skip("nothing is claimed")
        law()

    def test_it_breaks_where_it_says(self, aggregator: Aggregator, claims: AggregatorClaims) -> None:
        """A test of the attacks: what survives them does not do so because they are weak."""
        order = list(range(WORKERS))
        attacks = ("far away together", "the others' opposite")
        faulty = claims.breaks_at or WORKERS - 1
        worst = max(_distance(*_attacked(aggregator, faulty, attack, 5, order)) for attack in attacks)
        assert (worst > 1e3) == (claims.breaks_at is not None)


def _distance(good: Tensor, result: Tensor) -> float:
    """Of the result from the good workers' mean, in distances of the farthest good one."""
    centre = good.mean(0)
    apart = (good - centre).norm(dim=1).max() if len(good) > 1 else torch.tensor(1.0)
    return float((result - centre).norm() / apart)


def _attacked(aggregator: Aggregator, faulty: int, attack: str, seed: int, order: list[int]) -> tuple[Tensor, Tensor]:
    """The good updates, and what comes of them and of ``faulty`` others after some steps."""
    generator = torch.Generator().manual_seed(seed)
    state = aggregator.init(WORKERS)
    good = result = torch.zeros(WORKERS, 20)
    direction = torch.randn(faulty, 20, generator=generator)
    for _ in range(8):
        good = 1.0 + torch.randn(WORKERS - faulty, 20, generator=generator)
        bad = {
            "far away together": direction[:1].expand(faulty, -1) * 1e6,
            "far away apart": direction * 1e6,
            "the others' opposite": -1e6 * good.mean(0, keepdim=True).expand(faulty, -1),
            "a bit off": good.mean(0) + 3 * direction,
        }[attack]
        result, state = aggregate(torch.cat([good, bad])[order], aggregator, state)
    return good, result
