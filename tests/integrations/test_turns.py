"""Threads share a state or wait for another one; nobody is overtaken, and everybody leaves the model as it was."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from thinwire.errors import MisuseError, RetryError
from thinwire.integrations.turns import Turns


def test_threads_are_only_ever_in_the_state_that_they_asked_for() -> None:
    current: list[tuple[str, ...]] = [()]
    turns = Turns(lambda state: current.__setitem__(0, state), timeout_s=60)

    def work(seed: int) -> None:
        choose = random.Random(seed)
        for _ in range(60):
            state = (choose.choice("abc"),)
            with turns.at(state):
                assert current[0] == turns.state == state
                with turns.at(state):  # what forward() does within a task
                    assert current[0] == state
                time.sleep(0)
                assert current[0] == state
        with turns.at(("a",)):
            pass

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    assert current[0] == ()


def test_the_same_state_is_shared_and_another_one_waits() -> None:
    turns = Turns(lambda state: None, timeout_s=60)
    meet, order = threading.Barrier(2, timeout=30), []

    def share() -> None:
        with turns.at(("a",)):
            meet.wait()  # both are in at once, or this times out
            order.append("a")

    def other() -> None:
        with turns.at(("b",)):
            order.append("b")

    with ThreadPoolExecutor(3) as pool:
        found = [pool.submit(share), pool.submit(share)]
        [f.result(60) for f in found]
        pool.submit(other).result(60)
    assert order == ["a", "a", "b"]


def test_who_waits_too_long_is_told_what_others_hold() -> None:
    turns = Turns(lambda state: None, timeout_s=0.05)

    def ask() -> None:
        with turns.at(("b",)):
            raise AssertionError("this must not be reached")

    def settle() -> None:
        turns.settle(("b",))

    with turns.at(("a",)), ThreadPoolExecutor(1) as pool:
        for call in (ask, settle):
            with pytest.raises(RetryError, match="'a'"):
                pool.submit(call).result(30)
        assert turns.state == ("a",)
    assert turns.state == ()


def test_a_nested_state_is_not_joined_from_outside() -> None:
    turns = Turns(lambda state: None, timeout_s=0.05)

    def join() -> None:
        with turns.at(("a", "b")):
            raise AssertionError("this must not be reached")

    with turns.at(("a",)), turns.at(("a", "b")), ThreadPoolExecutor(1) as pool, pytest.raises(RetryError):
        pool.submit(join).result(30)


def test_a_switch_that_fails_leaves_the_state_before() -> None:
    calls = []

    def switch(state: tuple[str, ...]) -> None:
        calls.append(state)
        if state == ("bad",):
            raise RuntimeError("out of memory")

    turns = Turns(switch, timeout_s=30)
    with turns.at(("a",)):
        with pytest.raises(RuntimeError), turns.at(("bad",)):
            pass
        assert turns.state == ("a",)
    assert calls == [("a",), ("bad",), ("a",), ()]
    with pytest.raises(RuntimeError), turns.at(("bad",)):
        pass
    with ThreadPoolExecutor(1) as pool:  # nobody is left in

        def ask() -> None:
            with turns.at(("b",)):
                pass

        pool.submit(ask).result(30)
    assert turns.state == ()


def test_an_interrupt_while_putting_back_does_not_keep_the_task_on() -> None:
    calls, left = [], [1]

    def switch(state: tuple[str, ...]) -> None:
        calls.append(state)
        if state == () and left[0]:
            left[0] -= 1
            raise KeyboardInterrupt

    turns = Turns(switch, timeout_s=30)
    with pytest.raises(KeyboardInterrupt), turns.at(("a",)):
        pass
    assert (calls[-1], turns.state) == ((), ())


def test_contexts_left_out_of_order_are_an_error_and_leave_nothing_on() -> None:
    turns = Turns(lambda state: None, timeout_s=30)
    first, second = turns.at(("a",)), turns.at(("b",))
    first.__enter__()
    second.__enter__()
    for context in (first, second):
        with pytest.raises(MisuseError, match="reverse order"):
            context.__exit__(None, None, None)
    assert turns.state == ()
    with turns.at(("c",)):
        assert turns.state == ("c",)


def test_what_is_active_outside_cannot_be_chosen_from_within() -> None:
    turns = Turns(lambda state: None, timeout_s=30)
    turns.settle(("m",))
    with turns.at(("a",)):
        with pytest.raises(MisuseError, match="leave"):
            turns.settle(("b",))
        assert turns.state == ("a",)
    assert turns.state == turns.resident == ("m",)
    with pytest.raises(MisuseError):
        Turns(lambda state: None, timeout_s=-1)
