"""The recipe in one process: it learns, repeats itself, goes on after a stop, and refuses what does not fit."""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from thinwire.errors import MalformedError, MisuseError
from thinwire.lab.config import from_yaml
from thinwire.lab.runlog import read_rows
from thinwire.lab.text.config import LmConfig
from thinwire.lab.text.data import load_text
from thinwire.lab.text.evaluation import evaluate
from thinwire.lab.text.model import make_gpt
from thinwire.lab.text.recipe import train

TINY = LmConfig(
    epochs=2, train_limit=3500, valid_limit=800, context=16, layers=1, width=32, heads=2, batch_size=16, dropout=0.1,
    sample=30,
)  # fmt: skip
SPOILT = replace(TINY, shards="clean_vs_corrupt")


def test_it_learns_the_grammar_but_no_more_than_there_is_to_learn() -> None:
    before = torch.get_rng_state()
    summary = train(LmConfig(steps=150, batch_size=8, evaluate_every=50))
    assert summary.entropy is not None
    losses = [row.valid_loss for row in summary.history]
    assert [row.step for row in summary.history] == [50, 100, 150]
    assert losses == sorted(losses, reverse=True)
    assert summary.entropy < losses[-1] < 1.1 < losses[0]
    assert summary.best_loss == summary.loss == losses[-1]
    assert summary.perplexity == pytest.approx(torch.tensor(losses[-1]).exp().item(), rel=1e-6)
    assert len(summary.sample) == 200
    assert torch.equal(torch.get_rng_state(), before)


def test_the_same_seed_gives_the_same_weights_and_words_and_another_gives_others() -> None:
    torch.manual_seed(123)
    one = train(TINY)
    assert (one.steps, one.finished, one.workers, one.bytes_dense) == (26, True, 1, 0)
    torch.manual_seed(456)
    again = train(TINY)
    assert (again.digest, again.sample) == (one.digest, one.sample)
    assert train(replace(TINY, seed=2)).digest != one.digest


@pytest.mark.parametrize("corruption", ["random_tokens", "duplicated_batch", "stale", "sign_flip"])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path, corruption: str) -> None:
    config = replace(SPOILT, corruption=corruption, corruption_prob=0.5, precision="bfloat16", evaluate_every=7)
    whole = train(replace(config, out=str(tmp_path / "whole")))
    kept = replace(config, out=str(tmp_path / "run"), resume="auto", checkpoint_every=5)
    for stop, steps in ((3, 3), (3, 3), (14, 14), (20, 20)):  # between, again at once, at a report, between
        assert train(replace(kept, stop_after=stop)).steps == steps
    last = train(kept)
    assert (last.digest, last.sample) == (whole.digest, whole.sample)
    assert [row.step for row in last.history] == [7, 14, 21, 26]
    assert [(row.train_loss, row.valid_loss) for row in last.history] == [
        (row.train_loss, row.valid_loss) for row in whole.history
    ]
    rows = {name: read_rows(tmp_path / name / "metrics.jsonl") for name in ("whole", "run")}
    losses = {name: [(x["step"], x["loss"]) for x in found if x["kind"] == "step"] for name, found in rows.items()}
    assert losses["run"] == losses["whole"]


def test_what_a_run_keeps_is_whole_and_can_be_read_by_others(tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = replace(TINY, out=str(out), tokens="bpe", vocabulary=300, data="grammar", valid_limit=None)
    summary = train(config)
    assert from_yaml(LmConfig, out / "config.yaml", {}) == config
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(summary.as_json()))
    model = make_gpt(summary.vocabulary, **config.shape._asdict())
    kept = load_file(out / "model.safetensors")
    assert set(model.state_dict()) - set(kept) == {"lm_head.weight"}  # tied: written once
    model.load_state_dict(kept, strict=False)
    text = load_text("grammar", tokens="bpe", vocabulary=300)
    assert evaluate(model, text.tokens_valid, context=16) == pytest.approx(summary.loss, rel=1e-5)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert tokenizer.encode("two cats").ids == text.tokenizer.encode("two cats").tolist()
    from tests.cli.tools import thinwire

    assert thinwire("inspect", out / "model.safetensors", "--digest", "--json").json["state"] == summary.digest
    with pytest.raises(MisuseError, match="holds a run; go on with it by --resume auto"):
        train(config)


def test_a_batch_in_parts_is_the_batch() -> None:
    config = replace(TINY, dropout=0.0, clip_norm=0.5)
    whole, parts = train(config), train(replace(config, accumulate=4))
    losses = [[row.valid_loss for row in summary.history] for summary in (whole, parts)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_learns_nearly_the_same(precision: str) -> None:
    config = replace(TINY, epochs=1, dropout=0.0)
    exact, low = train(config), train(replace(config, precision=precision))
    assert low.history[0].train_loss == pytest.approx(exact.history[0].train_loss, rel=0.02)
    assert low.digest != exact.digest


def test_each_corruption_does_its_own_harm() -> None:
    config = replace(SPOILT, epochs=1, dropout=0.0)
    clean = train(config)
    assert clean.corrupted == (0,)
    assert train(replace(TINY, epochs=1, dropout=0.0)).digest == clean.digest  # corrupted by nothing
    digests = {clean.digest}
    for kind in ("token_swap", "random_tokens", "label_noise", "duplicated_batch", "stale", "sign_flip"):
        spoilt = train(replace(config, corruption=kind, corruption_prob=1.0))
        assert spoilt.loss is not None
        assert clean.loss is not None
        assert spoilt.loss > clean.loss + 0.002, kind
        digests.add(spoilt.digest)
        none = train(replace(config, corruption=kind, corruption_prob=0.0, epochs=2, steps=3))
        assert none.digest == train(replace(config, epochs=2, steps=3)).digest, kind
    assert len(digests) == 7


def test_workers_are_shown_where_there_is_a_terminal_and_told_elsewhere(tmp_path: Path) -> None:
    config = replace(TINY, live=True, print_every=10, steps=20, sample=0, out=str(tmp_path / "run"))
    plain, terminal = io.StringIO(), io.StringIO()
    train(config, console=Console(file=plain, force_terminal=False, width=100))
    assert plain.getvalue().count("worker 0: loss") == 2
    assert "weight 100.0 %" in plain.getvalue()
    train(replace(config, out=None), console=Console(file=terminal, force_terminal=True, width=100))
    assert "tokens/s" in terminal.getvalue()
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "workers"]
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert rows[0].keys() == {"kind", "step", "loss_0", "weight_0"}


# --- refusals ------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short\n")
    for options, words in (
        ({"data": str(short)}, "holds no window of 17"),
        ({"train_limit": 100}, "fewer than a batch"),
        ({"valid_limit": 16}, "holds no window"),
        ({"data": "nowhere"}, "there is no text"),
        ({"shards": "clean_vs_corrupt", "corrupt_workers": 2}, "2 of 1 workers"),
        ({"resume": str(tmp_path)}, "no checkpoint at"),
    ):
        with pytest.raises(MisuseError, match=words):
            train(replace(TINY, **options))  # type: ignore[arg-type]


def test_a_run_goes_on_with_its_own_text_and_options_only(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("some words of one kind or another\n" * 200)
    config = replace(TINY, data=str(path), model="gpt-tiny", out=str(tmp_path / "run"), valid_limit=None)
    train(replace(config, stop_after=3))
    again = replace(config, resume="auto")
    with pytest.raises(MisuseError, match="width 32 instead of 64, seed 1 instead of 2"):
        train(replace(again, width=64, seed=2))
    path.write_text("other words of one kind or another\n" * 200)
    with pytest.raises(MisuseError, match=r"with other options: text '[0-9a-f]{32}' instead of"):
        train(again)
    path.write_text("some words of one kind or another\n" * 200)
    assert train(again).finished
    shared = tmp_path / "run" / "checkpoints" / "step-00000026" / "shared.pt"
    assert shared.exists()
    state = torch.load(shared, weights_only=True)
    for damage in ({"history": [{"accuracy": 1.0}]}, {"config": 3}, {"model": {}}):
        torch.save(state | damage, shared)
        with pytest.raises((MalformedError, MisuseError)):
            train(again)


# --- real data -----------------------------------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.timeout(1800)
def test_a_few_hundred_steps_of_shakespeare_are_better_than_pairs_of_letters() -> None:
    if "THINWIRE_DATA" not in os.environ:
        pytest.skip("THINWIRE_DATA is not set")
    summary = train(LmConfig(data="tinyshakespeare", model="gpt-tiny", steps=600, valid_limit=20_000))
    assert summary.loss is not None
    assert summary.loss < 2.2  # pairs of letters: 2.45
