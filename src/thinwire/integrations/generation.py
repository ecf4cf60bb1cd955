"""A Transformers model that answers requests and is brought to a store's newest version between them.

One thread generates, another one gets the next version ready (fetched, decoded, proved) on the host. Between two
requests the changed elements are written into the model; that is all the time for which requests wait. A request runs
from its first token to its last under one version, and says which. Needs the extra ``rl``.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from thinwire.errors import DamagedObjectError, MisuseError, RetryError, ThinwireError
from thinwire.integrations.runtime_sync import RuntimeSync, SwapReport
from thinwire.integrations.served import Served
from thinwire.sync.remote import ReadableStore

__all__ = ["Answer", "BusyError", "Choice", "Generator", "Job", "Request"]

_log = logging.getLogger(__name__)
Delta = Callable[[int, str, Sequence[int]], None]


class BusyError(RetryError):
    """The queue is full; ask again later."""


@dataclass(frozen=True, slots=True)
class Request:
    """What to generate: ``samples`` answers to each prompt (token ids).

    ``temperature`` 0 takes the likeliest token. ``stop``: texts at which an answer ends, not part of it. ``seed`` makes
    sampling repeatable for the same version and request. ``min_version``: wait until at least that is served.
    """

    prompts: tuple[tuple[int, ...], ...]
    tokens_max: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    samples: int = 1
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: bool = False
    min_version: int = 0


@dataclass(slots=True)
class Choice:
    """One answer: its tokens without the one that ended it; ``logprobs`` of the tokens at temperature 1, if asked for.

    ``finish``: ``stop`` (an end token or a stop text), ``length``, or ``timeout``."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[float] = field(default_factory=list)
    finish: Literal["stop", "length", "timeout"] = "length"


@dataclass(frozen=True, slots=True)
class Answer:
    """Answers in the order of the prompts, ``samples`` to each, of one version; ``seconds`` without the queue."""

    choices: tuple[Choice, ...]
    version: int
    step: int | None
    digest: str
    seconds: float


class Job:
    """A request in the queue. ``wait`` for its answer; ``cancel`` it if nobody does any more."""

    def __init__(self, request: Request, deadline: float, delta: Delta | None) -> None:
        self.request, self.deadline, self.delta = request, deadline, delta
        self.done = threading.Event()
        self.cancelled = False
        self.answer: Answer | None = None
        self.error: Exception | None = None
        self.started: SwapReport | None = None

    def cancel(self) -> None:
        """Stop at the next token, or never begin."""
        self.cancelled = True

    def over(self) -> bool:
        """Whether it is not worth going on."""
        return self.cancelled or time.monotonic() >= self.deadline

    def wait(self, timeout_s: float) -> bool:
        """Until it is done, at most so long; whether it is."""
        return self.done.wait(timeout_s)

    def result(self) -> Answer:
        """The answer of a job that is done.

        Raises:
            RetryError: its time was up before it began, or the server stops.
        """
        if self.error is not None:
            raise self.error
        assert self.answer is not None
        return self.answer


class Generator:
    """Answers requests, one at a time, with the store's newest version.

    Args:
        served: see :func:`~thinwire.integrations.served.load_served`.
        store: as :class:`~thinwire.sync.consumer.Consumer` takes it.
        queue_max: requests that may wait; more are refused with :class:`BusyError`.
        poll_s: seconds between two looks for a new version.
        on_swap: called with each swap's report, in the thread that generates.
        settings: the consumer's: ``trust``, ``memory``, ``observer``, ``threads``, ...

    A store that fails, or shows what must not be believed, leaves the version in place that is served; ``trouble``
    tells.
    """

    def __init__(
        self,
        served: Served,
        store: str | ReadableStore,
        *,
        queue_max: int = 64,
        poll_s: float = 0.5,
        on_swap: Callable[[SwapReport], object] | None = None,
        **settings: Any,
    ) -> None:
        if queue_max < 1 or poll_s <= 0:
            raise MisuseError("queue_max must be 1 or more, and poll_s positive")
        self.served, self.queue_max, self.poll_s, self.on_swap = served, queue_max, poll_s, on_swap
        self.sync = RuntimeSync(store, served.tensors, self._load, **settings)
        self.trouble: str | None = None
        self.proved = 0  # the version that the model's memory was last compared with
        self.tokens_made = 0
        self._queue: deque[Job] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._threads: list[threading.Thread] = []

    def _load(self, pairs: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in pairs:
            self.served.tensors[name].copy_(tensor)

    @property
    def at(self) -> SwapReport:
        """The version that is served."""
        if self.sync.at is None:
            raise MisuseError("nothing is loaded yet; call start()")
        return self.sync.at

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    def start(self) -> SwapReport:
        """Load the newest version, then begin to answer and to follow."""
        opened = self.sync.open()
        self._tell(opened)
        self._threads = [
            threading.Thread(target=self._work, name="thinwire-generate", daemon=True),
            threading.Thread(target=self._follow, name="thinwire-follow", daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        return opened

    def close(self, *, timeout_s: float = 30.0) -> None:
        """Stop: the request under way ends at its next token, those that wait fail."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(timeout_s)

    def submit(self, request: Request, *, timeout_s: float = 60.0, delta: Delta | None = None) -> Job:
        """Put a request into the queue. ``delta`` is called with a choice's number, its new text and new tokens, while
        they are made.

        Raises:
            BusyError: the queue is full.
            RetryError: the server stops.
        """
        job = Job(request, time.monotonic() + timeout_s, delta)
        with self._changed:
            if self._stopping:
                raise RetryError("the server stops; ask another one")
            if len(self._queue) >= self.queue_max:
                raise BusyError(f"{len(self._queue)} requests wait already; try again later", waiting=len(self._queue))
            self._queue.append(job)
            self._changed.notify_all()
        return job

    # --- the thread that generates -----------------------------------------------------------------------------------

    def _work(self) -> None:
        while not self._stopping:
            self._swap()
            job = self._take()
            if job is not None:
                self._answer(job)
        for job in list(self._queue):
            job.error = RetryError("the server stops; ask another one")
            job.done.set()

    def _take(self) -> Job | None:
        """The first job that may begin; sleeps until there may be one, or a version to go to."""
        with self._changed:
            for job in list(self._queue):
                if job.over():
                    self._queue.remove(job)
                    job.error = RetryError("the request's time was up before it could begin")
                    job.done.set()
            ready = [job for job in self._queue if job.request.min_version <= self.at.version]
            if ready:
                self._queue.remove(ready[0])
                return ready[0]
            if self.sync.ready is not None or self._stopping:
                return None
            proved = self.proved == self.at.version
            woken = self._changed.wait(0.05 if self._queue or not proved else 1.0)
        if not woken and not proved:
            self._prove()  # without the lock: requests can be put into the queue meanwhile
        return None

    def _swap(self) -> None:
        try:
            report = self.sync.swap() if self.sync.ready is not None else None
        except ThinwireError as error:
            self._note(error)
            return
        if report is not None:
            self._tell(report)
            with self._changed:
                self._changed.notify_all()

    def _tell(self, report: SwapReport) -> None:
        if self.on_swap is not None:
            self.on_swap(report)

    def _prove(self) -> None:
        """While nobody waits: compare the model's memory with the version, bit by bit, and mend it if need be."""
        version = self.at.version
        with suppress(MisuseError):  # one has become ready meanwhile: it is written next, and proved after that
            try:
                self.sync.verify()
                self.proved = version
            except DamagedObjectError as error:
                self._note(error)
                self.sync.rewrite()  # and compared again, the next time nobody waits

    def _note(self, error: Exception) -> None:
        self.trouble = f"{type(error).__name__}: {error}"
        _log.warning("version %d stays: %s", self.at.version, error)

    def _answer(self, job: Job) -> None:
        job.started = self.at
        try:
            job.answer = self._generate(job)
        except Exception as error:  # told to whoever waits; the next request must not suffer
            _log.exception("a request failed")
            job.error = error
        job.done.set()

    def _generate(self, job: Job) -> Answer:
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        family: Any = GenerationConfig
        began, request, at = time.perf_counter(), job.request, self.at
        rows = [list(prompt) for prompt in request.prompts for _ in range(request.samples)]
        width = max(map(len, rows))
        device = next(iter(self.served.tensors.values())).device
        tokens = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
        attention = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        watch = _Watch(job, self.served, len(rows), width)
        sampling = {"temperature": request.temperature, "top_p": request.top_p, "top_k": 0}
        config = family(
            max_new_tokens=request.tokens_max, do_sample=request.temperature > 0, eos_token_id=self.served.ends or None,
            pad_token_id=0, use_cache=True, **(sampling if request.temperature > 0 else {}),
        )  # fmt: skip
        with torch.inference_mode(), torch.random.fork_rng(enabled=request.seed is not None):
            if request.seed is not None:
                torch.manual_seed(request.seed)
            self.served.model.generate(
                input_ids=tokens, attention_mask=attention, generation_config=config,
                stopping_criteria=StoppingCriteriaList([watch.step]), logits_processor=LogitsProcessorList([watch.see]),
            )  # fmt: skip
        choices = watch.finish()
        self.tokens_made += sum(len(choice.tokens) for choice in choices)
        return Answer(tuple(choices), at.version, at.step, at.digest, time.perf_counter() - began)

    # --- the thread that follows -------------------------------------------------------------------------------------

    def _follow(self) -> None:
        while not self._stopping:
            try:
                self.sync.prepare()
                self.trouble = None
            except ThinwireError as error:
                self._note(error)
            with self._changed:
                if self.sync.ready is not None:
                    self._changed.notify_all()
                    while self.sync.ready is not None and not self._stopping:
                        self._changed.wait(1.0)  # written between two requests
                else:
                    self._changed.wait_for(lambda: self._stopping, self.poll_s)


class _Watch:
    """Looks on while rows of tokens grow: ends them, tells what is new, keeps the probabilities of what was chosen."""

    def __init__(self, job: Job, served: Served, rows: int, width: int) -> None:
        self.job, self.served, self.width = job, served, width
        self.choices = [Choice() for _ in range(rows)]
        self.over = [False] * rows
        self.told = [0] * rows
        self.shown = [0] * rows
        self._ends = set(served.ends)
        self._scores: torch.Tensor | None = None

    def see(self, _: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Called with the next token's logits [rows, words] before they are warped."""
        if self.job.request.logprobs:
            self._scores = torch.log_softmax(scores.float(), dim=-1)
        return scores

    def step(self, tokens: torch.Tensor, _: Any, **__: Any) -> torch.Tensor:
        """Called with all tokens [rows, so far] after each new one; which rows are to end."""
        fresh = tokens[:, -1].tolist()
        scores = None if self._scores is None else self._scores.gather(1, tokens[:, -1:])[:, 0].tolist()
        late = self.job.over()
        for row, token in enumerate(fresh):
            if not self.over[row]:
                self._take(row, token, None if scores is None else scores[row])
                if late and not self.over[row]:
                    self.over[row], self.choices[row].finish = True, "timeout"
        return torch.tensor(self.over, device=tokens.device)

    def _take(self, row: int, token: int, logprob: float | None) -> None:
        choice = self.choices[row]
        if token in self._ends:
            choice.finish, self.over[row] = "stop", True
        else:
            choice.tokens.append(token)
            if logprob is not None:
                choice.logprobs.append(logprob)
        if self.job.request.stop or self.job.delta is not None or self.over[row]:
            choice.text = self._text(choice.tokens)
            found = [choice.text.find(stop) for stop in self.job.request.stop]
            ends = [at for at in found if at >= 0]
            if ends:
                choice.text, choice.finish, self.over[row] = choice.text[: min(ends)], "stop", True
        self._tell(row)

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self.served.tokenizer.decode(tokens, skip_special_tokens=True))

    def _tell(self, row: int, *, last: bool = False) -> None:
        if self.job.delta is None:
            return
        choice = self.choices[row]
        safe = len(choice.text)
        if not (self.over[row] or last):  # what may still become a stop text, or half a character, is held back
            longest = max((len(stop) - 1 for stop in self.job.request.stop), default=0)
            safe = max(len(choice.text.rstrip("�")) - longest, self.told[row])
        text, tokens = choice.text[self.told[row] : safe], choice.tokens[self.shown[row] :]
        if text or tokens:
            self.told[row], self.shown[row] = max(safe, self.told[row]), len(choice.tokens)
            self.job.delta(row, text, tokens)

    def finish(self) -> list[Choice]:
        """All choices, complete."""
        for row, choice in enumerate(self.choices):
            if not choice.text:
                choice.text = self._text(choice.tokens)
            self._tell(row, last=True)
        return self.choices
