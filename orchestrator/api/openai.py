"""OpenAI's HTTP API: completions and chat completions, streamed and not, and the list of models."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import aclosing
from typing import Any, Self

import orjson

from orchestrator import sse
from orchestrator.api import errors as table
from orchestrator.api.bodies import json_object
from orchestrator.api.fields import Defaults
from orchestrator.api.http import SLOW_READER_S, Exchange
from orchestrator.api.memory import Memory, key_of
from orchestrator.api.middleware import Routes
from orchestrator.api.openai_request import Call, chat, completion
from orchestrator.domain import Chunk, Model, Usage
from orchestrator.errors import InternalError, ModelNotFound, TruthGPTError, UpstreamError, UpstreamUnavailable
from orchestrator.gateway import Gateway
from orchestrator.ids import random_id

log = logging.getLogger(__name__)


Parser = Callable[[dict[str, Any], Exchange, Defaults], Call]


class OpenAI:
    """The handlers. `request_timeout_s` bounds how long a client may take to read its answer.

    `prompts_at_once` is how many prompts of one request are generated at the same time.
    """

    def __init__(self, gateway: Gateway, defaults: Defaults, request_timeout_s: float, prompts_at_once: int) -> None:
        self._gateway, self._defaults = gateway, defaults
        self._within_s = request_timeout_s + SLOW_READER_S
        self._prompts_at_once = prompts_at_once
        self._memory = Memory()

    @property
    def routes(self) -> Routes:
        return {
            "/v1/completions": {"POST": self.completions},
            "/v1/chat/completions": {"POST": self.chat_completions},
            "/v1/models": {"GET": self.models},
            "/v1/models/{model}": {"GET": self.model},
        }

    async def completions(self, exchange: Exchange) -> None:
        await self._generate(exchange, completion, _Completion)

    async def chat_completions(self, exchange: Exchange) -> None:
        await self._generate(exchange, chat, _Chat)

    async def models(self, exchange: Exchange) -> None:
        await exchange.reply_json(200, {"object": "list", "data": [_model(model) for model in self._gateway.models]})

    async def model(self, exchange: Exchange) -> None:
        name = exchange.params["model"]
        for model in self._gateway.models:
            if model.name == name:
                return await exchange.reply_json(200, _model(model))
        raise ModelNotFound(name)

    async def _generate(self, exchange: Exchange, parse: Parser, form: type[_Form]) -> None:
        call = await self._call(exchange, parse)
        answer = form(call)
        async with exchange.cancelled_by_hang_up(self._within_s):
            if len(call.requests) > 1:
                return await self._generate_all(exchange, call, answer)
            async with aclosing(self._gateway.generate(exchange.caller, call.request, exchange.notes)) as chunks:
                if call.request.stream:
                    await _stream(exchange, answer, chunks)
                else:
                    parts, usage, reason = [], Usage(), None
                    async for chunk in chunks:
                        parts.append(chunk.text)
                        usage.add(chunk)
                        reason = chunk.finish_reason
                        if reason is not None:  # what is left to do comes after the reply
                            break
                    await exchange.reply_json(200, answer.whole([("".join(parts), reason)], usage))

    async def _call(self, exchange: Exchange, parse: Parser) -> Call:
        body = await exchange.body()
        key = key_of(parse, body, exchange)
        call = None if key is None else self._memory.recall(key, exchange)
        if call is None:
            call = parse(json_object(body), exchange, self._defaults)
            if key is not None:
                self._memory.keep(key, call)
        return call

    async def _generate_all(self, exchange: Exchange, call: Call, answer: _Form) -> None:
        """Several prompts: a choice each, and one end, one usage and one failure for all of them."""
        indexes = range(len(call.requests))
        choices = [answer.of_choice(index) for index in indexes] if call.request.stream else []
        texts: list[list[str]] = [[] for _ in indexes]
        reasons: list[str | None] = [None for _ in indexes]
        usages = [Usage() for _ in indexes]
        marked: str | None = None
        try:
            pieces = self._gateway.generate_all(exchange.caller, call.requests, self._prompts_at_once, exchange.notes)
            async with aclosing(pieces) as chunks:
                async for index, chunk in chunks:
                    usages[index].add(chunk)
                    reasons[index] = chunk.finish_reason
                    if not call.request.stream:
                        texts[index].append(chunk.text)
                        continue
                    if not exchange.started:
                        marked = exchange.notes.fallback
                        await exchange.begin_events()
                    if exchange.notes.fallback != marked:
                        raise UpstreamUnavailable("a fallback came after the headers that would have marked it")
                    await exchange.write(choices[index].events(chunk, False))  # only chat marks a choice's first chunk
            if None in reasons:
                raise UpstreamError("an answer has no end")
        except TruthGPTError as error:
            return await _fail(exchange, error)
        usage = Usage(sum(one.prompt_tokens for one in usages), sum(one.completion_tokens for one in usages))
        if call.request.stream:
            await exchange.end(answer.usage_event(usage) + sse.DONE)
        else:
            whole = answer.whole(zip(map("".join, texts), reasons, strict=True), usage)
            await exchange.reply_json(200, whole)


async def _stream(exchange: Exchange, answer: _Form, chunks: AsyncIterator[Chunk]) -> None:
    """Events until [DONE]. The first chunk fixes the status; a later error is an event, and then there is no [DONE]."""
    usage, complete = Usage(), False
    try:
        async for chunk in chunks:
            first = not exchange.started
            if first:
                await exchange.begin_events()
            usage.add(chunk)
            complete = chunk.finish_reason is not None
            if complete:
                await exchange.end(answer.events(chunk, first) + answer.usage_event(usage) + sse.DONE)
                break  # what is left to do comes after the answer
            await exchange.write(answer.events(chunk, first))
        if not complete:
            raise UpstreamError("the answer has no end")
    except TruthGPTError as error:
        await _fail(exchange, error)


async def _fail(exchange: Exchange, error: TruthGPTError) -> None:
    """Raise it while it can still have its own status; afterwards it is the stream's last event."""
    if not exchange.started:
        raise error
    if isinstance(error, InternalError):
        log.error("request %s failed in its stream: %s", exchange.id, error, exc_info=error)
    body = table.body_of(error, exchange.caller.language)
    await exchange.end(sse.event(orjson.dumps(body)))


class _Form:
    """How one of the two APIs writes an answer. The part of a chunk that never changes is rendered once."""

    prefix: str
    kind: str
    chunk_kind: str

    def __init__(self, call: Call) -> None:
        self._id = self.prefix + random_id(12)
        self._created = int(time.time())
        self._model = call.request.model
        self._include_usage = call.include_usage
        if call.request.stream:
            head = orjson.dumps(self._head(self.chunk_kind))[:-1]
            self._opening = b'data: %b,"choices":[{"index":' % head
            self._before = b"%b0," % self._opening
            self._after = b'}],"usage":null}\n\n' if call.include_usage else b"}]}\n\n"

    def of_choice(self, index: int) -> Self:
        """The form whose events belong to another choice of this answer than the first."""
        other = copy.copy(self)
        other._before = b"%b%d," % (self._opening, index)
        return other

    def whole(self, answers: Iterable[tuple[str, str | None]], usage: Usage) -> dict[str, object]:
        """The body of an answer that is not streamed, from the text and the finish reason of each choice."""
        choices = [
            {"index": index, **self._choice(text), "logprobs": None, "finish_reason": reason}
            for index, (text, reason) in enumerate(answers)
        ]
        return {**self._head(self.kind), "choices": choices, "usage": _usage(usage)}

    def events(self, chunk: Chunk, first: bool) -> bytes:
        """The events of one chunk."""
        raise NotImplementedError

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

    def _event(self, fields: bytes, reason: str | None) -> bytes:
        ended = b"null" if reason is None else orjson.dumps(reason)
        return b'%b%b,"logprobs":null,"finish_reason":%b%b' % (self._before, fields, ended, self._after)


class _Completion(_Form):
    prefix, kind, chunk_kind = "cmpl-", "text_completion", "text_completion"

    def events(self, chunk: Chunk, first: bool) -> bytes:
        return self._event(b'"text":' + orjson.dumps(chunk.text), chunk.finish_reason)

    def _choice(self, text: str) -> dict[str, object]:
        return {"text": text}


class _Chat(_Form):
    prefix, kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def events(self, chunk: Chunk, first: bool) -> bytes:
        events = []
        if first:
            events.append(self._event(b'"delta":{"role":"assistant","content":""}', None))
        if chunk.text:
            events.append(self._event(b'"delta":{"content":%b}' % orjson.dumps(chunk.text), None))
        if chunk.finish_reason:
            events.append(self._event(b'"delta":{}', chunk.finish_reason))
        return b"".join(events)

    def _choice(self, text: str) -> dict[str, object]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}


def _usage(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _model(model: Model) -> dict[str, object]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "truthgpt",
        "version": model.version,
        "task": model.task,
        "chat": model.chat,
        "max_model_len": model.max_len,
        "dimensions": model.dim,
        "labels": list(model.labels) or None,
        "ready": model.ready,
    }
