"""OpenAI's HTTP API: completions and chat completions, streamed and not, and the list of models."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import orjson

from orchestrator import sse
from orchestrator.api import errors as table
from orchestrator.api.bodies import json_object
from orchestrator.api.fields import Defaults
from orchestrator.api.http import SLOW_READER_S, Exchange
from orchestrator.api.memory import Memory, key_of
from orchestrator.api.middleware import Routes
from orchestrator.api.openai_forms import Chat, Completion, Form
from orchestrator.api.openai_request import Call, chat, completion
from orchestrator.choices import Choice, merged
from orchestrator.domain import Chunk, Model, Notes, Usage
from orchestrator.errors import InternalError, ModelNotFound, TruthGPTError, UpstreamError, UpstreamUnavailable
from orchestrator.gateway import Gateway

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
        await self._generate(exchange, completion, Completion)

    async def chat_completions(self, exchange: Exchange) -> None:
        await self._generate(exchange, chat, Chat)

    async def models(self, exchange: Exchange) -> None:
        await exchange.reply_json(200, {"object": "list", "data": [_model(model) for model in self._gateway.models]})

    async def model(self, exchange: Exchange) -> None:
        name = exchange.params["model"]
        for model in self._gateway.models:
            if model.name == name:
                return await exchange.reply_json(200, _model(model))
        raise ModelNotFound(name)

    async def _generate(self, exchange: Exchange, parse: Parser, form: type[Form]) -> None:
        call = await self._call(exchange, parse)
        answer = form(call)
        async with exchange.cancelled_by_hang_up(self._within_s):
            if len(call.requests) > 1:
                return await self._generate_all(exchange, call, answer)
            async with aclosing(self._gateway.generate(exchange.caller, call.request, exchange.notes)) as chunks:
                if call.request.stream:
                    await _stream(exchange, answer, chunks)
                else:
                    parts, pieces, usage, reason = [], list[Choice](), Usage(), None
                    async for chunk in chunks:
                        parts.append(chunk.text)
                        pieces += chunk.choices
                        usage.add(chunk)
                        reason = chunk.finish_reason
                        if reason is not None:  # what is left to do comes after the reply
                            break
                    plain = Choice(0, "".join(parts), finish_reason=reason)
                    choices = [plain] if call.request.plain else merged(pieces)
                    if prefix := exchange.notes.prompt:
                        choices = [replace(choice, text=prefix + choice.text) for choice in choices]
                    await exchange.reply_json(200, answer.whole(choices, usage))

    async def _call(self, exchange: Exchange, parse: Parser) -> Call:
        body = await exchange.body()
        key = key_of(parse, body, exchange)
        call = None if key is None else self._memory.recall(key, exchange)
        if call is None:
            call = parse(json_object(body), exchange, self._defaults)
            if key is not None:
                self._memory.keep(key, call)
        return call

    async def _generate_all(self, exchange: Exchange, call: Call, answer: Form) -> None:
        """Several prompts: their choices in order, and one end, one usage and one failure for all of them."""
        request, notes = call.request, exchange.notes
        indexes = range(len(call.requests))
        forms = [answer.of_prompt(index) for index in indexes] if request.stream else []
        pieces: list[list[Choice]] = [[] for _ in indexes]
        each = [Notes(edge=notes.edge, route=notes.route) for _ in indexes]
        ended = [False for _ in indexes]
        usages = [Usage() for _ in indexes]
        marked: str | None = None
        try:
            answers = self._gateway.generate_all(exchange.caller, call.requests, self._prompts_at_once, notes, each)
            async with aclosing(answers) as chunks:
                async for index, chunk in chunks:
                    usages[index].add(chunk)
                    ended[index] = chunk.finish_reason is not None
                    if not request.stream:
                        plain = (Choice(0, chunk.text, finish_reason=chunk.finish_reason),)
                        pieces[index] += plain if request.plain else chunk.choices
                        continue
                    if not exchange.started:
                        marked = notes.fallback
                        await exchange.begin_events()
                    if notes.fallback != marked:
                        raise UpstreamUnavailable("a fallback came after the headers that would have marked it")
                    forms[index].prefix = each[index].prompt
                    if events := forms[index].events(chunk):
                        await exchange.write(events)
            if not all(ended):
                raise UpstreamError("an answer has no end")
        except TruthGPTError as error:
            return await _fail(exchange, error)
        usage = _sum(usages)
        if request.stream:
            await exchange.end(answer.usage_event(usage) + sse.DONE)
        else:
            whole = (
                replace(choice, index=index * request.n + choice.index, text=each[index].prompt + choice.text)
                for index in indexes
                for choice in merged(pieces[index])
            )
            await exchange.reply_json(200, answer.whole(whole, usage))


def _sum(usages: list[Usage]) -> Usage:
    cached = [one.cached_tokens for one in usages if one.cached_tokens is not None]
    prompt, completion = (sum(one.prompt_tokens for one in usages), sum(one.completion_tokens for one in usages))
    return Usage(prompt, completion, sum(cached) if cached else None)


async def _stream(exchange: Exchange, answer: Form, chunks: AsyncIterator[Chunk]) -> None:
    """Events until [DONE]. The first chunk fixes the status; a later error is an event, and then there is no [DONE]."""
    usage, complete = Usage(), False
    try:
        async for chunk in chunks:
            if not exchange.started:
                answer.prefix = exchange.notes.prompt
                await exchange.begin_events()
            usage.add(chunk)
            complete = chunk.finish_reason is not None
            events = answer.events(chunk)
            if complete:
                await exchange.end(events + answer.usage_event(usage) + sse.DONE)
                break  # what is left to do comes after the answer
            if events:
                await exchange.write(events)
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
