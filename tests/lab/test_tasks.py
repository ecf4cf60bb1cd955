"""Tasks: right answers score 1, others less, and a seed names a problem set."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinwire.errors import MisuseError
from thinwire.lab.tasks import CharTokenizer, Problem, SortDigits, Sums, problem_set


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


@given(st.integers(1, 1000), st.integers())
def test_a_sum_is_answered_by_its_value(largest: int, seed: int) -> None:
    task = Sums(largest)
    problem = task.problem(random.Random(seed))
    first, sign, second = problem.prompt.split()
    value = int(first) + int(second) * (1 if sign == "+" else -1)
    assert max(int(first), int(second)) <= largest
    assert value >= 0
    assert task.reward(problem, f" {value}. Next") == 1.0
    assert task.reward(problem, str(value + 1)) == task.reward(problem, f"-{value}") == task.reward(problem, "?") == 0.0


def test_sums_draw_both_signs() -> None:
    assert {problem.prompt.split()[1] for problem in problem_set(Sums(), 50, 1)} == {"+", "-"}


@pytest.mark.parametrize("largest", [0, -3, 10**9 + 1])
def test_a_largest_number_out_of_range_is_refused(largest: int) -> None:
    with pytest.raises(MisuseError, match="largest"):
        Sums(largest)


def test_an_endless_number_is_scored_all_the_same() -> None:
    assert Sums().reward(Problem("6 + 6", "12"), "9" * 100_000) == 0.0


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
