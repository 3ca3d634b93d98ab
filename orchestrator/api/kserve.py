"""KServe v2 over HTTP with Triton's extensions: what a Triton client sends is answered here, by the gateway's rules.

A generation model streams inside and cannot be asked by plain `infer` in Triton; here it can: its answer is collected.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any

import orjson

from orchestrator import sse
from orchestrator.api import errors as table
from orchestrator.api import kserve_path, kserve_request, kserve_tensors
from orchestrator.api.admin import CONTROL
from orchestrator.api.fields import Defaults
from orchestrator.api.http import SLOW_READER_S, Exchange
from orchestrator.api.kserve_request import Call
from orchestrator.api.kserve_tensors import InferBody
from orchestrator.api.middleware import Routes
from orchestrator.domain import Chunk, Model, Tensor
from orchestrator.errors import InternalError, ModelNotFound, PermissionDenied, TruthGPTError, UpstreamError
from orchestrator.gateway import Gateway

log = logging.getLogger(__name__)

# Model, version and "" (metadata), "config" or "stats" -> Triton's JSON; without a model that of all.
Describe = Callable[[str, str, str], Awaitable[Any]]

EXTENSIONS = (*kserve_path.EXTENSIONS, "generate")  # over HTTP alone


class KServe:
    """The handlers. `request_timeout_s` bounds how long a client may take to read its answer."""

    def __init__(self, gateway: Gateway, describe: Describe, defaults: Defaults, request_timeout_s: float) -> None:
        self._gateway, self._describe, self._defaults = gateway, describe, defaults
        self._within_s = request_timeout_s + SLOW_READER_S
        version = importlib.metadata.version("truthgpt")
        self._server = {"name": "truthgpt", "version": version, "extensions": EXTENSIONS}

    @property
    def routes(self) -> Routes:
        of_model = {
            "": {"GET": self.metadata},
            "/ready": {"GET": self.ready},
            "/config": {"GET": self.config},
            "/stats": {"GET": self.statistics},
            "/infer": {"POST": self.infer},
            "/generate": {"POST": self.generate},
            "/generate_stream": {"POST": self.generate_stream},
        }
        places = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")
        return {
            "/v2": {"GET": self.server},
            "/v2/models/stats": {"GET": self.all_statistics},
            **{place + path: methods for place in places for path, methods in of_model.items()},
            **{path: dict.fromkeys(methods, _admin_only) for path, methods in CONTROL.items()},
        }

    async def server(self, exchange: Exchange) -> None:
        await exchange.reply_json(200, self._server)

    async def metadata(self, exchange: Exchange) -> None:
        await self._describe_model(exchange, "")

    async def config(self, exchange: Exchange) -> None:
        await self._describe_model(exchange, "config")

    async def statistics(self, exchange: Exchange) -> None:
        await self._describe_model(exchange, "stats")

    async def all_statistics(self, exchange: Exchange) -> None:
        await exchange.reply_json(200, await self._describe("", "", "stats"))

    async def ready(self, exchange: Exchange) -> None:
        """200 while the model answers, else 400 as Triton says it: clients look at the status only."""
        try:
            model = await self._model(exchange)
        except ModelNotFound:
            model = None
        if model is not None and model.ready:
            return await exchange.reply(200, b"")
        return await exchange.reply_json(400, {"error": "Model version not ready"})

    async def generate(self, exchange: Exchange) -> None:
        model = await self._model(exchange)
        call = kserve_request.generate(await exchange.json(), exchange, model, self._defaults)
        async with exchange.cancelled_by_hang_up(self._within_s):
            async with aclosing(self._gateway.generate(exchange.caller, call.request, exchange.notes)) as chunks:
                whole = await kserve_path.joined(chunks)
                await exchange.reply(200, _Answer(call, model).body(whole))  # what is left to do comes after the reply

    async def generate_stream(self, exchange: Exchange) -> None:
        """Server-sent events, without [DONE]. The first one fixes the status; a later error is the last event."""
        model = await self._model(exchange)
        call = kserve_request.generate(await exchange.json(), exchange, model, self._defaults)
        answer = _Answer(call, model)
        async with exchange.cancelled_by_hang_up(self._within_s):
            if call.request.stream:
                async with aclosing(self._gateway.generate(exchange.caller, call.request, exchange.notes)) as chunks:
                    return await _stream(exchange, answer, chunks)
            whole = await kserve_path.collect(self._gateway, exchange, call)
            await exchange.begin_events()
            await exchange.end(sse.event(answer.body(whole)))

    async def infer(self, exchange: Exchange) -> None:
        model = await self._model(exchange)
        body = kserve_tensors.read(await exchange.body(), exchange.headers)
        head: dict[str, object] = {} if body.id is None else {"id": body.id}
        call = kserve_path.generation(body, exchange, model, self._defaults)
        async with exchange.cancelled_by_hang_up(self._within_s):
            result = await kserve_path.infer(self._gateway, body, exchange, model, call)
            head |= {"model_name": result.model, "model_version": result.version}
            await _reply(exchange, head, body, result.outputs)

    async def _describe_model(self, exchange: Exchange, what: str) -> None:
        model = await self._model(exchange)
        await exchange.reply_json(200, await self._describe(model.name, exchange.params.get("version", ""), what))

    async def _model(self, exchange: Exchange) -> Model:
        return await kserve_path.find(self._gateway, exchange.params["model"], exchange.params.get("version"))


async def _admin_only(exchange: Exchange) -> None:
    raise PermissionDenied(kserve_path.ADMIN_ONLY)


async def _stream(exchange: Exchange, answer: _Answer, chunks: AsyncIterator[Chunk]) -> None:
    complete = False
    try:
        async for chunk in chunks:
            if not exchange.started:
                await exchange.begin_events()
            event, complete = sse.event(answer.body(chunk)), chunk.finish_reason is not None
            if complete:
                await exchange.end(event)
                break  # what is left to do comes after the answer
            await exchange.write(event)
        if not complete:
            raise UpstreamError("the answer has no end")
    except TruthGPTError as error:
        if not exchange.started:  # it can still have its own status
            raise
        if isinstance(error, InternalError):
            log.error("request %s failed in its stream: %s", exchange.id, error, exc_info=error)
        body = table.encode(table.body_of(error, exchange.caller.language), exchange.path)
        await exchange.end(sse.event(body))


class _Answer:
    """Renders chunks as Triton's `generate` does: only the fields that were asked for, sorted by name."""

    def __init__(self, call: Call, model: Model) -> None:
        self._shown = kserve_path.Shown(call)
        self._fixed: dict[str, object] = {"model_name": model.name, "model_version": model.version}
        if call.id is not None:
            self._fixed["id"] = call.id

    def body(self, chunk: Chunk) -> bytes:
        """The next chunk as JSON. As Triton does, an element that is alone is written as a plain value."""
        fields = self._fixed | {
            name: values[0] if len(values) == 1 else values for name, values in self._shown.outputs(chunk).items()
        }
        return orjson.dumps(fields, option=orjson.OPT_SORT_KEYS)


async def _reply(exchange: Exchange, head: dict[str, object], asked: InferBody, tensors: Sequence[Tensor]) -> None:
    """The tensors, each in the form that was asked for."""
    own = {wanted.name: wanted.binary for wanted in asked.outputs}
    body, json_length = kserve_tensors.write(head, tensors, lambda name: own.get(name, asked.binary))
    if json_length is None:
        return await exchange.reply(200, body)
    headers = ((kserve_tensors.HEADER_LENGTH, b"%d" % json_length),)
    await exchange.reply(200, body, b"application/octet-stream", headers)
