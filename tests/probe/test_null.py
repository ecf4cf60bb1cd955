"""The null predicts what really changes in a first step, by torch's own arithmetic; simulations go on from there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.probe.models import OPTIMIZERS, TinyLM, backward, rms_of
from thinwire.errors import MisuseError
from thinwire.probe.changes import compare
from thinwire.probe.gradients import Gradients, gradient_source
from thinwire.probe.null import change_probability, excess_of, float_bounds, gradient_sizes, predict_null
from thinwire.probe.null_laws import Law, UpdateRule, law_of
from thinwire.probe.null_simulation import Shadow, simulate_null
from thinwire.tensors.bits import tensor_of

BF16 = torch.bfloat16


def observed(model: torch.nn.Module, step: Any) -> float:
    before = {n: p.detach().to(BF16).clone() for n, p in model.named_parameters()}
    step()
    found = [compare(before[n], p.detach().to(BF16)) for n, p in model.named_parameters()]
    return sum(f.changed for f in found) / sum(f.elements for f in found)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("masters", [False, True], ids=["bf16", "masters"])
@pytest.mark.parametrize("lr", [1e-6, 1e-5, 1e-4, 1e-3])
def test_a_real_first_step_is_predicted_within_one_percent(name: str, masters: bool, lr: float) -> None:
    model = TinyLM() if masters else TinyLM().to(BF16)
    optimizer = OPTIMIZERS[name](model.parameters(), lr * 30 if name == "sgd" else lr)
    backward(model, 0)
    view = BF16 if masters else None
    with_sizes = predict_null(model, optimizer=optimizer, view=view, gradient_rms=gradient_sizes(model))
    without = predict_null(model, optimizer=optimizer, view=view, gradient_rms=rms_of(model))
    real = observed(model, optimizer.step)
    assert abs(with_sizes.fraction - real) < 0.003
    assert abs(without.fraction - real) < (0.035 if name == "sgd" else 0.01)  # normal gradients of a size a tensor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize(
    ("rule", "make"),
    [
        (UpdateRule("adam", 1e-3), lambda p: torch.optim.Adam(p, lr=1e-3, foreach=False)),
        (UpdateRule("adam", 1e-3, betas=(0.8, 0.95)), lambda p: torch.optim.Adam(p, betas=(0.8, 0.95))),
        (UpdateRule("adam", 1e-3, fused=True), lambda p: torch.optim.Adam(p, lr=1e-3, fused=True)),
        (UpdateRule("sgd", 0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
        (
            UpdateRule("sgd", 0.1, momentum=0.9, nesterov=True),
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        ),
        (UpdateRule("adafactor", 0.1), lambda p: torch.optim.Adafactor(p, lr=0.1)),
    ],
)
def test_a_law_is_what_the_optimiser_does_to_weights_of_zero(
    dtype: torch.dtype, steps: int, rule: UpdateRule, make: Any
) -> None:
    if rule.fused and dtype == torch.bfloat16 and steps > 1:
        pytest.skip("a fused optimiser rounds its moments between steps")
    weights = torch.nn.Parameter(torch.zeros(256, 256, dtype=dtype))
    optimizer = make([weights])
    source = gradient_source(Gradients(), (256, 256), seed=0)
    for _ in range(steps):
        weights.data.zero_()
        weights.grad = next(source).to(dtype)
        optimizer.step()
    law = law_of(rule, dtype, step=steps, matrix=True).scaled(rule.scale(torch.zeros(3), steps))
    mine = np.sort(torch.from_numpy(law.steps).to(dtype).float().numpy())
    theirs = np.sort(weights.detach().float().numpy().reshape(-1))
    if dtype == torch.bfloat16 and rule.name == "sgd":
        assert np.array_equal(mine, theirs)
    elif dtype == torch.bfloat16:
        assert np.mean(np.abs(mine - theirs) <= 0.009 * np.abs(theirs)) > 0.999  # one ULP at most
    else:
        assert np.allclose(mine, theirs, rtol=1e-5, atol=1e-9)


cells16 = st.lists(st.integers(0, 65535), min_size=1, max_size=60)


@given(
    cells=cells16, name=st.sampled_from(["BF16", "F16"]), scale=st.floats(1e-6, 2.0), decay=st.sampled_from([0.0, 0.5])
)
def test_probabilities_are_shares_of_updates_that_change_a_weight(
    cells: list[int], name: str, scale: float, decay: float
) -> None:
    weights = tensor_of(np.array(cells, np.uint16), name, (len(cells),))
    steps = torch.randn(200, generator=torch.Generator().manual_seed(len(cells))).double() * scale
    rule = UpdateRule("adamw", lr=0.01, weight_decay=decay)
    found = change_probability(weights, Law.of(steps.numpy()), rule)
    decayed = weights * (1 - 0.01 * decay) if decay else weights
    moved = (decayed.double()[:, None] + steps).to(weights.dtype)
    right = (moved.view(torch.int16) != weights.view(torch.int16)[:, None]).double().mean(dim=1).numpy()
    usual = weights.isfinite().numpy() & (weights != 0).numpy()
    assert np.allclose(found[usual], right[usual], atol=0.0051)  # one update in 200: double rounding in torch
    assert not found[~weights.isfinite().numpy()].any()


@given(cells=cells16, scale=st.floats(1e-4, 1.0), decay=st.sampled_from([0.0, 0.5]))
def test_masters_anywhere_in_their_cells(cells: list[int], scale: float, decay: float) -> None:
    cells = [cell & 0x3FFF | 0x2000 for cell in cells]  # positive, not small: masters in float32 can be many
    weights = tensor_of(np.array(cells, np.uint16), "BF16", (len(cells),))
    values, low, high, _ = float_bounds(weights)
    rule = UpdateRule("adamw", lr=0.001, weight_decay=decay)
    law = Law.of(np.random.default_rng(0).standard_normal(64) * (high - low).mean() * scale)
    uniform = change_probability(weights, law, rule, masters="uniform")
    places = (np.arange(400) + 0.5) / 400
    spots = low[:, None] + (high - low)[:, None] * places
    shift = -0.001 * decay * values
    moved = spots[:, :, None] + law.steps + shift[:, None, None]
    right = ((moved < low[:, None, None]) | (moved > high[:, None, None])).mean(axis=(1, 2))
    assert np.allclose(uniform, right, atol=0.006)
    given_masters = torch.from_numpy(spots[:, 200]).double()
    if not decay:
        known = change_probability(weights, law, rule, masters=given_masters)
        assert np.allclose(known, ((moved < low[:, None, None]) | (moved > high[:, None, None]))[:, 200].mean(axis=1))


def test_boundaries_are_where_torch_rounds() -> None:
    cells = np.arange(65536, dtype=np.uint32).astype(np.uint16)
    for name, kind in (("BF16", torch.bfloat16), ("F16", torch.float16)):
        weights = tensor_of(cells.copy(), name, (65536,))
        values, low, high, odd = float_bounds(weights)
        fine = np.isfinite(values) & (values != 0) & (np.abs(values) < float(torch.finfo(kind).max))
        edges = torch.from_numpy(high[fine]).float()
        at = edges.to(kind).double().numpy()
        assert np.array_equal(at != values[fine], odd[fine])
        inside = torch.nextafter(edges, torch.tensor(-float("inf")))
        assert np.array_equal(inside.to(kind).double().numpy(), values[fine])
        assert np.array_equal(low[:32768][fine[:32768]], -high[32768:][fine[32768:]])
    wide = torch.tensor([1.0, 2.0, -1.0])
    _, low, high, _ = float_bounds(wide)
    assert (low + high - 2 * wide.double().numpy())[0] > 0  # below a power of two the neighbour is half as far
    assert high[0] - 1 == pytest.approx(2**-24)
    assert 1 - low[0] == pytest.approx(2**-25)


def test_more_precision_or_a_larger_step_changes_more() -> None:
    weights = torch.randn(300, 300, generator=torch.Generator().manual_seed(0)) * 0.02
    last = 0.0
    for lr in (0.0, 1e-7, 1e-6, 1e-5, 1e-4):
        coarse, full = (predict_null(weights.to(t), lr=lr).fraction for t in (torch.bfloat16, torch.float32))
        assert last <= coarse <= full
        last = coarse
    assert predict_null(weights, lr=0.0).fraction == 0
    tiny = Gradients(rms=1e-2)  # their squares are 0 in fp16, and so is eps: Adam makes them NaN
    assert predict_null(weights.half(), lr=0.0, gradients=tiny).fraction > 0.3
    sampled = predict_null(weights, lr=1e-6, view=BF16, sample=2000)
    whole = predict_null(weights, lr=1e-6, view=BF16, sample=10**6)
    assert whole.error == 0 < sampled.error
    assert abs(sampled.fraction - whole.fraction) < 5 * sampled.error


def test_odd_weights_and_misuse() -> None:
    odd = torch.tensor([float("nan"), float("inf"), 0.0, 1.0, -0.0, 3.39e38], dtype=BF16)
    assert predict_null(odd, lr=10.0).fraction == pytest.approx(3 / 6)
    assert predict_null(torch.ones(0), lr=1.0).fraction == 0
    assert predict_null(torch.tensor(1.0, dtype=BF16), lr=1.0).fraction == 1
    assert predict_null({}, lr=1.0).fraction == 0
    both = predict_null({"a": torch.ones(10, dtype=BF16), "b": torch.zeros(30, dtype=BF16)}, lr=1e-6)
    assert (both.tensors, both.fraction, both.elements) == ({"a": 0.0, "b": 1.0}, 0.75, {"a": 10, "b": 30})
    model = TinyLM()
    bad: list[dict[str, Any]] = [
        {"weights": torch.ones(3, dtype=torch.int64)},
        {"optimizer": "sgd"},
        {"optimizer": "lion"},
        {"step": 0},
        {"view": BF16, "masters": True},
        {"masters": {"x": torch.ones(3)}},
        {"lr": float("nan")},
        {"optimizer": torch.optim.RMSprop(model.parameters()), "lr": None},
        {"optimizer": torch.optim.Adam(model.parameters())},
        {"gradient_rms": (torch.ones(3, 1), torch.ones(1, 3))},
    ]
    for case in bad:
        case = {"weights": torch.ones(4), "lr": 1e-3, **case}
        with pytest.raises(MisuseError):
            predict_null(**{k: v for k, v in case.items() if v is not None})
    for wrong in ({"distribution": "cauchy"}, {"rms": -1.0}, {"correlation": 1.0}):
        with pytest.raises(MisuseError):
            Gradients(**wrong)  # type: ignore[arg-type]


def test_gradients_of_zero_are_known_by_their_sizes() -> None:
    weights = torch.nn.Parameter((torch.randn(100, 30, generator=torch.Generator().manual_seed(0)) * 0.02).to(BF16))
    model = torch.nn.ParameterList([weights])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    weights.grad = torch.randn(100, 30, generator=torch.Generator().manual_seed(1)).to(BF16)
    weights.grad[25:] = 0  # rows of rare tokens
    blind = predict_null(model, optimizer=optimizer).fraction
    knowing = predict_null(model, optimizer=optimizer, gradient_rms=gradient_sizes(model)).fraction
    real = observed(model, optimizer.step)
    assert abs(knowing - real) < 0.03  # of a sample of the rows
    assert blind > 3 * real


def test_known_masters_are_found_in_the_optimiser() -> None:
    masters = {"w": torch.nn.Parameter(torch.randn(100, 30, generator=torch.Generator().manual_seed(0)) * 0.02)}
    views = {"w": masters["w"].detach().to(BF16)}
    other = torch.nn.Parameter(torch.zeros(1))
    groups = [{"params": [other], "lr": 0.0}, {"params": [masters["w"]], "lr": 1e-4}]
    optimizer = torch.optim.Adam(groups)
    found = predict_null(views, optimizer=optimizer, masters=masters).fraction
    assert found == predict_null(masters, optimizer=optimizer, view=BF16).fraction > 0.5


@pytest.mark.parametrize("view", [None, BF16])
def test_a_simulation_starts_with_the_prediction(view: torch.dtype | None) -> None:
    model = TinyLM() if view else TinyLM().to(BF16)
    weights = {n: p.detach() for n, p in model.named_parameters()}
    found = simulate_null(weights, lambda p: torch.optim.AdamW(p, lr=1e-5), steps=3, view=view, sample=40_000)
    right = predict_null(weights, optimizer="adamw", lr=1e-5, view=view).fraction
    assert abs(found.fractions[1][0] - right) < 4 * found.errors[1][0] + 0.002
    later = predict_null(weights, optimizer="adamw", lr=1e-5, view=view, step=3).fraction
    assert abs(found.fractions[1][2] - later) < 4 * found.errors[1][2] + 0.004


def test_unknown_masters_are_simulated_as_predicted() -> None:
    weights = {"w": (torch.randn(200, 200, generator=torch.Generator().manual_seed(0)) * 0.02).to(BF16)}
    found = simulate_null(weights, lambda p: torch.optim.Adam(p, lr=1e-5), steps=1, masters=True)
    assert abs(found.fractions[1][0] - predict_null(weights, lr=1e-5, masters=True).fraction) < 0.01


def test_a_simulation_is_a_function_of_its_arguments_and_goes_on_where_it_was() -> None:
    weights = {"w": torch.randn(50, 40, generator=torch.Generator().manual_seed(0)).to(BF16), "b": torch.ones(3)}
    options: dict[str, Any] = {"lags": (1, 4), "sample": 500, "gradients": Gradients(correlation=0.5)}

    def make(params: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=1e-3)

    whole, first = Shadow(weights, make, **options), Shadow(weights, make, **options)
    steps = [whole.step() for _ in range(12)]
    assert [first.step() for _ in range(5)] == steps[:5]
    second = Shadow(weights, make, **options)
    second.load_state_dict(first.state_dict())
    assert [second.step() for _ in range(7)] == steps[5:]
    with pytest.raises(MisuseError):
        Shadow(weights, make, lags=(1,)).load_state_dict(first.state_dict())
    for bad in ({"lags": (0,)}, {"sample": 0}):
        with pytest.raises(MisuseError):
            Shadow(weights, make, **bad)
    with pytest.raises(MisuseError):
        Shadow({"ids": torch.arange(3)}, make)
    with pytest.raises(MisuseError):
        simulate_null(weights, make, steps=0)


def test_moments_are_filled_without_moving_the_weights() -> None:
    weights = {"w": torch.randn(50, 40, generator=torch.Generator().manual_seed(0)) * 0.02}
    shadows = [Shadow(weights, lambda p: torch.optim.Adam(p, lr=1e-5), view=BF16) for _ in range(2)]
    shadows[1].burn_in(200)
    fresh, old = (shadow.step()[1].fraction for shadow in shadows)
    assert fresh > 1.5 * old > 0  # a warmed-up Adam takes smaller steps on noise than a new one


def test_a_shadow_takes_over_the_real_weights_when_all_lags_start_anew() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {"w": (torch.randn(60, 50, generator=generator) * 0.02).to(BF16), "b": torch.zeros(7, dtype=BF16)}
    large = {"w": torch.ones(60, 50, dtype=BF16), "b": torch.ones(7, dtype=BF16)}
    shadow = Shadow(weights, lambda p: torch.optim.Adam(p, lr=1e-4), lags=(1, 2), sample=500)
    assert shadow.step()[1].fraction > 0.1
    assert not shadow.restart_from(large)  # the longer lag is under way
    assert shadow.step()[2].fraction > 0.1
    assert shadow.restart_from(large)
    assert shadow.step()[1].fraction == 0  # steps of 1e-4 round away at 1.0
    assert shadow.step()[2].fraction == 0
    assert shadow.restart_from({"w": torch.ones(3), "b": weights["b"]})  # of another size: left as it was
    assert 0 < shadow.step()[1].tensors["b"] != shadow.step()[1].tensors["w"] == 0


def test_schedules_and_correlation_count() -> None:
    weights = {"w": torch.randn(100, 100, generator=torch.Generator().manual_seed(0)).to(BF16) * 0.02}

    def make(params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=1.0)

    options: dict[str, Any] = {"steps": 8, "lags": (1, 8), "gradient_rms": 1e-5}
    plain = simulate_null(weights, make, **options)
    stopped = simulate_null(weights, make, lr=lambda step: 1.0 if step <= 4 else 0.0, **options)
    assert stopped.fractions[1][:4] == plain.fractions[1][:4]
    assert stopped.fractions[1][4:] == [0] * 4
    assert plain.fractions[1][4] > 0
    alike = simulate_null(weights, make, gradients=Gradients(correlation=0.99), masters=True, **options)
    free = simulate_null(weights, make, masters=True, **options)
    assert alike.fractions[8][0] > 1.3 * free.fractions[8][0]  # steps that add up lead farther


@given(share=st.floats(0.001, 0.5), seed=st.integers(0, 10**6))
def test_intervals_hold_the_truth_of_a_sample(share: float, seed: int) -> None:
    excess = excess_of(share, share, 0.01)
    assert (excess.value, excess.significant) == (0.0, False)
    assert replace(excess, low=0.001).significant


def test_nine_intervals_in_ten_hold_the_truth() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {"w": torch.randn(400, 400, generator=generator) * 0.02, "b": torch.randn(5000, generator=generator)}

    def make(params: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(params, lr=1e-5)

    truth = predict_null(weights, lr=1e-5, view=BF16, sample=10**6).fraction
    held = 0
    for seed in range(100):
        null = Shadow(weights, make, view=BF16, sample=2000, seed=seed).step()[1]
        excess = excess_of(truth, null.fraction, null.error)
        held += excess.low <= 0 <= excess.high
    assert 88 <= held <= 100
