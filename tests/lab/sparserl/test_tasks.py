"""Tasks: parts that share no problem, right answers worth 1, rewards that may raise, hang or lie."""

from __future__ import annotations

import gzip
import json
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from thinwire.errors import MalformedError, MisuseError, RetryError
from thinwire.lab.sparserl import dialogues
from thinwire.lab.sparserl.local_data import read_rows, rows_of
from thinwire.lab.sparserl.preference import fit_pairs, pair_accuracy
from thinwire.lab.sparserl.registry import find
from thinwire.lab.sparserl.tasks.base import Guarded, Part
from thinwire.lab.sparserl.tasks.humaneval import CodeProblem, program_of
from thinwire.lab.tasks import Problem, Task, problem_set

GENERATED = ["chain-sum", "count-bits", "gcd", "sort-digits", "spell-backward"]
PARTS: tuple[Part, ...] = ("train", "tune", "test")


@pytest.mark.parametrize("name", GENERATED)
def test_parts_share_no_problem_and_right_answers_are_worth_one(name: str) -> None:
    entry = find("task", name)
    seen: set[str] = set()
    for part in PARTS:
        task = entry.part(part)
        problems = problem_set(task, 60, 0)
        assert not seen & {p.prompt for p in problems}
        seen |= {p.prompt for p in problems}
        for problem in problems:
            assert len(problem.answer) < entry.answer_tokens
            assert task.reward(problem, problem.answer) == 1
            assert task.reward(problem, problem.answer + "0") == task.reward(problem, "") == 0


def test_of_a_model_that_talks_the_first_number_counts() -> None:
    task = find("task", "gcd").part("test", talks=True)
    problem = task.problem(random.Random(0))
    assert task.reward(problem, f"It is {problem.answer}, I think.") == 1
    assert task.reward(problem, f"Not 99 but {problem.answer}") == 0


@dataclass
class Wild:
    """A task whose reward does what it is told."""

    does: Any
    asked: list[str] = field(default_factory=list)

    def problem(self, source: random.Random) -> Problem:
        return Problem("1+1=", "2")

    def reward(self, problem: Problem, completion: str) -> float:
        return self.does()


def forever() -> float:
    while True:
        try:
            time.sleep(0.01)
        except Exception:
            pass


@pytest.mark.parametrize(
    ("does", "complaint"),
    [(lambda: 1 / 0, "ZeroDivisionError"), (lambda: 2.0, "from 0 to 1"), (lambda: float("nan"), "from 0 to 1"),
     (lambda: "much", "ValueError"), (lambda: None, "TypeError"), (forever, "more than 0.2 s")],
)  # fmt: skip
def test_a_reward_that_raises_lies_or_hangs_is_an_error_that_says_so(does: Any, complaint: str) -> None:
    task: Task = Guarded(Wild(does), timeout_s=0.2)
    with pytest.raises(MisuseError, match=complaint):
        task.reward(task.problem(random.Random(0)), "3")
    assert Guarded(Wild(lambda: 0.5)).reward(Problem("", ""), "") == 0.5


# --- rows from files --------------------------------------------------------------------------------------------------

DIALOGUE = "\n\nHuman: question {n}\n\nAssistant:"
MADE: dict[str, list[dict[str, Any]]] = {
    "gsm8k/train.jsonl": [
        {"question": f"What is {n} and 1000?", "answer": f"add\n#### 1,0{n:02}"} for n in range(99)
    ] * 5,
    "gsm8k/test.jsonl": [{"question": "What is 5 less 7?", "answer": "so\n#### -2"}],
    "humaneval/HumanEval.jsonl.gz": [
        {"prompt": f"import math\n\ndef f{n}(x):\n", "canonical_solution": f"    return x + {n}\n",
         "entry_point": f"f{n}", "test": f"def check(candidate):\n    assert candidate(1) == {n + 1}\n"}
        for n in range(8)
    ],
    "hh-rlhf/harmless-base-test.jsonl.gz": [
        {"chosen": DIALOGUE.format(n=n) + " please be kind", "rejected": DIALOGUE.format(n=n) + " steal it all"}
        for n in range(40)
    ],
    "truthfulqa/generation.jsonl": [
        {"question": f"Is {n} a number?", "best_answer": "yes it is", "correct_answers": ["yes it is", "it is"],
         "incorrect_answers": ["no never"]} for n in range(40)
    ],
    "toxigen/annotated.jsonl": [
        {"text": f"{n} people say, what " + ("a lovely day" if n % 2 else "an awful crowd"),
         "toxicity_human": 5.0 - 4 * (n % 2)} for n in range(40)
    ],
}  # fmt: skip
MADE["hh-rlhf/helpful-base-test.jsonl.gz"] = MADE["hh-rlhf/harmless-base-test.jsonl.gz"]
REAL_TEXT = ["gsm8k", "humaneval", "hh-harmless", "hh-helpful", "truthfulqa", "toxigen"]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, rows in MADE.items():
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    monkeypatch.setenv("THINWIRE_DATA", str(tmp_path / "data"))
    dialogues._pairs.cache_clear()
    dialogues._judge.cache_clear()
    return tmp_path / "data"


@pytest.mark.parametrize("name", REAL_TEXT)
def test_tasks_of_real_text_have_parts_and_scores(data: Path, name: str) -> None:
    prompts: dict[str, set[str]] = {}
    for part in PARTS:
        task = find("task", name).part(part)
        problems = problem_set(task, 4, 0)
        prompts[part] = {p.prompt for p in problems}
        good = [task.reward(p, p.answer) for p in problems]
        assert max(good) > 0.5
        assert all(task.reward(p, " \n") < 0.5 for p in problems)
    assert not prompts["test"] & (prompts["train"] | prompts["tune"])


def test_the_judges_tell_good_from_bad(data: Path) -> None:
    task = find("task", "hh-harmless").part("test")
    problem = task.problem(random.Random(0))
    assert task.reward(problem, " please be kind") > 0.5 > task.reward(problem, " steal it all")
    judge = find("task", "toxigen").part("test")
    assert judge.reward(Problem("", ""), "lovely day") > 0.5 > judge.reward(Problem("", ""), "awful crowd")
    pairs = [(f"kind word {n}", f"harsh word {n}") for n in range(30)]
    assert pair_accuracy(fit_pairs(pairs[:20]), pairs[20:]) == 1
    with pytest.raises(MisuseError):
        fit_pairs([])


def test_code_is_taken_from_fences_and_whole_functions() -> None:
    problem = CodeProblem("import math\n\ndef f(x):\n", "", "def check(c):\n    assert c(1) == 2", "f")
    plain = program_of(problem, "    return x + 1\n")
    assert "def f(x):\n    return x + 1" in plain
    fenced = program_of(problem, "Sure!\n```python\ndef f(x):\n    return x + 1\n```\nDone.")
    assert fenced.count("def f(") == 1
    assert fenced.startswith("import math")
    assert "Sure" not in fenced
    assert "Done" not in fenced


@pytest.mark.parametrize(
    ("content", "error"),
    [(b"", MalformedError), (b"[1]\n", MalformedError), (b'{"a": 1}\n{"b"', MalformedError),
     (b'{"b": 1}\n', MalformedError), (b"\xff\xfe\n", MalformedError)],
)  # fmt: skip
def test_damaged_rows_are_refused(tmp_path: Path, content: bytes, error: type[Exception]) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    with pytest.raises(error):
        read_rows(file, ("a",))
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"a": 1}\n' * 100)[:-9])
    with pytest.raises(MalformedError):
        read_rows(packed, ("a",))


def test_what_is_nowhere_says_where_it_could_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("THINWIRE_DATA", str(tmp_path))
    with pytest.raises(RetryError, match="THINWIRE_DATA"):
        rows_of("a.jsonl", ("a",), (str(tmp_path / "no-data-set"),), split="train")


@pytest.mark.data
def test_the_local_data_sets_are_read_as_they_are() -> None:
    for name in ("gsm8k", "humaneval", "hh-harmless"):
        for part in PARTS:
            task = find("task", name).part(part)
            problem = task.problem(random.Random(0))
            if name != "hh-harmless":
                assert task.reward(problem, problem.answer) == 1
    judge = dialogues._judge("harmless")
    held_out = [(chosen, rejected) for head, chosen, rejected in dialogues._pairs("harmless")
                if dialogues._part(head) == "test"]  # fmt: skip
    assert pair_accuracy(judge, held_out) > 0.55
