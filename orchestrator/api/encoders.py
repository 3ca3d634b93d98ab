"""`/v1/embeddings`, as OpenAI's, and `/v1/classify`, which is its like for labels."""

from __future__ import annotations

import asyncio
import math
import re
import struct
from base64 import b64encode
from collections.abc import Callable, Iterator
from typing import Any

import orjson

from orchestrator.api.encoder_request import Call, classify, embeddings
from orchestrator.api.http import SLOW_READER_S, Exchange
from orchestrator.api.middleware import Routes
from orchestrator.domain import Encoded
from orchestrator.errors import InvalidRequest, Text
from orchestrator.gateway import Gateway

ROWS = 64  # that are written before others come to their turn
_PLACE = re.compile(r"\btext_input(\[\d+\])?")  # the model's name of what a body of these calls input


class Encoders:
    """The handlers. `request_timeout_s` bounds how long a client may take to read its answer."""

    def __init__(self, gateway: Gateway, request_timeout_s: float) -> None:
        self._gateway, self._within_s = gateway, request_timeout_s + SLOW_READER_S

    @property
    def routes(self) -> Routes:
        return {"/v1/embeddings": {"POST": self.embeddings}, "/v1/classify": {"POST": self.classify}}

    async def embeddings(self, exchange: Exchange) -> None:
        await self._answer(exchange, embeddings(await exchange.json(), exchange), _vectors)

    async def classify(self, exchange: Exchange) -> None:
        await self._answer(exchange, classify(await exchange.json(), exchange), _labels)

    async def _answer(self, exchange: Exchange, call: Call, write: Callable[[Encoded, Call], Iterator[bytes]]) -> None:
        async with exchange.cancelled_by_hang_up(self._within_s):
            try:
                answer = await self._gateway.encode(exchange.caller, call.request, exchange.notes)
            except InvalidRequest as error:
                raise _renamed(error, call.single) from error.__cause__
            rows = []
            for row in write(answer, call):
                rows.append(row)
                if len(rows) % ROWS == 0:
                    await asyncio.sleep(0)
            usage = {"prompt_tokens": answer.tokens, "total_tokens": answer.tokens}
            tail = orjson.dumps({"model": call.request.model, "usage": usage})[1:]
            await exchange.reply(200, b'{"object":"list","data":[%b],%b' % (b",".join(rows), tail))


def _vectors(answer: Encoded, call: Call) -> Iterator[bytes]:
    """Each embedding as the float32 values that the model gave; a cut one has its length back where all have 1."""
    tensor, wanted = answer.outputs["embedding"], call.request.dimensions
    size = 4 * tensor.shape[1]
    cut = wanted is not None and wanted < tensor.shape[1]
    read = struct.Struct(f"<{wanted if cut else tensor.shape[1]}f")
    for index in range(tensor.shape[0]):
        at = index * size
        data = tensor.data[at : at + read.size]
        if cut and answer.model.normalized:
            values = read.unpack(data)
            length = math.hypot(*values) or 1.0
            data = read.pack(*(value / length for value in values))
        shown = b'"%b"' % b64encode(data) if call.base64 else orjson.dumps(read.unpack(data))
        yield b'{"object":"embedding","index":%d,"embedding":%b}' % (index, shown)


def _labels(answer: Encoded, call: Call) -> Iterator[bytes]:
    """Each text's best label, and the score of every one."""
    labels, tensor = answer.model.labels, answer.outputs["scores"]
    read = struct.Struct(f"<{tensor.shape[1]}f")
    for index, element in enumerate(answer.outputs["label"].elements):
        scores = dict(zip(labels, read.unpack_from(tensor.data, index * read.size), strict=True))
        label = element.decode()
        row: dict[str, Any] = {"index": index, "label": label, "score": scores[label], "scores": scores}
        yield orjson.dumps(row)


def _renamed(error: InvalidRequest, single: bool) -> InvalidRequest:
    """The same error about what this body calls input."""

    def renamed(text: str) -> str:
        return _PLACE.sub(lambda found: "input" if single else f"input{found[1] or ''}", text, count=1)

    other = error.again()
    if other.param is not None and _PLACE.match(other.param):
        other.param = renamed(other.param)
        other.text = Text(renamed(other.text.en), renamed(other.text.es))
    return other
