"""Products are those of the exact matrix, estimates lie in their intervals as often as they say."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, hessian

from thinwire.errors import MisuseError
from thinwire.probe.curvature import CurvatureOperator, Matrix, curvature
from thinwire.probe.estimators import Estimate, hutch_plus_plus, hutchinson, lanczos
from thinwire.probe.tangent import tangent_kernel


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def symmetric(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return (matrix + matrix.T) / 2


def times(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda vector: (matrix @ vector.double()).to(vector)


# --- estimators -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimate", [hutchinson, hutch_plus_plus])
@pytest.mark.parametrize("confidence", [0.5, 0.95])
def test_intervals_hold_the_trace_as_often_as_they_say(estimate: Callable[..., Estimate], confidence: float) -> None:
    matrix = symmetric(40, 1)
    matrix = matrix @ matrix
    runs = 300
    held = 0
    for seed in range(runs):
        low, high = estimate(times(matrix), 40, probes=12, seed=seed).interval(confidence)
        held += low <= float(matrix.trace()) <= high
    deviation = math.sqrt(runs * confidence * (1 - confidence))
    assert abs(held - runs * confidence) < 4 * deviation


@pytest.mark.parametrize("estimate", [hutchinson, hutch_plus_plus])
def test_traces_are_unbiased(estimate: Callable[..., Estimate]) -> None:
    matrix = symmetric(30, 2)
    found = torch.tensor([estimate(times(matrix), 30, probes=9, seed=seed).value for seed in range(300)])
    assert abs(float(found.mean() - matrix.trace())) < 4 * float(found.std()) / math.sqrt(300)


def test_signs_vary_as_the_off_diagonal_says() -> None:
    matrix = symmetric(30, 3)
    found = torch.tensor([hutchinson(times(matrix), 30, probes=1, seed=seed).value for seed in range(600)])
    expected = 2 * (matrix.square().sum() - matrix.diagonal().square().sum())
    assert float(found.var()) == pytest.approx(float(expected), rel=0.25)
    assert hutchinson(times(torch.diag(torch.arange(30.0).double())), 30, probes=3).error == pytest.approx(0, abs=1e-6)


def test_few_large_eigenvalues_are_found_better_by_hutch_plus_plus() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(200, 200, generator=generator, dtype=torch.float64))[0]
    values = torch.tensor([0.9**i * 100 for i in range(200)], dtype=torch.float64)
    matrix = (basis * values) @ basis.T
    errors = {
        estimate: sum(
            abs(estimate(times(matrix), 200, probes=60, seed=s).value - float(values.sum())) for s in range(10)
        )
        for estimate in (hutchinson, hutch_plus_plus)
    }
    assert errors[hutch_plus_plus] < 0.5 * errors[hutchinson]


@given(size=st.integers(0, 8), seed=st.integers(0, 99))
def test_few_rows_are_counted_one_by_one(size: int, seed: int) -> None:
    matrix = symmetric(size, seed)
    for estimate in (hutchinson, hutch_plus_plus):
        found = estimate(times(matrix), size, probes=8)
        assert found.value == pytest.approx(float(matrix.trace()), abs=1e-5)
        assert found.interval() == (found.value, found.value)


@given(size=st.integers(1, 30), seed=st.integers(0, 99), steps=st.integers(1, 40))
def test_lanczos_ends_lie_inside_and_within_their_residuals(size: int, seed: int, steps: int) -> None:
    matrix = symmetric(size, seed)
    values = torch.linalg.eigvalsh(matrix)
    found = lanczos(times(matrix), size, steps=steps, seed=seed)
    slack = 1e-5 * float(values.abs().max()) + 1e-6
    assert float(values[0]) - slack <= found.smallest <= found.largest <= float(values[-1]) + slack
    for value, residual in ((found.largest, found.largest_residual), (found.smallest, found.smallest_residual)):
        assert float((values - value).abs().min()) <= residual + slack
    assert found.products <= steps


def test_lanczos_finds_the_ends_of_a_large_matrix() -> None:
    values = torch.linspace(-1, 1, 5000)
    values[0], values[-1] = -3.0, 7.0
    found = lanczos(lambda v: values * v, 5000, steps=40)
    assert (found.largest, found.smallest) == (pytest.approx(7.0, rel=1e-4), pytest.approx(-3.0, rel=1e-4))
    assert lanczos(lambda v: 0 * v, 5).largest == 0.0
    assert lanczos(lambda v: v, 0).products == 0


@pytest.mark.parametrize(
    ("freedom", "confidence", "expected"),
    [
        (1, 0.95, 12.7062),
        (2, 0.95, 4.3027),
        (3, 0.95, 3.1824),
        (4, 0.95, 2.7764),
        (15, 0.95, 2.1314),
        (15, 0.99, 2.9467),
    ],
)
def test_intervals_are_students(freedom: int, confidence: float, expected: float) -> None:
    low, high = Estimate(1.0, 0.5, freedom, 0).interval(confidence)
    assert (high - 1.0) / 0.5 == pytest.approx(expected, rel=0.01)
    assert low + high == pytest.approx(2.0)


def test_estimates_out_of_range_are_refused() -> None:
    with pytest.raises(MisuseError, match="probe"):
        hutchinson(times(symmetric(9, 0)), 9, probes=0)
    with pytest.raises(MisuseError, match="probes"):
        hutch_plus_plus(times(symmetric(9, 0)), 9, probes=5)
    with pytest.raises(MisuseError, match="step"):
        lanczos(times(symmetric(9, 0)), 9, steps=0)
    for estimate in (hutchinson, hutch_plus_plus, lanczos):
        with pytest.raises(MisuseError, match="NaN"):
            estimate(lambda v: v * math.nan, 20)  # type: ignore[operator]
    assert hutchinson(times(symmetric(9, 0)), 9, probes=1).interval() == (-math.inf, math.inf)
    for confidence in (0.0, 1.0, math.nan):
        with pytest.raises(MisuseError, match="confidence"):
            Estimate(1.0, 1.0, 3, 4).interval(confidence)


# --- matrices ---------------------------------------------------------------------------------------------------------


def policy(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def batches(count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "states": torch.randn(5, 4, generator=generator),
            "actions": torch.randint(0, 3, (5,), generator=generator),
            "advantages": torch.randn(5, generator=generator),
        }
        for _ in range(count)
    ]


def logprobs(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return torch.log_softmax(model(batch["states"]), dim=-1).gather(-1, batch["actions"][:, None])[:, 0]


def policy_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    now = logprobs(model, batch)
    return -((now - now.detach()).exp() * batch["advantages"]).mean()


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(batch["states"])
    return found


def cross_entropy(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(outputs, batch["actions"])


def exact(model: nn.Module, data: list[dict[str, Tensor]], kind: Matrix) -> Tensor:
    """The whole matrix, by torch.func and by definition."""
    names, weights = zip(*model.named_parameters(), strict=True)
    flat = torch.cat([w.detach().flatten() for w in weights]).double()

    def stand_in(vector: Tensor) -> Any:
        pieces = torch.split(vector, [w.numel() for w in weights])
        state = {n: p.reshape(w.shape) for n, p, w in zip(names, pieces, weights, strict=True)}
        return lambda x: functional_call(model, state, (x.double(),))

    total = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    for batch in data:
        if kind == "hessian":
            total += hessian(lambda v, b=batch: policy_loss(stand_in(v), b))(flat)
        elif kind == "fisher":
            rows = torch.func.jacrev(lambda v, b=batch: logprobs(stand_in(v), b))(flat)
            total += rows.T @ rows / len(rows)
        else:
            rows = torch.func.jacrev(lambda v, b=batch: logits(stand_in(v), b))(flat)
            inner = hessian(lambda out, b=batch: cross_entropy(out, b))(logits(stand_in(flat), batch))
            total += torch.einsum("iop,iojq,jqr->pr", rows, inner, rows)
    return total / len(data)


def operator(model: nn.Module, data: list[dict[str, Tensor]], kind: Matrix) -> CurvatureOperator:
    objective = {"hessian": policy_loss, "fisher": logprobs, "ggn": logits}[kind]
    return CurvatureOperator(model, objective, data, kind=kind, loss=cross_entropy if kind == "ggn" else None)


KINDS: tuple[Matrix, ...] = ("hessian", "fisher", "ggn")


@settings(max_examples=12)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 99), count=st.integers(1, 3))
def test_products_are_those_of_the_exact_matrix(kind: Matrix, seed: int, count: int) -> None:
    model, data = policy(seed), batches(count, seed)
    matrix = operator(model, data, kind)
    expected = exact(model, data, kind)
    vector = torch.randn(matrix.size, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(matrix.product(vector).double(), expected @ vector.double(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_curvature_agrees_with_the_exact_matrix(kind: Matrix) -> None:
    model, data = policy(1), batches(2, 1)
    expected = exact(model, data, kind)
    values = torch.linalg.eigvalsh(expected)
    objective = {"hessian": policy_loss, "fisher": logprobs, "ggn": logits}[kind]
    for trace in ("hutchinson", "hutch++"):
        found = curvature(
            model, objective, data, kind=kind, loss=cross_entropy if kind == "ggn" else None, trace=trace,  # type: ignore[arg-type]
            probes=30, steps=40, confidence=0.999,
        )  # fmt: skip
        assert found.size == len(expected) == 51
        low, high = found.trace_interval
        assert low - 1e-5 <= float(expected.trace()) <= high + 1e-5  # ten directions are all there are of the Fisher
        assert found.largest == pytest.approx(float(values[-1]), rel=1e-3)
        assert found.smallest == pytest.approx(float(values[0]), abs=1e-3 * float(values[-1]))
        assert found.products in (30 + 40, 30 + 40 + 1)
    if kind == "fisher":
        assert math.isnan(found.gradient_norm)
        return
    value = (policy_loss if kind == "hessian" else lambda m, b: cross_entropy(logits(m, b), b))(model, data[0])
    other = (policy_loss if kind == "hessian" else lambda m, b: cross_entropy(logits(m, b), b))(model, data[1])
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad((value + other) / 2, list(model.parameters()))])
    assert found.gradient_norm == pytest.approx(float(gradient.norm()), rel=1e-4)
    unit = (gradient / gradient.norm()).double()
    assert found.along_gradient == pytest.approx(float(unit @ expected @ unit), rel=1e-3, abs=1e-6)


def test_the_fisher_matrix_has_the_tangent_kernels_eigenvalues() -> None:
    model, data = policy(2), batches(1, 2)[0]
    kernel = tangent_kernel(model, {"inputs": data["states"], "actions": data["actions"]}, "logprob") / 5
    found = curvature(model, logprobs, [data], kind="fisher", probes=51, steps=40)
    assert found.trace == pytest.approx(float(kernel.trace()), rel=1e-4)
    assert found.trace_interval == (found.trace, found.trace)
    assert found.largest == pytest.approx(float(torch.linalg.eigvalsh(kernel)[-1]), rel=1e-4)


def test_curvlinops_computes_the_same_matrices() -> None:
    curvlinops = pytest.importorskip("curvlinops")
    from thinwire.probe.linear_operators import linear_operator

    model, data = policy(3), batches(2, 3)
    rows = [(batch["states"], batch["actions"]) for batch in data]
    loss = nn.CrossEntropyLoss()
    vector = torch.randn(51, 3, generator=torch.Generator().manual_seed(0))

    def whole(model: Any, batch: dict[str, Tensor]) -> Tensor:
        return cross_entropy(logits(model, batch), batch)

    for ours, theirs in (
        (CurvatureOperator(model, whole, data), curvlinops.HessianLinearOperator),
        (CurvatureOperator(model, logits, data, kind="ggn", loss=cross_entropy), curvlinops.GGNLinearOperator),
    ):
        expected = theirs(model, loss, list(model.parameters()), rows)
        bridged = linear_operator(ours)
        torch.testing.assert_close(bridged @ vector, expected @ vector, rtol=1e-3, atol=1e-5)
        traces = []
        for either in (bridged, expected):  # its estimators take ours as they take theirs
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                traces.append(float(curvlinops.hutchpp_trace(either, num_matvecs=30)))
        assert traces[0] == pytest.approx(traces[1], rel=1e-3)


def test_without_curvlinops_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from thinwire.probe.linear_operators import linear_operator

    monkeypatch.setitem(sys.modules, "curvlinops._torch_base", None)
    with pytest.raises(MisuseError, match=r"thinwire\[curvature\]"):
        linear_operator(operator(policy(), batches(1), "hessian"))


def test_a_language_models_objective_is_curved_whatever_its_data_type() -> None:
    """bf16, tied embeddings, fused attention; a padding token that was sampled must not make it asymmetric."""
    pytest.importorskip("transformers")
    from thinwire.lab.models import tiny_llama
    from thinwire.probe.tangent import answer_logprobs

    model = tiny_llama(13, hidden=64, layers=1, seed=3, init=0.3)
    tokens = torch.randint(0, 13, (4, 6), generator=torch.Generator().manual_seed(0))
    tokens[:, 3] = 0
    batch = {"tokens": tokens, "attention": torch.ones_like(tokens), "mask": (torch.arange(6) > 2).repeat(4, 1)}
    weights = [weight.detach().clone() for weight in model.parameters()]

    def loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
        return -(answer_logprobs(model, batch) * torch.tensor([1.0, -1.0, 0.5, 0.0])).mean()

    matrix = CurvatureOperator(model, loss, [batch])
    a, b = torch.randn(2, matrix.size, generator=torch.Generator().manual_seed(1)).unbind()
    assert float(a @ matrix.product(b)) == pytest.approx(float(b @ matrix.product(a)), rel=1e-2)
    found = curvature(model, answer_logprobs, [batch], kind="fisher", probes=4, steps=8)
    kernel = tangent_kernel(model, batch, "logprob") / 4
    assert found.largest == pytest.approx(float(torch.linalg.eigvalsh(kernel)[-1]), rel=1e-3)
    assert all(torch.equal(w, b) and w.grad is None for w, b in zip(model.parameters(), weights, strict=True))


def test_curvature_is_to_be_had_without_gradients_around() -> None:
    model, data = policy(), batches(1)
    expected = curvature(model, policy_loss, data, probes=51, steps=10)
    with torch.no_grad():
        assert curvature(model, policy_loss, data, probes=51, steps=10) == expected


def test_frozen_weights_are_left_out_and_a_flat_objective_has_no_curvature() -> None:
    model, data = policy(), batches(1)
    model[0].requires_grad_(False)
    assert operator(model, data, "hessian").size == 21
    found = curvature(nn.Linear(4, 1), lambda m, b: m(b["states"]).mean(), data)
    assert (found.trace, found.largest, found.smallest, found.along_gradient) == (0.0, 0.0, 0.0, 0.0)
    still = curvature(nn.Linear(4, 1), lambda m, b: 0 * m(b["states"]).mean(), data)
    assert still.gradient_norm == 0.0
    assert math.isnan(still.along_gradient)


def test_what_has_no_curvature_is_refused() -> None:
    model, data = policy(), batches(1)
    for message, call in (
        ("matrix", lambda: CurvatureOperator(model, policy_loss, data, kind="newton")),  # type: ignore[arg-type]
        ("loss", lambda: CurvatureOperator(model, logits, data, kind="ggn")),
        ("loss", lambda: CurvatureOperator(model, policy_loss, data, loss=cross_entropy)),
        ("batch", lambda: CurvatureOperator(model, policy_loss, [])),
        ("scalar", lambda: curvature(model, logprobs, data)),
        (r"\[n\]", lambda: curvature(model, logits, data, kind="fisher")),
        ("depend", lambda: curvature(model, lambda m, b: torch.tensor(1.0), data)),
        ("depend", lambda: curvature(model, lambda m, b: policy_loss(m, b).detach(), data)),
        ("NaN", lambda: curvature(model, lambda m, b: policy_loss(m, b) * math.nan, data)),
        ("trace", lambda: curvature(model, policy_loss, data, trace="exact")),  # type: ignore[arg-type]
        ("'gone'", lambda: curvature(model, policy_loss, data, parameters=["gone"])),
        ("vectors", lambda: operator(model, data, "hessian").product(torch.ones(3))),
    ):
        with pytest.raises(MisuseError, match=message):
            call()
