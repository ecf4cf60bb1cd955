"""Every method: trains what it says, leaves the rest, and what it sends rebuilds it."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from tests.lab.sparserl.conftest import SETTINGS
from thinwire.errors import MisuseError
from thinwire.lab.grpo import grpo_step
from thinwire.lab.rollouts import generate
from thinwire.lab.sparserl.adapters import Prompted, attach, shira_rank
from thinwire.lab.sparserl.methods.base import Setting, state_bytes
from thinwire.lab.sparserl.publishing import Sender, as_published
from thinwire.lab.sparserl.registry import find, names
from thinwire.lab.sparserl.starts import recipe_of
from thinwire.lab.sparserl.train import Learner
from thinwire.lab.training import rollouts_for
from thinwire.sync.apply import apply_patch
from thinwire.sync.encode import take_snapshot
from thinwire.sync.layout import StateSource
from thinwire.tensors.tree import state_of
from thinwire.wire.patch import Patch

SPARSE = ("aspg", "random-mask", "frozen-subnetwork", "shira")
CONTEXT = tuple(range(2, 18))


def learnt(model: Any, name: str, steps: int = 6) -> Learner:
    prepared = find("method", name).prepare(model, Setting(1e-2, steps, 5, CONTEXT))
    learner = Learner(prepared, 1.0, 5)
    recipe = recipe_of(SETTINGS, "gcd", "train", prompts=2, group=4)
    source, generator = random.Random(0), torch.Generator().manual_seed(0)
    for _ in range(steps):
        with as_published(prepared.trained):
            batch = rollouts_for(recipe, prepared.model, source, generator)
        advantage = torch.linspace(-1, 1, len(batch.rewards))  # whatever they are worth: there is something to learn
        grpo_step(prepared.model, learner, batch, group=4, advantage=advantage)
    return learner


@pytest.mark.parametrize("name", names("method"))
def test_it_changes_what_it_trains_and_nothing_else(atom: Any, name: str) -> None:
    first = {id(p): p.detach().clone() for p in atom.parameters()}
    learner = learnt(atom, name)
    prepared = learner.prepared
    trained = {id(p) for p in prepared.trained.values()}
    for p in atom.parameters():
        if id(p) not in trained and id(p) in first:
            assert torch.equal(p, first[id(p)])
    assert sum(row["changed"] for row in learner.rows) > 0
    total = sum(p.numel() for p in first.values())
    assert 0 < prepared.trainable <= sum(p.numel() for p in prepared.trained.values())
    if name in SPARSE:
        assert prepared.trainable <= 0.05 * total
        assert state_bytes(prepared.optimiser) < 0.2 * 8 * total
        if name != "aspg":  # whose cells come and go
            moved = sum(int((p != first[id(p)]).sum()) for p in atom.parameters() if id(p) in first)
            assert moved <= prepared.trainable
    for row in learner.rows:
        assert 0 <= row["null"] <= sum(p.numel() for p in prepared.trained.values())
        assert row["sync_payload"] < row["sync_bytes"]


@pytest.mark.parametrize("name", ["dense", "aspg", "lora", "prefix-tuning"])
def test_patches_in_a_row_rebuild_what_was_published(atom: Any, name: str) -> None:
    prepared = find("method", name).prepare(atom, Setting(1e-2, 4, 5, CONTEXT))
    sender = Sender(prepared.sent)
    follower = take_snapshot(StateSource(state_of(prepared.sent, cast=torch.bfloat16)))
    for step in range(4):
        for p in prepared.trained.values():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        prepared.optimiser.step()
        sent = sender.send(prepared.sent)
        assert sent.size == len(sent.file)
        apply_patch(Patch.parse(sent.file), follower.layouts, follower.cells)
    rounded = state_of({n: t.detach().bfloat16() for n, t in prepared.sent.items()}).tensors
    for key, cells in follower.cells.items():
        assert np.array_equal(cells, rounded[key].flatten().view(torch.int16).numpy().view(np.uint16))


def test_what_is_published_is_put_back_bit_for_bit() -> None:
    tensor = torch.tensor([1.0000001, float("nan"), -0.0, float("inf"), 3e-41])
    kept = tensor.view(torch.int32).clone()
    with pytest.raises(ZeroDivisionError), as_published({"t": tensor}):  # noqa: PT012 - it is what happens inside
        assert float(tensor[0]) == 1
        assert torch.equal(tensor[2:4], torch.tensor([-0.0, float("inf")]))
        raise ZeroDivisionError
    assert torch.equal(tensor.view(torch.int32), kept)


@pytest.mark.parametrize("name", ["prefix-tuning", "prompt-tuning"])
def test_virtual_tokens_give_pefts_own_logits(atom: Any, name: str) -> None:
    prepared = find("method", name).prepare(atom, Setting(1e-2, 4, 5, CONTEXT))
    wrapped = prepared.model
    assert isinstance(wrapped, Prompted)
    tokens = torch.randint(2, 90, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    places = torch.arange(7).expand(3, -1)
    with torch.no_grad():
        ours = wrapped(input_ids=tokens, attention_mask=mask, position_ids=places).logits
        oracle = wrapped.inner(input_ids=tokens, attention_mask=mask).logits[:, -7:]
    torch.testing.assert_close(ours, oracle, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["prefix-tuning", "prompt-tuning", "lora"])
def test_sampling_with_a_cache_gives_the_probabilities_of_one_pass(atom: Any, name: str) -> None:
    from thinwire.lab.rollouts import token_logprobs

    model = find("method", name).prepare(atom, Setting(1e-2, 4, 5, CONTEXT)).model
    prompts = [[5, 6, 7], [9, 10, 11, 12, 13]]  # of two lengths: one row is padded
    batch = generate(model, prompts, tokens_max=5, end=1, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        again = token_logprobs(model, batch.tokens, batch.attention, first=batch.prompt_width) * batch.mask
    torch.testing.assert_close(again, batch.logprobs, rtol=1e-4, atol=1e-4)


def test_methods_that_do_not_fit_a_model_say_so() -> None:
    with pytest.raises(MisuseError, match="Linear layers"):
        shira_rank(torch.nn.LayerNorm(3), 0.01)
    with pytest.raises(MisuseError, match="PEFT cannot put"):
        attach("LoraConfig", torch.nn.Sequential(torch.nn.LayerNorm(3)), Setting(1e-3, 1, 0), r=2)
