"""Laws of corruption, shards, faults, models and what is shown of workers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

from thinwire.errors import MisuseError
from thinwire.lab.text.config import CORRUPTIONS, OF_TOKENS, LmConfig
from thinwire.lab.text.corruption import Corruption, corrupt, swapped
from thinwire.lab.text.evaluation import evaluate, generate, loss_sum
from thinwire.lab.text.model import make_gpt, next_token_loss
from thinwire.lab.text.shards import corrupted_ranks, make_text_shards
from thinwire.lab.trainer.faults import Fault, PastWeights
from thinwire.lab.trainer.learner import Learner
from thinwire.lab.trainer.options import TrainingOptions
from thinwire.lab.trainer.watch import WorkerRow, workers_line, workers_table
from thinwire.lab.trainer.workers import Workers

# --- corruption ----------------------------------------------------------------------------------------------------

shapes = st.tuples(st.integers(1, 6), st.integers(2, 40))
kinds = st.sampled_from(CORRUPTIONS)


def some_windows(shape: tuple[int, int], vocabulary: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, vocabulary, shape, dtype=torch.int32, generator=torch.Generator().manual_seed(seed))


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(shape=shapes, kind=kinds, vocabulary=st.integers(1, 50), seed=st.integers(0, 99))
def test_with_probability_zero_nothing_is_wrong(shape: tuple[int, int], kind: str, vocabulary: int, seed: int) -> None:
    made = some_windows(shape, vocabulary, seed)
    inputs, targets = corrupt(made, kind, 0.0, vocabulary=vocabulary, generator=drawn(seed))
    assert torch.equal(inputs, made[:, :-1].long())
    assert torch.equal(targets, made[:, 1:].long())
    none = Corruption(kind, 0.0, seed=seed, rank=1)
    assert none.fault(epoch=0, index=seed) == Fault()
    assert not none.repeats(epoch=0, index=seed)


@given(shape=shapes, p=st.floats(0, 1), seed=st.integers(0, 999))
def test_swapped_tokens_stay_in_their_window_and_change_places_in_pairs(
    shape: tuple[int, int], p: float, seed: int
) -> None:
    places = torch.arange(shape[1]).repeat(shape[0], 1)  # every token is its place
    found = swapped(places, p, drawn(seed))
    assert torch.equal(found.sort(dim=1).values, places)
    assert torch.equal(found.gather(1, found), places)  # who has mine, I have theirs
    if p == 1:
        assert int((found == places).sum()) == shape[0] * (shape[1] % 2)


@pytest.mark.parametrize("kind", OF_TOKENS)
@pytest.mark.parametrize("p", [0.05, 0.3, 0.8])
def test_the_share_of_spoilt_tokens_is_the_probability(kind: str, p: float) -> None:
    rows, length = 400, 129
    made = torch.arange(length).repeat(rows, 1)  # no two alike, so that what moved is seen
    inputs, targets = corrupt(made, kind, p, vocabulary=length, generator=drawn(1))
    wrong = float((targets != made[:, 1:]).double().mean())
    assert abs(wrong - p) < 5 * math.sqrt(p * (1 - p) / (rows * length)) + 1 / length  # an odd one stays
    if kind == "label_noise":
        assert torch.equal(inputs, made[:, :-1])
    else:
        assert torch.equal(inputs[:, 1:], targets[:, :-1])  # the same text on both sides
    assert torch.equal(made, torch.arange(length).repeat(rows, 1))  # what was given is as it was


def test_random_tokens_are_all_others_alike() -> None:
    made = torch.full((200, 101), 3)
    _, targets = corrupt(made, "random_tokens", 1.0, vocabulary=6, generator=drawn(2))
    counts = torch.bincount(targets.flatten(), minlength=6).double() / targets.numel()
    assert counts[3] == 0
    assert float((counts[[0, 1, 2, 4, 5]] - 0.2).abs().max()) < 0.02


@given(kind=st.sampled_from(OF_TOKENS), seed=st.integers(0, 99), index=st.integers(0, 50))
def test_what_is_drawn_depends_on_seed_worker_epoch_and_step_alone(kind: str, seed: int, index: int) -> None:
    made = some_windows((8, 65), 30)

    def targets(seed: int, rank: int, epoch: int, index: int) -> torch.Tensor:
        return Corruption(kind, 0.5, seed=seed, rank=rank).pair(made, epoch=epoch, index=index, vocabulary=30)[1]

    one = targets(seed, 1, 2, index)
    torch.manual_seed(seed + 1)
    assert torch.equal(targets(seed, 1, 2, index), one)
    for other in ((seed + 1, 1, 2, index), (seed, 0, 2, index), (seed, 1, 3, index), (seed, 1, 2, index + 1)):
        assert not torch.equal(targets(*other), one)


@pytest.mark.parametrize("kind", ["duplicated_batch", "stale", "sign_flip"])
def test_kinds_of_whole_steps_strike_as_often_as_asked_and_leave_tokens_alone(kind: str) -> None:
    bad = Corruption(kind, 0.25, seed=1, rank=2, delay=7)
    struck = [bad.repeats(epoch=k // 100, index=k % 100) or bad.fault(epoch=k // 100, index=k % 100) != Fault()
              for k in range(2000)]  # fmt: skip
    assert abs(sum(struck) / 2000 - 0.25) < 0.05
    always = Corruption(kind, 1.0, delay=7)
    wrong = {"stale": Fault(delay=7), "sign_flip": Fault(sign=-1.0), "duplicated_batch": Fault()}
    assert always.fault(epoch=0, index=0) == wrong[kind]
    assert always.repeats(epoch=0, index=3) == (kind == "duplicated_batch")
    made = some_windows((3, 9), 5)
    assert torch.equal(always.pair(made, epoch=0, index=0, vocabulary=5)[1], made[:, 1:].long())


def test_unknown_kinds_and_probabilities_are_refused() -> None:
    for kind, p in (("typos", 0.1), ("stale", -0.1), ("stale", 1.1), ("stale", math.nan)):
        with pytest.raises(MisuseError):
            Corruption(kind, p)


# --- shards --------------------------------------------------------------------------------------------------------


@given(count=st.integers(1, 300), workers=st.integers(1, 9), kind=st.sampled_from(["iid", "non_iid"]))
def test_shards_are_disjoint_and_of_equal_size(count: int, workers: int, kind: str) -> None:
    if count < workers:
        with pytest.raises(MisuseError, match="too few"):
            make_text_shards(count, workers, kind=kind, seed=1)
        return
    shards = make_text_shards(count, workers, kind=kind, seed=1)
    assert [len(shard) for shard in shards] == [count // workers] * workers
    together = torch.cat(shards).tolist()
    assert len(set(together)) == len(together)
    assert set(together) <= set(range(count))
    if kind == "non_iid":
        assert all(torch.equal(shard.diff(), torch.ones(len(shard) - 1)) for shard in shards)


def test_corrupted_workers_are_the_last_and_have_the_shards_of_an_even_run() -> None:
    clean, spoilt = (make_text_shards(100, 4, kind=kind, seed=3) for kind in ("iid", "clean_vs_corrupt"))
    assert all(torch.equal(a, b) for a, b in zip(clean, spoilt, strict=True))
    assert list(corrupted_ranks(4, kind="clean_vs_corrupt", corrupt_workers=3)) == [1, 2, 3]
    assert list(corrupted_ranks(4, kind="non_iid", corrupt_workers=3)) == []
    with pytest.raises(MisuseError, match="3 of 2 workers"):
        corrupted_ranks(2, kind="clean_vs_corrupt", corrupt_workers=3)
    with pytest.raises(MisuseError, match="give iid"):
        make_text_shards(9, 3, kind="skewed", seed=0)


# --- faults --------------------------------------------------------------------------------------------------------


def learner(past: int = 0, **options: object) -> Learner:
    torch.manual_seed(0)
    model = nn.Linear(3, 1, bias=False)
    plain = {"optimizer": "sgd", "lr": 0.5, "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant"}
    config = TrainingOptions(**(plain | options))  # type: ignore[arg-type]
    return Learner(model, config, Workers(0, 1, torch.device("cpu")), steps=9, warmup_steps=0, past=past)


def squares(model: nn.Module, part: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return (model(part[0]) ** 2).sum()


def test_a_flipped_sign_climbs_where_others_descend_and_tells_its_true_loss() -> None:
    batch = [(torch.tensor([[1.0, 2.0, -1.0]]),)]
    good, bad = learner(), learner()
    start = good.model.weight.detach().clone()
    one, other = good.step(0, batch, squares), bad.step(0, batch, squares, Fault(sign=-1.0))
    assert one.loss == other.loss > 0
    assert torch.equal(good.model.weight.grad, -bad.model.weight.grad)
    assert torch.allclose(good.model.weight - start, start - bad.model.weight)
    clipped = learner(clip_norm=1e-3, accumulate=1)
    clipped.step(0, batch, squares, Fault(sign=-1.0))
    assert float((clipped.model.weight.detach() - start).norm()) == pytest.approx(0.5e-3, rel=1e-3)


@given(delay=st.integers(0, 3), steps=st.integers(1, 8))
def test_a_stale_gradient_is_that_at_the_weights_of_then(delay: int, steps: int) -> None:
    batch = (torch.tensor([[0.3, -0.2, 0.1]]),)
    stale = learner(past=3, lr=0.1)
    weights = [stale.model.weight.detach().clone()]
    for number in range(steps):
        stale.step(number, [batch], squares, Fault(delay=delay))
        then = weights[max(0, number - delay)].requires_grad_()
        (gradient,) = torch.autograd.grad(((batch[0] @ then.T) ** 2).sum(), then)
        weights.append((weights[-1] - 0.1 * gradient).detach())
        assert torch.allclose(stale.model.weight, weights[-1], atol=1e-7)


def test_past_weights_go_on_from_their_state_and_refuse_those_of_another_model() -> None:
    model = nn.Linear(2, 2)
    past = PastWeights(model, steps=2)
    for number in range(4):
        nn.init.constant_(model.weight, number)
        with past.step(0):
            pass
    again = PastWeights(model, steps=2)
    again.load(past.state())
    for one in (past, again):
        with one.step(2):
            assert model.weight[0, 0].item() == 2.0
    with pytest.raises(ValueError, match="another model"):
        PastWeights(nn.Linear(3, 2), steps=2).load(past.state())
    with pytest.raises(RuntimeError, match="fails"), past.step(1):
        raise RuntimeError("it fails")
    assert model.weight[0, 0].item() == 3.0  # whatever happened, the weights are those of now


# --- models --------------------------------------------------------------------------------------------------------


def weights(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


def test_the_models_are_as_large_as_said() -> None:
    tiny, small = LmConfig().shape, LmConfig(model="gpt-small").shape
    assert weights(make_gpt(65, **tiny._asdict())) == 108_352
    assert weights(make_gpt(65, **small._asdict())) == 2_463_776
    tied, loose = (make_gpt(50, context=8, layers=1, width=16, heads=2, tied=tied) for tied in (True, False))
    assert weights(loose) - weights(tied) == 50 * 16
    with pytest.raises(MisuseError, match="no multiple"):
        make_gpt(9, context=8, width=10, heads=3)


def test_a_model_sees_no_token_before_it_has_to_tell_it() -> None:
    model = make_gpt(20, context=16, layers=2, width=16, heads=2, seed=0).eval()
    tokens = torch.randint(0, 20, (1, 16), generator=drawn(0))
    changed = tokens.clone()
    changed[0, 9:] = (changed[0, 9:] + 1) % 20
    before, after = model(tokens).logits, model(changed).logits
    assert torch.allclose(before[:, :9], after[:, :9], atol=1e-6)
    assert not torch.allclose(before[:, 9:], after[:, 9:], atol=1e-3)


def test_a_seed_names_the_weights_and_leaves_the_random_state_alone() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, same, other = (make_gpt(9, context=8, width=16, heads=2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    pairs = list(zip(one.parameters(), same.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(next(one.parameters()), next(other.parameters()))


def test_the_evaluated_loss_is_the_mean_over_all_targets_however_it_is_batched() -> None:
    model = make_gpt(11, context=8, layers=1, width=16, heads=2, dropout=0.5, seed=0)
    tokens = torch.randint(0, 11, (100,), generator=drawn(1))
    found = [evaluate(model, tokens, context=8, batch=batch) for batch in (1, 5, 100)]
    assert found == pytest.approx([found[0]] * 3, rel=1e-5)
    assert model.training  # as it was, and no dropout while it was evaluated
    model.eval()
    windows = tokens.unfold(0, 9, 8)
    direct = next_token_loss(model, windows[:, :-1], windows[:, 1:])
    assert found[0] == pytest.approx(direct.item(), rel=1e-5)
    parts = [loss_sum(model, windows[k::2]) for k in range(2)]
    assert sum(x for x, _ in parts) / sum(n for _, n in parts) == pytest.approx(found[0], rel=1e-5)


def test_what_is_written_depends_on_the_generator_and_follows_the_model() -> None:
    model = make_gpt(5, context=4, layers=1, width=16, heads=2, seed=0)
    one, same, other = (generate(model, torch.tensor([1]), 30, context=4, generator=drawn(s)) for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    cycle = torch.arange(200) % 5
    for _ in range(60):
        optimizer.zero_grad()
        next_token_loss(model, cycle[:-1].view(1, -1)[:, :4], cycle[1:].view(1, -1)[:, :4]).backward()
        pieces = cycle.unfold(0, 5, 3)
        next_token_loss(model, pieces[:, :-1], pieces[:, 1:]).backward()
        optimizer.step()
    written = generate(model, torch.tensor([0]), 12, context=4, generator=drawn(0), temperature=0.1)
    assert written.tolist() == [(k + 1) % 5 for k in range(12)]


# --- what is shown -------------------------------------------------------------------------------------------------


def shown(rows: list[WorkerRow]) -> list[str]:
    console = Console(width=100, force_terminal=False, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(workers_table(rows, "tokens"))
    return console.export_text().splitlines()


def test_a_table_shows_each_worker_and_how_much_it_counts() -> None:
    rows = [
        WorkerRow(0, 1.25, 0.75, 12345.6, {"loss_ema": 1.3}),
        WorkerRow(1, 3.5, 0.25, 9000.0, {"loss_ema": 3.4}),
        WorkerRow(2, math.nan, 0.0, 1.0),
    ]
    head, first, second, third = shown(rows)
    assert head.split() == ["worker", "loss", "loss_ema", "weight", "tokens/s"]
    assert {"0", "1.2500", "1.3", "75.0", "12,346"} <= set(first.split())
    bars = [line.count("█") for line in (first, second, third)]
    assert bars == [24, 8, 0]
    assert "nan" in third
    assert "-" in third.split()
    assert workers_line(rows).count("worker") == 3


def test_bars_of_equal_workers_are_half_full() -> None:
    assert [line.count("█") for line in shown([WorkerRow(k, 1.0, 0.125, 1.0) for k in range(8)])[1:]] == [12] * 8


# --- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"corruption": "token_swap"}, "for shards clean_vs_corrupt"),
        ({"corruption": "typos"}, "one of none, token_swap"),
        ({"corruption_prob": 1.5}, "at most 1"),
        ({"steps": 5, "epochs": 7}, "steps or epochs"),
        ({"width": 30, "heads": 4}, "multiple of the number of heads"),
        ({"model": "gpt-huge"}, "one of auto, gpt-tiny"),
        ({"context": 1}, "at least 2"),
        ({"aggregate": "majority"}, "one of uniform, signal"),
        ({"resume": "auto"}, "give out"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(MisuseError, match=words):
        LmConfig(**options)  # type: ignore[arg-type]


def test_defaults_follow_the_model_and_the_corruption() -> None:
    assert LmConfig().peak_lr == pytest.approx(0.01)
    assert LmConfig(model="gpt-small").peak_lr == pytest.approx(0.64 / 224)
    assert LmConfig(optimizer="sgd").peak_lr == 0.05
    assert LmConfig(lr=0.3).peak_lr == 0.3
    spoilt = [LmConfig(shards="clean_vs_corrupt", corruption=kind).probability for kind in CORRUPTIONS[1:]]
    assert spoilt == [0.3, 0.3, 0.3, 1.0, 1.0, 1.0]
    assert LmConfig(shards="clean_vs_corrupt", corruption="stale", corruption_prob=0.0).probability == 0.0
