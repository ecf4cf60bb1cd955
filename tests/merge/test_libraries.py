"""Side by side with mergekit and PEFT on the same inputs: at most one unit in the last place of the output apart.

What drops at random is decided by us here: the libraries get our masks in place of torch.bernoulli's draw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from tests.merge.test_methods import NAME, della_chances
from thinwire.merge.delta import TensorDelta, delta_between
from thinwire.merge.methods import METHODS
from thinwire.merge.recipe import recipe_of
from thinwire.merge.sparsify import uniforms
from thinwire.merge.tensor import merge_tensor
from thinwire.tensors.bits import cells_of
from thinwire.tensors.oracle import ordered

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPE = (64, 48)


def ulps(a: torch.Tensor, b: torch.Tensor) -> int:
    """The largest distance of two tensors in units in the last place; 0 and -0 are 1 apart."""
    bits = 8 * a.element_size()
    pairs = zip(cells_of(a).tolist(), cells_of(b).tolist(), strict=True)
    return max(abs(ordered(x, bits, is_float=True) - ordered(y, bits, is_float=True)) for x, y in pairs)


def units(a: torch.Tensor, b: torch.Tensor, base: torch.Tensor) -> float:
    """The largest distance in units in the last place of the base or the result, whichever is larger."""
    size = torch.maximum(torch.maximum(a.abs(), b.abs()), base.abs()).double()
    unit = torch.finfo(a.dtype).eps * 2.0 ** torch.floor(torch.log2(size))
    return float(((a.double() - b.double()).abs() / unit).max())


def inputs(dtype: torch.dtype, seed: int, tasks: int = 4) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A base and fine-tunes of it whose steps are all of different size, so that no order of equals decides."""
    generator = torch.Generator().manual_seed(seed)
    base = (torch.randn(SHAPE, generator=generator)).to(dtype)
    tuned = []
    for _ in range(tasks):
        step = torch.randn(SHAPE, generator=generator) * base.float() * 0.05  # a fine-tune moves weights by little
        mask = torch.rand(SHAPE, generator=generator) < 0.3
        new = torch.where(mask, base.float() + step, base.float()).to(dtype)
        sizes = (new.float() - base.float()).abs().view(-1)
        order = torch.sort(sizes, stable=True).indices
        again = order[1:][sizes[order[1:]] == sizes[order[:-1]]]
        new.view(-1)[again] = base.view(-1)[again]
        tuned.append(new)
    return base, tuned


def ours(base: torch.Tensor, deltas: list[TensorDelta], method: str, **settings: object) -> torch.Tensor:
    merged = merge_tensor(NAME, deltas, recipe_of(method, len(deltas), **settings))
    found = base.clone()
    found.view(-1)[torch.from_numpy(merged.positions.astype(np.int64))] = merged.values(merged.new)
    return found


@contextmanager
def our_masks(masks: list[torch.Tensor]) -> Iterator[None]:
    """torch.bernoulli gives our masks, one a call."""
    queue = iter(masks)
    patch = pytest.MonkeyPatch()
    patch.setattr(torch, "bernoulli", lambda chances: next(queue).reshape(chances.shape).to(chances.dtype))
    try:
        yield
    finally:
        patch.undo()


def masks_of(deltas: list[TensorDelta], method: str, settings: dict[str, object]) -> list[torch.Tensor]:
    everywhere = np.arange(deltas[0].size, dtype=np.int32)
    found = []
    for i, delta in enumerate(deltas):
        chance: object = settings.get("density", 1.0)
        if method.startswith("della"):
            chance = della_chances(delta, float(chance), float(settings.get("epsilon", 0.15)))  # type: ignore[arg-type]
        found.append(torch.from_numpy(uniforms(everywhere, seed=0, task=i, tensor=NAME) < chance))
    return found


DENSITIES = [{"density": 0.05}, {"density": 0.25}, {"density": 1.0}]
CASES = {
    "linear": [{}],
    "task_arithmetic": [{}, {"normalize": True}, {"lambda_": 0.7}],
    "ties": [*DENSITIES, {"density": 0.1, "normalize": False}, {"density": 0.1, "rescale": True}],
    "dare_linear": [{"density": 0.3}, {"density": 0.3, "rescale": False}],
    "dare_ties": [{"density": 0.3}, {"density": 0.3, "normalize": True, "lambda_": 1.5}],
    "della": [{"density": 0.3, "epsilon": 0.1}, {"density": 0.5, "epsilon": 0.2, "rescale": False}],
    "della_linear": [{"density": 0.3, "epsilon": 0.1}],
    "breadcrumbs": [{"density": 0.1, "gamma": 0.02}, {"density": 0.9, "gamma": 0.2}, {"density": 0.3, "gamma": 0.0}],
    "breadcrumbs_ties": [{"density": 0.1, "gamma": 0.02}, {"density": 0.2, "gamma": 0.1, "rescale": True}],
    "sce": [{"select_topk": 0.2}, {"select_topk": 1.0}],
    "ram": [{}, {"epsilon": 0.03}],
    "ramplus_tl": [{}, {"r": 0.5, "alpha": 1.0, "epsilon": 0.01}],
}


# A float32 sum over a dense tensor hangs on the order of its summands, zeros included. Where such a sum scales the
# vectors, the results differ in the vectors' last places, which can be more places of what base and vector leave over.
SUMS = ("linear", "sce")


def test_every_method_that_claims_to_agree_with_mergekit_is_compared() -> None:
    assert set(CASES) == {name for name, method in METHODS.items() if method.agrees_with == "mergekit"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", sorted(CASES))
def test_methods_agree_with_mergekit(method: str, dtype: torch.dtype) -> None:
    api = pytest.importorskip("mergekit.merge_methods.api", reason="mergekit is not installed")
    moved = False
    for seed, settings in enumerate(CASES[method]):
        base, tuned = inputs(dtype, seed)
        deltas = [delta_between(base, new) for new in tuned]
        weights = [0.5, 1.0, 0.25, 0.7]
        known = METHODS[method].parameters
        weight = {"weight": weights} if "weight" in known else {}
        theirs = {("lambda" if key == "lambda_" else key): value for key, value in settings.items()} | weight
        models = tuned if method == "linear" else [base, *tuned]
        with our_masks(masks_of(deltas, method, settings)):
            expected = api.merge_tensors(
                models, method, parameters=theirs, base_index=None if method == "linear" else 0,
                dtype=torch.float32, out_dtype=dtype,
            )  # fmt: skip
        found = ours(base, deltas, method, **settings, **weight)
        moved |= not torch.equal(found, base)
        summed = method in SUMS or recipe_of(method, 4, **settings).at(NAME).shared.get("rescale")
        if summed and dtype == torch.float32:
            assert units(found, expected, base) <= 2, settings  # they round on the way, too
        else:
            assert ulps(found, expected) <= 1, settings
    assert moved


PEFT_CASES: dict[str, list[dict[str, object]]] = {
    "task_arithmetic": [{}],
    "magnitude_prune": DENSITIES,
    "ties_peft": [*DENSITIES, {"density": 0.2, "majority_sign_method": "frequency"}],
    "dare_linear_peft": [{"density": 0.3}],
    "dare_ties_peft": [{"density": 0.3}, {"density": 0.5, "majority_sign_method": "frequency"}],
}


def test_every_method_that_claims_to_agree_with_peft_is_compared() -> None:
    assert set(PEFT_CASES) >= {name for name, method in METHODS.items() if method.agrees_with == "PEFT"}


@pytest.mark.filterwarnings("ignore:The density")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", sorted(PEFT_CASES))
def test_methods_agree_with_peft(method: str, dtype: torch.dtype) -> None:
    library = pytest.importorskip("peft.utils.merge_utils", reason="PEFT is not installed")
    function: Callable[..., torch.Tensor] = getattr(library, method.removesuffix("_peft"))
    for seed, settings in enumerate(PEFT_CASES[method]):
        base, tuned = inputs(dtype, seed)
        deltas = [delta_between(base, new) for new in tuned]
        weights = [0.5, 1.0, 0.25, 0.7]
        with our_masks(masks_of(deltas, method, settings)):
            merged = function([new.float() - base.float() for new in tuned], torch.tensor(weights), **settings)
        expected = (base.float() + merged).to(dtype)
        found = ours(base, deltas, method, **settings, weight=weights)
        assert not torch.equal(found, base)
        assert ulps(found, expected) <= 1, settings


def test_where_the_libraries_differ_each_convention_is_its_own_method() -> None:
    base, tuned = inputs(torch.float32, 0)
    deltas = [delta_between(base, new) for new in tuned]
    settings = {"density": 0.2, "weight": [0.5, 1.0, 0.25, 0.7]}
    for ours_of_mergekit, ours_of_peft in (("ties", "ties_peft"), ("dare_linear", "dare_linear_peft")):
        one, other = (ours(base, deltas, name, **settings) for name in (ours_of_mergekit, ours_of_peft))
        assert ulps(one, other) > 1000
