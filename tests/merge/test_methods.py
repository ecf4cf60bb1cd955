"""Every method equals its dense oracle, keeps its laws, and refuses what cannot be merged."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.errors import MisuseError
from thinwire.merge import sparsify
from thinwire.merge.combine import Vector, count_overlap, reduce, reduce_in_turn
from thinwire.merge.delta import TensorDelta, delta_between
from thinwire.merge.methods import METHODS
from thinwire.merge.methods.base import Task
from thinwire.merge.oracle import merge_dense
from thinwire.merge.recipe import Recipe, recipe_of
from thinwire.merge.tensor import merge_tensor, surveyed, vector_of

SHAPES = [(24,), (6, 8), (3, 4, 5), (9, 1)]
NAME = "layers.0.w"


def merged_alone(deltas: list[TensorDelta], recipe: Recipe) -> TensorDelta:
    """The merge of a model that has one tensor."""
    return merge_tensor(NAME, deltas, surveyed(recipe, [(NAME, deltas)]))


@st.composite
def problems(draw: st.DrawFn) -> tuple[torch.Tensor, list[torch.Tensor], dict[str, object], str]:
    """A base, fine-tunes with steps that add up without rounding, parameters, a method."""
    method = draw(st.sampled_from(sorted(METHODS)))
    shape = draw(st.sampled_from(SHAPES))
    tasks = draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    base = torch.randint(-8, 9, shape, generator=generator) / 8
    steps = [torch.randint(-40, 41, shape, generator=generator) / 64 for _ in range(tasks)]
    density = draw(st.sampled_from([0.0, 0.05, 0.3, 1.0]))
    tuned = [base + step * (torch.rand(shape, generator=generator) < density) for step in steps]
    weights = draw(st.lists(st.sampled_from([0.25, 0.5, 1.0, 2.0, -0.5]), min_size=tasks, max_size=tasks))
    if method == "linear" and abs(sum(weights)) < 0.1:
        weights[0] += 1.0
    known = METHODS[method].parameters
    values: dict[str, object] = {"weight": weights, "lambda_": draw(st.sampled_from([1.0, 0.5])), "seed": 7}
    values["density"] = draw(st.sampled_from([0.2, 0.5, 0.8, 1.0]))
    values["gamma"] = draw(st.sampled_from([0.0, 0.1]))
    values["epsilon"] = draw(st.sampled_from([0.05, 0.15]))
    values["select_topk"] = draw(st.sampled_from([0.0, 0.4, 1.0]))
    values["normalize"] = draw(st.booleans()) or method == "linear"
    values["rescale"] = draw(st.booleans())
    values["majority_sign_method"] = draw(st.sampled_from(["total", "frequency"]))
    return base, tuned, {k: v for k, v in values.items() if k.rstrip("_") in known}, method


def kept_at_random(deltas: list[TensorDelta], method: str, recipe_tasks: tuple) -> torch.Tensor:
    """The masks that the sparse methods draw, as dense rows."""
    kept = torch.ones(len(deltas), deltas[0].size)
    for i, (delta, own) in enumerate(zip(deltas, recipe_tasks, strict=True)):
        vector = vector_of(delta)
        numbers = Task(vector, i, NAME, delta.shape, own).uniforms(7)
        chance: np.ndarray | float = own.get("density", 1.0)
        if method.startswith("della"):
            chance = della_chances(delta, own["density"], own["epsilon"])[vector.positions]
        kept[i, torch.from_numpy(vector.positions.astype(np.int64))] = torch.from_numpy(
            (numbers < chance) * 1.0
        ).float()
    return kept


def della_chances(delta: TensorDelta, density: float, epsilon: float) -> np.ndarray:
    """The formula on dense rows; equal magnitudes rank by position, as here."""
    dense = np.zeros(delta.size, np.float32)
    dense[delta.positions] = delta.differences()
    shape = delta.shape if len(delta.shape) > 1 else (1, *delta.shape)
    ranks = np.abs(dense.reshape(shape)).argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    share = ranks / (shape[1] - 1) if shape[1] > 1 else np.full(shape, 0.5)
    return ((density - epsilon) + share * 2 * epsilon).reshape(-1)


@given(problem=problems())
def test_sparse_methods_equal_their_dense_oracles(problem: tuple) -> None:
    base, tuned, values, method = problem
    deltas = [delta_between(base, new) for new in tuned]
    recipe = surveyed(recipe_of(method, len(tuned), **values), [(NAME, deltas)])
    merged = merge_tensor(NAME, deltas, recipe).check()
    resolved = recipe.at(NAME)
    kept = kept_at_random(deltas, method, resolved.tasks)
    dense = torch.stack([(new - base).reshape(-1) for new in tuned])
    expected = base.reshape(-1) + merge_dense(method, dense, resolved, kept)
    found = base.reshape(-1).clone()
    found[torch.from_numpy(merged.positions.astype(np.int64))] = merged.values(merged.new)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", sorted(METHODS))
@given(problem=problems())
def test_one_task_with_all_of_it_kept_is_the_task_itself(method: str, problem: tuple) -> None:
    base, tuned, _, _ = problem
    delta = delta_between(base, tuned[0])
    settings = {"epsilon": 0.0} if method.startswith("ram") else {}
    if method.startswith("ramplus"):
        settings["r"] = 0.0
    merged = merged_alone([delta], recipe_of(method, 1, **settings))
    assert np.array_equal(merged.positions, delta.positions)
    assert np.array_equal(merged.new, delta.new)


@given(problem=problems(), order=st.randoms(use_true_random=False))
def test_the_order_of_tasks_does_not_matter(problem: tuple, order: object) -> None:
    base, tuned, values, method = problem
    if method.startswith(("dare", "della")):
        return  # what is dropped goes by the task's place
    deltas = [delta_between(base, new) for new in tuned]
    places = list(range(len(deltas)))
    order.shuffle(places)  # type: ignore[attr-defined]
    moved = {k: [v[i] for i in places] if isinstance(v, list) else v for k, v in values.items()}
    one = merged_alone(deltas, recipe_of(method, len(deltas), **values))
    other = merged_alone([deltas[i] for i in places], recipe_of(method, len(deltas), **moved))
    full = [torch.zeros(base.numel()) for _ in range(2)]
    for into, delta in zip(full, (one, other), strict=True):
        into[torch.from_numpy(delta.positions.astype(np.int64))] = torch.from_numpy(delta.differences())
    torch.testing.assert_close(*full, rtol=1e-5, atol=1e-6)


@given(problem=problems())
def test_lambda_scales_the_merged_vector(problem: tuple) -> None:
    base, tuned, values, method = problem
    deltas = [delta_between(base, new) for new in tuned]
    zeros = [torch.zeros(base.numel(), dtype=torch.float64) for _ in range(2)]
    for into, factor in zip(zeros, (1.0, 0.25), strict=True):
        merged = (
            merged_alone(deltas, recipe_of(method, len(deltas), **values | {"lambda_": factor}))
            if "lambda" in METHODS[method].parameters
            else None
        )
        assert merged is not None
        into[torch.from_numpy(merged.positions.astype(np.int64))] = torch.from_numpy(
            merged.differences().astype(np.float64)
        )
    torch.testing.assert_close(zeros[0] * 0.25, zeros[1], rtol=1e-5, atol=1e-6)


@given(problem=problems())
def test_a_task_without_changes_only_dilutes_what_divides_by_all(problem: tuple) -> None:
    base, tuned, values, method = problem
    if method in ("linear", "sce") or values.get("normalize"):
        return
    deltas = [delta_between(base, new) for new in tuned]
    more = {k: [*v, 1.0] if isinstance(v, list) else v for k, v in values.items()}
    one = merged_alone(deltas, recipe_of(method, len(deltas), **values))
    other = merged_alone([*deltas, delta_between(base, base)], recipe_of(method, len(deltas) + 1, **more))
    assert np.array_equal(one.positions, other.positions)
    assert np.array_equal(one.new, other.new)


def test_ramplus_takes_the_ratio_over_the_whole_model() -> None:
    """Two tensors: in the first all changes are shared, in the second none, so over both, task 1 shares 2 of 5."""
    zeros = torch.zeros(6)
    shared = [delta_between(zeros, torch.tensor([1.0, 1, 0, 0, 0, 0]))] * 2
    own = [delta_between(zeros, torch.tensor(v)) for v in ([1.0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1.0])]
    recipe = recipe_of("ramplus", 2, r=0.5, alpha=10.0)
    with pytest.raises(MisuseError, match="surveyed"):
        merge_tensor("b", own, recipe)
    whole = surveyed(recipe, [("a", shared), ("b", own)])
    assert whole.survey == pytest.approx((2 / 3, 2.0))
    merged = merge_tensor("b", own, whole)
    assert merged.values(merged.new).tolist() == pytest.approx([1 + 0.5 * 2 / 3] * 3 + [1 + 0.5 * 2])
    local = merge_tensor("b", own, recipe_of("ramplus_tl", 2, r=0.5, alpha=10.0))
    assert local.values(local.new).tolist() == [1.0] * 4


@given(problem=problems())
def test_ramplus_of_one_tensor_is_ramplus_tl(problem: tuple) -> None:
    base, tuned, _, _ = problem
    deltas = [delta_between(base, new) for new in tuned]
    one, other = (merged_alone(deltas, recipe_of(name, len(deltas))) for name in ("ramplus", "ramplus_tl"))
    assert np.array_equal(one.positions, other.positions)
    assert np.array_equal(one.new, other.new)


@given(
    seed=st.integers(0, 10**6), tasks=st.integers(1, 6), size=st.sampled_from([1, 64, 1000, 65_536, 200_000]),
    density=st.sampled_from([0.0, 0.001, 0.05, 1.0]), kind=st.sampled_from([np.float32, np.float64]),
    vote=st.sampled_from(["all", "weighted", "total", "frequency"]),
    divide=st.sampled_from(["nothing", "weights", "count", "weights_clamped"]),
)  # fmt: skip
@settings(max_examples=60)
def test_sums_by_blocks_are_those_of_the_walk(
    seed: int, tasks: int, size: int, density: float, kind: type, vote: str, divide: str
) -> None:
    source = np.random.default_rng(seed)
    vectors = []
    for _ in range(tasks):
        positions = np.flatnonzero(source.random(size) < density).astype(np.int64)
        values = source.normal(size=positions.size).astype(kind)
        vectors.append(Vector(positions, values, source.integers(0, 99, positions.size).astype(np.uint16)))
    weights = source.choice([0.0, 0.5, 1.0, -1.0], tasks).tolist()
    one, other = (work(vectors, weights, vote=vote, divide=divide) for work in (reduce, reduce_in_turn))
    assert np.array_equal(one.positions, other.positions)
    assert np.array_equal(one.values.view(np.uint8), other.values.view(np.uint8))
    assert np.array_equal(one.cells, other.cells)


def test_density_counts_cells_of_the_dense_vector() -> None:
    values = np.arange(1, 11, dtype=np.float32)
    assert sparsify.magnitude(values, size=1000, density=0.01).all()
    assert sparsify.magnitude(values, size=1000, density=0.004).sum() == 4
    assert sparsify.magnitude(values, size=1000, density=0.0001).sum() == 1
    assert sparsify.magnitude(values, size=1000, density=0.0001, least=0).sum() == 0
    assert sparsify.magnitude_outliers(values, size=1000, density=0.5, gamma=0.002).tolist() == [True] * 8 + [False] * 2


def test_what_stays_at_random_is_the_share_asked_for_and_hangs_on_nothing_else() -> None:
    positions = np.arange(200_000, dtype=np.int32)
    one = sparsify.uniforms(positions, seed=1, task=0, tensor="a")
    assert abs((one < 0.3).mean() - 0.3) < 0.005  # five standard deviations
    assert abs(np.corrcoef(one[1:], one[:-1])[0, 1]) < 0.012
    assert np.array_equal(sparsify.uniforms(positions[500:900:3], seed=1, task=0, tensor="a"), one[500:900:3])
    for other in ({"seed": 2}, {"task": 1}, {"tensor": "b"}):
        numbers = sparsify.uniforms(positions, **{"seed": 1, "task": 0, "tensor": "a"} | other)
        assert abs(np.corrcoef(one, numbers)[0, 1]) < 0.012


@given(problem=problems())
def test_overlap_counts_what_dense_masks_count(problem: tuple) -> None:
    base, tuned, _, _ = problem
    dense = torch.stack([(new - base).reshape(-1) for new in tuned])
    changed = dense != 0
    counts = count_overlap([vector_of(delta_between(base, new)) for new in tuned])
    assert counts.union == int(changed.any(dim=0).sum())
    assert counts.conflicting == int(((dense > 0).any(dim=0) & (dense < 0).any(dim=0)).sum())
    assert counts.shared.tolist() == (changed & (changed.sum(dim=0) > 1)).sum(dim=1).tolist()
    assert counts.unique.tolist() == (changed & (changed.sum(dim=0) == 1)).sum(dim=1).tolist()
    for i in range(len(tuned)):
        for j in range(len(tuned)):
            if i != j:
                assert counts.pairs[i, j] == int((changed[i] & changed[j]).sum())
                assert counts.conflicts[i, j] == int((dense[i] * dense[j] < 0).sum())


def test_what_cannot_be_merged_is_refused_by_name() -> None:
    base = torch.zeros(4)
    fine = delta_between(base, torch.tensor([1.0, 0, 0, 0]))
    two = recipe_of("ties", 2)
    with pytest.raises(MisuseError, match=r"w of task 2 changes at 1"):
        merge_tensor("w", [fine, delta_between(base, torch.tensor([0, float("nan"), 0, 0]))], two)
    with pytest.raises(MisuseError, match=r"\(4,\).*\(2, 2\)"):
        merge_tensor("w", [fine, delta_between(base.view(2, 2), torch.ones(2, 2))], two)
    with pytest.raises(MisuseError, match="1 deltas for 2 tasks"):
        merge_tensor("w", [fine], two)
    big = delta_between(base.half(), torch.full((4,), 60000.0).half())
    with pytest.raises(MisuseError, match="does not fit F16"):
        merge_tensor("w", [big, big], recipe_of("task_arithmetic", 2))
    ids = torch.arange(4)
    moved, other = delta_between(ids, ids.flip(0)), delta_between(ids, ids + 1)
    assert merge_tensor("ids", [moved, delta_between(ids, ids)], two) is moved
    with pytest.raises(MisuseError, match="cannot be averaged"):
        merge_tensor("ids", [moved, other], two)
    with pytest.raises(MisuseError, match="scale every weight"):
        merge_tensor("w", [fine, fine], recipe_of("linear", 2, normalize=False))
    with pytest.raises(MisuseError, match="lower epsilon"):
        merge_tensor("w", [fine, fine], recipe_of("della", 2, density=0.1))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64])
def test_other_floats_are_merged_too(dtype: torch.dtype) -> None:
    base = torch.tensor([1.0, 2.0, 3.0, 4.0]).to(dtype)
    deltas = [delta_between(base, torch.tensor(new).to(dtype)) for new in ([2.0, 2, 3, 4], [1.0, 4, 3, 4])]
    merged = merge_tensor("w", deltas, recipe_of("task_arithmetic", 2))
    assert merged.values(merged.new).double().tolist() == [2.0, 4.0]


RECIPES_REFUSED = [
    ({"method": "tise"}, "did you mean ties"),
    ({"densty": 0.5}, "did you mean density"),
    ({"density": [0.1, 0.2, 0.3]}, "3 values of density were given for 2 tasks"),
    ({"density": 1.5}, "from 0 to 1"),
    ({"density": "much"}, "give a number"),
    ({"density": float("nan")}, "give a number"),
    ({"normalize": 1}, "true or false"),
    ({"weight": [{"filter": "mlp", "valeu": 1}, 0.5]}, "no condition"),
    ({"per_task": [{"normalize": True}, {}]}, "same for all tasks"),
    ({"per_task": [{}]}, "parameters for 1 tasks"),
]


@pytest.mark.parametrize(("settings", "message"), RECIPES_REFUSED, ids=[str(i) for i in range(len(RECIPES_REFUSED))])
def test_wrong_recipes_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(MisuseError, match=message):
        recipe_of(settings.pop("method", "ties"), 2, **settings).at("mlp")


def test_settings_follow_names_and_layers() -> None:
    density = [{"filter": "mlp", "value": [0.0, 1.0]}, {"filter": "*.norm.*", "value": 0.5}, {"value": 0.25}]
    recipe = recipe_of("ties", 2, per_task=[{"density": density}, {}], layers=5)
    found = {n: recipe.at(n).tasks[0]["density"] for n in ("h.1.mlp.w", "h.4.mlp.w", "h.1.norm.w", "wte", "norm")}
    assert found == {"h.1.mlp.w": 0.25, "h.4.mlp.w": 1.0, "h.1.norm.w": 0.5, "wte": 0.25, "norm": 0.25}
    assert recipe.at("h.1.mlp.w").tasks[1]["density"] == 1.0
