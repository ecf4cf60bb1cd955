"""Every contraction gives the kernel that brute force gives, one gradient at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from thinwire.errors import MisuseError
from thinwire.probe.rank import rank_of
from thinwire.probe.spectrum import spectrum_of, spectrum_of_gram
from thinwire.probe.tangent import (
    Contraction,
    advantage_kernel,
    alignment,
    answer_logprobs,
    drift,
    tangent_kernel,
)

WAYS: tuple[Contraction, ...] = ("jacobian", "blocks", "products")


def network(seed: int = 0, outputs: int = 3) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, outputs))


def examples(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))


def brute_force(model: nn.Module, outputs: Callable[[], Tensor]) -> Tensor:
    """The Jacobian [n O, P] by one backward pass an output."""
    weights = [w for w in model.parameters() if w.requires_grad]
    rows = []
    for value in outputs().flatten():
        grads = torch.autograd.grad(value, weights, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat(
                [(torch.zeros_like(w) if g is None else g).flatten() for w, g in zip(weights, grads, strict=True)]
            )
        )
    return torch.stack(rows).double()


@settings(max_examples=15)
@given(
    count=st.integers(1, 5), outputs=st.integers(1, 4), seed=st.integers(0, 99), contraction=st.sampled_from(WAYS),
    memory=st.sampled_from([1, 1000, 1 << 30]),
)  # fmt: skip
def test_contractions_agree_with_brute_force(
    count: int, outputs: int, seed: int, contraction: Contraction, memory: int
) -> None:
    model, inputs = network(seed, outputs), examples(count, seed)
    jacobian = brute_force(model, lambda: model(inputs))
    expected = (jacobian @ jacobian.T).reshape(count, outputs, count, outputs)
    whole = tangent_kernel(model, inputs, contraction=contraction, memory_max=memory, full=True)
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-5)
    traced = tangent_kernel(model, inputs, contraction=contraction, memory_max=memory)
    torch.testing.assert_close(traced, torch.einsum("iojo->ij", expected), rtol=1e-4, atol=1e-5)
    if contraction != "products":
        vectorised = tangent_kernel(model, inputs, contraction=contraction, memory_max=memory, vectorised=True)
        torch.testing.assert_close(vectorised, traced, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("memory", "expected"), [(1 << 30, "jacobian"), (4 * 4 * 3 * 60, "blocks"), (100, "products")])
def test_memory_decides_the_contraction(memory: int, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from thinwire.probe import tangent as module

    seen: list[Any] = []
    blocks, products = module._Jacobian.by_blocks, module._Jacobian.by_products
    monkeypatch.setattr(module._Jacobian, "by_blocks", lambda self, b: (seen.append(b), blocks(self, b))[1])
    monkeypatch.setattr(module._Jacobian, "by_products", lambda self: (seen.append(None), products(self))[1])
    model = network()
    found = tangent_kernel(model, examples(4), memory_max=memory)
    torch.testing.assert_close(found, tangent_kernel(model, examples(4), contraction="jacobian"), rtol=1e-4, atol=1e-5)
    chosen = seen[0]
    assert (chosen is None) == (expected == "products")
    if chosen is not None:
        assert (len(chosen) > 1) == (expected == "blocks")
        assert [name for block in chosen for name in block] == [name for name, _ in model.named_parameters()]


def test_a_linear_model_has_the_kernel_of_its_inputs() -> None:
    model, inputs = nn.Linear(5, 2, dtype=torch.float64), examples(6).double()
    kernel = tangent_kernel(model, inputs)
    torch.testing.assert_close(kernel, 2 * (inputs @ inputs.T + 1))
    assert rank_of(spectrum_of_gram(kernel), "numerical") == 6.0
    narrow = tangent_kernel(nn.Linear(2, 1, bias=False), examples(6)[:, :2])
    assert rank_of(spectrum_of_gram(narrow), "numerical") == 2.0


def test_the_kernels_spectrum_is_the_jacobians() -> None:
    model, inputs = network(outputs=1), examples(7)
    jacobian = brute_force(model, lambda: model(inputs))
    found = spectrum_of_gram(tangent_kernel(model, inputs))
    torch.testing.assert_close(found.values, spectrum_of(jacobian).values, rtol=1e-3, atol=1e-4)


@given(seed=st.integers(0, 99))
def test_a_policy_gradients_norm_is_that_of_the_weighted_kernel(seed: int) -> None:
    model, inputs = network(seed), examples(6, seed)
    generator = torch.Generator().manual_seed(seed)
    actions = torch.randint(0, 3, (6,), generator=generator)
    advantages = torch.randn(6, generator=generator)
    kernel = tangent_kernel(model, {"inputs": inputs, "actions": actions}, "logprob")
    objective = (answer_logprobs(model, {"inputs": inputs, "actions": actions}) * advantages).sum()
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(objective, list(model.parameters()))])
    weighted = advantage_kernel(kernel, advantages)
    assert float(weighted.sum()) == pytest.approx(float(gradient.double().square().sum()), rel=1e-4, abs=1e-7)


def test_a_small_step_moves_outputs_as_the_kernel_says() -> None:
    model, inputs = network(outputs=1).double(), examples(5).double()
    kernel = tangent_kernel(model, inputs)
    advantages = torch.tensor([1.0, -2.0, 0.0, 0.5, 1.0], dtype=torch.float64)
    before = model(inputs)[:, 0]
    gradient = torch.autograd.grad((before * advantages).sum(), list(model.parameters()))
    lr = 1e-6
    with torch.no_grad():
        for weight, part in zip(model.parameters(), gradient, strict=True):
            weight += lr * part
        moved = (model(inputs)[:, 0] - before) / lr
    torch.testing.assert_close(moved, kernel @ advantages, rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def policy() -> tuple[Any, dict[str, Tensor]]:
    pytest.importorskip("transformers")
    from thinwire.lab.models import tiny_llama

    model = tiny_llama(13, hidden=64, layers=1, dtype=torch.bfloat16, seed=3, init=0.3)
    tokens = torch.randint(2, 13, (4, 6), generator=torch.Generator().manual_seed(0))
    tokens[3, 4] = 0  # a padding token that was sampled: its embedding learns nothing
    attention = torch.ones_like(tokens)
    attention[0, :2] = 0
    mask = torch.zeros(4, 6)
    mask[:, 4:] = 1.0
    mask[1, 5] = 0.0
    return model, {"tokens": tokens, "attention": attention, "mask": mask}


def test_a_language_models_answers_have_a_kernel(policy: tuple[Any, dict[str, Tensor]]) -> None:
    """bf16 weights, tied embeddings, padding, masks; the outputs as a recipe takes them."""
    import copy

    from thinwire.lab.rollouts import token_logprobs

    model, inputs = policy
    wide = copy.deepcopy(model).float()

    def outputs(policy: Any, part: dict[str, Tensor]) -> Tensor:
        return (token_logprobs(policy, part["tokens"], part["attention"], first=4) * part["mask"]).sum(dim=1)

    jacobian = brute_force(wide, lambda: outputs(wide, inputs))
    for contraction in WAYS:
        for kind in ("logprob", outputs):
            found = tangent_kernel(model, inputs, kind, contraction=contraction, memory_max=1 << 20)  # type: ignore[arg-type]
            torch.testing.assert_close(found, jacobian @ jacobian.T, rtol=1e-3, atol=1e-3)
    assert all(weight.dtype == torch.bfloat16 and weight.grad is None for weight in model.parameters())
    wide.set_attn_implementation("eager")
    assert tangent_kernel(wide, inputs, "logprob", vectorised=True) == pytest.approx(jacobian @ jacobian.T, rel=1e-3)


def test_frozen_weights_count_for_nothing_and_names_choose() -> None:
    model, inputs = network(), examples(3)
    whole = tangent_kernel(model, inputs)
    parts = [tangent_kernel(model, inputs, parameters=[name]) for name, _ in model.named_parameters()]
    torch.testing.assert_close(torch.stack(parts).sum(dim=0), whole, rtol=1e-5, atol=1e-6)
    model[0].requires_grad_(False)
    rest = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert len(rest) == 4
    torch.testing.assert_close(tangent_kernel(model, inputs), tangent_kernel(model, inputs, parameters=rest))


def test_modes_and_random_state_are_left_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 1))
    model[0].eval()
    modes = [module.training for module in model.modules()]
    running = model[2].running_mean.clone()
    state = torch.get_rng_state()
    first, second = (tangent_kernel(model, examples(4)) for _ in range(2))
    assert torch.equal(first, second)
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(model[2].running_mean, running)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("contraction", WAYS)
def test_kernels_are_to_be_had_without_gradients_around(contraction: Contraction) -> None:
    model, inputs = network(), examples(3)
    expected = tangent_kernel(model, inputs, contraction=contraction)
    with torch.no_grad():
        found = tangent_kernel(model, inputs, contraction=contraction)
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad


def test_no_examples_have_an_empty_kernel() -> None:
    assert tangent_kernel(network(), examples(0)).shape == (0, 0)
    assert tangent_kernel(network(), examples(0), full=True).shape == (0, 0, 0, 0)


def test_what_cannot_be_differentiated_is_refused() -> None:
    model, inputs = network(), examples(3)
    with pytest.raises(MisuseError, match="'nothing'"):
        tangent_kernel(model, inputs, parameters=["nothing"])
    with pytest.raises(MisuseError, match="requires a gradient"):
        tangent_kernel(network().requires_grad_(False), inputs)
    with pytest.raises(MisuseError, match="length"):
        tangent_kernel(model, {"input": inputs, "other": inputs[:2]})
    with pytest.raises(MisuseError, match="length"):
        tangent_kernel(model, torch.tensor(1.0))
    with pytest.raises(MisuseError, match="one row an example"):
        tangent_kernel(model, inputs, lambda m, i: m(i).sum())
    with pytest.raises(MisuseError, match="int64"):
        tangent_kernel(model, inputs, lambda m, i: m(i).argmax(dim=1))
    with pytest.raises(MisuseError, match="NaN"):
        tangent_kernel(model, inputs * math.nan)
    with pytest.raises(MisuseError, match="contraction"):
        tangent_kernel(model, inputs, contraction="whole")  # type: ignore[arg-type]
    with pytest.raises(MisuseError, match="outputs"):
        tangent_kernel(model, inputs, "values")  # type: ignore[arg-type]
    for wrong in (inputs, {"input": inputs}):
        with pytest.raises(MisuseError, match="log-probabilities"):
            tangent_kernel(model, wrong, "logprob")


@given(seed=st.integers(0, 99), scale=st.floats(1e-200, 1e200))
def test_drift_is_an_angle_and_ignores_scale(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    first, second = first @ first.T, second @ second.T
    assert drift(first, scale * first) == pytest.approx(0.0, abs=1e-12)
    assert drift(first, scale * second) == pytest.approx(drift(second, first))
    assert 0 < drift(first, second) <= 1  # kernels are positive semidefinite
    expected = torch.nn.functional.cosine_similarity(first.flatten(), second.flatten(), dim=0)
    assert alignment(first, second) == pytest.approx(float(expected))


def test_kernels_that_do_not_fit_are_refused_and_zeros_are_defined() -> None:
    zero, one = torch.zeros(2, 2), torch.eye(2)
    assert (drift(zero, zero), drift(zero, one), drift(one, one)) == (0.0, 1.0, pytest.approx(0.0))
    assert drift(torch.zeros(0, 0), torch.zeros(0, 0)) == 0.0
    with pytest.raises(MisuseError, match="same examples"):
        drift(one, torch.eye(3))
    with pytest.raises(MisuseError, match="NaN"):
        drift(one, one * math.nan)
    for kernel, weights in ((one, torch.ones(3)), (torch.ones(2, 3), torch.ones(2)), (torch.ones(2), torch.ones(2))):
        with pytest.raises(MisuseError, match="fit"):
            advantage_kernel(kernel, weights)
