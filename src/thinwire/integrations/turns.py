"""Threads that want one model in different states take turns; those that want the same one share it.

First come, first served: who joins a state that others are in does not overtake those who wait for another one. A
thread may go on to further states from within its own (nesting) once it is alone, and is not joined while it does.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from thinwire.errors import MisuseError, RetryError

__all__ = ["Turns"]

State = tuple[str, ...]


class Turns:
    """Lets threads into states, calling ``switch(state)`` between them; ``resident`` is the state when nobody is in.

    ``switch`` is only ever called while no other thread is in. It may raise; it is then called again with the state
    before.

    >>> turns = Turns(lambda state: print("switch to", state), timeout_s=30)
    >>> with turns.at(("a",)), turns.at(("a", "b")):
    ...     print("in", turns.state)
    switch to ('a',)
    switch to ('a', 'b')
    in ('a', 'b')
    switch to ('a',)
    switch to ()
    """

    def __init__(self, switch: Callable[[State], None], *, timeout_s: float) -> None:
        if timeout_s < 0:
            raise MisuseError("timeout_s must not be negative")
        self._switch, self.timeout_s = switch, timeout_s
        self.state: State = ()
        self.resident: State = ()
        self._inside: dict[int, list[tuple[object, State]]] = {}  # by thread: its frames, with the state before each
        self._queue: deque[object] = deque()
        self._changed = threading.Condition(threading.Lock())

    def mine(self) -> State | None:
        """The state that the calling thread is in; None if in none."""
        with self._changed:
            return self.state if self._inside.get(threading.get_ident()) else None

    def _may_enter(self, me: int, state: State, ticket: object) -> bool:
        alone = not any(thread != me for thread in self._inside)
        if me in self._inside:  # waiting behind others would be waiting for itself
            return alone or self.state == state
        nested = any(before != self.state for frames in self._inside.values() for _, before in frames[1:])
        return self._queue[0] is ticket and (alone or (self.state == state and not nested))

    def _wait_to_enter(self, me: int, state: State) -> None:
        ticket = object()
        self._queue.append(ticket)
        try:
            if not self._changed.wait_for(lambda: self._may_enter(me, state, ticket), self.timeout_s):
                raise RetryError(
                    f"{list(state)} did not get its turn within {self.timeout_s:g} s: {len(self._inside)} threads are "
                    f"using {list(self.state)}; try again, leave tasks sooner, or allow a longer timeout_s",
                    wanted=state,
                    held=self.state,
                )
        finally:
            self._queue.remove(ticket)
            self._changed.notify_all()

    def _go(self, state: State) -> None:
        before = self.state
        try:
            self._switch(state)
        except BaseException:
            self._switch(before)
            raise
        self.state = state

    def _go_back(self, state: State) -> None:
        try:
            self._switch(state)
        except BaseException:  # an interrupt: what must be put back is put back all the same
            self._switch(state)
            raise
        finally:
            self.state = state

    @contextmanager
    def at(self, state: State) -> Iterator[None]:
        """Be in ``state`` within the context; at its end the state before comes back, when the last thread leaves.

        Raises:
            RetryError: others used another state for longer than ``timeout_s``.
            MisuseError: contexts of one thread were not left in reverse order (coroutines that share a thread).
        """
        me, frame, entered = threading.get_ident(), object(), False
        try:
            with self._changed:
                self._wait_to_enter(me, state)
                before = self.state if me in self._inside else self.resident
                entered = True  # first of all: an interrupt after the switch must find the way back
                self._inside.setdefault(me, []).append((frame, before))
                if state != self.state:
                    self._go(state)
            yield
        finally:
            if entered:
                with self._changed:
                    self._leave(me, frame)

    def _leave(self, me: int, frame: object) -> None:
        frames = self._inside.get(me, [])
        ordered = bool(frames) and frames[-1][0] is frame
        before = frames.pop()[1] if ordered else self.resident
        if not ordered:
            frames.clear()
        if not frames:
            self._inside.pop(me, None)
        try:
            if (not self._inside or frames) and self.state != before:
                self._go_back(before)
            if not ordered:
                raise MisuseError(
                    "task contexts of one thread must be left in reverse order; do not await, or yield, within them: "
                    "another coroutine would run with this one's weights"
                )
        finally:
            self._changed.notify_all()

    def settle(self, state: State) -> None:
        """Make ``state`` the one that the model is in when nobody asks for another.

        Raises:
            MisuseError: the calling thread is in a state itself.
            RetryError: others were in one for longer than ``timeout_s``.
        """
        me = threading.get_ident()
        with self._changed:
            if me in self._inside:
                raise MisuseError("leave the task's context before choosing what is to be active outside of it")
            ticket = object()
            self._queue.append(ticket)
            try:
                if not self._changed.wait_for(lambda: not self._inside and self._queue[0] is ticket, self.timeout_s):
                    raise RetryError(
                        f"other threads have used {list(self.state)} for {self.timeout_s:g} s; try again",
                        wanted=state,
                        held=self.state,
                    )
                self._go(state)
                self.resident = state
            finally:
                self._queue.remove(ticket)
                self._changed.notify_all()
