"""Runs: the same again for the same cell, every algorithm, and what goes wrong is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.lab.sparserl.conftest import SETTINGS, TASKS
from thinwire.errors import MalformedError, MisuseError
from thinwire.lab.reasoning import ALPHABET
from thinwire.lab.sparserl.starts import make_start, read_start
from thinwire.lab.sparserl.train import Cell, train
from thinwire.lab.tasks import CharTokenizer

CELL = Cell("atom", SETTINGS, "count-bits", "aspg", 1e-3, 0, steps=6, prompts=4, group=4, problems=16, others=("gcd",))


@pytest.mark.parametrize("method", ["aspg", "frozen-subnetwork", "prefix-tuning"])
@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_a_cell_made_again_gives_the_same_numbers(starts: Path, method: str, algorithm: str) -> None:
    cell = replace(CELL, method=method, algorithm=algorithm)
    one, other = (train(cell, starts) for _ in range(2))
    assert one.pop("seconds") > 0
    other.pop("seconds")
    assert one == other
    assert one["status"] == "success"
    assert [row["step"] for row in one["steps"]] == [1, 2, 3, 4, 5, 6]
    assert one["flops"] > 0
    assert set(one["others_after"]) == set(one["others_before"]) == {"gcd"}
    assert train(replace(cell, seed=0, lr=2e-3), starts)["steps"] != one["steps"]


def test_a_run_that_only_tunes_measures_nothing(starts: Path) -> None:
    record = train(replace(CELL, part="tune", others=()), starts)
    assert record["flops"] == record["whole_bytes"] == 0
    assert "sync_bytes" not in record["steps"][0]
    assert set(record["after"]) == {"sampled"}


def test_a_run_that_diverges_is_recorded_with_what_it_did(starts: Path, tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text(
        "import torch\n"
        "from thinwire.lab.sparserl.methods.base import Method, adamw, prepared\n"
        "class Broken(torch.optim.AdamW):\n"
        "    count = 0\n"
        "    def step(self, closure=None):\n"
        "        super().step()\n"
        "        self.count += 1\n"
        "        if self.count == 2:\n"
        "            with torch.no_grad():\n"
        "                self.param_groups[0]['params'][0].fill_(float('nan'))\n"
        "METHOD = Method(about='breaks in step 2', lrs=(1e-3,),\n"
        "    prepare=lambda model, setting: prepared(model, lambda ps: Broken(ps, lr=setting.lr)))\n"
    )
    record = train(replace(CELL, method=str(file)), starts)
    assert record["status"] == "diverged"
    assert record["error"]
    assert record["after"] is None
    assert len(record["steps"]) == 2


def test_a_learning_rate_beyond_all_measure_does_not_lose_the_run(starts: Path) -> None:
    record = train(replace(CELL, method="dense", lr=1e5, steps=6), starts)
    assert record["status"] in ("success", "diverged")


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [({"algorithm": "dpo"}, "grpo, ppo"), ({"steps": 0}, "1 or more"), ({"group": 1}, "group"),
     ({"lr": 0.0}, "above 0"), ({"lr": float("nan")}, "above 0")],
)  # fmt: skip
def test_nonsense_is_refused(wrong: dict[str, Any], complaint: str) -> None:
    with pytest.raises(MisuseError, match=complaint):
        replace(CELL, **wrong)


def test_a_start_is_kept_and_a_damaged_one_is_named(starts: Path, tmp_path: Path) -> None:
    one = read_start(SETTINGS, "atom", 0, starts)
    make_start(SETTINGS, "atom", TASKS, 0, tmp_path, problems=16)
    other = read_start(SETTINGS, "atom", 0, tmp_path)
    for p, q in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, p.bfloat16().float())
    assert one.scores == other.scores
    file = tmp_path / "atom-0.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(MalformedError, match="remove"):
        read_start(SETTINGS, "atom", 0, tmp_path)
    with pytest.raises(MisuseError, match="was not made"):
        read_start(SETTINGS, "atom", 1, tmp_path)


def test_a_warm_start_reaches_what_it_was_asked_for_or_says_so(tmp_path: Path) -> None:
    hopeless = SETTINGS | {"warm": {"target": 0.99, "steps_max": 20, "batch": 8}}
    with pytest.raises(MisuseError, match="on all"):
        make_start(hopeless, "atom", TASKS, 0, tmp_path)


def test_the_character_tokenizer_of_transformers_is_ours() -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    from thinwire.lab.sparserl.trl_runs import character_tokenizer

    theirs, ours = character_tokenizer(), CharTokenizer(ALPHABET)
    text = "[8, 22]= The quick brown fox! ~"
    assert theirs(text)["input_ids"] == ours.encode(text)
    assert theirs.decode(ours.encode(text)) == text
    assert (theirs.pad_token_id, theirs.eos_token_id) == (ours.pad, ours.end)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["trl-grpo", "trl-rloo"])
def test_trl_trains_the_same_methods(starts: Path, tmp_path: Path, algorithm: str) -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    task = tmp_path / "odd.py"  # worth something to a model that knows nothing
    task.write_text(
        "from thinwire.lab.sparserl.tasks.base import TaskEntry\nfrom thinwire.lab.tasks import SortDigits\n"
        "class Odd(SortDigits):\n    def reward(self, problem, completion):\n"
        "        return ord(completion[0]) % 2 if completion else 0\n"
        "TASK = TaskEntry(about='odd first letter', make=lambda part: Odd(3), answer_tokens=4, generated=False)\n"
    )
    for method in ("random-mask", "lora"):
        cell = replace(CELL, algorithm=algorithm, method=method, task=str(task), lr=1e-2)
        record = train(cell, starts)
        assert record["status"] == "success"
        assert len(record["steps"]) == cell.steps
        assert sum(row["changed"] for row in record["steps"]) > 0
    with pytest.raises(MisuseError, match="virtual tokens"):
        train(replace(CELL, algorithm=algorithm, method="prompt-tuning"), starts)
