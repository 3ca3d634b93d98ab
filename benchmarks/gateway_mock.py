"""An instant upstream for measuring gateways: OpenAI's chat API for the peers, for ours what it asks of Triton.

    python -m benchmarks.gateway_mock [--port 9999] [--core 1]

Every answer is rendered before it starts, so a request costs it some 15 us and a stream of 16 chunks some 100 us. An
answer has as many tokens as `max_tokens` asks for (16 if it does not say), at most 64. Each chunk of a stream is a
write of its own in a turn of the event loop of its own, as a model's tokens come one after another. It prints one line
of JSON with its port when it listens, and ends with SIGTERM.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import Iterator
from typing import Any, cast

import click
import httptools
import uvloop

MODEL = "bench"
TOKEN = " tick"  # noqa: S105  every token of every answer; no id, name or header has it
CHUNKS = 16
_MOST = 64
_MAX_TOKENS = re.compile(rb"max_(?:completion_)?tokens\W{1,6}(\d{1,3})")
_STREAM = re.compile(rb'"stream"\s*:\s*true')
_END = b"0\r\n\r\n"


def _head(kind: str, length: int | None) -> bytes:
    size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    return f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\n{size}\r\n\r\n".encode()


def _json(value: Any) -> bytes:
    body = json.dumps(value).encode()
    return _head("application/json", len(body)) + body


def _events(values: list[Any], done: bytes = b"") -> list[bytes]:
    """The writes of a stream: the head goes with the first chunk, the end of the body with the last one."""
    events = [b"data: " + json.dumps(value).encode() + b"\n\n" for value in values]
    events[-1] += done
    writes = [b"%x\r\n%s\r\n" % (len(event), event) for event in events]
    writes[0] = _head("text/event-stream; charset=utf-8", None) + writes[0]
    writes[-1] += _END
    return writes


def _openai(tokens: int) -> tuple[bytes, list[bytes]]:
    """A chat completion of so many tokens, whole and as a stream."""
    head = {"id": "chatcmpl-0123456789abcdef", "created": 1700000000, "model": MODEL}
    usage = {"prompt_tokens": 8, "completion_tokens": tokens, "total_tokens": 8 + tokens}
    message = {"role": "assistant", "content": TOKEN * tokens, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    whole = _json({**head, "object": "chat.completion", "choices": [choice], "usage": usage})
    chunks = []
    for number in range(tokens):
        delta = {"content": TOKEN, **({"role": "assistant"} if number == 0 else {})}
        reason = "stop" if number == tokens - 1 else None
        choices = [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]
        chunks.append({**head, "object": "chat.completion.chunk", "choices": choices})
    return whole, _events(chunks, b"data: [DONE]\n\n")


def _triton(tokens: int) -> list[bytes]:
    """The stream that Triton's generate_stream writes for our backend."""
    return _events([
        {
            "model_name": MODEL, "model_version": "1", "text_output": TOKEN, "num_input_tokens": 8,
            "num_output_tokens": 1, "finish_reason": "stop" if number == tokens - 1 else "",
        }
        for number in range(tokens)
    ])  # fmt: skip


def _said(value: object) -> bytes:
    return _json({"model_name": MODEL, "model_version": "1", "text_output": json.dumps(value)})


OPENAI = [_openai(max(tokens, 1)) for tokens in range(_MOST + 1)]
TRITON = [_triton(max(tokens, 1)) for tokens in range(_MOST + 1)]
_EMPTY = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
_UNKNOWN = (
    b'HTTP/1.1 404 Not Found\r\nContent-Type: application/json\r\nContent-Length: 25\r\n\r\n{"error": "no such path"}'
)
_BEAT = _said({"running": 0, "waiting": 0, "slots": 64, "step_age_s": 0.0, "busy": False, "digest": "mock"})
_INSPECTED = _said({"tokens": 8, "text": None})
_PARAMETERS = {"task": "text_generation", "chat": "true", "max_len": "4096"}
_CONFIG = {
    "name": MODEL, "backend": "inflight", "parameters": {k: {"string_value": v} for k, v in _PARAMETERS.items()},
}  # fmt: skip
_FIXED = {
    "/v2/repository/index": _json([{"name": MODEL, "version": "1", "state": "READY"}]),
    f"/v2/models/{MODEL}/config": _json(_CONFIG),
    f"/v2/models/{MODEL}/ready": _EMPTY,
    "/v2/health/ready": _EMPTY,
    "/v2/health/live": _EMPTY,
    "/v1/models": _json({"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "m"}]}),
}


def answer(path: str, body: bytes) -> bytes | list[bytes]:
    """What is written for one request: at once, or one write after another."""
    fixed = _FIXED.get(path)
    if fixed is not None:
        return fixed
    found = _MAX_TOKENS.search(body)
    tokens = min(int(found[1]), _MOST) if found else CHUNKS
    if path.endswith("/chat/completions"):
        whole, stream = OPENAI[tokens]
        return stream if _STREAM.search(body) else whole
    if path.endswith("/generate_stream"):
        return TRITON[tokens]
    if path.endswith("/generate"):
        if b'"heartbeat"' in body:
            return _BEAT
        return _INSPECTED if b'"inspect"' in body else _json({**_first(tokens), "text_output": TOKEN * tokens})
    return _UNKNOWN


def _first(tokens: int) -> dict[str, object]:
    return {"model_name": MODEL, "model_version": "1", "num_output_tokens": tokens, "finish_reason": "stop"}


class Connection(asyncio.Protocol):
    """One keep-alive connection. A second request before the first is answered would get its answer out of turn: the
    clients here do not pipeline.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._url, self._body = b"", b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own class, which switches Nagle's algorithm off

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            if self._transport is not None:
                self._transport.abort()

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        path = self._url.decode("latin-1").partition("?")[0]
        found = answer(path, self._body)
        self._url = self._body = b""
        if self._transport is None:
            return
        if isinstance(found, bytes):
            self._transport.write(found)
        else:
            self._next(iter(found))

    def _next(self, writes: Iterator[bytes]) -> None:
        if self._transport is None:
            return
        piece = next(writes, None)
        if piece is not None:
            self._transport.write(piece)
            self._loop.call_soon(self._next, writes)


async def serve(port: int) -> None:
    """Until SIGTERM or SIGINT."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    server = await loop.create_server(Connection, "127.0.0.1", port, backlog=1024)
    print(json.dumps({"port": server.sockets[0].getsockname()[1]}), flush=True)
    await ended.wait()
    server.close()


@click.command(help=__doc__)
@click.option("--port", default=0, help="0: any free one.")
@click.option("--core", type=int, help="Run on this core alone.")
def main(port: int, core: int | None) -> None:
    if core is not None:
        os.sched_setaffinity(0, {core})
    uvloop.run(serve(port))


if __name__ == "__main__":
    main()
