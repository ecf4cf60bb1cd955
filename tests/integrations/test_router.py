"""The router: every switch comes back bit for bit; batches of mixed tasks are what each task gives by itself."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.merge.states import patch_between, tuned
from tests.sync.models import bits, small_model
from thinwire.errors import (
    DamagedObjectError,
    MalformedError,
    MisuseError,
    ObjectExistsError,
    ObjectNotFoundError,
    RetryError,
    WrongBaseError,
)
from thinwire.integrations.merging import merge
from thinwire.integrations.router import SparseTaskRouter
from thinwire.integrations.task_store import TaskStore
from thinwire.stores import open_store
from thinwire.wire.patch import Patch


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(40, 16)
        self.mix = torch.nn.Linear(16, 16)
        self.head = torch.nn.Linear(16, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> dict[str, object]:
        hidden = torch.relu(self.mix(self.embed(x))) * scale
        return {"logits": self.head(hidden), "hidden": (hidden,), "scale": scale, "none": None}


def expert(model: torch.nn.Module, seed: int, share: float = 0.05) -> tuple[Patch, torch.nn.Module]:
    """A fine-tune of ``model`` with a share of the weights moved, and the patch that leads to it."""
    base = {n: t.clone() for n, t in model.state_dict().items()}
    new = tuned({n: t for n, t in base.items() if n != "head.weight"}, seed, share)
    copy = Net() if isinstance(model, Net) else small_model()
    copy.load_state_dict(new | ({"head.weight": new["embed.weight"]} if "head.weight" in base else {}))
    return patch_between(dict(model.state_dict()), dict(copy.state_dict())), copy


@pytest.fixture
def served() -> tuple[Net, SparseTaskRouter, dict[str, torch.nn.Module]]:
    model = Net()
    found = {name: expert(model, seed) for seed, name in enumerate(("math", "code", "law"), start=1)}
    return model, SparseTaskRouter(model, {n: p for n, (p, _) in found.items()}), {n: m for n, (_, m) in found.items()}


Served = tuple[Net, SparseTaskRouter, dict[str, torch.nn.Module]]


def test_a_thousand_random_switches_come_back_to_the_base_each_time(served: Served) -> None:
    model, router, experts = served
    base, choose = router.digest(), random.Random(0)
    assert base == SparseTaskRouter(Net(), {"x": expert(Net(), 1)[0]}).digest()
    for _ in range(1000):
        names = choose.choices(list(experts), k=choose.randint(1, 3))
        with router.task(*names):
            if len(names) == 1:
                assert router.digest() == router.tasks[names[0]].result
        assert router.digest() == base
    assert bits(model) == bits(Net())


def test_a_task_is_the_expert_and_one_over_another_is_both(served: Served) -> None:
    model, router, experts = served
    with router.task("math"):
        assert bits(model) == bits(experts["math"])
        with router.task("code"):
            nested = bits(model)
            with router.disable_adapter():
                assert bits(model) == bits(Net())
            assert bits(model) == nested
        assert bits(model) == bits(experts["math"])
    with router.task("math", "code"):
        assert bits(model) == nested
    with router.task("code", "math"):
        assert bits(model) != nested


def test_what_raises_within_a_task_still_restores(served: Served) -> None:
    model, router, _ = served
    with pytest.raises(ZeroDivisionError), router.task("math"), router.task("code"):
        _ = 1 / 0
    assert bits(model) == bits(Net())
    with pytest.raises(MisuseError, match="no task 'poetry'"), router.task("poetry"):
        pass
    assert bits(model) == bits(Net())


def test_adapters_are_set_disabled_swapped_and_deleted_as_in_peft(served: Served) -> None:
    model, router, experts = served
    router.set_adapter("math")
    assert (router.active_adapters, bits(model)) == (["math"], bits(experts["math"]))
    with router.disable_adapter():
        assert (router.active_adapters, bits(model)) == ([], bits(Net()))
    with router.task("code"):  # the outermost context starts from the base
        assert bits(model) == bits(experts["code"])
    patch, other = expert(Net(), 9)
    with pytest.raises(MisuseError, match="already"):
        router.load_adapter(patch, "math")
    assert router.load_adapter(patch, "math", replace=True).result == patch.result
    assert bits(model) == bits(other)
    with pytest.raises(MisuseError, match="active"):
        router.delete_adapter("math")
    router.set_adapter(["law", "code"])
    router.set_adapter(None)
    router.delete_adapter("math")
    assert (sorted(router.tasks), bits(model)) == (["code", "law"], bits(Net()))
    with pytest.raises(MisuseError):
        router.delete_adapter("math")


@pytest.mark.parametrize(("method", "settings"), [("task_arithmetic", {}), ("ties", {"density": 0.5})])
def test_tasks_can_be_merged_into_a_further_one(served: Served, method: str, settings: dict[str, float]) -> None:
    model, router, _ = served
    patches = [expert(Net(), seed)[0] for seed in (1, 2)]
    weights = [0.6, 0.4]
    expected = merge(dict(Net().state_dict()), patches, weights=weights, method=method, **settings)
    router.add_weighted_adapter(["math", "code"], weights, "both", method, **settings)
    with router.task("both"):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert bits(model) == bits(Net())
    for bad in ((["math"], weights, "x"), (["math", "nothing"], weights, "x"), (["math", "code"], weights, "both")):
        with pytest.raises(MisuseError):
            router.add_weighted_adapter(*bad)
    with pytest.raises(MisuseError):
        router.add_weighted_adapter(["math"], [1.0], "x", "tiess")


def test_rows_of_a_mixed_batch_are_what_their_task_gives(served: Served) -> None:
    _, router, experts = served
    x = torch.arange(24).reshape(8, 3)
    tasks = ["math", None, "code", "math", "law", None, "code", "math"]
    with torch.no_grad():
        out = router.forward(x, task_id=tasks, scale=2.0)
        for row, name in enumerate(tasks):
            alone = (experts[name] if name else Net())(x, scale=2.0)
            torch.testing.assert_close(out["logits"][row], alone["logits"][row])
            torch.testing.assert_close(out["hidden"][0][row], alone["hidden"][0][row])
        assert (out["scale"], out["none"]) == (2.0, None)
        same = [experts["math"](x)["logits"], router.forward(x, task_id="math")["logits"]]
        assert torch.equal(*same)
        assert torch.equal(router(x, task_id=["math"] * 8)["logits"], same[0])
        router.set_adapter("math")
        assert torch.equal(router.forward(x)["logits"], same[0])
        with router.task("code"):
            assert torch.equal(router(x)["logits"], experts["code"](x)["logits"])


def test_outputs_without_rows_are_refused_rather_than_guessed(served: Served) -> None:
    model, router, _ = served
    x = torch.arange(4).reshape(2, 2)
    with pytest.raises(MisuseError, match="task_id is empty"):
        router.forward(x, task_id=[])
    model.forward = lambda x: {"loss": x.float().mean()}  # type: ignore[method-assign, assignment]
    with pytest.raises(MisuseError, match=r"'loss'.*no row"):
        router.forward(x, task_id=["math", "code"])
    assert bits(model) == bits(Net())
    with pytest.raises(MisuseError, match="state dict"):
        SparseTaskRouter(dict(Net().state_dict())).forward(x)


def test_threads_with_tasks_of_their_own_each_see_theirs(served: Served) -> None:
    model, router, experts = served
    x = torch.arange(6).reshape(2, 3)
    with torch.no_grad():
        expected = {name: found(x)["logits"] for name, found in experts.items()}

    def serve(name: str) -> bool:
        with torch.no_grad():
            return all(torch.equal(router.forward(x, task_id=name)["logits"], expected[name]) for _ in range(30))

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(serve, [*experts, *experts]))
    assert bits(model) == bits(Net())


def test_a_thread_that_cannot_have_its_turn_is_told(served: Served) -> None:
    model, _, _ = served
    router = SparseTaskRouter(model, {"math": expert(Net(), 1)[0]}, timeout_s=0.05)
    x = torch.zeros(1, 1, dtype=torch.long)
    with router.task("math"), ThreadPoolExecutor(1) as pool:
        pool.submit(router.forward, x, task_id="math").result(30)
        with pytest.raises(RetryError, match="math"):
            pool.submit(router.forward, x).result(30)


def test_a_compiled_model_sees_every_switch(served: Served) -> None:
    model, router, experts = served
    x = torch.arange(6).reshape(2, 3)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        for name in ("math", "code", "math"):
            with router.task(name):
                torch.testing.assert_close(compiled(x)["logits"], experts[name](x)["logits"])
            torch.testing.assert_close(compiled(x)["logits"], Net()(x)["logits"])


def test_it_works_under_inference_mode(served: Served) -> None:
    model, router, experts = served
    x = torch.arange(6).reshape(2, 3)
    with torch.inference_mode(), router.task("math"):
        assert torch.equal(model(x)["logits"], experts["math"](x)["logits"])
    assert bits(model) == bits(Net())


def test_tasks_are_served_from_a_store(tmp_path: Path) -> None:
    patch, tuned_model = expert(Net(), 1)
    tasks = TaskStore(str(tmp_path))
    tasks.put("math", patch)
    with pytest.raises(ObjectExistsError):
        tasks.put("math", patch)
    for bad in ("a/b", "", "../x", "ü"):
        with pytest.raises(MisuseError):
            tasks.put(bad, patch)
    open_store(tmp_path).put("tasks/broken.safetensors", [b"not a patch"])
    assert tasks.names() == ["broken", "math"]
    with pytest.raises(MalformedError):
        tasks.get("broken", size_max=1000)
    with pytest.raises(DamagedObjectError):
        tasks.get("math", size_max=100)
    model = Net()
    router = SparseTaskRouter(model, store=tmp_path)
    assert router.tasks == {}
    with router.task("math"):
        assert bits(model) == bits(tuned_model)
    assert bits(model) == bits(Net())
    with pytest.raises(ObjectNotFoundError), router.task("poetry"):
        pass


def test_patches_of_another_base_and_files_that_are_none_are_refused(tmp_path: Path) -> None:
    model = Net()
    patch, other = expert(model, 1)
    with pytest.raises(WrongBaseError, match=patch.parent):
        SparseTaskRouter(other, {"math": patch})
    path = tmp_path / "math.safetensors"
    with pytest.raises(MisuseError, match="no patch"):
        SparseTaskRouter(model, {"math": path})
    path.write_bytes(b"".join(patch.encode()))
    router = SparseTaskRouter(model, {"math": path})
    assert router.tasks["math"].changed == patch.changed
    assert router.tasks["math"].size == patch.changed * (4 + 4 + 4)
    with pytest.raises(MisuseError, match="no task has been loaded"):
        SparseTaskRouter(Net()).digest()


def test_a_transformers_model_with_tied_weights_is_routed() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    state = {
        n: t.clone() for n, t in model.state_dict().items() if n != "lm_head.weight"
    }  # as save_pretrained writes it
    new = tuned(state, 1, 0.1)
    router = SparseTaskRouter(model, {"math": patch_between(state, new)})
    base, x = router.digest(), torch.randint(64, (3, 5))
    with torch.no_grad():
        plain = model(x).logits
        out = router.forward(input_ids=x, use_cache=False, task_id=["math", None, "math"])
        with router.task("math"):
            torch.testing.assert_close(out.logits[[0, 2]], model(x[[0, 2]]).logits)
            assert torch.equal(model.lm_head.weight, new["model.embed_tokens.weight"])
        torch.testing.assert_close(out.logits[1], plain[1])
    assert router.digest() == base
