"""A subset of OpenAI's HTTP interface for completions: what is read from a request, and what an answer looks like.

Requests are hostile: types, ranges and sizes are checked before anything is computed, and a field that would change the
answer but is not known here is refused rather than ignored.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from thinwire.errors import MisuseError
from thinwire.integrations.generation import Answer, Choice, Request
from thinwire.integrations.served import Served

__all__ = ["Asked", "chunk", "document", "parse_body", "read_request"]

PROMPTS_MAX = 64
ROWS_MAX = 128
STOPS_MAX = 8
STOP_LENGTH_MAX = 256
_DEFAULT_TOKENS = {"completion": 16, "chat": 512}
_IGNORED = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "stream_options",
    "model",
    "messages",
    "prompt",
    "parallel_tool_calls",
}
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (None, 0), "presence_penalty": (None, 0), "repetition_penalty": (None, 1),
    "logit_bias": (None, {}), "best_of": (None, 1), "echo": (None, False), "suffix": (None, ""), "tools": (None, []),
    "tool_choice": (None, "none"), "response_format": (None, {"type": "text"}), "top_k": (None, 0, -1),
    "min_p": (None, 0), "ignore_eos": (None, False),
}  # fmt: skip
_KNOWN = {
    "max_tokens", "max_completion_tokens", "temperature", "top_p", "n", "stop", "seed", "stream", "logprobs",
    "top_logprobs", "return_token_ids", "min_version",
}  # fmt: skip
_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as it came: what to generate, and how to answer."""

    request: Request
    kind: str
    model: str
    stream: bool
    token_ids: bool


def parse_body(data: bytes) -> dict[str, Any]:
    """The JSON object of a request's body.

    Raises:
        MisuseError: it is none.
    """
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise MisuseError(f"the body is no JSON: {str(error)[:200]}") from error
    if not isinstance(found, dict):
        raise MisuseError("the body must be a JSON object")
    return found


def read_request(body: Mapping[str, Any], kind: str, served: Served) -> Asked:
    """A request for ``/v1/completions`` (kind ``completion``) or ``/v1/chat/completions`` (``chat``).

    Raises:
        MisuseError: a field is of the wrong type, out of range, or asks for something that is not done here; the fact
            ``param`` names it.
    """
    for name, value in body.items():
        if name in _NEUTRAL and value not in _NEUTRAL[name]:
            raise MisuseError(f"{name} is not supported here; leave it out", param=name)
        if name not in _NEUTRAL and name not in _KNOWN and name not in _IGNORED:
            raise MisuseError(f"{str(name)[:60]!r} is no field that is known here; leave it out", param=str(name)[:60])
    prompts = _chat_prompt(body, served) if kind == "chat" else _prompts(body, served)
    longest = max(map(len, prompts))
    room = served.context - longest
    if room < 1:
        raise MisuseError(
            f"the prompt has {longest} tokens, the model reads {served.context}; shorten it", param="prompt"
        )
    asked = _number(body, "max_completion_tokens", None, 1, 1 << 20) or _number(body, "max_tokens", None, 1, 1 << 20)
    if asked is not None and asked > room:
        raise MisuseError(
            f"a prompt of {longest} tokens and max_tokens {asked} are more than the model reads, {served.context}",
            param="max_tokens",
        )
    samples = int(_number(body, "n", 1, 1, ROWS_MAX) or 1)
    if samples * len(prompts) > ROWS_MAX:
        raise MisuseError(f"{len(prompts)} prompts times n={samples} are more than {ROWS_MAX} answers", param="n")
    seed = _number(body, "seed", None, -(1 << 63), (1 << 63) - 1)
    temperature, top_p = _real(body, "temperature", 1.0, 0.0, 100.0), _real(body, "top_p", 1.0, 0.0, 1.0)
    if top_p == 0.0:
        temperature = 0.0
    request = Request(
        prompts=prompts, tokens_max=int(asked or min(room, _DEFAULT_TOKENS[kind])), temperature=temperature,
        top_p=top_p or 1.0, samples=samples, stop=_stops(body), seed=None if seed is None else int(seed),
        logprobs=_logprobs(body), min_version=int(_number(body, "min_version", 0, 0, 1 << 40) or 0),
    )  # fmt: skip
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise MisuseError("model must be a string", param="model")
    return Asked(request, kind, (model or "")[:200], _flag(body, "stream"), _flag(body, "return_token_ids"))


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value not in (None, True, False) or (isinstance(value, int) and not isinstance(value, bool)):
        raise MisuseError(f"{name} must be true or false", param=name)
    return bool(value)


def _number(body: Mapping[str, Any], name: str, default: int | None, least: int, most: int) -> int | None:
    value = body.get(name)
    if value is None:
        return default
    if type(value) is not int or not least <= value <= most:
        raise MisuseError(f"{name} must be an integer from {least} to {most}", param=name)
    return value


def _real(body: Mapping[str, Any], name: str, default: float, least: float, most: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if type(value) not in (int, float) or not math.isfinite(value) or not least <= value <= most:
        raise MisuseError(f"{name} must be a number from {least:g} to {most:g}", param=name)
    return float(value)


def _stops(body: Mapping[str, Any]) -> tuple[str, ...]:
    value = body.get("stop")
    found = [] if value is None else [value] if isinstance(value, str) else value
    fine = isinstance(found, list) and len(found) <= STOPS_MAX
    if not fine or not all(isinstance(s, str) and 0 < len(s) <= STOP_LENGTH_MAX for s in found):
        raise MisuseError(
            f"stop must be a text, or up to {STOPS_MAX}, of at most {STOP_LENGTH_MAX} characters", param="stop"
        )
    return tuple(found)


def _logprobs(body: Mapping[str, Any]) -> bool:
    value, top = body.get("logprobs"), body.get("top_logprobs")
    if top not in (None, 0):
        raise MisuseError("only the chosen tokens' logprobs are told; leave top_logprobs out", param="top_logprobs")
    if value is not None and not isinstance(value, bool) and value not in (0, 1):
        raise MisuseError("logprobs must be true, false, 0 or 1: only the chosen tokens' are told", param="logprobs")
    return value is not None and value is not False  # 0 asks for the chosen tokens' alone


def _prompts(body: Mapping[str, Any], served: Served) -> tuple[tuple[int, ...], ...]:
    value = body.get("prompt")
    if isinstance(value, str) or (isinstance(value, list) and value and all(type(v) is int for v in value)):
        value = [value]
    if not isinstance(value, list) or not 0 < len(value) <= PROMPTS_MAX:
        raise MisuseError(
            f"prompt must be a text, a list of token ids, or a list of up to {PROMPTS_MAX} of these", param="prompt"
        )
    words = int(served.model.config.get_text_config().vocab_size)
    found = []
    for one in value:
        ids = served.tokenizer(one)["input_ids"] if isinstance(one, str) else one
        if not isinstance(ids, list) or not ids or not all(type(i) is int and 0 <= i < words for i in ids):
            raise MisuseError(f"each prompt must be a text of one token or more, or ids below {words}", param="prompt")
        found.append(tuple(ids))
    return tuple(found)


def _chat_prompt(body: Mapping[str, Any], served: Served) -> tuple[tuple[int, ...], ...]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise MisuseError("messages must be a list of messages", param="messages")
    turns = []
    for message in messages:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
            content = "".join(p["text"] if isinstance(p.get("text"), str) else "" for p in content)
        if role not in _ROLES or not isinstance(content, str):
            raise MisuseError(
                f"each message needs a role ({', '.join(_ROLES)}) and a text as content", param="messages"
            )
        turns.append({"role": role, "content": content})
    if served.tokenizer.chat_template is None:
        raise MisuseError("this model's tokenizer has no chat template; ask /v1/completions", param="messages")
    try:
        text = served.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template refuses orders of roles with errors of its own
        raise MisuseError(
            f"the model's chat template refuses these messages: {str(error)[:200]}", param="messages"
        ) from error
    return (tuple(served.tokenizer(text, add_special_tokens=False)["input_ids"]),)


# --- answers ---------------------------------------------------------------------------------------------------------


def document(asked: Asked, answer: Answer, served: Served, *, name: str, number: str) -> dict[str, Any]:
    """A whole answer."""
    request = asked.request
    made = sum(len(choice.tokens) for choice in answer.choices)
    given = sum(map(len, request.prompts)) * request.samples
    choices = [
        _choice(asked, index, choice, served, request.prompts[index // request.samples])
        for index, choice in enumerate(answer.choices)
    ]
    usage = {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made}
    return {**_head(asked, name, number, answer.digest), "choices": choices, "usage": usage, **version_of(answer)}


def version_of(answer: Any) -> dict[str, Any]:
    """Which version it is from: number, the trainer's step, digest."""
    return {"thinwire": {"version": answer.version, "step": answer.step, "digest": answer.digest}}


def _head(asked: Asked, name: str, number: str, digest: str, *, chunk: bool = False) -> dict[str, Any]:
    kind = "chat.completion" if asked.kind == "chat" else "text_completion"
    kind += ".chunk" if chunk and asked.kind == "chat" else ""
    fingerprint = digest[:16]
    return {"id": number, "object": kind, "created": int(time.time()), "model": name, "system_fingerprint": fingerprint}


def _choice(asked: Asked, index: int, choice: Choice, served: Served, prompt: Sequence[int]) -> dict[str, Any]:
    found: dict[str, Any] = {"index": index, "finish_reason": choice.finish, "logprobs": None}
    if asked.kind == "chat":
        found["message"] = {"role": "assistant", "content": choice.text}
    else:
        found["text"] = choice.text
    if asked.request.logprobs:
        words = [str(served.tokenizer.decode([token])) for token in choice.tokens]
        if asked.kind == "chat":
            pairs = zip(words, choice.logprobs, strict=True)
            found["logprobs"] = {"content": [{"token": w, "logprob": p, "top_logprobs": []} for w, p in pairs]}
        else:
            found["logprobs"] = {"tokens": words, "token_logprobs": choice.logprobs}
    if asked.token_ids:
        found |= {"token_ids": choice.tokens, "prompt_token_ids": list(prompt)}
    return found


def chunk(
    asked: Asked, at: Any, index: int, text: str, tokens: Sequence[int], finish: str | None, *, name: str, number: str
) -> dict[str, Any]:
    """A part of a streamed answer; ``at`` is the version that it is from."""
    one: dict[str, Any] = {"index": index, "finish_reason": finish, "logprobs": None}
    if asked.kind == "chat":
        one["delta"] = {"role": "assistant", "content": text} if text or finish is None else {}
    else:
        one["text"] = text
    if asked.token_ids:
        one["token_ids"] = list(tokens)
    return {**_head(asked, name, number, at.digest, chunk=True), "choices": [one], **version_of(at)}
