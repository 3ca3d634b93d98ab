"""How OpenAI's two APIs write an answer: whole, or event by event."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable
from typing import Self

import orjson

from orchestrator import sse
from orchestrator.api import openai_logprobs
from orchestrator.api.openai_logprobs import Offsets
from orchestrator.api.openai_request import Call
from orchestrator.choices import Choice
from orchestrator.domain import Chunk, Usage
from orchestrator.ids import random_id

_NULL = b"null"


class Form:
    """One of the two, for one answer. The part of an event that never changes is rendered once.

    `prefix` stands in front of each choice's text; it may be set until the first event is written.
    """

    kind: str
    chunk_kind: str
    id_prefix: str

    def __init__(self, call: Call) -> None:
        self.prefix = ""
        self._id = self.id_prefix + random_id(12)
        self._created = int(time.time())
        self._model = call.request.model
        self._include_usage = call.include_usage
        self._plain, self._n = call.request.plain, call.request.n
        self._base = 0  # the index of its first choice
        self._begun: set[int] = set()  # choices of which there was an event
        if call.request.stream:
            head = orjson.dumps(self._head(self.chunk_kind))[:-1]
            self._opening = b'data: %b,"choices":[{"index":' % head
            self._before = b"%b0," % self._opening
            self._after = b'}],"usage":null}\n\n' if call.include_usage else b"}]}\n\n"

    def of_prompt(self, index: int) -> Self:
        """The form whose events belong to another prompt of this request than the first."""
        other = copy.copy(self)
        other._base, other._begun = index * self._n, set()
        other._before = b"%b%d," % (self._opening, other._base)
        return other

    def whole(self, choices: Iterable[Choice], usage: Usage) -> dict[str, object]:
        """The body of an answer that is not streamed."""
        rows = [
            {
                "index": choice.index,
                **self._choice(choice.text),
                "logprobs": self._logprobs(choice) if choice.logprobs else None,
                "finish_reason": choice.finish_reason,
            }
            for choice in choices
        ]
        return {**self._head(self.kind), "choices": rows, "usage": _usage(usage)}

    def events(self, chunk: Chunk) -> bytes:
        """The events of one chunk; empty if it has nothing to show."""
        if self._plain:
            return self._events(0, chunk.text, chunk.finish_reason, _NULL, self._before)
        found = []
        for choice in chunk.choices:
            if choice.text or choice.finish_reason or choice.logprobs:
                before = b"%b%d," % (self._opening, self._base + choice.index)
                logprobs = orjson.dumps(self._logprobs(choice)) if choice.logprobs else _NULL
                found.append(self._events(choice.index, choice.text, choice.finish_reason, logprobs, before))
        return b"".join(found)

    def usage_event(self, usage: Usage) -> bytes:
        """The extra chunk before [DONE], where it was asked for."""
        if not self._include_usage:
            return b""
        body = {**self._head(self.chunk_kind), "choices": [], "usage": _usage(usage)}
        return sse.event(orjson.dumps(body))

    def _head(self, kind: str) -> dict[str, object]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _choice(self, text: str) -> dict[str, object]:
        raise NotImplementedError

    def _logprobs(self, choice: Choice) -> dict[str, object] | None:
        raise NotImplementedError

    def _events(self, index: int, text: str, reason: str | None, logprobs: bytes, before: bytes) -> bytes:
        raise NotImplementedError

    def _first(self, index: int) -> bool:
        if index in self._begun:
            return False
        self._begun.add(index)
        return True

    def _event(self, before: bytes, fields: bytes, reason: str | None, logprobs: bytes = _NULL) -> bytes:
        ended = _NULL if reason is None else orjson.dumps(reason)
        return b'%b%b,"logprobs":%b,"finish_reason":%b%b' % (before, fields, logprobs, ended, self._after)


class Completion(Form):
    id_prefix, kind, chunk_kind = "cmpl-", "text_completion", "text_completion"

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self._offsets: dict[int, Offsets] = {}

    def of_prompt(self, index: int) -> Self:
        other = super().of_prompt(index)
        other._offsets = {}
        return other

    def _events(self, index: int, text: str, reason: str | None, logprobs: bytes, before: bytes) -> bytes:
        if self.prefix and self._first(index):
            text = self.prefix + text
        return self._event(before, b'"text":' + orjson.dumps(text), reason, logprobs)

    def _choice(self, text: str) -> dict[str, object]:
        return {"text": text}

    def _logprobs(self, choice: Choice) -> dict[str, object] | None:
        return self._offsets.setdefault(choice.index, Offsets()).completion(choice.logprobs)


class Chat(Form):
    id_prefix, kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def _events(self, index: int, text: str, reason: str | None, logprobs: bytes, before: bytes) -> bytes:
        if reason is None and text and index in self._begun:  # as nearly all chunks
            return self._event(before, b'"delta":{"content":%b}' % orjson.dumps(text), None, logprobs)
        events = []
        if self._first(index):
            events.append(self._event(before, b'"delta":{"role":"assistant","content":""}', None))
        if text or logprobs is not _NULL:
            events.append(self._event(before, b'"delta":{"content":%b}' % orjson.dumps(text), None, logprobs))
        if reason:
            events.append(self._event(before, b'"delta":{}', reason))
        return b"".join(events)

    def _choice(self, text: str) -> dict[str, object]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _logprobs(self, choice: Choice) -> dict[str, object] | None:
        return openai_logprobs.chat(choice.logprobs)


def _usage(usage: Usage) -> dict[str, object]:
    counts: dict[str, object] = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
    if usage.cached_tokens is not None:
        counts["prompt_tokens_details"] = {"cached_tokens": usage.cached_tokens}
    return counts
