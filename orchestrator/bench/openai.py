"""OpenAI's endpoints as a client sees them: bodies to send, and what their answers say.

https://platform.openai.com/docs/api-reference (chat, completions, embeddings).
"""

from __future__ import annotations

from typing import Any

import orjson

from orchestrator.bench.answers import Answer, Fault, HttpReader, mapping
from orchestrator.bench.plan import Load, Prompt, Target
from orchestrator.sse import EventParser

PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions", "embeddings": "/v1/embeddings"}
# What a delta may hold that was generated; reasoning is in the second and third with servers that show it.
_GENERATED = ("content", "reasoning_content", "reasoning", "refusal", "tool_calls", "function_call")


def path(target: Target) -> str:
    """The URL's path; a base URL that ends in /v1, as OpenAI's clients want it, is taken as well."""
    return target.prefix.removesuffix("/v1") + PATHS[target.endpoint]


def body(target: Target, load: Load, prompt: Prompt, tokens: int) -> bytes:
    """The JSON body of a request for at most so many tokens."""
    fields: dict[str, Any] = {"model": target.model}
    if target.endpoint == "embeddings":
        fields["input"] = prompt.text
        return _json(fields, load)
    if target.endpoint == "chat":
        turns = prompt.turns or (("user", prompt.text),)
        fields["messages"] = [{"role": role, "content": content} for role, content in turns]
    else:
        fields["prompt"] = prompt.text
    fields |= {"max_tokens": tokens, "temperature": load.temperature, "stream": target.stream}
    if target.stream:
        fields["stream_options"] = {"include_usage": True}
    if load.ignore_eos:
        fields["ignore_eos"] = True
    return _json(fields, load)


def _json(fields: dict[str, Any], load: Load) -> bytes:
    """With what the load adds; a null there takes a field away, for servers that do not know it."""
    return orjson.dumps({name: value for name, value in {**fields, **load.extra_body}.items() if value is not None})


def reader(target: Target, answer: Answer) -> HttpReader:
    """What takes an answer of the target's endpoint."""
    if target.endpoint == "embeddings":
        return Embedding(answer)
    return Stream(answer) if target.stream else Completion(answer)


class Stream(HttpReader):
    """Server-sent events. The first with text is the first token: not the one with the role, nor the usage's."""

    kind = "text/event-stream"

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer)
        self._events = EventParser()
        self._done = self._finished = False

    def part(self, data: bytes, now: float) -> None:
        try:
            events = self._events.feed(data)
        except ValueError as error:
            raise Fault("too_large", str(error)) from error
        for event in events:
            if event.strip() == b"[DONE]":
                self._done = True
            elif not self._done:
                self._event(event, now)

    def _event(self, event: bytes, now: float) -> None:
        fields = mapping(event, "an event")
        _usage(fields, self.answer)
        choice = _choice(fields)
        if choice is None:
            return
        if generated(choice):
            self.answer.piece(now)
        self._finished |= _finish(choice)

    def whole(self, now: float) -> None:
        if not self._done and not self._finished:
            raise Fault("no_end", "the stream ended without [DONE] or a finish reason")
        self.answer.finish(now, streams=True)


class Completion(HttpReader):
    """An answer in one piece."""

    def whole(self, now: float) -> None:
        fields = mapping(bytes(self._kept), "the body")
        _usage(fields, self.answer)
        choice = _choice(fields)
        if choice is None:
            raise Fault("nonsense", "the body has no choices")
        if not _finish(choice):
            raise Fault("no_end", "the answer has no finish reason")
        if generated(choice):
            self.answer.piece(now)
        self.answer.finish(now, streams=False)


class Embedding(HttpReader):
    """A list of embeddings, numbers or base64."""

    def whole(self, now: float) -> None:
        fields = mapping(bytes(self._kept), "the body")
        _usage(fields, self.answer)
        rows = fields.get("data")
        row = rows[0] if isinstance(rows, list) and rows else None
        if not isinstance(row, dict) or not row.get("embedding"):
            raise Fault("no_tokens", "the answer has no embedding")
        self.answer.finish(now, streams=False)


def generated(choice: dict[str, Any]) -> bool:
    """Whether a choice, whole or a delta, holds something that the model wrote."""
    if choice.get("text"):
        return True
    inner = choice.get("delta", choice.get("message"))
    return isinstance(inner, dict) and any(inner.get(name) for name in _GENERATED)


def _choice(fields: dict[str, Any]) -> dict[str, Any] | None:
    choices = fields.get("choices")
    if not isinstance(choices, list):
        raise Fault("nonsense", "choices is missing")
    if not choices:
        return None
    if not isinstance(choices[0], dict):
        raise Fault("nonsense", "a choice is not an object")
    return choices[0]


def _finish(choice: dict[str, Any]) -> bool:
    reason = choice.get("finish_reason")
    if reason == "error":
        raise Fault("in_band", "the finish reason is error")
    return bool(reason)


def _usage(fields: dict[str, Any], answer: Answer) -> None:
    usage = fields.get("usage")
    if usage is None:
        return
    if not isinstance(usage, dict):
        raise Fault("wrong_usage", "usage is not an object")
    answer.count(usage.get("completion_tokens"), usage.get("prompt_tokens"))
