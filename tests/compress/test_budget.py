"""Shares of a budget: exact sums, bounds kept, fair in scores, and the same for any order of the parameters."""

from __future__ import annotations

from fractions import Fraction
from math import ceil, floor, inf, nan
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from thinwire.compress.base import Layout
from thinwire.compress.budget import allocate, gradient_norm_share, sensitivity
from thinwire.errors import MisuseError

Claim = tuple[float, int]

any_score = st.floats(0, 100) | st.floats(0, 1e300) | st.integers(0, 5).map(float) | st.sampled_from([5e-324, 1e308])
claims_of = st.lists(st.tuples(any_score, st.integers(0, 60) | st.integers(0, 10**7)), max_size=12)
bounds = st.fixed_dictionaries(
    {
        "minimum": st.integers(0, 4),
        "maximum_density": st.sampled_from([1.0, 0.5, 0.1, 1e-6]),
        "whole_below": st.sampled_from([0, 0, 10, 1000]),
    }
)


def limits(numel: int, minimum: int, maximum_density: float, whole_below: int) -> tuple[int, int]:
    if numel < whole_below:
        return numel, numel
    low = min(minimum, numel)
    return low, max(low, floor(maximum_density * numel))


def shared(total: int, claims: list[Claim], **bound: Any) -> tuple[int, ...]:
    return allocate(total, [score for score, _ in claims], [numel for _, numel in claims], **bound)


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, list[Claim], dict[str, Any]]:
    claims, bound = draw(claims_of), draw(bounds)
    most = sum(numel for _, numel in claims)
    return draw(st.integers(0, most + 5) | st.integers(0, min(most, 50))), claims, bound


@given(cases())
def test_counts_add_up_and_keep_their_bounds(case: tuple[int, list[Claim], dict[str, Any]]) -> None:
    total, claims, bound = case
    counts = shared(total, claims, **bound)
    lows, highs = zip(*(limits(numel, **bound) for _, numel in claims), strict=True) if claims else ((), ())
    assert len(counts) == len(claims)
    if total < sum(lows):
        assert sum(counts) == total
        assert all(0 <= count <= low for count, low in zip(counts, lows, strict=True))
    else:
        assert sum(counts) == min(total, sum(highs))
        assert all(low <= count <= high for low, count, high in zip(lows, counts, highs, strict=True))


@given(cases(), st.data())
def test_raising_a_score_never_lowers_its_count(
    case: tuple[int, list[Claim], dict[str, Any]], data: st.DataObject
) -> None:
    total, claims, bound = case
    assume(claims)
    index = data.draw(st.integers(0, len(claims) - 1))
    score, numel = claims[index]
    raised = list(claims)
    raised[index] = (data.draw(st.floats(score, 1e308) | st.just(score * (1 + 1e-15)) | st.just(score + 1.0)), numel)
    assume(raised[index][0] < inf)
    assert shared(total, raised, **bound)[index] >= shared(total, claims, **bound)[index]


@given(cases())
def test_of_two_of_one_size_the_higher_score_gets_no_less(case: tuple[int, list[Claim], dict[str, Any]]) -> None:
    total, claims, bound = case
    counts = shared(total, claims, **bound)
    for (score, numel), count in zip(claims, counts, strict=True):
        for (other_score, other_numel), other_count in zip(claims, counts, strict=True):
            if numel == other_numel and score > other_score:
                assert count >= other_count


@given(cases(), st.randoms(use_true_random=False))
def test_the_order_of_the_parameters_does_not_matter(
    case: tuple[int, list[Claim], dict[str, Any]], random: Any
) -> None:
    total, claims, bound = case
    order = list(range(len(claims)))
    random.shuffle(order)
    counts = shared(total, claims, **bound)
    shuffled = shared(total, [claims[index] for index in order], **bound)
    before = sorted(zip(claims, counts, strict=True))
    after = sorted(zip((claims[index] for index in order), shuffled, strict=True))
    assert before == after


@given(cases(), st.sampled_from([0.5, 3.0, 2.0**-40]))
def test_only_ratios_of_scores_matter(case: tuple[int, list[Claim], dict[str, Any]], factor: float) -> None:
    total, claims, bound = case
    assume(all(score == 0 or 1e-200 < score < 1e200 for score, _ in claims))
    scaled = [(score * factor, numel) for score, numel in claims]
    assume(
        all(
            Fraction(new) == Fraction(old) * Fraction(factor) for (new, _), (old, _) in zip(scaled, claims, strict=True)
        )
    )
    assert shared(total, scaled, **bound) == shared(total, claims, **bound)


@given(st.integers(0, 1000), st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12))
def test_without_bounds_each_gets_its_quota(total: int, scores: list[float]) -> None:
    """Hamilton's method stays within one of the exact share."""
    counts = allocate(total, scores, [1000] * len(scores), minimum=0)
    for score, count in zip(scores, counts, strict=True):
        quota = total * Fraction(score) / sum(map(Fraction, scores))
        assert floor(quota) <= count <= ceil(quota)


@given(cases())
def test_shares_are_those_of_one_water_level(case: tuple[int, list[Claim], dict[str, Any]]) -> None:
    """The readable version: bisect for the level at which ``clamp(level * score)`` adds up to the total."""
    total, claims, bound = case
    claims = [(score, numel) for score, numel in claims if 1e-3 < score < 1e6]
    ends = [limits(numel, **bound) for _, numel in claims]
    assume(sum(low for low, _ in ends) <= total <= sum(high for _, high in ends))

    def shares(level: Fraction) -> list[Fraction]:
        pairs = zip(claims, ends, strict=True)
        return [min(Fraction(high), max(Fraction(low), level * Fraction(score))) for (score, _), (low, high) in pairs]

    below, above = Fraction(0), Fraction(10**11)
    for _ in range(120):
        middle = (below + above) / 2
        below, above = (middle, above) if sum(shares(middle)) < total else (below, middle)
    for count, share in zip(shared(total, claims, **bound), shares(above), strict=True):
        assert abs(count - share) < 1 + Fraction(1, 10**6)


def test_small_parameters_are_sent_whole_and_nobody_is_forgotten() -> None:
    layout = Layout(((512, 512), (512,), (512, 2048), (512,)))
    counts = allocate(13_000, [0.9, 1e-9, 0.1, 1e-9], layout.numels, whole_below=1000, minimum=16)
    assert counts == (10_778, 512, 1198, 512)
    assert allocate(13_000, [1.0, 0.0, 0.0, 0.0], layout.numels, minimum=16) == (12_952, 16, 16, 16)


def test_zero_scores_get_what_the_others_cannot_take_by_size() -> None:
    assert allocate(130, [0.0, 1.0, 0.0], [100, 100, 200]) == (10, 100, 20)
    assert allocate(90, [0.0, 0.0, 0.0], [100, 200, 600]) == (10, 20, 60)


def test_too_small_a_total_goes_to_the_highest_scores() -> None:
    assert allocate(2, [1.0, 3.0, 2.0], [10, 10, 10]) == (0, 1, 1)
    assert allocate(0, [1.0, 2.0], [10, 10]) == (0, 0)
    assert allocate(5, [], []) == ()


@pytest.mark.parametrize("score", [nan, inf, -1.0])
def test_scores_that_are_none_are_refused(score: float) -> None:
    with pytest.raises(MisuseError, match="finite"):
        allocate(5, [1.0, score], [10, 10])


@pytest.mark.parametrize(
    ("call", "bound"),
    [((5, [1.0], [1, 2]), {}), ((-1, [1.0], [1]), {}), ((1, [1.0], [-1]), {}), ((1, [1.0], [1]), {"minimum": -1}),
     ((1, [1.0], [1]), {"maximum_density": 0.0})],
)  # fmt: skip
def test_impossible_bounds_are_refused(call: Any, bound: Any) -> None:
    with pytest.raises(MisuseError):
        allocate(*call, **bound)


# --- scores -----------------------------------------------------------------------------------------------------------

LAYOUT = Layout(((3, 4), (4,), (), (0, 2)))


def test_the_share_of_the_squared_norm() -> None:
    update = torch.randn(17, generator=torch.Generator().manual_seed(0))
    parts = update.double().split([12, 4, 1, 0])
    expected = [float(part.norm() ** 2 / update.double().norm() ** 2) for part in parts]
    assert gradient_norm_share(update, LAYOUT) == pytest.approx(expected)


def test_scores_of_the_largest_and_smallest_floats() -> None:
    for scale in (3e38, 1e-45):
        assert gradient_norm_share(torch.full((17,), scale), LAYOUT) == pytest.approx([12 / 17, 4 / 17, 1 / 17, 0])
    assert gradient_norm_share(torch.zeros(17), LAYOUT) == pytest.approx([12 / 17, 4 / 17, 1 / 17, 0])
    assert gradient_norm_share(torch.zeros(0), Layout(())) == ()
    assert gradient_norm_share(torch.zeros(0), Layout(((0,),))) == (0.0,)
    with pytest.raises(MisuseError):
        allocate(5, gradient_norm_share(torch.full((17,), nan), LAYOUT), LAYOUT.numels)


def test_sensitivity_is_the_loss_of_removing_weights_to_first_order() -> None:
    """On a linear loss the first order is all there is: |loss(w) - loss(w without w_i)| = |w_i g_i|."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(17, generator=generator, dtype=torch.float64).float().requires_grad_()
    slope = torch.randn(17, generator=generator)
    loss = weights @ slope
    (gradient,) = torch.autograd.grad(loss, weights)
    removed = [
        float((loss.detach() - weights.detach().index_fill(0, torch.tensor(i), 0.0) @ slope).abs()) for i in range(17)
    ]
    expected = [sum(removed[:12]), sum(removed[12:16]), removed[16], 0.0]
    assert sensitivity(weights.detach(), gradient, LAYOUT) == pytest.approx(
        [e / sum(expected) for e in expected], rel=1e-4
    )


def test_another_size_is_refused() -> None:
    with pytest.raises(MisuseError, match="17"):
        gradient_norm_share(torch.ones(16), LAYOUT)
