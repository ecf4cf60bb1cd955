"""Tasks: right answers score 1, others less, and a seed names a problem set."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinwire.errors import MisuseError
from thinwire.lab.tasks import CharTokenizer, Problem, SortDigits, WordProblems, problem_set


@given(st.integers(1, 64), st.integers())
def test_a_sorted_answer_is_right_and_any_other_is_not(length: int, seed: int) -> None:
    task = SortDigits(length)
    problem = task.problem(random.Random(seed))
    assert task.reward(problem, problem.answer) == 1.0
    assert sorted(problem.answer) == list(problem.answer) == sorted(problem.prompt[:-1])
    wrong = chr(ord(problem.answer[0]) ^ 1) + problem.answer[1:]
    assert task.reward(problem, wrong) == 0.0
    assert task.reward(problem, problem.answer[:-1]) == 0.0
    assert task.reward(problem, problem.answer + "0") == 0.0


@pytest.mark.parametrize("length", [0, -1, 65])
def test_a_length_out_of_range_is_refused(length: int) -> None:
    with pytest.raises(MisuseError, match="length"):
        SortDigits(length)


@given(st.integers(2, 1000), st.integers())
def test_the_story_holds_the_numbers_of_the_answer(largest: int, seed: int) -> None:
    task = WordProblems(largest)
    problem = task.problem(random.Random(seed))
    given_numbers = [int(number) for number in re.findall(r"\d+", problem.prompt)]
    a, b = given_numbers[0], given_numbers[1]
    reachable = {a + b, a - b, a * b}
    if len(given_numbers) == 3:
        reachable = {a + b + given_numbers[2], a - b + given_numbers[2]}
    assert int(problem.answer) in reachable
    assert task.reward(problem, problem.answer) == 1.0


@pytest.mark.parametrize(
    ("completion", "reward"),
    [("12", 1.0), ("5 + 7 = 12", 1.0), ("It is 12.", 1.0), ("12 or 13", 0.1), ("-12", 0.1), ("twelve", 0.0), ("", 0.0)],
)
def test_the_last_number_of_a_word_answer_counts(completion: str, reward: float) -> None:
    assert WordProblems().reward(Problem("?", "12"), completion) == reward


def test_an_endless_number_is_scored_in_bounded_time() -> None:
    assert WordProblems().reward(Problem("?", "12"), "9" * 100_000) == 0.1


def test_a_seed_names_a_problem_set() -> None:
    task = SortDigits(8)
    assert problem_set(task, 20, 3) == problem_set(task, 20, 3)
    assert problem_set(task, 20, 3) != problem_set(task, 20, 4)
    assert problem_set(task, 10, 3) == problem_set(task, 20, 3)[:10]


@given(st.text("0123456789>", max_size=40), st.lists(st.just(0), max_size=5), st.lists(st.integers(0, 12), max_size=5))
def test_decoding_inverts_encoding_up_to_the_end_token(text: str, padding: list[int], rest: list[int]) -> None:
    tokenizer = CharTokenizer("0123456789>")
    tokens = tokenizer.encode(text)
    assert all(2 <= token < tokenizer.size for token in tokens)
    assert tokenizer.decode([*padding, *tokens, tokenizer.end, *rest]) == text


def test_an_unknown_character_is_refused() -> None:
    with pytest.raises(MisuseError, match="alphabet"):
        CharTokenizer("01").encode("012")
