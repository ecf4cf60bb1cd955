"""GRPO's laws: what the advantages sum to, what the loss's gradient is, and what padding must not touch."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thinwire.errors import MisuseError
from thinwire.lab.grpo import advantages, grpo_loss, grpo_step
from thinwire.lab.optimiser import MasterAdamW
from thinwire.lab.rollouts import Rollouts, concatenate, generate, sample, token_logprobs
from thinwire.lab.tasks import CharTokenizer, SortDigits, problem_set
from thinwire.lab.training import evaluate

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model() -> Any:
    from thinwire.lab.models import tiny_llama

    return tiny_llama(13, hidden=64, layers=2, dtype=torch.float32, seed=3, init=0.3)


def prompts_of_many_lengths(count: int, seed: int = 0) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(2, 13) for _ in range(source.randrange(1, 9))] for _ in range(count)]


@given(st.lists(st.floats(0, 1, width=32), min_size=2, max_size=12), st.integers(1, 4))
def test_advantages_of_a_group_sum_to_zero_and_keep_its_order(rewards: list[float], groups: int) -> None:
    advantage = advantages(torch.tensor(rewards * groups), len(rewards)).view(groups, -1)
    assert torch.allclose(advantage.sum(dim=1), torch.zeros(groups), atol=1e-3)
    ranked = advantage[0][torch.tensor(rewards).argsort()]
    assert bool((ranked.diff() >= -1e-6).all())


@given(st.floats(0, 1, width=32), st.integers(2, 9))
def test_equal_rewards_teach_nothing(reward: float, group: int) -> None:
    assert torch.equal(advantages(torch.full((2 * group,), reward), group), torch.zeros(2 * group))


def test_a_batch_that_teaches_nothing_is_a_step_without_gradient() -> None:
    from thinwire.lab.models import tiny_llama

    pupil = tiny_llama(13, hidden=64, layers=1, seed=7)
    before = [weight.detach().clone() for weight in pupil.parameters()]
    batch = generate(pupil, [[4, 5]] * 8, tokens_max=2, end=1)
    report = grpo_step(pupil, MasterAdamW(pupil, lr=1e-2), batch, group=4)
    assert (report.loss, report.gradient_norm, report.reward) == (0.0, 0.0, 0.0)
    assert all(torch.equal(w, b) for w, b in zip(pupil.parameters(), before, strict=True))


def test_leaving_useless_answers_out_changes_nothing() -> None:
    from thinwire.lab.models import tiny_llama

    twin = tiny_llama(13, hidden=64, layers=2, dtype=torch.float32, seed=5)
    batch = generate(twin, [[3, 4]] * 16, tokens_max=3, end=1, generator=torch.Generator().manual_seed(4))
    rewards = torch.tensor([1.0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 0, 0])
    batch = Rollouts(batch.tokens, batch.attention, batch.mask, batch.logprobs, rewards)
    report = grpo_step(twin, MasterAdamW(twin, lr=0.0), batch, group=4)
    now = token_logprobs(twin, batch.tokens, batch.attention)
    loss = grpo_loss(now, batch.logprobs, batch.mask, advantages(rewards, 4))
    loss.backward()
    norm = torch.cat([weight.grad.flatten() for weight in twin.parameters()]).norm()
    assert report.loss == pytest.approx(float(loss.detach()), abs=1e-6)
    assert report.gradient_norm == pytest.approx(float(norm), rel=1e-4)


@pytest.mark.parametrize(("count", "group"), [(7, 2), (8, 3), (4, 1), (4, 0)])
def test_rewards_that_do_not_make_groups_are_refused(count: int, group: int) -> None:
    with pytest.raises(MisuseError, match="groups"):
        advantages(torch.zeros(count), group)


def test_at_ratio_one_the_gradient_is_that_of_reinforce(model: Any) -> None:
    batch = sample(
        model, CharTokenizer(), SortDigits(4), problem_set(SortDigits(4), 4, 1), group=4, tokens_max=4,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    advantage = torch.randn(16, generator=torch.Generator().manual_seed(2))

    def gradient(loss_of: Any) -> torch.Tensor:
        model.zero_grad()
        loss_of(token_logprobs(model, batch.tokens, batch.attention)).backward()
        return torch.cat([weight.grad.flatten().clone() for weight in model.parameters()])

    lengths = batch.mask.sum(dim=1)
    clipped = gradient(lambda now: grpo_loss(now, now.detach(), batch.mask, advantage))
    reinforce = gradient(lambda now: -((now * batch.mask).sum(dim=1) / lengths * advantage).mean())
    assert reinforce.norm() > 0
    torch.testing.assert_close(clipped, reinforce, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("ratio", "advantage", "passes"),
    [(1.5, 1.0, False), (1.5, -1.0, True), (0.5, 1.0, True), (0.5, -1.0, False), (1.1, 1.0, True), (0.9, -1.0, True)],
)
def test_clipping_stops_the_gradient_only_where_the_step_has_gone_far_enough(
    ratio: float, advantage: float, passes: bool
) -> None:
    behaviour = torch.zeros(1, 2)
    logprobs = torch.tensor([[0.0, ratio]]).log().nan_to_num(neginf=0.0).requires_grad_()
    mask = torch.tensor([[0.0, 1.0]])
    loss = grpo_loss(logprobs, behaviour, mask, torch.tensor([advantage]))
    loss.backward()
    assert logprobs.grad is not None
    assert bool(logprobs.grad[0, 1] != 0) == passes
    if passes:
        assert float(loss.detach()) == pytest.approx(-ratio * advantage)


def test_padding_and_prompts_do_not_count() -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs, behaviour = torch.randn(2, 4, 6, generator=generator).unbind()
    mask = (torch.arange(6) >= 2).float() * (torch.arange(6) < torch.tensor([[3], [4], [5], [6]])).float()
    advantage = torch.tensor([1.0, -1.0, 0.5, 2.0])
    loss = grpo_loss(logprobs, behaviour, mask, advantage)
    noisy = torch.where(mask.bool(), logprobs, 1e6)
    assert torch.equal(grpo_loss(noisy, behaviour, mask, advantage), loss)
    assert float(grpo_loss(logprobs, behaviour, torch.zeros(4, 6), advantage)) == 0.0


@pytest.mark.parametrize("rows_max", [1, 5, 16])
def test_a_batch_in_parts_gives_the_same_step(rows_max: int) -> None:
    from thinwire.lab.models import tiny_llama

    results = []
    for rows in (rows_max, 1000):
        twin = tiny_llama(13, hidden=64, layers=2, dtype=torch.float32, seed=5)
        batch = generate(twin, [[3, 4]] * 16, tokens_max=3, end=1, generator=torch.Generator().manual_seed(4))
        batch = Rollouts(batch.tokens, batch.attention, batch.mask, batch.logprobs, batch.mask.sum(dim=1))
        optimiser = MasterAdamW(twin, lr=0.0)
        results.append(grpo_step(twin, optimiser, batch, group=8, rows_max=rows))
    assert results[0].gradient_norm == pytest.approx(results[1].gradient_norm, rel=1e-4)
    assert results[0].loss == pytest.approx(results[1].loss, abs=1e-6)
    assert results[0].drift < 1e-5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rollout_logprobs_are_the_models_logprobs(model: Any, temperature: float) -> None:
    rollouts = generate(
        model, prompts_of_many_lengths(32), tokens_max=6, end=1, temperature=temperature,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    with torch.no_grad():
        again = token_logprobs(model, rollouts.tokens, rollouts.attention) * rollouts.mask
        fewer = token_logprobs(model, rollouts.tokens, rollouts.attention, first=rollouts.prompt_width)
    torch.testing.assert_close(rollouts.logprobs, again, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(fewer * rollouts.mask, again, rtol=1e-3, atol=1e-4)
    assert rollouts.prompt_width == 8


def test_an_answer_does_not_depend_on_the_padding_of_its_prompt(model: Any) -> None:
    prompts = prompts_of_many_lengths(12, seed=2)
    together = generate(model, prompts, tokens_max=5, end=1, temperature=0.0).answers()
    alone = [generate(model, [prompt], tokens_max=5, end=1, temperature=0.0).answers()[0] for prompt in prompts]
    assert together == alone


def test_an_answer_stops_at_its_end_token(model: Any) -> None:
    rollouts = generate(model, [[2, 3]] * 200, tokens_max=6, end=1, generator=torch.Generator().manual_seed(0))
    answers = rollouts.answers()
    assert any(len(answer) < 6 for answer in answers)
    for answer, row, mask in zip(answers, rollouts.tokens, rollouts.mask, strict=True):
        assert 1 not in answer[:-1]
        assert len(answer) == 6 or answer[-1] == 1
        assert not row[2 + len(answer) :].any()
        assert not mask[2 + len(answer) :].any()


@pytest.mark.parametrize(("prompts", "temperature"), [([], 1.0), ([[]], 1.0), ([[2]], 0.7)])
def test_generating_from_nothing_or_at_another_temperature_is_refused(
    model: Any, prompts: list[list[int]], temperature: float
) -> None:
    with pytest.raises(MisuseError):
        generate(model, prompts, tokens_max=2, end=1, temperature=temperature)


def test_concatenated_batches_keep_answers_rewards_and_logprobs(model: Any) -> None:
    batches = [
        generate(model, [prompt] * 3, tokens_max=length, end=1, generator=torch.Generator().manual_seed(length))
        for prompt, length in (([2], 4), ([5, 6, 7, 8], 2))
    ]
    joined = concatenate(batches)
    assert joined.tokens.shape == joined.mask.shape == (6, 4 + max(b.mask.shape[1] - b.prompt_width for b in batches))
    assert joined.answers() == batches[0].answers() + batches[1].answers()
    assert len(joined.rewards) == 6
    with torch.no_grad():
        again = token_logprobs(model, joined.tokens, joined.attention) * joined.mask
    torch.testing.assert_close(joined.logprobs, again, rtol=1e-3, atol=1e-4)
    with pytest.raises(MisuseError):
        concatenate([])


def test_learning_one_answer_raises_its_reward() -> None:
    """The whole path: sample, score, step; a model that may answer '0' or not learns to."""
    from thinwire.lab.models import tiny_llama

    pupil = tiny_llama(13, hidden=64, layers=1, seed=7)
    optimiser = MasterAdamW(pupil, lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    rewards = []
    for _ in range(30):
        batch = generate(pupil, [[4, 5]] * 64, tokens_max=1, end=1, generator=generator)
        scored = Rollouts(batch.tokens, batch.attention, batch.mask, batch.logprobs, (batch.tokens[:, 2] == 2).float())
        rewards.append(grpo_step(pupil, optimiser, scored, group=8).reward)
    assert rewards[0] < 0.4
    assert sum(rewards[-5:]) / 5 > 0.9


def test_two_evaluations_of_the_same_weights_are_equal() -> None:
    from thinwire.lab.recipes import tiny_recipe

    recipe = tiny_recipe()
    weights = recipe.pretrained(1)
    first = evaluate(recipe, weights, seed=5, problems=16)
    assert first == evaluate(recipe, weights, seed=5, problems=16)
    assert len(first.per_problem) == 16
